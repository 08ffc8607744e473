"""What a checkpoint scores on held-out questions, and comparisons of models."""
