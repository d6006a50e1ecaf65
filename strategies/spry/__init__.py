"""Spry: every client trains some of the units, and the server joins them (arXiv 2405.15551)."""

from fedllm.strategies.spry.strategy import Spry

__all__ = ["Spry"]
