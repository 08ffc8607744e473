"""Accuracy kept under pruning, and the speed of drafting, measured on held-out questions."""
