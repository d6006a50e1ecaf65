"""`fedllm doctor --node`: why a node cannot take part, and what to do about it.

Every check works without starting anything and without the SuperLink knowing the node.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.doctor import Check, check_package
from fedllm.errors import FedLLMError
from fedllm.flower import pinned
from fedllm.narration import format_bytes, format_seconds
from fedllm.node.settings import NodeSettings, read_node

_TIMEOUT = 5.0
_SOON = timedelta(days=30)
_LOW_DISK_BYTES = 2_000_000_000
_AHEAD_SECONDS, _BEHIND_SECONDS = 5.0, 300.0
"""Flower refuses what a node has signed more than so many seconds in the future or the past."""
_API_PORT = 8000


def run_node_checks(config: Path) -> list[Check]:
    """All checks of a node's settings, in the order in which to mend things.

    Raises:
        ConfigError: the settings cannot be read, or name a file that does not exist.
    """
    settings = read_node(config)
    checks = [Check("settings", "ok", str(config)), check_package("flwr", pinned())]
    checks += check_authority(settings.root_certificates)
    checks += check_key(settings.private_key)
    checks += check_server(settings)
    checks += check_clock(f"{settings.superlink.rpartition(':')[0]}:{_API_PORT}", settings.root_certificates)
    checks += check_data_file(settings.data_file)
    checks += check_worker(settings)
    checks += check_disk(settings.state)
    return checks


def check_authority(path: Path) -> Iterator[Check]:
    """The certificate of the authority on this machine."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        advice = "copy ca.crt of `fedllm certs init` here again"
        yield Check("authority", "fail", f"{path} is not a PEM certificate: {error}", advice)
        return
    for certificate in certificates:
        yield _validity("authority", certificate, "make new credentials with `fedllm certs init`")


def check_key(path: Path) -> Iterator[Check]:
    """The node's private key: format, permissions, and whether the public key beside it belongs to it."""
    again = "make another pair with `fedllm certs node` and register its public key"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except PermissionError:
        yield Check(
            "private key",
            "fail",
            f"{path} cannot be read by this user",
            f"chown it to who runs `fedllm node`: {path}",
        )
        return
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        yield Check(
            "private key", "fail", f"{path} is not an OpenSSH private key without password: {error}", again
        )
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not key.curve.name.startswith("secp"):
        found = f"{path} is a {type(key).__name__.strip('_')}, expected an elliptic-curve key (NIST)"
        yield Check("private key", "fail", found, again)
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        advice = f"others could take part in your name: chmod 600 {path}"
        yield Check("private key", "warn", f"{path} can be read by others (mode {mode:04o})", advice)
    else:
        yield Check("private key", "ok", f"{path} ({key.curve.name})")
    yield from _check_public_key(path.with_suffix(".pub"), key)


def _check_public_key(path: Path, key: ec.EllipticCurvePrivateKey) -> Iterator[Check]:
    if not path.is_file():
        return  # the node does not need it
    advice = "register the public key that was made with the private key, or copy the right one"
    try:
        public = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        yield Check("public key", "fail", f"{path} is not an OpenSSH public key: {error}", advice)
        return
    if public != key.public_key():
        yield Check("public key", "fail", f"{path} does not belong to the private key", advice)
    else:
        yield Check("public key", "ok", f"{path} belongs to it")


def check_server(settings: NodeSettings) -> Iterator[Check]:
    """The way to the SuperLink: name, port, TLS, its certificate against the authority, and the clock."""
    host, _, port = settings.superlink.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "correct superlink in node.toml, or the name service (DNS, /etc/hosts)"
        yield Check("address", "fail", f"{host} cannot be resolved: {error.strerror}", advice)
        return
    yield Check("address", "ok", f"{host} is {found[0][4][0]}")
    try:
        connection = socket.create_connection((host, int(port)), timeout=_TIMEOUT)
    except OSError as error:
        advice = "start the SuperLink, correct the port (nodes: 9092, not the API's 8000), or open the firewall for it"
        yield Check(
            "port", "fail", f"{settings.superlink} does not answer: {error.strerror or error}", advice
        )
        return
    yield Check("port", "ok", f"{settings.superlink} answers")
    with connection:
        yield from _check_tls(connection, host, settings)


