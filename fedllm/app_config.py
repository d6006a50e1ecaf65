"""From an app folder and ``-c`` overrides to a :class:`~fedllm.config.RunConfig` with absolute paths.

Flower resolves relative paths against the directory in which its SuperLink was started and accepts only
overrides of keys that the app's ``pyproject.toml`` already has. Here a path means what its writer sees (the
app's folder, or the directory of the command line), and every known key can be overridden.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedllm.config import RunConfig, Scalar
from fedllm.errors import ConfigError

PATH_KEYS = ("data.source", "data.test-file", "model.name")
_LEFT_OUT = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "*.pyc",
    ".*_cache",
    "*.egg-info",
    "runs",
    "node_modules",
)
_MAX_FILE_BYTES = 2_000_000
_PAIR = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")
_EXAMPLE = """-c 'rounds=5 data.alpha=0.1 strategy="fedadam"'"""


@dataclass(frozen=True)
class App:
    """A Flower app on disk.

    Attributes:
        folder: absolute path of the app.
        pyproject: the parsed ``pyproject.toml``.
    """

    folder: Path
    pyproject: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``project.name``."""
        return str(self.pyproject["project"]["name"])

    @property
    def config(self) -> dict[str, Scalar]:
        """``[tool.flwr.app.config]`` with dotted keys."""
        return flatten(
            self.pyproject["tool"]["flwr"]["app"].get("config", {}), str(self.folder / "pyproject.toml")
        )


def read_app(folder: Path) -> App:
    """Read an app folder.

    Raises:
        ConfigError: no such folder, no ``pyproject.toml`` in it, or not that of a Flower app.
    """
    hint = f"`fedllm new {folder}` writes a minimal app"
    path = folder / "pyproject.toml"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder with a Flower app; {hint}")
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no pyproject.toml, so it is not a Flower app; {hint} in a new folder"
        )
    pyproject = _parse(path)
    components = pyproject.get("tool", {}).get("flwr", {}).get("app", {}).get("components", {})
    for key, table in (("project.name", pyproject.get("project", {}).get("name")),
                       ("project.version", pyproject.get("project", {}).get("version")),
                       ("tool.flwr.app.components.serverapp", components.get("serverapp")),
                       ("tool.flwr.app.components.clientapp", components.get("clientapp"))):  # fmt: skip
        if not isinstance(table, str):
            raise ConfigError(
                f"{path} is not that of a Flower app: {key} is missing; compare it with `fedllm new`"
            )
    return App(folder.resolve(), pyproject)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Scalar]:
    """Read ``-c`` values: space-separated TOML pairs, or a single TOML file.

    Raises:
        ConfigError: not TOML, not a scalar, or a file next to pairs.
    """
    if len(overrides) == 1 and overrides[0].endswith(".toml"):
        path = Path(overrides[0]).expanduser()
        if not path.is_file():
            raise ConfigError(f"-c {overrides[0]}: no such file")
        return flatten(_parse(path), str(path))
    flat: dict[str, Scalar] = {}
    for text in overrides:
        if text.endswith(".toml"):
            raise ConfigError(f"-c {text}: give either one TOML file or key=value pairs, not both")
        rest = _PAIR.sub("", text).strip()
        if rest:
            raise ConfigError(f"-c {text!r}: cannot read {rest!r}; expected pairs like {_EXAMPLE}")
        for key, value in _PAIR.findall(text):
            flat |= flatten(_parse_pair(key, value), f"-c {text!r}")
    return flat


def resolve(
    app: App, overrides: Sequence[str], *, saved: Mapping[str, Scalar] | None = None
) -> dict[str, Scalar]:
    """The app's configuration with overrides applied and paths made absolute; unset keys stay unset.

    Args:
        app: the app, whose relative paths count from its folder where they exist there.
        overrides: ``-c`` values, whose relative paths count from the current directory.
        saved: configuration of an earlier run that takes the place of the app's own.
    """
    given = parse_overrides(overrides)
    base = dict(saved) if saved is not None else app.config
    flat = {**_absolute(base, app.folder), **_absolute(given, Path.cwd())}
    flat["run.root"] = str(Path(str(flat.get("run.root", RunConfig().run.root))).expanduser().resolve())
    return flat


def read_saved(run_dir: Path) -> dict[str, Scalar]:
    """The configuration that a run has saved in its folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = run_dir / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"cannot resume {run_dir}: {path.name} is missing there, so no run of that name has started"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"cannot resume {run_dir}: {path} is damaged ({error})") from None
    return flatten(saved, str(path))


def flatten(table: Mapping[str, Any], origin: str) -> dict[str, Scalar]:
    """Turn nested tables into dotted keys.

    Raises:
        ConfigError: a value that is neither a scalar nor a table.
    """
    flat: dict[str, Scalar] = {}
    for key, value in _leaves(table):
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"{origin}: {key} must be a string, number or boolean, found {value!r}"
                + ('; write a list as one string with commas: "a,b"' if isinstance(value, list) else "")
            )
        flat[key] = value
    return flat


def nest(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, leaf = key.split(".")
        target = nested
        for table in tables:
            target = target.setdefault(table, {})
        target[leaf] = value
    return nested


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _parse_pair(key: str, value: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"-c {key}={value}: the value is not TOML; a string needs quotes of its own, as in {_EXAMPLE}"
        ) from None


def _absolute(flat: Mapping[str, Scalar], base: Path) -> dict[str, Scalar]:
    result = dict(flat)
    for key in PATH_KEYS:
        value = result.get(key)
        if isinstance(value, str) and value and (path := base / Path(value).expanduser()).exists():
            # A hub id such as `org/name` is a path only where something of that name exists.
            result[key] = str(path.resolve())
    return result


def stage(app: App, config: RunConfig, target: Path) -> Path:
    """Copy an app with its complete resolved configuration, so that Flower gets what was checked.

    Args:
        app: the app.
        config: what ``[tool.flwr.app.config]`` of the copy shall say.
        target: folder that must not exist.

    Returns:
        ``target``. Large files, caches, virtual environments and run folders are left out: Flower bundles an
        app of 10 MB at most, and data is read from where it lies.
    """
    shutil.copytree(app.folder, target, ignore=_left_out, symlinks=True)
    pyproject = json.loads(json.dumps(app.pyproject, default=str))
    pyproject["tool"]["flwr"]["app"]["config"] = nest(config.to_flat())
    (target / "pyproject.toml").write_text(tomli_w.dumps(pyproject), encoding="utf-8")
    return target


def _left_out(folder: str, names: list[str]) -> set[str]:
    left_out = {name for pattern in _LEFT_OUT for name in fnmatch.filter(names, pattern)}
    for name in set(names) - left_out:
        path = Path(folder) / name
        if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
            left_out.add(name)
    return left_out
