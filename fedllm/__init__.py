"""Federated fine-tuning of language models on Flower."""

from importlib.metadata import version

__version__ = version("fedllm")
