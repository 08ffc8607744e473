"""What a checkpoint scores, and comparisons of checkpoints."""
