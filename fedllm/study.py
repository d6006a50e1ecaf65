"""The runs of a comparison: each is simulated once, resumed where it was cut short, and read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedllm import registry
from fedllm.app_config import read_app, read_saved, resolve
from fedllm.config import Scalar
from fedllm.errors import ConfigError, FedLLMError
from fedllm.history import RunHistory
from fedllm.report import load_run

_OF_THE_MACHINE = ("run.", "server.min-nodes")


def finished_run(app: Path, folder: Path, settings: str) -> RunHistory:
    """The history of the run in a folder; ``fedllm simulate`` makes it first, unless it is finished.

    Args:
        app: folder of the Flower app.
        folder: of the run, which is named after it.
        settings: keys of the configuration, as ``fedllm simulate -c`` takes them.

    Raises:
        ConfigError: the folder holds a run with another configuration, or a key or value is wrong.
        FedLLMError: the simulation failed; what it has finished is kept, and is gone on with in the next call.
    """
    folder = folder.resolve()
    begun = (folder / "events.jsonl").exists()
    if begun:
        _check_same(app, folder, settings)
    if not begun or load_run(folder).status != "finished":
        command = [sys.executable, "-m", "fedllm", "simulate", str(app)]
        command += ["--resume" if begun else "--name", folder.name]
        command += ["-c", settings, "-c", f'run.root="{folder.parent}"']
        if code := subprocess.run(command, check=False).returncode:
            raise FedLLMError(f"{folder.name} ended with exit code {code}, see above; finished runs are kept")
    return load_run(folder)


def _check_same(app: Path, folder: Path, settings: str) -> None:
    asked = registry.config_from_flat(resolve(read_app(app), [settings])).to_flat()
    made = read_saved(folder)
    if different := [key for key in sorted({*asked, *made}) if _differs(key, asked, made)]:
        key = different[0]
        raise ConfigError(
            f"{folder} holds a run with {key} = {made.get(key)!r}, and {asked.get(key)!r} is asked for"
            + (f" ({len(different)} keys differ)" if len(different) > 1 else "")
            + "; remove it or choose another folder"
        )


def _differs(key: str, asked: dict[str, Scalar], made: dict[str, Scalar]) -> bool:
    return not key.startswith(_OF_THE_MACHINE) and asked.get(key) != made.get(key)
