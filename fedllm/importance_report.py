"""How a client tells which of its adapted modules matter: measured while it trains, sent beside the adapter.

The record :data:`fedllm.records.IMPORTANCE` holds one float32 vector for each module, by its name in the base model:
the score, then the energy curve of the update.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord

from fedllm.errors import ReplyError, TrainError
from fedllm.lora.factors import fold
from fedllm.lora.importance import AdapterStep, Importance, ImportanceTracker
from fedllm.models import ModelBundle
from fedllm.records import IMPORTANCE, decode

logger = logging.getLogger(__name__)


class ImportanceProbe:
    """Watches a client's local steps.

    Args:
        bundle: the model that is trained; its ranks must not change while it is watched.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._factors = bundle.factors()
        self._tracker = ImportanceTracker()

    def observe(self) -> None:
        """Take in one step: after the backward pass, before the optimiser touches gradients or values."""
        steps = {
            module: AdapterStep(a.detach(), b.detach(), a.grad, b.grad, scale)
            for module, (a, b, scale) in self._factors.items()
            if a.grad is not None and b.grad is not None
        }
        self._tracker.update(steps)

    def extras(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """The report as a record of the reply; nothing if no step has moved the loss."""
        adapters = {
            module: fold(a.detach(), b.detach(), scale) for module, (a, b, scale) in self._factors.items()
        }
        try:
            report = self._tracker.report(adapters)
        except TrainError as error:
            # The adapter is as good as ever: the server is told by the absence of the record.
            logger.warning("no report of importance: %s", error)
            return {}
        return {
            IMPORTANCE: {
                module: torch.tensor([score, *report.curves[module]], dtype=torch.float32)
                for module, score in report.scores.items()
            }
        }


def read_importance(node: str, record: ArrayRecord) -> Importance:
    """The report of a reply; :func:`fedllm.lora.importance.check_report` tells whether it can be used.

    Raises:
        ReplyError: an array that is no vector of real numbers; node and module are named.
    """
    scores, curves = {}, {}
    for module, vector in decode(record).items():
        if vector.dim() != 1 or vector.numel() < 2:
            raise ReplyError(
                f"node {node}: importance of {module} has shape {tuple(vector.shape)}, expected a score and a curve"
            )
        score, *curve = vector.tolist()
        scores[module], curves[module] = float(score), tuple(float(share) for share in curve)
    return Importance(scores, curves)
