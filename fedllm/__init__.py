"""Federated fine-tuning of language models on Flower."""

import logging
from importlib.metadata import version

__version__ = version("fedllm")

# One harmless line per process about an optional kernel, printed while peft is being imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
