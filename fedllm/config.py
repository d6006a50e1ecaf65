"""The run configuration: every key once, with its unit, default and bounds.

Flower hands an app a flat mapping of dotted keys to scalars (``{"train.batch-size": 16}``). :meth:`RunConfig.from_flat`
turns it into typed, validated sections; :meth:`RunConfig.to_flat` gives the resolved mapping back. Keys are kebab-case
on the outside and snake_case in Python. A list is one string with commas, a mapping one string ``key=value,key=value``.

Tables that are not a section of :class:`RunConfig` hold the parameters of the plug-in of that name, for example
``fedadam.eta``; they are validated against that plug-in's constructor by :mod:`fedllm.registry`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedllm.errors import ConfigError

Scalar = bool | int | float | str


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)  # TOML writes a list of one number without quotes
    return value


def _split_mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    result: dict[str, str] = {}
    for part in _split(value):
        name, separator, number = part.rpartition("=")
        if not separator:
            raise ValueError(f"expected name=value, found {part!r}")
        result[name.strip()] = number.strip()
    return result


def _positive_ranks(value: dict[str, int]) -> dict[str, int]:
    for name, rank in value.items():
        if rank < 1:
            raise ValueError(f"the rank of {name!r} must be at least 1, found {rank}")
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]
RankPattern = Annotated[dict[str, int], BeforeValidator(_split_mapping), AfterValidator(_positive_ranks)]
RankList = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
AggregationName = Literal["auto", "factor-average", "zero-pad", "stack", "svd", "exact"]
FloatList = Annotated[tuple[float, ...], BeforeValidator(_split)]
PositiveList = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_split)]


def kebab(name: str) -> str:
    """Turn a snake_case or CamelCase name into kebab-case."""
    spaced = "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
    return spaced.replace("_", "-")


class Section(BaseModel):
    """Base of all configuration sections: frozen, no unknown keys, kebab-case names outside."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=kebab,
        populate_by_name=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class ModelConfig(Section):
    """Base model: where it comes from and how it is held in memory."""

    name: str = Field(
        "packaged:minilm",
        min_length=1,
        description="Hugging Face id, local folder, packaged:minilm, packaged:smollm2 or "
        "tiny-random:llama|gpt2|bert|qwen2",
    )
    revision: str = Field("main", description="revision of a Hugging Face id")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the base weights"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="bitsandbytes quantisation of the base weights; heads are never quantised"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention implementation; auto leaves the choice to transformers"
    )
    device: str = Field(
        "auto", description="auto, cpu, cuda or cuda:N; auto takes CUDA where it is to be had"
    )
    blocks: int = Field(
        0, ge=0, description="load only the first blocks of the model, so many; 0: all of them"
    )
    cache_bundles: int = Field(
        3, ge=1, description="loaded models that a process keeps, those used last (one for each quantisation)"
    )


class LoraConfig(Section):
    """The adapter: which modules get low-rank factors, and of which rank."""

    rank: int = Field(8, ge=1, le=4096, description="rank of every adapted module not named in rank-pattern")
    alpha: float = Field(
        0.0, ge=0, description="scale numerator: the product is scaled by alpha/rank; 0 means twice the rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: CommaList = Field(
        (), description="module names with commas; empty: every linear layer except the heads"
    )
    rank_pattern: RankPattern = Field(
        {}, description="ranks of single modules: module-regex=rank,module-regex=rank"
    )
    client_ranks: RankList = Field(
        (),
        description="ranks of the clients in turn, each at most lora.rank, for example 2,4,8; no module gets more than "
        "the client's rank; empty: every client has the full rank",
    )
    aggregation: AggregationName = Field(
        "auto",
        description="how adapters are averaged: factor-average, zero-pad, stack, svd or exact; auto: exact where "
        "ranks differ between clients, else the plain mean of the factors",
    )
    accumulator_rank: int = Field(
        0,
        ge=0,
        description="largest rank of a module that the server keeps between rounds (exact, stack); 0: no limit",
    )

    @model_validator(mode="after")
    def _client_ranks_fit(self) -> Self:
        if too_high := [rank for rank in self.client_ranks if rank > self.rank]:
            raise ValueError(
                f"lora.client-ranks: {too_high[0]} exceeds lora.rank, which is {self.rank}; raise lora.rank, the rank "
                "of the global adapter, or lower the client's"
            )
        if 0 < self.accumulator_rank < self.rank:
            raise ValueError(
                f"lora.accumulator-rank ({self.accumulator_rank}) must be 0 or at least lora.rank ({self.rank})"
            )
        return self


