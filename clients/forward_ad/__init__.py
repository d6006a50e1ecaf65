"""Forward-mode clients: loss and directional derivatives in one pass, without a graph (Spry, arXiv 2405.15551)."""

from fedllm.clients.forward_ad.client import ForwardAD

__all__ = ["ForwardAD"]
