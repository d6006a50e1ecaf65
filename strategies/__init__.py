"""Server strategies, one module or folder per method; imported as ``fedllm.strategies``."""
