"""The YAML config and its sections."""
