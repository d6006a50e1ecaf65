"""The runs of a comparison: each is simulated once, resumed where it was cut short, and read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedllm import registry
from fedllm.app_config import read_app, read_saved, resolve
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedLLMError
from fedllm.history import RunHistory
from fedllm.report import load_run


def checked(app: Path, settings: str) -> RunConfig:
    """The configuration of a run; asked for all runs of a comparison, a wrong one is found before the first is made.

    Args:
        app: folder of the Flower app.
        settings: pairs of keys and values, as ``fedllm simulate -c`` takes them.

    Raises:
        ConfigError: a key or value is wrong, or they do not go together.
        RegistryError: a plug-in that cannot be found.
    """
    config = registry.config_from_flat(resolve(read_app(app), [settings]))
    registry.check(config)
    return config


def finished_run(app: Path, folder: Path, settings: str) -> RunHistory:
    """The history of the run in a folder; ``fedllm simulate`` makes it first, unless it is finished.

    Args:
        app: folder of the Flower app.
        folder: of the run, which is named after it.
        settings: pairs of keys and values, as ``fedllm simulate -c`` takes them.

    Raises:
        ConfigError: a key or value is wrong, or the folder holds a run whose numbers another configuration decided.
        RegistryError: a plug-in that cannot be found.
        FedLLMError: the simulation failed; what it has finished is kept, and is gone on with in the next call.
    """
    folder = folder.resolve()
    asked = checked(app, settings)
    begun = (folder / "events.jsonl").exists()
    if begun:
        _check_same(folder, asked)
    if not begun or load_run(folder).status != "finished":
        command = [sys.executable, "-m", "fedllm", "simulate", str(app)]
        command += ["--resume" if begun else "--name", folder.name]
        command += ["-c", settings, "-c", f'run.root="{folder.parent}"']
        if code := subprocess.run(command, check=False).returncode:
            raise FedLLMError(f"{folder.name} ended with exit code {code}, see above; finished runs are kept")
    return load_run(folder)


def _check_same(folder: Path, asked: RunConfig) -> None:
    made = registry.config_from_flat(read_saved(folder))
    idle = frozenset({*asked.plugins, *made.plugins} - _plugins(asked) - _plugins(made))
    ours, theirs = ({**config.deciding(idle), "rounds": config.rounds} for config in (asked, made))
    if different := [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]:
        key = different[0]
        raise ConfigError(
            f"{folder} holds a run with {key} = {theirs.get(key)!r}, and {ours.get(key)!r} is asked for"
            + (f" ({len(different)} keys differ)" if len(different) > 1 else "")
            + "; remove it or choose another folder"
        )


def _plugins(config: RunConfig) -> set[str]:
    """Tables of the plug-ins that take part in the numbers."""
    refs = (config.strategy, config.client, config.defence, config.attack)
    return {registry.parameter_table(ref) for ref in refs}
