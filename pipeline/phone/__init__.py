"""What a model costs and answers in each runtime: PyTorch, llama.cpp, ExecuTorch."""
