"""``node.toml`` and ``superlink.toml``: what the two sides of a deployment are told, checked before anything starts.

Relative paths count from the folder of the file, wherever the command is run.
"""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from fedllm.config import Section, describe_validation_error, kebab
from fedllm.errors import ConfigError
from fedllm.lora.modes import Rung

WORKER_SOCKET = "worker-socket"
_SOCKET_LENGTH = 107  # bytes that Linux allows for the path of a Unix socket
_SIZE = re.compile(r"\d+(\.\d+)?\s*([kMGT]i?B|B)")


def _from_file(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("folder", Path.cwd())
    return Path(base / path.expanduser()).resolve()


def _host_and_port(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "://" in address:
        raise ValueError("expected host:port, for example superlink.example.org:9092")
    return address


def _size(text: str) -> str:
    if text and not _SIZE.fullmatch(text):
        raise ValueError("expected a size such as 8GB")
    return text


FilePath = Annotated[Path, AfterValidator(_from_file)]
Address = Annotated[str, AfterValidator(_host_and_port)]
Size = Annotated[str, AfterValidator(_size)]
Port = Annotated[int, Field(ge=0, le=65535)]


class NodeSettings(Section):
    """``node.toml``: one machine that trains."""

    superlink: Address = Field(description="host:port of the SuperLink for nodes, usually port 9092")
    root_certificates: FilePath = Field(description="certificate of the authority, ca.crt")
    private_key: FilePath = Field(description="the node's private key, NAME.key of `fedllm certs node`")
    name: str = Field(
        "",
        max_length=128,
        pattern=r"^[^\"'\s]*$",
        description="name in logs, events and seeds; empty: the partition's number",
    )
    state: FilePath = Field(
        Path("state"), description="folder of logs and sockets; one supervisor at a time uses it"
    )
    data_file: FilePath | None = Field(None, description="the node's own data: csv, jsonl or parquet")
    partition_id: int | None = Field(
        None, ge=0, description="without a file of its own: which part of data.source"
    )
    num_partitions: int | None = Field(None, ge=1, description="of how many parts")
    device: str = Field(
        "",
        pattern=r"^(auto|cpu|cuda(:\d+)?)?$",
        description="auto, cpu, cuda or cuda:N; empty: the run decides",
    )
    gradient_mode: Rung | Literal[""] = Field(
        "", description="how the node gets gradients where the strategy is spry; empty: the run decides"
    )
    memory_megabytes: float | None = Field(
        None, gt=0, description="memory that a training may take, in MB; unset: all"
    )
    flops_per_second: float | None = Field(None, gt=0, description="speed; unset: measured")
    upload_rate: float | None = Field(
        None, gt=0, description="bytes a second to the server; unset: 100 Mbit/s"
    )
    download_rate: float | None = Field(
        None, gt=0, description="bytes a second from the server; unset: 100 Mbit/s"
    )
    threads: int = Field(0, ge=0, description="CPU threads of a training; 0: all CPUs")
    worker: bool = Field(True, description="keep a resident worker, which holds the model between messages")
    worker_memory: Size = Field(
        "", description="memory for models that the worker keeps loaded, for example 8GB"
    )
    metrics_port: Port = Field(0, description="port of the worker's Prometheus metrics; 0: none")
    runtime_port: Port = Field(0, description="loopback port of Flower's Runtime API; 0: a free one")
    health_address: Address | None = Field(
        None, description="host:port where the SuperNode answers gRPC health"
    )

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if (self.partition_id is None) != (self.num_partitions is None):
            raise ValueError("partition-id and num-partitions go together: give both or none")
        if self.data_file is None and self.partition_id is None:
            raise ValueError("the node has no data: give data-file, or partition-id and num-partitions")
        if self.data_file is not None and self.partition_id is not None:
            raise ValueError("give data-file, or partition-id and num-partitions, not both")
        if (
            self.partition_id is not None
            and self.num_partitions is not None
            and self.partition_id >= self.num_partitions
        ):
            raise ValueError(
                f"partition-id counts from 0, so it must be less than num-partitions ({self.num_partitions})"
            )
        return self

    @property
    def title(self) -> str:
        """Name of the node for people."""
        return self.name or (
            str(self.partition_id) if self.partition_id is not None else self.private_key.stem
        )

    @property
    def socket(self) -> Path:
        """Unix socket of the resident worker."""
        return self.state / "worker.sock"

    @property
    def launcher_socket(self) -> Path:
        """Unix socket of the launcher."""
        return self.state / "launcher.sock"

    def node_config(self) -> dict[str, str | int | float]:
        """What Flower is told as ``--node-config``."""
        told: dict[str, str | int | float | None] = {
            "name": self.name or (self.title if self.partition_id is None else None),
            "data-file": str(self.data_file) if self.data_file is not None else None,
            "partition-id": self.partition_id,
            "num-partitions": self.num_partitions,
            "device": self.device or None,
            "gradient-mode": self.gradient_mode or None,
            "memory-megabytes": self.memory_megabytes,
            "flops-per-second": self.flops_per_second,
            "upload-rate": self.upload_rate,
            "download-rate": self.download_rate,
            WORKER_SOCKET: str(self.socket) if self.worker else None,
        }
        return {key: value for key, value in told.items() if value is not None}


class SuperLinkSettings(Section):
    """``superlink.toml``: the machine that nodes connect to and that runs the server's side."""

    certificate: FilePath = Field(description="server.crt of `fedllm certs init`")
    private_key: FilePath = Field(description="server.key")
    root_certificates: FilePath = Field(description="ca.crt")
    state: FilePath = Field(Path("state"), description="folder of the database and logs")
    runs_from: FilePath = Field(
        Path("."), description="folder from which a relative run.root of a run counts"
    )
    fleet_address: Address = Field("0.0.0.0:9092", description="host:port on which nodes are served")
    api_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="host of the API for commands: whoever reaches it can start code on this machine",
    )
    api_port: Port = Field(8000, description="its port")
    health_address: Address | None = Field(
        None, description="host:port where the SuperLink answers gRPC health"
    )
    threads: int = Field(0, ge=0, description="CPU threads of the server's side; 0: all CPUs")

    @property
    def database(self) -> Path:
        """Where the SuperLink keeps nodes, runs and messages."""
        return self.state / "superlink.db"


Settings = TypeVar("Settings", NodeSettings, SuperLinkSettings)


def read_node(path: Path) -> NodeSettings:
    """Read ``node.toml`` and check that the files that it names exist.

    Raises:
        ConfigError: unknown key, wrong value, or a missing file; key and file are named.
    """
    settings = _read(path, NodeSettings)
    _need_files(path, settings, ("root_certificates", "private_key", "data_file"))
    for socket in (settings.socket, settings.launcher_socket) if settings.worker else ():
        if (length := len(str(socket).encode())) > _SOCKET_LENGTH:
            raise ConfigError(
                f"{path}: state: the socket {socket} has {length} bytes, but Linux allows {_SOCKET_LENGTH}; "
                "choose a shorter folder"
            )
    return settings


def read_superlink(path: Path) -> SuperLinkSettings:
    """Read ``superlink.toml`` and check that the files that it names exist.

    Raises:
        ConfigError: unknown key, wrong value, or a missing file; key and file are named.
    """
    settings = _read(path, SuperLinkSettings)
    _need_files(path, settings, ("certificate", "private_key", "root_certificates", "runs_from"))
    return settings


def example(kind: str) -> str:
    """A commented sample of ``node`` or ``superlink``."""
    return files("fedllm").joinpath(f"templates/{kind}.toml").read_text(encoding="utf-8")


def _read(path: Path, kind: type[Settings]) -> Settings:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        command = "node" if kind is NodeSettings else "superlink"
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; `fedllm {command} --example` prints a sample"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    try:
        return kind.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        message = describe_validation_error(error).removeprefix("invalid configuration: ")
        known = ", ".join(kebab(name) for name in kind.model_fields)
        hint = f"; known keys: {known}" if any(e["type"] == "extra_forbidden" for e in error.errors()) else ""
        raise ConfigError(f"{path}: {message}{hint}") from None


def _need_files(path: Path, settings: Section, names: tuple[str, ...]) -> None:
    for name in names:
        file = getattr(settings, name)
        if file is not None and not file.exists():
            raise ConfigError(f"{path}: {kebab(name)}: {file} does not exist")
