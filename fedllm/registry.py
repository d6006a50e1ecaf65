"""Look-up of strategies, client updates, defences, attacks and sinks by entry point or ``module:Class``.

The built-in ones are registered in the entry-point groups ``fedllm.strategies``, ``fedllm.clients``, … exactly as a
user's package would register its own. A plug-in's constructor is its configuration: each keyword with an annotation and
a default is a key ``<plug-in name>.<keyword in kebab-case>``, checked by pydantic before the run starts.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fedllm.config import RunConfig, Scalar, describe_validation_error, kebab
from fedllm.errors import ConfigError, RegistryError

INNER = "inner"
"""The constructor argument of a defence or attack that holds the strategy around which it is put; not a key."""

DEFAULTS = "key_defaults"
"""The class attribute that tells, by name, what is used for keywords whose default is None."""

KINDS = ("strategies", "clients", "defences", "attacks", "sinks")

GIVEN: Mapping[str, Mapping[str, str]] = {
    "defences": {"seed": "seed", "spool_bytes": "server.spool-megabytes"},
    "attacks": {"fraction": "attack-fraction", "from_round": "attack-from-round", "seed": "seed"},
}
"""Keywords of what is put around a strategy that follow keys of the run, by kind; they are no keys of their own."""


@cache
def _entry_points(kind: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"fedllm.{kind}"))


def available(kind: str) -> dict[str, EntryPoint]:
    """Registered plug-ins of a kind by name, in alphabetical order.

    Raises:
        RegistryError: two packages register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(_entry_points(kind), key=lambda point: point.name):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise RegistryError(
                f"two plug-ins in fedllm.{kind} are named {point.name!r}: {other.value} and {point.value}; "
                "uninstall or rename one of them"
            )
        found[point.name] = point
    return found


def plugin_names() -> frozenset[str]:
    """Names of all registered plug-ins; each may have a table of parameters in the configuration."""
    return frozenset(name for kind in KINDS for name in available(kind))


def parameter_table(ref: str) -> str:
    """The configuration table that holds a plug-in's parameters: its name, or its class name in kebab-case."""
    return kebab(ref.partition(":")[2]) if ":" in ref else ref


