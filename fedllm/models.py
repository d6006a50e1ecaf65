"""A base model with its adapter: loaded once per process, its adapter state copied in and out in place."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedllm.adapter_ranks import AdapterLayers, check_state
from fedllm.base_models import BaseModel, load_base, resolve_device, seeded
from fedllm.config import ModelConfig, RunConfig
from fedllm.errors import ModelError
from fedllm.kept import Kept
from fedllm.lora_targets import build_peft_config
from fedllm.model_sources import canonical_name, quiet_transformers
from fedllm.seeding import derive_seed

_DESCRIPTION = "fedllm.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass
class ModelBundle:
    """A frozen base model with a trainable adapter, and its tokenizer.

    The adapter holds whatever its last user left in it, of whatever ranks; load a state before relying on it.

    Attributes:
        model: in evaluation mode unless a user switched it.
        tokenizer: with a padding token.
        device: where the model is.
        config: where the base model came from.
        task: ``sequence-classification`` or ``causal-lm``.
        labels: class names in order; empty for causal-lm.
        initial_state: the adapter as it was drawn from the seed, see :meth:`adapter_state`.
    """

    model: peft.PeftModel
    tokenizer: Any
    device: torch.device
    config: ModelConfig
    task: str
    labels: tuple[str, ...]
    initial_state: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # A name belongs to the parameter that shares its memory: this holds however peft builds names.
        live = {p.data_ptr(): p for p in self.model.parameters() if p.requires_grad}
        state = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self._trainable = {name: live[tensor.data_ptr()] for name, tensor in state.items()}
        self._names = tuple(self._trainable)
        self._layers = AdapterLayers(self.model, {id(p): name for name, p in self._trainable.items()})
        in_heads = {
            id(parameter)
            for module in self.model.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for parameter in module.modules_to_save.parameters()
        }
        self._heads = {name: p for name, p in self._trainable.items() if id(p) in in_heads}
        self.initial_state = self.adapter_state()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The live parameters by PEFT state-dict name, in the model's order."""
        return dict(self._trainable)

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to a head, which is trained in full, and not to a low-rank factor."""
        return name in self._heads

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Float32 copies on the CPU of all trainable parameters, in the order of :meth:`trainable`."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self._trainable.items()
        }

    @property
    def label(self) -> str:
        """The model's name, and how it is quantised if it is."""
        suffix = "" if self.config.quantization == "none" else f" ({self.config.quantization})"
        return self.config.name + suffix

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, and of the adapter as it was drawn."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.initial_state.values()]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every adapted module now, by its name within the base model."""
        return self._layers.form

    def factors(self) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter, float]]:
        """The live ``lora_A``, ``lora_B`` and α/r of every adapted module, by its name within the base model."""
        return self._layers.factors()

    def load_adapter_state(self, state: Mapping[str, torch.Tensor], *, any_ranks: bool = False) -> None:
        """Copy a state into the live parameters; those that keep their shape stay where they are in memory.

        Args:
            state: tensors by PEFT state-dict name.
            any_ranks: take an adapter of other ranks, or of fewer modules, than the configuration gave this
                model; a module that the state lacks is then not adapted and costs nothing. Parameters of
                another rank are new objects. Without it the state must have the configured ranks.

        Raises:
            ModelError: a key is missing or unknown, a shape or rank differs, or a value is not finite; the
                model is unchanged then.
        """
        form = self._layers.form_of(state) if any_ranks else self._layers.own
        check_state(state, self._shapes(form), self.config.name)
        if form != self._layers.form:
            self._layers.take(form)
            live = {**self._layers.parameters(), **self._heads}
            self._trainable = {name: live[name] for name in self._names if name in live}
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state[name])

    def _shapes(self, form: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter with these ranks, in the order of :meth:`trainable`."""
        shapes = self._layers.shapes(form) | {name: tuple(p.shape) for name, p in self._heads.items()}
        return {name: shapes[name] for name in self._names if name in shapes}

    def save_adapter(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads, with tokenizer and labels.

        The folder appears whole: a reader never finds a half-written one.

        Args:
            folder: replaced if it exists.
            state: the adapter to write, of any ranks; None: the model's own.

        Raises:
            ModelError: the state does not fit the model.
            OSError: the disk is full or the folder cannot be written.
        """
        if state is None:
            state = self.adapter_state()
        form = self._layers.form_of(state)
        shapes = self._shapes(form)
        check_state(state, shapes, self.config.name)
        settings: Any = copy.copy(self.model.peft_config["default"])
        settings.inference_mode = True
        settings.base_model_name_or_path = canonical_name(self.config.name)
        settings.revision = self.config.revision
        settings.target_modules = sorted(
            settings.target_modules
        )  # a set is written in another order every time
        self._layers.describe(form, settings)
        description = {
            "base-model": settings.base_model_name_or_path,
            "revision": self.config.revision,
            "task": self.task,
            "labels": list(self.labels),
        }
        with _replacing(folder) as target:
            tensors = {name: state[name].detach().to("cpu", torch.float32).contiguous() for name in shapes}
            save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
            settings.save_pretrained(str(target))
            self.tokenizer.save_pretrained(target)
            (target / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def gradient_checkpointing(self, on: bool = True, *, offload: bool = False) -> Iterator[None]:
        """Recompute activations in the backward pass instead of keeping them, in training mode only.

        The non-reentrant form is used: it finds the adapter's parameters by itself, whereas the reentrant one
        yields no gradients when the input of a block needs none, as behind frozen embeddings.

        Args:
            on: False changes nothing.
            offload: keep the inputs of the blocks in the host's memory; on a CPU they are there anyway.
        """
        if not on:
            yield
            return
        base: Any = self.model.get_base_model()
        with quiet_transformers():
            base.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False},
                offload=offload and self.device.type != "cpu",
            )
        # transformers lets the embeddings' output need a gradient, for the reentrant form; with it the blocks below the
        # lowest trained one would be kept and differentiated for nothing, also after checkpointing has ended.
        base.disable_input_require_grads()
        try:
            yield
        finally:
            with quiet_transformers():
                base.activation_checkpointing_disable()


