"""`fedllm list`: what is installed, and every configuration key."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm import registry
from fedllm.config import RunConfig, kebab
from fedllm.scaffold import choices_of

Keys = list[dict[str, Any]]
Plugins = dict[str, dict[str, str]]


def plugins() -> Plugins:
    """One line on every strategy, client, defence, attack, sink and task, by kind and name."""
    return {kind: registry.describe(kind) for kind in registry.KINDS} | {"tasks": _tasks()}


def keys() -> Keys:
    """Every configuration key, those of the registered plug-ins last.

    Returns:
        Objects with ``key``, ``type``, ``choices``, ``default`` and ``description``.
    """
    return _own_keys() + [key for kind in registry.KINDS for key in _plugin_keys(kind)]


def _plugin_keys(kind: str) -> Keys:
    """Parameters of plug-ins' constructors, inherited ones too.

    Left out is what a strategy inherits from :class:`fedllm.strategy.BaseStrategy` and what a defence or attack gets
    from the run: keys of fedllm's own set it; and functions, which only Python can give.
    """
    from fedllm.strategy import BaseStrategy  # needs torch, which a list of names does not wait for

    common = inspect.signature(BaseStrategy.__init__).parameters.keys() if kind == "strategies" else ()
    found: Keys = []
    for name in registry.available(kind):
        cls = registry.load(kind, name)
        given = registry.given_by_the_run(kind, name)
        own = inspect.signature(cls.__init__).parameters if "__init__" in cls.__dict__ else {}
        for parameter, field in registry.parameters_model(cls, kind).model_fields.items():
            if parameter in given or _is_function(field) or (parameter in common and parameter not in own):
                continue
            default = None if field.is_required() else field.default
            if default is None:
                default = getattr(cls, registry.DEFAULTS, {}).get(parameter)
            if isinstance(default, tuple):  # a list is one string with commas
                default = ",".join(map(str, default))
            found.append(
                {
                    "key": f"{name}.{kebab(parameter)}",
                    "type": "required" if field.is_required() else _type_of(field, default),
                    "choices": list(choices_of(field)),
                    "default": default,
                    "description": _described(cls, parameter),
                }
            )
    return found


def _type_of(field: FieldInfo, default: Any) -> str:
    """The type of the default, or all that a key takes, as in ``float | str``."""
    scalars = [kind.__name__ for kind in get_args(field.annotation) if kind in (str, int, float)]
    union = get_origin(field.annotation) in (Union, UnionType)
    return " | ".join(scalars) if union and len(scalars) > 1 else type(default).__name__


def _is_function(field: FieldInfo) -> bool:
    """Whether a keyword takes a function, or one or None."""
    annotation: Any = field.annotation
    return any(get_origin(part) is Callable for part in (annotation, *get_args(annotation)))


def _described(cls: type[Any], parameter: str) -> str:
    """What the ``Args`` section of a class's docstring, or a base's, says of a parameter, up to the end of the line."""
    for base in cls.__mro__:
        if line := re.search(rf"^\s+{parameter}: (.+)$", base.__doc__ or "", re.MULTILINE):
            return line.group(1)
    return f"see the documentation of {cls.__name__}"


def _own_keys() -> Keys:
    defaults = RunConfig().to_flat()
    return [
        {
            "key": key,
            "type": type(defaults[key]).__name__,
            "choices": list(choices_of(field)),
            "default": defaults[key],
            "description": field.description,
        }
        for key, field in RunConfig.keys().items()
    ]


def print_plugins(found: Plugins, console: Console) -> None:
    """Print what :func:`plugins` returns, one line each."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for kind, entries in found.items():
        table.add_row(Text(kind, style="bold"), Text("" if entries else "none installed", style="dim"))
        for name, description in entries.items():
            table.add_row(Text(f"  {name}", style="cyan"), description)
    console.print(table)
    console.print(
        Text("a class of your own works as well: -c 'strategy=\"my_package.module:Class\"'", style="dim")
    )


def print_keys(found: Keys, console: Console) -> None:
    """Print what :func:`keys` returns, grouped by section."""
    section = None
    for entry in found:
        table, _, _ = entry["key"].rpartition(".")
        if table != section:
            section = table
            console.print(Text(f"\n[{section}]" if section else "[general]", style="bold"))
        line = Text(entry["key"], style="cyan")
        line.append(f" = {json.dumps(entry['default'], ensure_ascii=False)}", style="default")
        line.append(f"  {' | '.join(entry['choices']) or entry['type']}", style="green")
        console.print(line)
        console.print(Text(f"    {entry['description']}", style="dim"))


def _tasks() -> dict[str, str]:
    from fedllm.tasks import get_task

    names = get_args(RunConfig.model_fields["task"].annotation)
    return {name: (inspect.getdoc(get_task(name)) or "").partition("\n")[0] for name in names}
