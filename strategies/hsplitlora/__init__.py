"""HSplitLoRA-style split fine-tuning (arXiv 2505.02795) on top of SplitLoRA (arXiv 2407.00952)."""

from fedllm.strategies.hsplitlora.strategy import HSplitLoRA

__all__ = ["HSplitLoRA"]
