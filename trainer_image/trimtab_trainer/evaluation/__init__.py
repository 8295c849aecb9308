"""Evaluation by generation: questions from validation rows, the model's answers, their scores, and all of it kept."""
