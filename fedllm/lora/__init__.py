"""Adapter algebra in plain torch: products of LoRA factors, their exact sums, compression, importance and budgets."""