def _check_tls(connection: socket.socket, host: str, settings: NodeSettings) -> Iterator[Check]:
    """A handshake that takes any certificate, which is then judged piece by piece."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            served = secured.getpeercert(binary_form=True)
    except (ssl.SSLError, OSError) as error:
        advice = "the port serves something else than TLS: check the address, and that the SuperLink has certificates"
        yield Check("TLS", "fail", f"no TLS on {settings.superlink}: {error}", advice)
        return
    assert served is not None
    certificate = x509.load_der_x509_certificate(served)
    yield _validity("server certificate", certificate, "`fedllm certs renew` on the machine of the authority")
    yield _names(certificate, host)
    yield _signed(certificate, settings.root_certificates)
    yield _trusted(host, settings)


def _trusted(host: str, settings: NodeSettings) -> Check:
    """The judgement of the TLS library, which is what counts, by the real rules."""
    try:
        context = ssl.create_default_context(cafile=str(settings.root_certificates))
        context.set_alpn_protocols(["h2"])
        port = int(settings.superlink.rpartition(":")[2])
        with (
            socket.create_connection((host, port), timeout=_TIMEOUT) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
        ):
            return Check("TLS", "ok", f"{secured.version()}, the server is trusted")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "verify_message", "") or str(error)
        return Check("TLS", "fail", f"the server is not trusted: {reason}", "mend what is named above")


def _validity(name: str, certificate: x509.Certificate, advice: str) -> Check:
    now, starts, ends = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < starts:
        hint = f"set this machine's clock (it says {now:%Y-%m-%d %H:%M} UTC), or {advice}"
        return Check(name, "fail", f"not valid before {starts:%Y-%m-%d %H:%M} UTC", hint)
    if now > ends:
        ago = format_seconds((now - ends).total_seconds())
        return Check(name, "fail", f"expired {ago} ago, on {ends:%Y-%m-%d %H:%M} UTC", advice)
    if ends - now < _SOON:
        return Check(name, "warn", f"expires soon, on {ends:%Y-%m-%d %H:%M} UTC", advice)
    return Check(name, "ok", f"valid until {ends:%Y-%m-%d}")


def _names(certificate: x509.Certificate, host: str) -> Check:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names: list[str] = []
    else:
        names = [
            *extension.get_values_for_type(x509.DNSName),
            *map(str, extension.get_values_for_type(x509.IPAddress)),
        ]
    try:
        matches = str(ip_address(host)) in names
    except ValueError:
        wildcard = "*." + host.partition(".")[2]
        matches = host.lower() in map(str.lower, names) or wildcard in names
    if matches:
        return Check("server name", "ok", f"the certificate holds for {host}")
    advice = (
        f"use one of these names in node.toml, or `fedllm certs renew DIR --server-name {host}` (--server-ip)"
    )
    return Check(
        "server name", "fail", f"the certificate is for {', '.join(names) or 'no name'}, not {host}", advice
    )


def _signed(certificate: x509.Certificate, authority: Path) -> Check:
    """Whether the authority of this node has signed the server's certificate."""
    try:
        known = x509.load_pem_x509_certificates(authority.read_bytes())
    except (OSError, ValueError):
        return Check("server authority", "fail", f"{authority} cannot be read", "see above")
    for candidate in known:
        try:
            certificate.verify_directly_issued_by(candidate)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return Check("server authority", "ok", f"signed by {authority.name}")
    return Check(
        "server authority",
        "fail",
        f"the server's certificate was not signed by {authority}",
        "copy the ca.crt with which the SuperLink's certificate was made; if that is new, every node needs it",
    )


def check_clock(address: str, authority: Path) -> Iterator[Check]:
    """This machine's clock against the date that the SuperLink's API answers with.

    Args:
        address: host:port of the API for commands.
        authority: certificate of the authority.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with urllib.request.urlopen(f"https://{address}/health", timeout=_TIMEOUT, context=context) as reply:
            date = reply.headers["Date"]
    except (urllib.error.URLError, OSError, ValueError):
        # That the API cannot be reached from a node is how it should be.
        yield Check(
            "clock",
            "ok",
            f"not compared: {address} does not answer; compare `date -u` yourself",
        )
        return
    off = time.time() - parsedate_to_datetime(date).timestamp()
    if not -_BEHIND_SECONDS < off < _AHEAD_SECONDS:
        which = "ahead of" if off > 0 else "behind"
        found = f"{format_seconds(abs(off))} {which} the SuperLink's"
        yield Check("clock", "fail", found, "the SuperLink refuses the node's signature: let both use NTP")
    else:
        yield Check("clock", "ok", f"{abs(off):.0f} s from the SuperLink's")


def check_data_file(path: Path | None) -> Iterator[Check]:
    """The node's own data."""
    if path is None:
        return
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        yield Check(
            "data", "fail", f"{path}: {error.strerror}", "let the user who runs `fedllm node` read it"
        )
        return
    if empty or path.suffix.lower() not in (".csv", ".jsonl", ".json", ".parquet"):
        found = f"{path} is empty" if empty else f"{path} is not csv, jsonl or parquet"
        yield Check("data", "fail", found, "correct data-file in node.toml")
    else:
        yield Check("data", "ok", f"{path}, {format_bytes(path.stat().st_size)}")


def check_worker(settings: NodeSettings) -> Iterator[Check]:
    """The resident worker, if the node runs now."""
    if not settings.worker:
        yield Check("worker", "ok", "none wanted: the model is loaded for every message")
        return
    if not settings.socket.exists():
        yield Check("worker", "ok", "does not run now; `fedllm node` starts it")
        return
    from fedllm.node import health

    try:
        told = health.ask(settings.socket, _TIMEOUT)
    except (FedLLMError, OSError) as error:
        advice = f"see {settings.state / 'worker.log'}; restart `fedllm node`"
        yield Check("worker", "fail", f"does not answer on {settings.socket}: {error}", advice)
    else:
        yield Check(
            "worker", "ok", f"process {told.pid}, {told.jobs_done} jobs done, {told.jobs_failed} failed"
        )


def check_disk(state: Path) -> Iterator[Check]:
    """Whether the state folder can be written, and the space there."""
    existing = next(path for path in (state, *state.parents) if path.exists())
    try:
        probe = existing / f".fedllm-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Check(
            "state", "fail", f"{existing} cannot be written: {error.strerror}", "chown it, or set state"
        )
        return
    free = shutil.disk_usage(existing).free
    scarce = free < _LOW_DISK_BYTES
    advice = "free some space: logs, models and token caches need it" if scarce else ""
    yield Check("state", "warn" if scarce else "ok", f"{state}, {format_bytes(free)} free", advice)