class DataConfig(Section):
    """Where examples come from, how they become text and labels, and who gets which."""

    source: str = Field(
        "packaged:chatterbot",
        min_length=1,
        description="packaged:chatterbot, a csv/jsonl/parquet file, or a Hugging Face dataset id",
    )
    subset: str = Field("", description="configuration name of a Hugging Face dataset")
    train_split: str = Field("train", description="training split of a Hugging Face dataset")
    test_split: str = Field("test", description="test split of a Hugging Face dataset; empty: none")
    test_file: str = Field("", description="test file when source is a file; empty: test-fraction applies")
    test_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the training rows held out as test rows when there is no test split",
    )
    text_column: str = Field("text", description="column with the text to classify")
    label_column: str = Field("label", description="column with the class")
    labels: CommaList = Field(
        (), description="class names in order; empty: the sorted labels of the training rows"
    )
    prompt_column: str = Field("prompt", description="column with the prompt (causal-lm)")
    response_column: str = Field("response", description="column with the wanted answer (causal-lm)")
    system_prompt: str = Field("", description="system message of the chat template (causal-lm)")
    max_length: int = Field(128, ge=4, le=131072, description="tokens kept of an example")
    train_rows: int = Field(0, ge=0, description="use only the first N training rows; 0: all")
    test_rows: int = Field(0, ge=0, description="use only the first N test rows; 0: all")
    max_rows_per_label: int = Field(
        0, ge=0, description="keep at most N rows of a class, before test rows are held out; 0: all"
    )
    partitioner: Literal["iid", "dirichlet", "pathological", "shard", "natural-id", "sizes"] = Field(
        "iid", description="how the training rows are dealt to the clients"
    )
    alpha: float = Field(0.5, gt=0, le=1e6, description="concentration of the Dirichlet partitioner")
    min_partition_size: int = Field(
        1, ge=0, description="Dirichlet draws again until every partition has this many rows"
    )
    classes_per_client: int = Field(
        2, ge=1, description="classes that a client of the pathological partitioner sees"
    )
    shards_per_client: int = Field(2, ge=1, description="shards that a client of the shard partitioner gets")
    id_column: str = Field("", description="column that names the owner of a row (natural-id)")
    sizes: FloatList = Field(
        (), description="rows (or shares, if at most 1) of each client (sizes partitioner)"
    )
    share_label_counts: bool = Field(
        False, description="let a node report how many examples of each class it has"
    )
    cache_dir: str = Field("", description="folder of the tokenised cache; empty: the user's cache folder")


class TrainConfig(Section):
    """What a client does in one round, whatever its update rule."""

    learning_rate: float = Field(1e-3, gt=0, le=1e3, description="learning rate of the adapter")
    head_learning_rate: float = Field(
        0.0, ge=0, le=1e3, description="learning rate of the heads; 0: that of the adapter"
    )
    batch_size: int = Field(16, ge=1, description="examples in a step")
    local_steps: int = Field(0, ge=0, description="optimiser steps in a round; 0: local-epochs decides")
    local_epochs: float = Field(1.0, gt=0, le=1e4, description="passes over the client's examples in a round")


class ServerConfig(Section):
    """Whom the server asks, how long it waits, and when a round counts."""

    fraction_train: float = Field(1.0, gt=0, le=1, description="share of the nodes that train in a round")
    fraction_evaluate: float = Field(
        0.0, ge=0, le=1, description="share of the nodes that evaluate after a round"
    )
    min_nodes: int = Field(2, ge=1, description="nodes that must be connected before the run starts")
    node_timeout: float = Field(180.0, gt=0, description="seconds to wait for min-nodes before giving up")
    quorum: float = Field(
        0.5, gt=0, le=1, description="share of the asked clients whose valid replies make a round count"
    )
    deadline: float = Field(
        3600.0, gt=0, description="seconds after which a round closes as soon as it has its quorum"
    )
    round_timeout: float = Field(
        7200.0, gt=0, description="seconds after which a round closes whatever it has"
    )
    max_failed_rounds: int = Field(
        3, ge=1, description="rounds in a row without quorum after which the run stops"
    )
    evaluate_every: int = Field(
        1, ge=0, description="rounds between evaluations on the server's test rows; 0: never"
    )
    evaluate_batch_size: int = Field(64, ge=1, description="examples in an evaluation batch")
    spool_megabytes: float = Field(
        32.0, ge=0, description="replies that wait their turn in memory, in MB; more go to disk"
    )
    poll_interval: float = Field(
        0.05, gt=0, le=10, description="longest pause in seconds between two looks for replies"
    )

    @model_validator(mode="after")
    def _deadline_before_timeout(self) -> Self:
        if self.deadline > self.round_timeout:
            raise ValueError(
                f"server.deadline ({self.deadline:g} s) must not exceed server.round-timeout "
                f"({self.round_timeout:g} s)"
            )
        return self


