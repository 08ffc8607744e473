"""Vision-language models: MobileVLM V2, the attention tap beside it and the stub teacher cut from it."""
