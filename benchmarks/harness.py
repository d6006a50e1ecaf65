"""What all benchmarks share: arguments, the machine's description, tables, and running a Flower app to its end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from rich.console import Console
from rich.table import Table

APPS = Path(__file__).parent / "apps"
console = Console(width=None if sys.stdout.isatty() else 160)
"""A log has no width of its own."""


class Progress:
    """What is finished, in a file that is written after every run.

    Args:
        path: the file.
        identity: what the results depend on; a file with another one is begun anew.
        empty: what the content is to begin with.
    """

    def __init__(self, path: Path, identity: str, **empty: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": identity, **empty}
        if path.is_file() and (stored := json.loads(path.read_text()))["identity"] == identity:
            self.content = stored

    def write(self) -> None:
        """Replace the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1))
        temporary.replace(self.path)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description in its own lines."""


def arguments(description: str, **extra: Any) -> argparse.Namespace:
    """Parse ``--json FILE``, ``--quick`` and ``--seed``.

    Args:
        description: of the benchmark.
        extra: further options: the default, or the default and a line of help; False makes a plain flag.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures, seeds and the machine here"
    )
    parser.add_argument("--quick", action="store_true", help="at most 10 minutes on 2 cores; same keys")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    for name, default in extra.items():
        value, told = default if isinstance(default, tuple) else (default, None)
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true", default=value, help=told)
        else:
            parser.add_argument(option, type=type(value), default=value, help=told)
    return parser.parse_args()


def chosen(asked: str, known: Sequence[str], option: str) -> list[str]:
    """Names that an option asks for, with commas, each once; all that are known if it names none."""
    names = [name.strip() for name in asked.split(",") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{option}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def machine() -> dict[str, str | int | float]:
    """The machine and the versions that a figure belongs to, as flat keys."""
    import flwr
    import torch
    import transformers

    return {
        "machine_cpus": len(os.sched_getaffinity(0)),
        "machine_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "machine_processor": platform.machine(),
        "machine_gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "flwr_version": flwr.__version__,
    }


def report(
    args: argparse.Namespace, figures: Mapping[str, Any], rows: Sequence[Sequence[object]], title: str
) -> None:
    """Print a table (first row: its head), say what machine it was, and write the JSON file if asked for."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(str(name), justify="left" if index == 0 else "right")
    for row in rows[1:]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    described = machine()
    console.print(", ".join(f"{key}={value}" for key, value in described.items()), style="dim")
    if args.json:
        content = {**figures, "seed": args.seed, "quick": args.quick, **described}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {args.json}")


class Finished:
    """What finished parts of a benchmark found, by their settings, so that an interrupted one goes on where it was.

    Args:
        file: JSON file; empty: nothing is kept.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file).expanduser() if file else None
        known = self._file is not None and self._file.is_file()
        self._found: dict[str, Any] = (
            json.loads(self._file.read_text("utf-8")) if self._file and known else {}
        )

    def get(self, settings: Mapping[str, Any]) -> Any:
        """What the part with exactly these settings found; None: it has not finished yet."""
        return self._found.get(json.dumps(settings, sort_keys=True))

    def put(self, settings: Mapping[str, Any], found: Any) -> None:
        """Keep what a part found, as JSON values."""
        self._found[json.dumps(settings, sort_keys=True)] = found
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")


def run_app(app: Path, federation: Mapping[str, int | float], timeout: float = 3600.0) -> float:
    """Run a Flower app under a SuperLink of its own; returns the seconds that it took.

    Raises:
        RuntimeError: the run failed; the end of its log is part of the message.
    """
    from fedllm.superlink import PrivateSuperLink

    started = time.perf_counter()
    with PrivateSuperLink() as link:
        run_id = link.start_run(app, federation)
        while not (status := link.status(run_id)).finished:
            if time.perf_counter() - started > timeout:
                raise RuntimeError(f"{app.name} did not finish within {timeout:g} s")
            time.sleep(10)  # asking starts a process of its own, which would compete with what is measured
        if not status.completed:
            raise RuntimeError(
                f"{app.name}: {status.status} {status.details}\n{link.app_log(run_id)[-4000:]}"
            )
    return time.perf_counter() - started


def write_app(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write fedllm's own app with this configuration into a folder that does not exist yet."""
    flower = {
        "publisher": "benchmarks",
        "components": {"serverapp": "fedllm.server_app:app", "clientapp": "fedllm.client_app:app"},
        "config": config,
    }
    project = {"name": "benchmark", "version": "0.1.0", "dependencies": []}
    folder.mkdir(parents=True)
    content = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flower}}})
    (folder / "pyproject.toml").write_text(content, encoding="utf-8")
    return folder


def stage(app: str, target: Path, config: Mapping[str, Any]) -> Path:
    """Copy one of the benchmark apps and set keys of its configuration."""
    folder = target / app
    shutil.copytree(APPS / app, folder, ignore=shutil.ignore_patterns("__pycache__"))
    pyproject = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    settings = pyproject["tool"]["flwr"]["app"]["config"]
    if unknown := set(config) - set(settings):
        raise KeyError(f"{app} has no configuration keys {unknown}")
    settings.update(config)
    (folder / "pyproject.toml").write_text(tomli_w.dumps(pyproject), encoding="utf-8")
    return folder
