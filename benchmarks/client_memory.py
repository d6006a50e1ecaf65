"""Peak memory, operations and seconds of one local step in every gradient mode.

Memory and operations are counted on the meta device, with the shapes of the real models and no weights: what lives at a
time, storage by storage. With a CUDA device the same steps run on random weights and the peak is the allocator's.
Weights of the large models are 4-bit (0.5 bytes and a float32 scale per 64 of them); embeddings stay in bfloat16.
``backprop`` and ``forward-ad`` attend by the plain formula, as in the paper; ``fused`` is CUDA's own kernel,
which forward mode cannot use and every other mode here does. Adapters are those of the Spry paper: rank 1 on the query
and value projections. ``--quick`` measures 2 and 4 blocks of each model and extrapolates.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
import transformers
from fedllm.clients.backprop_top_k import top_names
from fedllm.clients.forward_ad.jvp import dual_pass
from fedllm.clients.forward_ad.linear import frozen_linear
from fedllm.clients.forward_ad.setting import forward_mode
from harness import arguments, console, report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import eager_mask

from fedllm.live_memory import LiveMemory
from fedllm.lora.modes import rows_at_once
from fedllm.tangents import draw
from fedllm.tasks import Task, get_task

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
        key: in the JSON.
        title: in the table.
        config: of the transformers model.
        rows: examples in the batch.
        length: tokens of an example.
        packed: whether linear layers hold 4-bit weights.
        dtype: of everything else in the base model.
    """

    key: str
    title: str
    config: Any
    rows: int
    length: int
    packed: bool
    dtype: torch.dtype


def shapes() -> list[Shape]:
    """The models of the paper's memory table."""
    roberta = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1, num_labels=4,
    )  # fmt: skip
    llama = transformers.LlamaConfig()  # the defaults are those of Llama-2-7B
    opt = transformers.OPTConfig(
        hidden_size=5120,
        num_hidden_layers=40,
        num_attention_heads=40,
        ffn_dim=20480,
        word_embed_proj_dim=5120,
    )
    return [
        Shape("roberta_large", "RoBERTa-large, fp32, 8×128", roberta, 8, 128, False, torch.float32),
        Shape("llama_7b", "Llama-2-7B, 4-bit, bf16, 8×512", llama, 8, 512, True, torch.bfloat16),
        Shape("opt_13b", "OPT-13B, 4-bit, bf16, 8×512", opt, 8, 512, True, torch.bfloat16),
    ]


class Packed4bit(nn.Module):
    """The memory of a bitsandbytes NF4 layer; unpacked for every product, also in the backward pass, as there."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self.compute_dtype = layer.out_features, layer.in_features, dtype
        count, device = layer.weight.numel(), layer.weight.device
        self.bias = layer.bias
        self.register_buffer("packed", torch.zeros(count // 2, 1, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.full((count // 64,), 0.02, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """What peft looks at to find the device."""
        return self.packed

    def dequantize(self, first: int, last: int) -> torch.Tensor:
        """Rows of the weight: real on a CUDA device, their shape on meta."""
        shape = torch.Size((last - first, self.in_features))
        if self.packed.is_meta:
            return torch.empty(shape, dtype=self.compute_dtype, device="meta")
        from bitsandbytes import functional

        some = slice(first * self.in_features // 64, last * self.in_features // 64)
        code = functional.get_4bit_type("nf4", device=self.packed.device)
        state = functional.QuantState(self.scales[some], shape, code, 64, "nf4", self.compute_dtype)
        return functional.dequantize_4bit(self.packed[32 * some.start : 32 * some.stop], state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product as every mode computes it."""
        compute = frozen_linear(self)
        assert compute is not None
        return compute(x)


