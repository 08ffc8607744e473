"""Annotations and images of any tool to WebDataset shards."""
