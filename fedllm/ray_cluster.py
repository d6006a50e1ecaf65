"""A Ray cluster that runs already: what its nodes have, asked before a simulation joins it.

Run as ``python -m fedllm.ray_cluster HOST:PORT`` this prints the nodes as JSON. Asking is left to a process of its own
because Ray changes the signal handlers of whoever connects.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass

from fedllm import __version__
from fedllm.errors import ConfigError

_REACH_TIMEOUT = 5.0
_ASK_TIMEOUT = 120.0


@dataclass(frozen=True)
class RayNode:
    """One node of a cluster; ``version`` is that of its fedllm, empty if there is none."""

    address: str
    cpus: float
    gpus: float
    version: str

    def places(self, cpus: int, gpus: float) -> int:
        """Clients with these shares that run here at a time; Ray never splits a share of a GPU over two."""
        by_cpu = int(self.cpus / cpus + 1e-9)
        if gpus <= 0:
            return by_cpu
        per_gpu = int(1 / gpus + 1e-9)
        return min(by_cpu, int(self.gpus) * per_gpu if per_gpu else int(self.gpus / gpus + 1e-9))


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster: ``address`` is that of its head, HOST:PORT."""

    address: str
    nodes: tuple[RayNode, ...]

    def places(self, cpus: int, gpus: float) -> int:
        """Clients with these shares that run at a time."""
        return sum(node.places(cpus, gpus) for node in self.nodes)

    def check(self, cpus: int, gpus: float, at_once: int) -> None:
        """Check that the nodes have this fedllm and room for clients with these shares.

        Args:
            cpus: CPUs of a client.
            gpus: share of a GPU of a client.
            at_once: clients that must run at the same time.

        Raises:
            ConfigError: a node has no fedllm or another one, or there is too little room.
        """
        for node in self.nodes:
            if node.version != __version__:
                raise ConfigError(
                    f"node {node.address} of the Ray cluster {self.address} has "
                    f"{f'fedllm {node.version}' if node.version else 'no fedllm'}, this machine has {__version__}; "
                    "install the same packages in the environment in which `ray start` runs there"
                )
        if (places := self.places(cpus, gpus)) < max(at_once, 1):
            has = "; ".join(f"{node.address}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in self.nodes)
            raise ConfigError(
                f"the Ray cluster {self.address} has room for {places} clients with {cpus} CPUs "
                f"(simulation.cpus-per-client) and {gpus:g} GPUs (simulation.gpus-per-client) at a time, expected at "
                f"least {max(at_once, 1)}; its nodes have {has}"
            )

    def summary(self) -> str:
        """The cluster in a few words."""
        cpus, gpus = sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes)
        return f"Ray cluster {self.address}: {len(self.nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"


def ask(address: str) -> RayCluster:
    """What the nodes of a cluster have.

    Args:
        address: HOST:PORT of the head, as ``ray start --head`` prints it; this machine must be a node of the cluster.

    Raises:
        ConfigError: not an address, nobody answers there, or Ray refuses this machine.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray-address: expected HOST:PORT, for example 10.0.0.1:6379, found {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address: nobody answers at {address} ({error}); start the cluster with `ray start --head`"
        ) from None
    try:
        told = subprocess.run(
            [sys.executable, "-m", "fedllm.ray_cluster", address],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"--ray-address: the Ray cluster {address} did not answer within {_ASK_TIMEOUT:g} s; "
            "`ray status` shows whether its nodes are alive and busy"
        ) from None
    if told.returncode != 0:
        reason = told.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ConfigError(
            f"--ray-address: cannot join the Ray cluster {address}: {reason[0]}; this machine must be one of its "
            f"nodes, too: `ray start --address={address}`"
        )
    found = json.loads(told.stdout.strip().splitlines()[-1])
    return RayCluster(address, tuple(RayNode(**node) for node in found))


def _nodes(address: str) -> list[RayNode]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def version() -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fedllm")
        except PackageNotFoundError:
            return ""

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # Without CPUs of its own the question is answered also by nodes that are busy.
        task = ray.remote(num_cpus=0)(version)
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        answers = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in alive
        ]
        return [
            RayNode(
                f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
                answer,
            )
            for node, answer in zip(alive, ray.get(answers), strict=True)
        ]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps([asdict(node) for node in _nodes(sys.argv[1])]))
