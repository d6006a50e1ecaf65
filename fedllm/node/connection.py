"""A federation folder: how commands reach a SuperLink, which nodes have been registered, which runs started.

It is a ``FLWR_HOME`` with one connection, so Flower's own commands work on it, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedllm.errors import ConfigError, FedLLMError
from fedllm.flower import FlowerCommands

NAME = "federation"
DEFAULT_FOLDER = Path(".fedllm")
_BOOK = "federation.json"


@dataclass(frozen=True)
class Node:
    """A registered node, as the SuperLink knows it.

    Attributes:
        node_id: Flower's id, as text.
        name: under which it was registered from this folder, else empty.
        status: ``registered`` (never seen), ``online``, ``offline`` or ``unregistered``.
        changed: when the status changed last, UTC, as Flower writes it; empty if never.
        seconds_online: since it came online; 0 if it is not.
    """

    node_id: str
    name: str
    status: str
    changed: str
    seconds_online: float


class FederationFolder(FlowerCommands):
    """Flower's commands on the SuperLink of a federation folder, and what the folder remembers.

    Args:
        folder: made by :meth:`create`.

    Raises:
        ConfigError: it is not a federation folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.resolve(), NAME)
        self._book: dict[str, Any] = {"nodes": {}, "runs": {}}
        try:
            self._book |= json.loads((self.home / _BOOK).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} is not a federation folder; `fedllm up` starts a federation on this machine, "
                "`fedllm connect` makes a folder for a SuperLink elsewhere"
            ) from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.home / _BOOK} is damaged: {error}") from None

    @classmethod
    def create(cls, folder: Path, address: str, root_certificates: Path, *, local: bool) -> FederationFolder:
        """Make a federation folder.

        Args:
            folder: gets ``config.toml`` and ``federation.json``.
            address: host:port of the SuperLink's API for commands.
            root_certificates: ``ca.crt``.
            local: whether the SuperLink runs on this machine, so that run folders can be read.

        Raises:
            ConfigError: the folder is one already, or the certificate does not exist.
        """
        if (folder / _BOOK).exists():
            raise ConfigError(f"{folder} is a federation folder already; choose another one")
        if not root_certificates.is_file():
            raise ConfigError(f"the certificate {root_certificates} does not exist")
        folder.mkdir(parents=True, exist_ok=True)
        connection = {"address": address, "root-certificates": str(root_certificates.resolve())}
        config = {"superlink": {"default": NAME, NAME: connection}}
        (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        (folder / _BOOK).write_text(json.dumps({"local": local}), encoding="utf-8")
        return cls(folder)

    @property
    def local(self) -> bool:
        """Whether the SuperLink runs on this machine."""
        return bool(self._book["local"])

    @property
    def runs(self) -> dict[str, str]:
        """Run folder by Flower's run id, of runs started from here."""
        return dict(self._book["runs"])

    @property
    def names(self) -> dict[str, str]:
        """Flower's id by name, of nodes registered from here."""
        return dict(self._book["nodes"])

    def remember_run(self, run_id: str, run_dir: Path) -> None:
        """Note where a run leaves its results."""
        self._book["runs"][run_id] = str(run_dir)
        self._save()

    def nodes(self) -> list[Node]:
        """All nodes that the SuperLink knows, in the order of their registration.

        Raises:
            SuperLinkError: it cannot be asked.
        """
        names = {node_id: name for name, node_id in self._book["nodes"].items()}
        return [
            Node(
                str(told["node-id"]),
                names.get(str(told["node-id"]), ""),
                told["status"],
                _known({"online": told["online-at"], "offline": told["offline-at"],
                        "unregistered": told["deleted-at"]}.get(told["status"], "")),
                float(told["online-elapsed"]) if told["status"] == "online" else 0.0,
            )
            for told in self.call("supernode", "list", self.connection)["nodes"]
        ]  # fmt: skip

    def register(self, public_key: Path, name: str) -> str:
        """Admit a node and return its id.

        Raises:
            ConfigError: the file is missing, or another node has this name.
            SuperLinkError: Flower refused, for instance because the key is registered already.
        """
        if not public_key.is_file():
            raise ConfigError(
                f"the public key {public_key} does not exist; `fedllm certs node` makes a key pair"
            )
        if name in self._book["nodes"]:
            raise ConfigError(
                f"a node {name!r} is registered already (id {self._book['nodes'][name]}); "
                "revoke it, or choose another --name"
            )
        reply = self.call("supernode", "register", str(public_key), self.connection, "--name", name)
        node_id = str(reply["node-id"])
        self._book["nodes"][name] = node_id
        self._save()
        return node_id

    def revoke(self, name_or_id: str) -> str:
        """Bar a node for good and return its id; its key cannot be registered again.

        Raises:
            ConfigError: no such name here, and not a number either.
            SuperLinkError: Flower refused.
        """
        node_id = self._book["nodes"].get(name_or_id, name_or_id)
        if not node_id.isdecimal():
            known = ", ".join(self._book["nodes"]) or "none"
            raise ConfigError(
                f"no node {name_or_id!r} was registered from {self.home} (names: {known}); "
                "`fedllm nodes list` shows the ids"
            )
        self.call("supernode", "unregister", node_id, self.connection)
        self._book["nodes"] = {name: kept for name, kept in self._book["nodes"].items() if kept != node_id}
        self._save()
        return str(node_id)

    def _save(self) -> None:
        partial = self.home / f"{_BOOK}.part"
        try:
            partial.write_text(json.dumps(self._book, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.home / _BOOK)
        except OSError as error:
            raise FedLLMError(f"cannot write {self.home / _BOOK}: {error.strerror}") from None


def _known(text: str) -> str:
    return "" if text == "N/A" else text
