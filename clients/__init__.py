"""Client update rules, one module per rule; imported as ``fedllm.clients``."""
