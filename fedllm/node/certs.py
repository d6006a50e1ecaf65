"""Credentials of a deployment: a certificate authority, the server's certificate, and a key pair for every node.

TLS tells a node that it talks to the right server; the node's elliptic-curve key tells the server which node
talks. Private keys are written with mode 0600 and never leave the folder unless somebody copies them.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import ConfigError

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
_CURVE = ec.SECP384R1()
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A certificate that is a few minutes older than it is valid survives clocks that are not quite right.
_BACKDATED = timedelta(minutes=5)


@dataclass(frozen=True)
class Credential:
    """A file that was written, and the machines that it belongs on."""

    path: Path
    belongs: str


def create_authority(
    folder: Path,
    names: Sequence[str] = ("localhost",),
    addresses: Sequence[str] = ("127.0.0.1",),
    *,
    server_days: float = 365,
    authority_days: float = 3650,
) -> list[Credential]:
    """Make a certificate authority and a server certificate that it has signed.

    Args:
        folder: gets ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key``.
        names: host names under which nodes and the command line reach the server.
        addresses: IP addresses under which they do.
        server_days: days until the server's certificate expires.
        authority_days: days until the authority expires.

    Raises:
        ConfigError: one of the files exists, a name or address is not one, or the server's would outlive the authority.
    """
    if not names and not addresses:
        raise ConfigError("the server needs at least one --server-name or --server-ip")
    if server_days > authority_days:
        raise ConfigError(
            f"the server's certificate ({server_days:g} days) would outlive its authority ({authority_days:g} days)"
        )
    alternatives = _alternatives(names, addresses)
    _refuse_existing([folder / name for name in (CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY)])
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(_CURVE)
    authority = _sign_authority(key, authority_days)
    _write(folder / CA_KEY, _pem(key), private=True)
    _write(folder / CA_CERTIFICATE, authority.public_bytes(serialization.Encoding.PEM))
    return [
        Credential(folder / CA_CERTIFICATE, "every machine: SuperLink, nodes, and where you run commands"),
        Credential(folder / CA_KEY, "nowhere else: keep it safe, it signs new server certificates"),
        *_issue_server(folder, authority, key, alternatives, server_days),
    ]


def renew_server(
    folder: Path,
    names: Sequence[str],
    addresses: Sequence[str],
    *,
    server_days: float = 365,
) -> list[Credential]:
    """Replace the server's certificate and key by new ones of the same authority; nodes need not be touched.

    Raises:
        ConfigError: the authority is missing or unreadable, or a name or address is not one.
    """
    alternatives = _alternatives(names, addresses)
    try:
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        authority = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the certificate authority in {folder} cannot be read ({error}); `fedllm certs init` makes one"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / CA_KEY}: expected an elliptic-curve key, found {type(key).__name__}")
    for name in (SERVER_CERTIFICATE, SERVER_KEY):
        (folder / name).unlink(missing_ok=True)
    return _issue_server(folder, authority, key, alternatives, server_days)


def create_node_key(folder: Path, name: str) -> list[Credential]:
    """Make the key pair of a node: ``<name>.key`` and ``<name>.pub``, in OpenSSH format as Flower reads it.

    Raises:
        ConfigError: a file exists, or the name is not one for a file.
    """
    if not _NODE_NAME.fullmatch(name):
        raise ConfigError(f"a node's name is letters, digits, dots, dashes and underscores, found {name!r}")
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    if private.name in (CA_KEY, SERVER_KEY):
        raise ConfigError(
            f"{private.name} is the authority's or the server's; choose another name for the node"
        )
    _refuse_existing([private, public])
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(_CURVE)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(private, secret, private=True)
    _write(public, line + f" {name}\n".encode())
    return [
        Credential(private, f"the node {name}, and only there"),
        Credential(public, f"where you run commands: fedllm nodes register {public}"),
    ]


def _issue_server(
    folder: Path,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    alternatives: Sequence[x509.GeneralName],
    days: float,
) -> list[Credential]:
    key = ec.generate_private_key(_CURVE)
    certificate = (
        _builder("fedllm SuperLink", authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA384())
    )
    _write(folder / SERVER_KEY, _pem(key), private=True)
    _write(folder / SERVER_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    return [
        Credential(folder / SERVER_CERTIFICATE, "the machine of the SuperLink"),
        Credential(folder / SERVER_KEY, "the machine of the SuperLink, and only there"),
    ]


def _sign_authority(key: ec.EllipticCurvePrivateKey, days: float) -> x509.Certificate:
    name = _name("fedllm authority")
    return (
        _builder("fedllm authority", name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(names: Sequence[str], addresses: Sequence[str]) -> list[x509.GeneralName]:
    try:
        found: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(address)) for address in addresses
        ]
    except ValueError as error:
        raise ConfigError(f"--server-ip: {error}") from None
    for name in names:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
            raise ConfigError(
                f"--server-name: expected a host name such as superlink.example.org, found {name!r}"
            )
        found.append(x509.DNSName(name))
    return found


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _refuse_existing(paths: Sequence[Path]) -> None:
    if existing := [path for path in paths if path.exists()]:
        raise ConfigError(
            f"{existing[0]} exists and is not overwritten: what was given out would stop working; "
            "choose another folder or name, or move it away"
        )


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)
