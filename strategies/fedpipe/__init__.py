"""FedPipe: a plan of weights, ranks, batch size and base bits for every node, and an exact mean of what comes back."""

from fedllm.strategies.fedpipe.strategy import FedPipe

__all__ = ["FedPipe"]
