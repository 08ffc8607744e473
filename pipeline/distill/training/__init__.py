"""The training: transformers' Trainer, resuming, signals and processes."""
