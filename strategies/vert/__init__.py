"""VERT: keep the clients that do what their own and the global history predict (after arXiv 2411.10673)."""
