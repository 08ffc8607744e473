"""A real llama.cpp, in a process of its own, and the comparison of exported files with PyTorch."""
