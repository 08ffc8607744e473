"""A checkpoint in the layouts of other runtimes: Hugging Face, llama.cpp, ExecuTorch."""
