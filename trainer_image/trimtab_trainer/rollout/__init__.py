"""The room in which a model speaks while it is trained: prompts go in, sequences come out.

grpo, ppo and gkd share it. An engine stands behind one function, so that another can be put there; which rows are asked
in which order, and what is held between two steps, are rooms beside it.
"""