@dataclass
class Client:
    """A model with its adapter, a batch, and what is trained."""

    model: Any
    task: Task
    batch: dict[str, torch.Tensor]
    parameters: dict[str, nn.Parameter]
    heads: dict[str, nn.Parameter]
    weight_bytes: int

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The low-rank factors."""
        return {name: p for name, p in self.parameters.items() if name not in self.heads}


def build(shape: Shape, device: str, layers: int = 0) -> Client:
    """A client with random (or no) weights; ``layers`` > 0 keeps only so many blocks."""
    config = type(shape.config).from_dict(shape.config.to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    classifies = shape.key.startswith("roberta")
    auto: Any = (
        transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    )
    with torch.device(device):
        base = auto.from_config(config, dtype=shape.dtype)
    base.config.use_cache = False
    targets = ["query", "value"] if classifies else ["q_proj", "v_proj"]
    head = ["classifier"] if classifies else None
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=targets, modules_to_save=head)
    )
    if shape.packed:
        _pack(model, base.get_output_embeddings(), shape.dtype)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.ones(shape.rows, shape.length, dtype=torch.int64, device=device)
    labels = torch.zeros(shape.rows, dtype=torch.int64, device=device) if classifies else ids
    return Client(
        model,
        get_task("sequence-classification" if classifies else "causal-lm"),
        {"input_ids": ids, "attention_mask": ids, "labels": labels},
        parameters,
        {name: p for name, p in parameters.items() if "lora_" not in name},
        sum(t.untyped_storage().nbytes() for t in _held(model)),
    )


def _pack(model: nn.Module, output: nn.Module, dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not output and not child.weight.requires_grad:
                setattr(module, name, Packed4bit(child, dtype))


def _held(model: nn.Module) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


def _fused_attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What CUDA's memory-efficient kernel keeps for the backward pass; on meta, PyTorch's own choice keeps scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
    mask = attention_mask.expand(*query.shape[:3], key.shape[2])
    output = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]
    return output.transpose(1, 2), None


transformers.AttentionInterface.register("fused_on_meta", _fused_attention)
transformers.AttentionMaskInterface.register("fused_on_meta", eager_mask)


# --------------------------------------------------------------------- gradient modes


@contextmanager
def _attention(client: Client, kind: str) -> Iterator[None]:
    base = client.model.get_base_model()
    before = base.config._attn_implementation
    if kind == "sdpa" and client.batch["input_ids"].is_meta:
        kind = "fused_on_meta"
    base.set_attn_implementation(kind)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def inference(client: Client) -> None:
    """The loss without any gradient."""
    client.model.eval()
    with torch.no_grad():
        client.task.loss(client.model, client.batch)


def forward_ad(client: Client, rows: int = 0) -> None:
    """A dual pass along one tangent of all factors; heads exactly."""
    client.model.eval()
    with forward_mode(client.model, client.task, client.parameters) as loss:
        point = {name: p.detach() for name, p in client.factors.items()}
        tangent = {
            name: draw(0, 1, 1, name, p.shape, "rademacher").to(p) for name, p in client.factors.items()
        }
        size = rows or rows_at_once(client.batch["input_ids"].shape[1])
        for first in range(0, len(client.batch["input_ids"]), size):
            piece = {name: value[first : first + size] for name, value in client.batch.items()}
            dual_pass(loss.at(piece), point, [tangent], client.heads, client.model)


def backprop(client: Client, rows: int = 0) -> None:
    """Plain back-propagation, all activations kept."""
    client.model.train()
    size = rows or len(client.batch["input_ids"])
    for first in range(0, len(client.batch["input_ids"]), size):
        piece = {name: value[first : first + size] for name, value in client.batch.items()}
        client.task.loss(client.model, piece).backward()
    client.model.zero_grad(set_to_none=True)


def backprop_checkpointed(client: Client, rows: int = 0) -> None:
    """Back-propagation with one checkpoint a block."""
    base = client.model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        backprop(client, rows)
    finally:
        base.gradient_checkpointing_disable()


def backprop_top_1(client: Client) -> None:
    """Back-propagation through the last block and the head only."""
    top = top_names(list(client.parameters), 1)
    lower = [p for name, p in client.parameters.items() if name not in top and name not in client.heads]
    for parameter in lower:
        parameter.requires_grad_(False)
    try:
        backprop(client)
    finally:
        for parameter in lower:
            parameter.requires_grad_(True)


def zeroth_order(client: Client) -> None:
    """Two inferences at two points."""
    for _ in range(2):
        inference(client)


MODES: dict[str, tuple[str, str, Callable[[Client], None]]] = {
    "inference": ("inference", "sdpa", inference),
    "zeroth_order": ("zeroth-order", "sdpa", zeroth_order),
    "forward_ad": ("forward-ad", "eager", forward_ad),
    "forward_ad_whole_batch": ("forward-ad, whole batch at once", "eager", partial(forward_ad, rows=8)),
    "forward_ad_micro_batch_1": ("forward-ad, micro-batch 1", "eager", partial(forward_ad, rows=1)),
    "bp_top_1": ("backprop-top-k, k = 1", "sdpa", backprop_top_1),
    "bp_checkpointed": ("backprop-checkpointed", "sdpa", backprop_checkpointed),
    "bp_checkpointed_micro_batch_1": (
        "backprop-checkpointed, micro-batch 1",
        "sdpa",
        partial(backprop_checkpointed, rows=1),
    ),
    "bp_fused": ("backprop, fused attention", "sdpa", backprop),
    "bp_fused_micro_batch_1": ("backprop, fused attention, micro-batch 1", "sdpa", partial(backprop, rows=1)),
    "bp": ("backprop", "eager", backprop),
}


# --------------------------------------------------------------------- measurements


def counted(client: Client, attention: str, step: Callable[[Client], None]) -> tuple[int, int]:
    """The most bytes above the weights that live during a step, and the operations of its matrix products; on meta."""
    memory = LiveMemory()
    memory.ignore(_held(client.model))
    gc.collect()
    with _attention(client, attention), memory:
        step(client)
    # Apart: the counter's hooks keep tensors alive.
    with _attention(client, attention), LiveMemory(), FlopCounterMode(display=False) as operations:
        step(client)
    return memory.peak, operations.get_total_flops()


def allocated(client: Client, attention: str, step: Callable[[Client], None]) -> int:
    """The most bytes above the weights that CUDA's allocator handed out during a step."""
    with _attention(client, attention):
        step(client)  # what stays allocated for good
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(client)
        return torch.cuda.max_memory_allocated() - before