class WireConfig(Section):
    """How tensors travel."""

    upload_codec: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="codec of a client's update; lossy codecs carry the difference to what was sent"
    )
    download_codec: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="codec of the global adapter on its way to the clients"
    )


class RunSection(Section):
    """Where a run keeps its results."""

    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$",
        description="name of the run's folder (letters, digits, dot, dash, underscore); empty: the date and time",
    )
    root: str = Field("runs", min_length=1, description="folder that holds all runs")
    resume: bool = Field(False, description="go on from the newest good checkpoint of the run of this name")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    sinks: CommaList = Field((), description="further event sinks by name, for example tensorboard")


class SimulationConfig(Section):
    """What `fedllm simulate` passes on to Flower's simulation engine."""

    clients: int = Field(10, ge=1, le=100_000, description="simulated clients")
    cpus_per_client: int = Field(
        1, ge=1, description="CPUs that one running client gets, and its torch threads"
    )
    gpus_per_client: float = Field(0.0, ge=0, description="share of a GPU that one running client gets")
    memory_megabytes: PositiveList = Field(
        (),
        description="memory budget of every client in MB, in order (one value: of all); empty: that of the machine",
    )
    flops_per_second: PositiveList = Field(
        (), description="speed of every client, as memory-megabytes; empty: measured"
    )
    upload_rate: PositiveList = Field(
        (), description="bytes a second of every client to the server, as memory-megabytes; empty: 100 Mbit/s"
    )
    download_rate: PositiveList = Field(
        (), description="bytes a second of the server to every client, as memory-megabytes; empty: 100 Mbit/s"
    )

    @model_validator(mode="after")
    def _one_value_for_every_client(self) -> Self:
        for name in ("memory_megabytes", "flops_per_second", "upload_rate", "download_rate"):
            if (count := len(getattr(self, name))) not in (0, 1, self.clients):
                raise ValueError(
                    f"simulation.{kebab(name)} has {count} values, expected 1 or {self.clients} (simulation.clients)"
                )
        return self


class EvaluationConfig(Section):
    """What counts as better, and optional, slower metrics."""

    best: Literal["auto", "accuracy", "macro-f1", "perplexity", "loss"] = Field(
        "auto",
        description="metric by which best/ is kept; auto: accuracy, or perplexity for causal-lm. Take macro-f1 where "
        "classes are unbalanced",
    )
    generate: int = Field(
        0,
        ge=0,
        description="test prompts answered by generation and scored with BLEU and chrF; 0: none (causal-lm)",
    )
    max_new_tokens: int = Field(64, ge=1, description="tokens generated for an answer")


