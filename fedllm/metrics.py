"""An HTTP endpoint for Prometheus, of a run's server and of a node's worker (extra ``prometheus``).

Only this machine can read it unless ``FEDLLM_METRICS_HOST`` names another address to bind, such as ``0.0.0.0`` in a
container: it speaks plain HTTP without a password.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError, FedLLMError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

HOST_VARIABLE = "FEDLLM_METRICS_HOST"
PORT_VARIABLE = "FEDLLM_METRICS_PORT"
LOOPBACK = "127.0.0.1"
HIGHEST_PORT = 65535


def default_host() -> str:
    """Address to bind unless somebody says otherwise."""
    return os.environ.get(HOST_VARIABLE) or LOOPBACK


def wanted_port() -> int | None:
    """The port on which the operator of this machine wants the metrics of every run; None: nobody asks for them.

    Raises:
        ConfigError: ``FEDLLM_METRICS_PORT`` is not a port.
    """
    text = os.environ.get(PORT_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) <= HIGHEST_PORT:
        raise ConfigError(f"{PORT_VARIABLE}: expected a port from 1 to {HIGHEST_PORT}, found {text!r}")
    return int(text)


def new_registry() -> CollectorRegistry:
    """An empty registry of ``prometheus-client``.

    Raises:
        FedLLMError: the package is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry
    except ImportError as error:
        raise FedLLMError(
            f"metrics need a package that is missing ({error}); install the extra: pip install "
            '"fedllm[prometheus]"'
        ) from None
    return CollectorRegistry()


def serve(registry: CollectorRegistry, port: int, host: str | None = None) -> Callable[[], None]:
    """Answer ``GET /metrics`` from a thread, and return the function that ends it and frees the port.

    Args:
        registry: what to show.
        port: TCP port.
        host: address to bind; default: :func:`default_host`.

    Raises:
        FedLLMError: the address cannot be bound.
    """
    from prometheus_client import start_http_server

    host = host or default_host()
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise FedLLMError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose another port"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
