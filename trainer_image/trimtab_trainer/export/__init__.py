"""Quantised export: a whole model becomes a smaller one in the compressed-tensors layout, checked, then published."""