def load(kind: str, ref: str) -> type[Any]:
    """The class behind a registered name or ``module:Class``.

    Raises:
        RegistryError: no such name (the known ones are listed), or the module or class cannot be imported.
    """
    if ":" in ref:
        module_name, _, class_name = ref.partition(":")
        try:
            found = getattr(import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise RegistryError(
                f"cannot load {ref!r} from fedllm.{kind}: {error}; the module must be importable where the app runs "
                "(install its package, or put it in the app's folder)"
            ) from error
    else:
        known = available(kind)
        if ref not in known:
            near = difflib.get_close_matches(ref, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RegistryError(
                f"nothing named {ref!r} in fedllm.{kind}; {hint}known: {', '.join(known) or 'none'}; "
                "your own: module:Class"
            )
        found = known[ref].load()
    if not isinstance(found, type):
        raise RegistryError(f"{ref!r} in fedllm.{kind} is {found!r}, expected a class")
    return found


def describe(kind: str) -> dict[str, str]:
    """First docstring line of every registered plug-in of a kind."""
    return {name: (inspect.getdoc(load(kind, name)) or "").partition("\n")[0] for name in available(kind)}


def parameters_model(cls: type[Any], kind: str = "") -> type[BaseModel]:
    """Pydantic model of a plug-in's constructor keywords, following ``**kwargs`` to the base classes.

    What the framework itself gives is left out: the strategy of a defence or attack, the folder of a sink (kind
    ``sinks``), which is its first argument whatever its name.
    """
    fields: dict[str, Any] = {}
    seen = False
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        signature = inspect.signature(init, eval_str=True)
        passes_on = False
        given = 1 if kind == "sinks" and not seen else 0
        seen = True
        for parameter in list(signature.parameters.values())[1 + given :]:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.name == INNER:
                continue
            elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and parameter.name not in fields:
                annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
                default = ... if parameter.default is inspect.Parameter.empty else parameter.default
                fields[parameter.name] = (annotation, Field(default))
        if not passes_on:
            break
    config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        alias_generator=kebab,
        populate_by_name=True,
    )
    return create_model(f"{cls.__name__}Parameters", __config__=config, **fields)


def given_by_the_run(kind: str, ref: str) -> Mapping[str, str]:
    """Keywords of a plug-in that keys of the run set, with those keys; see :data:`GIVEN`.

    An attack that a client runs alone gets none of them: a keyword of such a name is a key of its own there.
    """
    cls = load(kind, ref)
    own = () if INNER in inspect.signature(cls).parameters else parameters_model(cls, kind).model_fields
    return {name: key for name, key in GIVEN.get(kind, {}).items() if name not in own}


def check_parameters(kind: str, ref: str, parameters: Mapping[str, Scalar]) -> dict[str, Any]:
    """Validated constructor keywords of a plug-in.

    Raises:
        ConfigError: an unknown parameter (the nearest known one is named), one that a key of the run sets, or a bad
            value.
        RegistryError: the plug-in cannot be loaded.
    """
    model = parameters_model(load(kind, ref), kind)
    table = parameter_table(ref)
    given = given_by_the_run(kind, ref)
    known = {kebab(name): name for name in model.model_fields if name not in given}
    for key in parameters:
        if (run_key := given.get(key.replace("-", "_"))) is not None:
            raise ConfigError(
                f"unknown configuration key {table}.{key} (found {parameters[key]!r}); set {run_key} instead, which it "
                "follows"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {table}.{near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ConfigError(f"unknown configuration key {table}.{key!s}; {hint}")
    try:
        validated = model.model_validate(dict(parameters))
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, table)) from None
    return {known[key]: getattr(validated, known[key]) for key in parameters}


def build(kind: str, ref: str, parameters: Mapping[str, Scalar], *inner: Any, **given: Any) -> Any:
    """Construct a plug-in from its configuration table.

    Args:
        kind: ``strategies``, ``clients``, ….
        ref: registered name or ``module:Class``.
        parameters: its table of the configuration.
        inner: the strategy that a defence or attack is put around.
        given: further keywords from the framework; those that the constructor does not take are left out.
    """
    keywords = check_parameters(kind, ref, parameters)
    cls = load(kind, ref)
    accepted = parameters_model(cls, kind).model_fields
    return cls(*inner, **{name: value for name, value in given.items() if name in accepted} | keywords)


def sink_tables(config: RunConfig) -> frozenset[str]:
    """The tables that belong to sinks: they say where figures go and decide none of them."""
    return frozenset(available("sinks")) | {parameter_table(ref) for ref in config.run.sinks}


def check(config: RunConfig) -> None:
    """Check that what the configuration names exists, and all parameters of plug-ins, of unused ones too.

    A plug-in whose class has a static method ``check_config(config)`` also looks at the configuration as a whole.

    Raises:
        ConfigError: a wrong parameter, or a client, codecs or an aggregation that the strategy cannot do.
        RegistryError: a plug-in that cannot be found or loaded.
    """
    used = {"strategies": config.strategy, "clients": config.client}
    used |= {
        kind: ref for kind, ref in (("defences", config.defence), ("attacks", config.attack)) if ref != "none"
    }
    for kind, ref in used.items():
        check_parameters(kind, ref, config.plugins.get(parameter_table(ref), {}))
    for ref in config.run.sinks:
        check_parameters("sinks", ref, config.plugins.get(parameter_table(ref), {}))
    for table in config.plugins.keys() - {
        parameter_table(ref) for ref in (*used.values(), *config.run.sinks)
    }:
        for kind in (kind for kind in KINDS if table in available(kind)):
            check_parameters(kind, table, config.plugins[table])
    _check_reply_kind(config)
    _check_codecs(config)
    _check_aggregation(config)
    for kind, ref in used.items():
        if (look := getattr(load(kind, ref), "check_config", None)) is not None:
            look(config)


def _check_codecs(config: RunConfig) -> None:
    """Only strategies that take a ``download_codec`` decode what comes back; Flower's own read NumPy arrays."""
    for key, codec in (
        ("wire.upload-codec", config.wire.upload_codec),
        ("wire.download-codec", config.wire.download_codec),
    ):
        takes = "download_codec" in parameters_model(load("strategies", config.strategy)).model_fields
        if codec != "fp32" and not takes:
            raise ConfigError(
                f"{key} is {codec}, but the strategy {config.strategy!r} reads fp32 only; set it to fp32"
            )


def _check_aggregation(config: RunConfig) -> None:
    """Let the strategy itself say whether it can average adapters in the way that is wanted."""
    wanted = {"aggregation": config.lora.aggregation, "client_ranks": config.lora.client_ranks}
    if wanted == {"aggregation": "auto", "client_ranks": ()}:
        return
    if not wanted.keys() <= parameters_model(load("strategies", config.strategy)).model_fields.keys():
        raise ConfigError(
            "lora.aggregation and lora.client-ranks are for fedllm's strategies; "
            f"{config.strategy!r} averages arrays of equal shapes only"
        )
    build("strategies", config.strategy, config.plugins.get(parameter_table(config.strategy), {}), **wanted)


def _check_reply_kind(config: RunConfig) -> None:
    """The client must send what the strategy reads: an adapter unless their classes say otherwise."""
    from fedllm.records import ADAPTER  # needs torch, which a mere look-up does not wait for

    sends = getattr(load("clients", config.client), "sends", ADAPTER)
    reads = getattr(load("strategies", config.strategy), "reads", ADAPTER)
    if sends == reads:
        return
    fitting = [
        name for name in available("clients") if getattr(load("clients", name), "sends", ADAPTER) == reads
    ]
    raise ConfigError(
        f"client: {config.client!r} sends its {sends}, but the strategy {config.strategy!r} reads each client's "
        f"{reads}; set client to one of {', '.join(fitting)}"
    )


def config_from_flat(flat: Mapping[str, Scalar]) -> RunConfig:
    """:class:`RunConfig` from Flower's flat mapping, with the tables of all plug-ins in sight."""
    named = [str(flat.get(key, "")) for key in ("strategy", "client", "defence", "attack")]
    named += [ref.strip() for ref in str(flat.get("run.sinks", "")).split(",")]
    own = {parameter_table(ref) for ref in named if ":" in ref}
    return RunConfig.from_flat(flat, plugin_names() | own)
