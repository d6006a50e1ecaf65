"""What the cuts of a run are planned with: the model's sizes, what may be planned, and what a client's memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedllm.strategies.fedpipe.plan import modules_of

from fedllm.batches import count_steps
from fedllm.config import RunConfig
from fedllm.lora.memory import MemoryModel
from fedllm.lora.plans import PlanOptions, ranks_up_to
from fedllm.lora.spec import ModelSpec
from fedllm.planned import base_bits, compute_bytes

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

_ALLOCATOR_WASTE = 1.25
"""Memory that a process takes for activations, to what lives of them; benchmarks/split_budgets.py measures it."""
_TOKENIZER_BYTES = 1000
"""Memory of a tokenizer, for each of its tokens."""


def planning_of(
    config: RunConfig, bundle: ModelBundle, ranks: Sequence[int] = ()
) -> tuple[ModelSpec, PlanOptions]:
    """The whole model with the candidate weights, and the options of a plan.

    Args:
        config: of the run.
        bundle: the server's model with the global adapter.
        ranks: that may be planned; empty: powers of two up to ``lora.rank``.

    Raises:
        ConfigError: no adapted module is in a block.
    """
    from fedllm.model_spec import adapted_spec, kept_attention

    rank, train = config.lora.rank, config.train
    options = PlanOptions(
        ranks=tuple(ranks) or ranks_up_to(rank),
        batch_sizes=(train.batch_size,),
        bits=(base_bits(config.model),),
        sequence_length=config.data.max_length,
        steps=lambda examples, size: count_steps(examples, train),
        memory=MemoryModel(
            attention=kept_attention(bundle.model.config, bundle.device),
            adapter_dropout=config.lora.dropout > 0,
            keeps_outputs=True,
            quantized_compute=compute_bytes(config.model),
            activation_scale=_ALLOCATOR_WASTE,
            workspace_bytes=_TOKENIZER_BYTES * len(bundle.tokenizer),
        ),
    )
    return adapted_spec(bundle.model, modules_of(bundle.initial_state)), options
