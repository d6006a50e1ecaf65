"""A whole federation on this machine, over TLS with authenticated nodes: for trying, for tests, for benchmarks.

``fedllm up`` and ``fedllm down`` start and stop a :class:`Federation`; everything lies in one folder::

    config.toml federation.json    how commands reach the SuperLink
    certs/                         authority, server certificate, node keys
    superlink/superlink.toml       and its state, database included
    node-0/node.toml …             and the state of each node
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from fedllm.errors import ConfigError
from fedllm.events import Event, read_events
from fedllm.flower import RunStatus, tail
from fedllm.node import certs
from fedllm.node.connection import FederationFolder
from fedllm.node.member import STARTUP, FederationError, Member
from fedllm.node.settings import read_node, read_superlink
from fedllm.node.superlink import SUPERLINK
from fedllm.processes import start_guard
from fedllm.superlink import free_port

_FOLDERS = "node-{}"


@dataclass(frozen=True)
class FederationRun:
    """A run that has been started on a federation of this machine.

    Attributes:
        run_id: Flower's.
        folder: of the run's results.
    """

    run_id: str
    folder: Path
    federation: FederationFolder

    def events(self) -> list[Event]:
        """What has happened so far; empty before the ServerApp has begun."""
        path = self.folder / "events.jsonl"
        return read_events(path) if path.is_file() else []

    def wait_for_event(self, name: str, timeout: float = STARTUP, **fields: Any) -> Event:
        """Wait for an event of this name and these fields, for example ``("round-started", round=2)``.

        Raises:
            FederationError: it has not happened after ``timeout`` seconds.
        """
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            for event in self.events():
                if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                    return event
            time.sleep(0.1)
        raise FederationError(f"run {self.folder.name}: no {name} {fields or ''} after {timeout:g} s")

    def wait(self, timeout: float = 600.0) -> RunStatus:
        """Wait for the end and return what Flower says of it.

        Raises:
            FederationError: it has not ended after ``timeout`` seconds; with the end of its log.
        """
        ends = time.monotonic() + timeout
        while not (status := self.federation.status(self.run_id)).finished:
            if time.monotonic() > ends:
                log = tail(self.federation.app_log(self.run_id))
                raise FederationError(
                    f"run {self.folder.name} is {status.status} after {timeout:g} s:\n{log}"
                )
            time.sleep(2)
        return status


class Federation:
    """A TLS-secured, authenticated federation on the loopback interface of this machine.

    As a context manager it starts on entry and stops on exit, also if the process that has entered it is killed::

        with Federation(folder, nodes=3) as federation:
            run = federation.start_run(app, ["rounds=3"], name="first")
            run.wait_for_event("round-started", round=2)
            os.kill(federation.nodes[1].pid("worker"), signal.SIGKILL)
            assert run.wait().completed

    Args:
        folder: of certificates, state and logs; made if there is none, else used as it is.
        nodes: how many; None: as many as the folder has.
        node_settings: further keys of every ``node.toml``, for example ``{"worker": False, "threads": 1}``; or a
            function from a node's number to its keys.
        superlink_settings: further keys of ``superlink.toml``.

    Raises:
        ConfigError: the folder is not empty and not a federation's, or has another number of nodes.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int | None = None,
        *,
        node_settings: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None,
        superlink_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.superlink = Member(self.folder / SUPERLINK, SUPERLINK)
        found = len(list(self.folder.glob("node-*/node.toml")))
        if not self.superlink.settings_file.is_file():
            if nodes is None:
                raise ConfigError(f"{folder} holds no federation of this machine; `fedllm up` makes one")
            self._create(nodes, node_settings, superlink_settings or {})
            found = nodes
        elif nodes is not None and nodes != found:
            raise ConfigError(
                f"{folder} holds a federation of {found} nodes, asked for {nodes}; "
                "`fedllm down --remove` removes it, or choose another folder"
            )
        self.nodes = [Member(self.folder / _FOLDERS.format(index), "node") for index in range(found)]
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._guard = start_guard(*(home for member in self._members() for home in member.homes))
        try:
            self.start()
        except BaseException:
            self._guard.communicate()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            assert self._guard is not None
            self._guard.communicate()

    @property
    def connection(self) -> FederationFolder:
        """Commands on the SuperLink: runs, nodes."""
        return FederationFolder(self.folder)

    @property
    def running(self) -> bool:
        """Whether any of its supervisors runs."""
        return any(member.supervisor is not None for member in self._members())

    def start(self, timeout: float = STARTUP) -> None:
        """Start SuperLink and nodes, register nodes that are not yet, and wait until all are connected.

        Raises:
            FederationError: something runs already, or does not come up in ``timeout`` seconds; all is stopped then.
        """
        if self.running:
            raise FederationError(f"a federation runs in {self.folder} already; `fedllm down` ends it")
        try:
            self.superlink.start()
            self.superlink.wait_until_ready(timeout)
            self._register()
            for node in self.nodes:
                node.start()
            for node in self.nodes:
                node.wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of it; folder, database and logs stay."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.stop()
        self.superlink.stop()

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder)

    def start_run(
        self,
        app: Path,
        overrides: Sequence[str] = (),
        *,
        name: str | None = None,
        resume: str | None = None,
        rounds: int | None = None,
    ) -> FederationRun:
        """Check an app, start it, and return at once; arguments as :func:`fedllm.node.deployed.prepare`.

        Raises:
            FedLLMError: as :func:`fedllm.node.deployed.prepare` and ``start``.
        """
        from fedllm.node import deployed

        prepared = deployed.prepare(app, self.folder, overrides, name=name, resume=resume, rounds=rounds)
        return FederationRun(deployed.start(prepared), prepared.job.run_dir, prepared.federation)

    def wait_for_online(self, count: int, timeout: float = STARTUP) -> None:
        """Wait until so many nodes are online, as the SuperLink sees it.

        Raises:
            FederationError: they are not after ``timeout`` seconds.
        """
        ends = time.monotonic() + timeout
        while (online := sum(node.status == "online" for node in self.connection.nodes())) < count:
            if time.monotonic() > ends:
                raise FederationError(f"{online} of {count} nodes are online after {timeout:g} s")
            time.sleep(1)

    def _members(self) -> Sequence[Member]:
        return [self.superlink, *self.nodes]

    def _register(self) -> None:
        connection = self.connection
        known = connection.names
        for index, node in enumerate(self.nodes):
            if node.folder.name not in known:
                connection.register(self.folder / "certs" / f"node-{index}.pub", node.folder.name)

    def _create(
        self,
        nodes: int,
        node_settings: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None,
        superlink_settings: Mapping[str, Any],
    ) -> None:
        if nodes < 1:
            raise ConfigError(f"a federation needs at least one node, found {nodes}")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and holds no federation; choose another folder")
        folder = self.folder / "certs"
        certs.create_authority(folder)
        authority = folder / certs.CA_CERTIFICATE
        api_port, fleet_port = free_port(), free_port()
        while fleet_port == api_port:
            fleet_port = free_port()
        fleet = f"127.0.0.1:{fleet_port}"
        FederationFolder.create(self.folder, f"127.0.0.1:{api_port}", authority, local=True)
        self._write(
            self.superlink.settings_file,
            {
                "certificate": str(folder / certs.SERVER_CERTIFICATE),
                "private-key": str(folder / certs.SERVER_KEY),
                "root-certificates": str(authority),
                "fleet-address": fleet,
                "api-port": api_port,
                **superlink_settings,
            },
        )
        read_superlink(self.superlink.settings_file)
        for index in range(nodes):
            name = _FOLDERS.format(index)
            certs.create_node_key(folder, name)
            given = node_settings(index) if callable(node_settings) else node_settings or {}
            own_data = {} if "data-file" in given else {"partition-id": index, "num-partitions": nodes}
            path = self.folder / name / "node.toml"
            self._write(
                path,
                {
                    "superlink": fleet,
                    "root-certificates": str(authority),
                    "private-key": str(folder / f"{name}.key"),
                    **own_data,
                    **given,
                },
            )
            read_node(path)

    def _write(self, path: Path, settings: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(settings), encoding="utf-8")
