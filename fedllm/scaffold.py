"""`fedllm new`: a minimal app folder with every key that a user is likely to change, explained."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w

from fedllm.config import RunConfig, Scalar
from fedllm.errors import ConfigError

#: Keys of the new app in order; a value of ``None`` stands for the key's own default.
_KEYS: dict[str, Scalar | None] = {
    "strategy": None, "client": None, "task": None, "rounds": 5, "seed": None,
    "model.name": None, "model.dtype": None, "model.quantization": None,
    "lora.rank": None, "lora.alpha": None, "lora.dropout": None, "lora.target-modules": None,
    "data.source": None, "data.test-file": None, "data.test-fraction": None, "data.text-column": None,
    "data.label-column": None, "data.prompt-column": None, "data.response-column": None,
    "data.max-length": 64, "data.train-rows": None, "data.test-rows": None,
    "data.partitioner": "dirichlet", "data.alpha": None,
    "train.learning-rate": 3e-3, "train.head-learning-rate": 1e-2, "train.batch-size": None,
    "train.local-steps": 10, "train.local-epochs": None,
    "server.fraction-train": 0.5, "server.quorum": None, "server.deadline": None,
    "server.evaluate-every": None, "wire.upload-codec": None, "wire.download-codec": None,
    "run.name": None, "run.root": None, "run.sinks": None,
    "simulation.clients": None, "simulation.cpus-per-client": None, "simulation.gpus-per-client": None,
}  # fmt: skip

_MAX_NAME = 32
_PYPROJECT = """\
[project]
name = "{name}"
version = "0.1.0"
description = "Federated fine-tuning of a language model with fedllm"
license = "Apache-2.0"
# Leave this empty: Flower would install what stands here into an environment of its own at every start.
dependencies = []

[tool.flwr.app]
publisher = "{publisher}"

[tool.flwr.app.components]
serverapp = "fedllm.server_app:app"
clientapp = "fedllm.client_app:app"

# Any of these, and every key of `fedllm list --keys`, can be set for one run: fedllm simulate . -c 'rounds=2'
[tool.flwr.app.config]
{config}"""

_README = """\
# {name}

Federated fine-tuning of a language model with fedllm on [Flower](https://flower.ai). This folder holds only a
configuration, `pyproject.toml`; the code is in fedllm.

```bash
fedllm simulate .                                   # simulated clients on this machine
fedllm simulate . -c 'strategy="fedadam" rounds=10' # another method
fedllm simulate . --resume NAME                     # go on with an interrupted run
```

Results are in `runs/NAME/`: `adapter/` (a PEFT adapter), `report.html`, `curves.png` and `metrics.csv`.

The same app runs by Flower's own command line, which needs the number of clients said once more:

```bash
flwr run . --federation-config 'num-supernodes={clients} client-resources-num-cpus=1'
```

To use data of your own, set `data.source` to a csv, jsonl or parquet file and name its columns.
"""


def create_app(folder: Path) -> list[Path]:
    """Write a new app.

    Args:
        folder: where to; its last part becomes the app's name.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the folder is not empty, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another path")
    name = app_name(folder.resolve().name)
    contents = {
        "pyproject.toml": _PYPROJECT.format(name=name, publisher="me", config=config_toml()),
        "README.md": _README.format(name=name, clients=RunConfig().simulation.clients),
        ".gitignore": "runs/\n__pycache__/\n*.fab\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in contents.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from None
    return [folder / file for file in contents]


def app_name(text: str) -> str:
    """An app name as Flower wants it: at most 32 lower-case letters, digits and dashes, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"app-{name}")[:_MAX_NAME].strip("-")


def config_toml() -> str:
    """``[tool.flwr.app.config]`` of a new app: each key under a comment with its meaning and default."""
    defaults, fields = RunConfig().to_flat(), RunConfig.keys()
    lines: list[str] = []
    table = ""
    for key, given in _KEYS.items():
        section, _, leaf = key.rpartition(".")
        if section != table:
            table = section
            lines += ["", f"[tool.flwr.app.config.{section}]"]
        value = defaults[key] if given is None else given
        lines += [f"# {comment(fields[key])} (default: {_toml(defaults[key])})", f"{leaf} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def comment(field: Any) -> str:
    """Description of a configuration key, with its choices if it has any."""
    choices = " | ".join(str(choice) for choice in choices_of(field))
    return f"{field.description}: {choices}" if choices else str(field.description)


def choices_of(field: Any) -> tuple[object, ...]:
    """The values that a key with a fixed set of them can have."""
    union = get_origin(field.annotation) in (Union, UnionType)  # "Literal[…] | None"
    kinds = get_args(field.annotation) if union else (field.annotation,)
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def _toml(value: Scalar) -> str:
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
