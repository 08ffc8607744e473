"""Annotations and tars to samples, and samples to tokens and pixels."""
