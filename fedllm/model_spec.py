"""A model's sizes and activations for the planner, read off its structure on the meta device: no weights are needed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.errors import ConfigError, ModelError
from fedllm.lora.spec import ActivationSpec, BlockSpec, ModelSpec, WeightSpec
from fedllm.lora_targets import linear_layers
from fedllm.model_sources import quiet_transformers

_LENGTHS = (32, 64)


def model_spec(kind: type[Any], config: Any, heads: Sequence[str] = ()) -> ModelSpec:
    """The spec of a transformers model.

    What a block keeps for the backward pass is counted, not estimated: a forward pass on the meta device tells every
    tensor that autograd would save, for two lengths, in float32 and in bfloat16.

    Args:
        kind: model class, for example ``LlamaForCausalLM``.
        config: its transformers configuration; stays as it is.
        heads: names of the modules that are trained in full.

    Returns:
        The spec with every linear layer of a block as a candidate weight, by its module name in the model.

    Raises:
        ModelError: the model has no list of blocks.
    """
    model = _on_meta(kind, config)
    prefix, blocks = _blocks(model)
    inside = {
        name: model.get_submodule(name)
        for name in linear_layers(model, heads)
        if name.startswith(f"{prefix}.")
    }
    counted = [_count_block(block) for block in blocks]
    trained = sum(_parameters(model.get_submodule(head)) for head in heads)
    output = model.get_output_embeddings()
    everything = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(
        _parameters(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{prefix}.")
    )
    sizes = [_shape(layer) for layer in inside.values()]
    hidden = int(config.hidden_size)
    return ModelSpec(
        hidden_size=hidden,
        num_heads=int(config.num_attention_heads),
        feed_forward=max(max(shape) for shape in sizes),
        vocabulary=0 if output is None else int(config.vocab_size),
        blocks=tuple(counted),
        weights=tuple(
            WeightSpec(name, *_shape(layer), int(name.removeprefix(f"{prefix}.").partition(".")[0]))
            for name, layer in inside.items()
        ),
        embedding_parameters=tables,
        output_parameters=everything - trained - tables - sum(b.parameters for b in counted),
        head_parameters=trained,
        largest_weight=max(rows * cols for rows, cols in sizes),
        activations={
            dtype.itemsize: _activations(model.to(dtype), blocks[-1])
            for dtype in (torch.bfloat16, torch.float32)
        },
    )


def adapted_spec(model: Any, adapted: Collection[str]) -> ModelSpec:
    """The spec of a peft model whose candidate weights are those that its adapter can hold.

    Args:
        model: with the adapter ``default``.
        adapted: names of the adapted modules in the base model; those outside of blocks are left out.

    Raises:
        ModelError: the model has no list of blocks.
        ConfigError: no adapted module is in a block.
    """
    base = model.get_base_model()
    spec = model_spec(type(base), base.config, model.peft_config["default"].modules_to_save or ())
    weights = tuple(weight for weight in spec.weights if weight.name in adapted)
    if not weights:
        raise ConfigError(
            "lora.target-modules names no module of a transformer block, so there is nothing to plan"
        )
    return replace(spec, weights=weights)


def kept_attention(config: Any, device: torch.device) -> Literal["sdpa", "eager", "math"]:
    """What attention keeps for the backward pass, as :class:`fedllm.lora.memory.MemoryModel` names it.

    On a CPU no fused kernel of ``scaled_dot_product_attention`` can drop scores: torch computes the plain formula then.

    Args:
        config: transformers configuration of a loaded model.
        device: where the model is trained.
    """
    if config._attn_implementation == "eager":
        return "eager"
    names = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
    dropped = any(getattr(config, name, 0.0) for name in names)
    return "math" if dropped and device.type == "cpu" else "sdpa"


def _on_meta(kind: type[Any], config: Any) -> Any:
    config = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    config.use_cache = False
    with torch.device("meta"), quiet_transformers():
        return kind._from_config(config, attn_implementation="eager")


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name: the module list that holds most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of blocks, so it cannot be planned for")
    return max(lists, key=lambda item: _parameters(item[1]))


def _count_block(block: nn.Module) -> BlockSpec:
    shapes = [_shape(block.get_submodule(name)) for name in _linear_in(block)]
    return BlockSpec(
        parameters=_parameters(block),
        quantizable=sum(rows * cols for rows, cols in shapes),
        quantizable_rows=sum(rows for rows, _ in shapes),
    )


def _linear_in(block: nn.Module) -> Iterator[str]:
    return (name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D))


def _shape(layer: Any) -> tuple[int, int]:
    """(output width, input width); Conv1D keeps its weight transposed."""
    rows, cols = layer.weight.shape
    return (cols, rows) if isinstance(layer, Conv1D) else (rows, cols)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _activations(model: Any, block: nn.Module) -> ActivationSpec:
    """What a block keeps at two lengths s gives token · s + pair · s²."""
    short, long = _LENGTHS
    first, second = (_saved_bytes(model, block, length) for length in _LENGTHS)
    pair = (second / long - first / short) / (long - short)
    return ActivationSpec(token=first / short - pair * short, pair=pair)


def _saved_bytes(model: Any, block: nn.Module, length: int) -> int:
    """Bytes that autograd keeps of one example in a block whose input needs a gradient, parameters left out."""
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # A mask of four axes is used as it stands; transformers would look into the values of any other.
    mask = torch.zeros(1, 1, length, length, dtype=model.dtype, device="meta")
    model.requires_grad_(False).train()
    kept: list[torch.Tensor] = []
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)  # a live reference: a freed storage's address could come back
            sizes.append(storage.nbytes())
        return tensor

    def before(_module: nn.Module, _inputs: Any) -> None:
        sizes.clear()

    total = 0

    def after(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        nonlocal total
        total = sum(sizes)

    handles = [
        block.register_forward_pre_hook(before),
        block.register_forward_hook(after),
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_()),
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), quiet_transformers():
            model.base_model(input_ids=ids, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return total
