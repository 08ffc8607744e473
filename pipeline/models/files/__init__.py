"""The files of a checkpoint: which tensors they hold, and what is wrong with them."""
