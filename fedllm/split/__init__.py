"""Split learning: a model cut after a block, and the gRPC stream between its two parts."""
