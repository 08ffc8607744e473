"""The scenes study: data and two small base models for TwigVLM, on which pruning and drafting can be measured."""