BUNDLES: Kept[ModelBundle] = Kept("model", lambda bundle: bundle.num_bytes)
"""The models that this process has loaded."""


def load_bundle(config: RunConfig, labels: tuple[str, ...] = ()) -> ModelBundle:
    """The model, adapter and tokenizer of a run, loaded once per process.

    A process keeps ``model.cache-bundles`` of them, those used last. One serves adapters of all ranks, see
    :meth:`ModelBundle.load_adapter_state`. Heads and low-rank factors are drawn from ``config.seed``; the caller's
    random state is left as it was.

    Args:
        config: its model, lora, task and seed decide what is loaded.
        labels: class names in order, for sequence classification.

    Raises:
        ModelError: the model is not there, does not fit the task, or a module name matches nothing.
    """
    key = json.dumps(
        [
            config.model.model_dump(exclude={"cache_bundles"}),
            config.lora.model_dump(),
            config.task,
            labels,
            config.seed,
        ],
        sort_keys=True,
    )
    return BUNDLES.get(key, lambda: _build_bundle(config, labels), config.model.cache_bundles)


@contextmanager
def intact(bundle: ModelBundle) -> Iterator[None]:
    """Keep a model from later users if an exception inside leaves it in the middle of something."""
    try:
        yield
    except BaseException:
        BUNDLES.discard(bundle)
        raise


def clear_bundles() -> None:
    """Forget all loaded models, so that their memory can be freed."""
    BUNDLES.clear()


def merge_adapter(adapter: Path, out: Path) -> None:
    """Add a saved adapter to its base model in float32 and write an ordinary transformers folder.

    Args:
        adapter: a folder written by :meth:`ModelBundle.save_adapter`.
        out: the new folder; replaced if it exists.

    Raises:
        ModelError: the adapter folder is incomplete, or its base model is not there.
        OSError: the disk is full or the folder cannot be written.
    """
    for name in (_DESCRIPTION, "adapter_config.json", _WEIGHTS):
        if not (adapter / name).is_file():
            raise ModelError(f"adapter folder {adapter} lacks {name}; expected one written by a fedllm run")
    try:
        description = json.loads((adapter / _DESCRIPTION).read_text(encoding="utf-8"))
        model = ModelConfig(name=description["base-model"], revision=description["revision"])
        task, labels = description["task"], tuple(description["labels"])
        settings = peft.LoraConfig.from_pretrained(str(adapter))
        state = load_file(adapter / _WEIGHTS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"adapter folder {adapter} cannot be read: {type(error).__name__}: {error}"
        ) from error
    settings.inference_mode = False
    settings.base_model_name_or_path = None  # peft warns when it differs from the folder that was loaded
    device = torch.device("cpu")
    base = load_base(model, task, labels, device, seed=0)
    bundle = ModelBundle(_adapt(base, settings, seed=0), base.tokenizer, device, model, task, labels)
    bundle.load_adapter_state(state)
    with _replacing(out) as folder, quiet_transformers():
        bundle.model.merge_and_unload().save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)


def _build_bundle(config: RunConfig, labels: tuple[str, ...]) -> ModelBundle:
    device = resolve_device(config.model.device)
    base = load_base(config.model, config.task, labels, device, derive_seed(config.seed, "heads"))
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ModelError(
            f"data.max-length is {config.data.max_length} tokens, but {config.model.name} has {positions} positions; "
            f"set data.max-length to {positions} or less"
        )
    settings = build_peft_config(config.lora, config.task, base.model, base.heads)
    model = _adapt(base, settings, derive_seed(config.seed, "adapter"))
    return ModelBundle(model, base.tokenizer, device, config.model, config.task, labels)


def _adapt(base: BaseModel, settings: peft.LoraConfig, seed: int) -> Any:
    with seeded(seed), quiet_transformers():
        model: Any = peft.get_peft_model(base.model, settings)
    model.peft_config["default"].modules_to_save = list(base.heads) or None  # peft adds names of its own
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
            module.modules_to_save["default"].register_forward_pre_hook(_to_float32)
    return model.eval()


def _to_float32(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head is trained in float32 whatever the dtype of the base that feeds it."""
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, and put it in the place of ``folder`` when that went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        try:
            yield new
        except SafetensorError as error:
            raise OSError(str(error)) from error
        if folder.exists():
            folder.rename(old)  # a folder cannot be renamed onto one that is not empty
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
