"""Shards to samples, and samples to tokens and pixels."""
