"""Public benchmarks: their published files as questions, and answers as scores."""
