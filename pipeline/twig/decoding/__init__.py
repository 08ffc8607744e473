"""Decoding with a twig: pruned prefill, drafts, and the verification by the model itself."""
