"""The loss of a language model without its logits: the output embedding is applied to a few tokens at a time.

Logits [tokens, vocabulary] in float32 with their tangents would be the largest tensors of a dual forward by far.
"""

from __future__ import annotations

from typing import Any

import torch
from fedllm.clients.forward_ad.exchange import exchanged
from fedllm.clients.forward_ad.weights import weight_of
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.encoded import IGNORED
from fedllm.tasks import Batch

_LOGITS = 2**21  # logits that exist at a time, 8 MiB in float32
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def has_plain_output(model: Any) -> bool:
    """Whether a model's logits are a frozen linear function of its last hidden states and nothing else."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED):
        return False
    output = model.get_output_embeddings()
    return output is not None and weight_of(output) is not None


def token_loss(model: nn.Module, output: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the unmasked tokens, as :meth:`fedllm.tasks.CausalLM.loss`.

    Args:
        model: maps token ids to logits.
        output: its output embedding, see :func:`has_plain_output`.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` ``[batch, length]``.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden[..., :0]  # no logits

    with exchanged(output, lambda module: capture if module is output else None):
        model(**inputs, use_cache=False)
    targets = batch["labels"][:, 1:]
    unmasked = targets != IGNORED
    rows, targets = captured.pop()[:, :-1][unmasked], targets[unmasked]
    at_once = max(1, _LOGITS // _vocabulary(output))
    total = rows.new_zeros((), dtype=torch.float32)
    for some, wanted in zip(torch.split(rows, at_once), torch.split(targets, at_once), strict=True):
        total = total + F.cross_entropy(output(some).float(), wanted, reduction="sum")
    return total / len(targets)


def _vocabulary(output: Any) -> int:
    return int(getattr(output, "out_features", output.weight.shape[0]))
