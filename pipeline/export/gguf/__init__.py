"""MobileVLM V2 as GGUF files."""
