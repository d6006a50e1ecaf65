"""The address of a split server, and how its channel is secured: TLS everywhere, plain on loopback only."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedllm.errors import SplitError

OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.bdp_probe", 1),
    ("grpc.http2.write_buffer_size", 8 << 20),
    ("grpc.max_concurrent_streams", 4096),
)
"""Of both sides; a chunk of a packet is far below the largest message."""


@dataclass(frozen=True)
class Certificates:
    """PEM files of a TLS endpoint.

    Attributes:
        root: certificates of the authority that the other side must trust, or be signed by.
        certificate: own certificate chain; a server needs one.
        key: private key of it.
    """

    root: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def server(self) -> grpc.ServerCredentials:
        """Credentials of a server.

        Raises:
            SplitError: a file is missing.
        """
        if self.certificate is None or self.key is None:
            raise SplitError("a TLS server needs a certificate and its key")
        return grpc.ssl_server_credentials([(_read(self.key), _read(self.certificate))])

    def client(self) -> grpc.ChannelCredentials:
        """Credentials of a client, which trusts the root certificates alone.

        Raises:
            SplitError: a file is missing.
        """
        return grpc.ssl_channel_credentials(None if self.root is None else _read(self.root))


def check_plain(address: str) -> None:
    """Refuse an address outside this machine where there is no TLS.

    Raises:
        SplitError: activations, of which text can be reconstructed, would cross a network in the clear.
    """
    host = split_address(address)[0]
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SplitError(
            f"{address} is not on this machine, and without TLS activations would cross the network in the clear: "
            "give the split server a certificate, or let it listen on 127.0.0.1"
        )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[ipv6]:port``.

    Raises:
        SplitError: not an address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise SplitError(f"expected an address host:port, found {address!r}")
    return host.strip("[]"), int(port)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SplitError(f"TLS file {path} cannot be read: {error.strerror}") from error
