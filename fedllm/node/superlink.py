"""The server's side: Flower's SuperLink with TLS, node authentication and a database on disk, kept running."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from fedllm.flower import check_deployable, executable
from fedllm.node.settings import SuperLinkSettings
from fedllm.node.supernode import part_environment
from fedllm.node.supervise import Backoff, Part, Supervisor

SUPERLINK = "superlink"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}


def supervisor(
    settings: SuperLinkSettings, *, backoff: Backoff | None = None, echo: Callable[[str], None] | None = None
) -> Supervisor:
    """The supervisor of a SuperLink; its :meth:`~Supervisor.run` returns after SIGTERM.

    Raises:
        SuperLinkError: Flower is not installed, or not in a version that can be deployed.
    """
    check_deployable()
    return Supervisor("superlink", [superlink_part(settings)], settings.state, backoff=backoff, echo=echo)


def superlink_part(settings: SuperLinkSettings) -> Part:
    """Flower's SuperLink, which starts the ServerApps of runs itself."""
    command = [
        executable("flower-superlink"),
        "--ssl-certfile", str(settings.certificate),
        "--ssl-keyfile", str(settings.private_key),
        "--ssl-ca-certfile", str(settings.root_certificates),
        "--enable-supernode-auth",
        "--database", str(settings.database),
        "--isolation", "subprocess",
        "--fleet-api-type", "grpc-rere",
        "--fleet-api-address", settings.fleet_address,
        "--host", settings.api_host,
        "--port", str(settings.api_port),
        # An app's dependencies would be installed into an environment of their own; nodes and server have fedllm.
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if settings.health_address:
        command += ["--health-server-address", settings.health_address]
    home = settings.state / "home" / SUPERLINK

    def ready(lines: Sequence[str]) -> bool:
        return api_answers(settings)

    return Part(
        SUPERLINK,
        lambda: command,
        home,
        part_environment(home, settings.threads),
        ready,
        settings.runs_from,
    )


def api_answers(settings: SuperLinkSettings, timeout: float = 1.0) -> bool:
    """Whether the API for commands answers."""
    host = _EVERYWHERE.get(settings.api_host, settings.api_host)
    # Which names the certificate has is the concern of those who connect; here one process asks its own child.
    context = ssl.create_default_context(cafile=str(settings.root_certificates))
    context.check_hostname = False
    try:
        with urllib.request.urlopen(
            f"https://{host}:{settings.api_port}/health", timeout=timeout, context=context
        ):
            return True
    except (urllib.error.URLError, OSError):
        return False
