"""Vision-language models: MobileVLM V2, the attention tap, and the teacher with its stub."""