def seconds(client: Client, attention: str, step: Callable[[Client], None], repeats: int) -> float:
    """The shortest of some repetitions after a first one: processor time on a CPU, which others may share."""
    clock, found = time.perf_counter if torch.cuda.is_available() else time.process_time, []
    with _attention(client, attention):
        for _ in range(repeats + 1):
            started = clock()
            step(client)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(clock() - started)
    return min(found[1:])


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of a step in one mode."""

    weights: float
    above: float
    operations: float


def costs(shape: Shape, device: str, layers: int = 0) -> dict[str, Cost]:
    """What every mode costs with all blocks of a model, or the first ``layers`` of them."""
    client = build(shape, "meta", layers)
    # Equal rows one by one: two of them, one with the gradient of the other, are as many as all.
    pair = replace(client, batch={name: value[:2] for name, value in client.batch.items()})
    real = build(shape, device, layers) if device != "meta" else None
    found = {}
    for mode, (title, attention, step) in MODES.items():
        console.print(f"{shape.title}: {title}" + (f", {layers} blocks" if layers else ""), style="dim")
        single = mode.endswith("micro_batch_1")
        above, operations = counted(pair if single else client, attention, step)
        if real is not None:
            above = allocated(real, attention, step)
        found[mode] = Cost(client.weight_bytes, above, operations * (shape.rows // 2 if single else 1))
    return found


def extrapolated(shape: Shape, device: str) -> dict[str, Cost]:
    """The costs of a whole model from those of 2 and 4 of its equal blocks, in whose number all are affine."""
    two, four = costs(shape, device, 2), costs(shape, device, 4)
    beyond = (shape.config.num_hidden_layers - 2) / 2
    return {
        mode: Cost(
            *(a + (b - a) * beyond for a, b in zip(astuple(two[mode]), astuple(four[mode]), strict=True))
        )
        for mode in MODES
    }


def measure(shape: Shape, device: str, quick: bool) -> tuple[dict[str, float], list[list[object]]]:
    """JSON keys and table rows of one model."""
    found = extrapolated(shape, device) if quick else costs(shape, device)
    totals = {mode: cost.weights + cost.above for mode, cost in found.items()}
    figures = {f"{shape.key}_weights_gib": found["inference"].weights / GIB}
    rows: list[list[object]] = []
    for mode, (title, _, _) in MODES.items():
        ratio = found[mode].operations / found["inference"].operations
        over = totals[mode] / totals["forward_ad"]
        figures |= {
            f"{shape.key}_{mode}_activations_gib": found[mode].above / GIB,
            f"{shape.key}_{mode}_total_gib": totals[mode] / GIB,
            f"{shape.key}_{mode}_over_forward_ad": over,
            f"{shape.key}_{mode}_flops_ratio": ratio,
        }
        rows.append([shape.title, title, found[mode].above / MIB, totals[mode] / GIB, over, ratio])
    return figures, rows


def main() -> None:
    args = arguments(__doc__ or "")
    device = "cuda" if torch.cuda.is_available() else "meta"
    torch.manual_seed(args.seed)
    figures: dict[str, Any] = {"memory_counted_on": device}
    rows: list[list[object]] = [["model", "mode", "MiB above weights", "total GiB", "/ forward-ad", "FLOPs"]]
    for shape in shapes():
        found, lines = measure(shape, device, args.quick)
        figures |= found
        rows += [[shape.title if index == 0 else "", *line[1:]] for index, line in enumerate(lines)]
    ratios = [figures[f"{shape.key}_forward_ad_flops_ratio"] for shape in shapes()]
    figures["forward_ad_flops_ratio"] = max(ratios)
    blocks = 2 if args.quick else 24
    timed = build(shapes()[0], "cuda" if torch.cuda.is_available() else "cpu", blocks)
    clock: list[list[object]] = [["mode", "seconds", "/ inference"]]
    for mode, (title, attention, step) in MODES.items():
        taken = seconds(timed, attention, step, 2)
        figures[f"{mode}_seconds"] = taken
        clock.append([title, taken, taken / figures["inference_seconds"]])
    figures["timed_blocks"] = blocks
    title = f"Seconds of a step: RoBERTa-large, {blocks} of 24 blocks, fp32, 8×128"
    report(argparse.Namespace(json=None), {}, clock, title)
    report(args, figures, rows, "Memory and operations of a step; FLOPs relative to inference")


if __name__ == "__main__":
    main()