class RunConfig(Section):
    """The whole configuration of a run."""

    strategy: str = Field("fedavg", min_length=1, description="strategy: a registered name or module:Class")
    client: str = Field(
        "backprop", min_length=1, description="client update rule: a registered name or module:Class"
    )
    defence: str = Field(
        "none",
        min_length=1,
        description="filter of the clients' replies: none, a registered name or module:Class",
    )
    attack: str = Field(
        "none",
        min_length=1,
        description="what hostile clients do, in simulations only: none or a registered name",
    )
    attack_fraction: float = Field(0.2, gt=0, le=1, description="share of the clients that is hostile")
    attack_from_round: int = Field(1, ge=1, description="first round in which hostile clients attack")
    task: Literal["sequence-classification", "causal-lm"] = Field(
        "sequence-classification", description="what is learned"
    )
    rounds: int = Field(10, ge=1, le=1_000_000, description="rounds of training")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in the run")
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunSection = RunSection()
    simulation: SimulationConfig = SimulationConfig()
    plugins: dict[str, dict[str, Scalar]] = Field({}, description="parameters of plug-ins by plug-in name")

    @model_validator(mode="after")
    def _best_metric_of_the_task(self) -> Self:
        of_task = ("accuracy", "macro-f1") if self.task == "sequence-classification" else ("perplexity",)
        if self.evaluation.best not in ("auto", "loss", *of_task):
            raise ValueError(
                f"evaluation.best is {self.evaluation.best}, but {self.task} measures {', '.join(of_task)} and loss"
            )
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar], plugin_names: frozenset[str] = frozenset()) -> RunConfig:
        """Validate a flat mapping of dotted kebab-case keys.

        Args:
            flat: keys as Flower hands them over, for example ``{"lora.rank": 8}``.
            plugin_names: tables that belong to plug-ins and are passed on in :attr:`plugins`.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), a wrong type, or a value out of bounds.
        """
        nested: dict[str, Any] = {}
        plugins: dict[str, dict[str, Scalar]] = {}
        known = cls.keys()
        for key, value in flat.items():
            table, dot, leaf = key.partition(".")
            if key in known:
                if dot:
                    nested.setdefault(table, {})[leaf] = value
                else:
                    nested[key] = value
            elif dot and table in plugin_names:
                plugins.setdefault(table, {})[leaf] = value
            else:
                raise ConfigError(unknown_key_message(key, known, plugin_names))
        try:
            return cls.model_validate({**nested, "plugins": plugins})
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error)) from None

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """All dotted keys with their pydantic field information (type, default, bounds, description)."""
        result: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            if name == "plugins":
                continue
            section = field.annotation
            if isinstance(section, type) and issubclass(section, Section):
                for leaf, leaf_field in section.model_fields.items():
                    result[f"{kebab(name)}.{kebab(leaf)}"] = leaf_field
            else:
                result[kebab(name)] = field
        return result

    def to_flat(self) -> dict[str, Scalar]:
        """The resolved configuration as Flower would hand it over; ``from_flat`` reads it back unchanged."""
        flat: dict[str, Scalar] = {}
        for name, value in self:
            if name == "plugins":
                for table, parameters in self.plugins.items():
                    flat |= {f"{table}.{leaf}": scalar for leaf, scalar in parameters.items()}
            elif isinstance(value, Section):
                flat |= {f"{kebab(name)}.{kebab(leaf)}": _to_scalar(entry) for leaf, entry in value}
            else:
                flat[kebab(name)] = value
        return flat

    def fingerprint(self, without: frozenset[str] = frozenset()) -> str:
        """Hash of :meth:`deciding`; a checkpoint of another fingerprint is refused."""
        return hashlib.sha256(json.dumps(self.deciding(without), sort_keys=True).encode()).hexdigest()[:16]

    def deciding(self, without: frozenset[str] = frozenset()) -> dict[str, Scalar]:
        """The keys that decide a run's numbers.

        Left out are those that may change between a run and its continuation: the number of rounds, where results
        go, and how long the server waits; and the tables of plug-ins named in ``without``.
        """
        free = (
            "run.",
            "simulation.cpus-per-client",
            "simulation.gpus-per-client",
            "server.node-timeout",
            "server.min-nodes",
            "server.quorum",
            "server.evaluate-every",
            "server.deadline",
            "server.round-timeout",
            "server.max-failed-rounds",
            "server.spool-megabytes",
            "server.poll-interval",
            "rounds",
            "data.cache-dir",
            "model.device",
            "model.cache-bundles",
            *(f"{table}." for table in without),
        )
        return {key: value for key, value in self.to_flat().items() if not key.startswith(free)}


def _to_scalar(value: Any) -> Scalar:
    if isinstance(value, tuple):
        return ",".join(repr(entry) if isinstance(entry, float) else str(entry) for entry in value)
    if isinstance(value, dict):
        return ",".join(f"{name}={entry}" for name, entry in value.items())
    assert isinstance(value, bool | int | float | str)
    return value


def unknown_key_message(key: str, known: Mapping[str, Any], plugin_names: frozenset[str]) -> str:
    """Say that a key is unknown and which known key is nearest to it."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        near = [
            by_leaf[leaf]
            for leaf in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)
        ]
    table = key.partition(".")[0]
    if not near and (tables := difflib.get_close_matches(table, plugin_names, n=1, cutoff=0.6)):
        near = [f"{tables[0]}.{key.partition('.')[2]}"]
    hint = f"; did you mean {near[0]!r}?" if near else "; `fedllm list --keys` shows all keys"
    return f"unknown configuration key {key!r}{hint}"


def describe_validation_error(error: ValidationError, prefix: str = "") -> str:
    """One line per wrong key: the key, what was expected, what was found."""
    lines = []
    for item in error.errors():
        key = ".".join([prefix] * bool(prefix) + [kebab(str(part)) for part in item["loc"]])
        found = "" if item["type"] == "missing" else f" (found {item['input']!r})" if key else ""
        lines.append(f"{key}: {item['msg']}{found}" if key else item["msg"])
    return "invalid configuration: " + "; ".join(lines)
