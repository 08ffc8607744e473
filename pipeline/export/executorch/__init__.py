"""A checkpoint as programs of ExecuTorch: the vision tower with the projector, and the decoder."""
