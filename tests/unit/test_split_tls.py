"""The split stream over TLS: certificates of a throw-away authority, and what a client says that trusts another one."""

import datetime
import ipaddress
import threading
import time
from pathlib import Path

import pytest
import torch

from fedllm.errors import ConfigError, SplitError
from fedllm.registry import build
from fedllm.split.endpoint import Certificates
from fedllm.split.frames import Packet
from fedllm.split.server import SplitServer
from fedllm.split.session import Session, Ticket
from fedllm.split.stream import SplitStream
from fedllm.split.trainer import GRADIENT, STEP

x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402


def name(common):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def certificate(subject, key, issuer, issuer_key, *extensions):
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def write(path, thing):
    pem = serialization.Encoding.PEM
    if isinstance(thing, x509.Certificate):
        path.write_bytes(thing.public_bytes(pem))
    else:
        plain = serialization.NoEncryption()
        path.write_bytes(thing.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return path


def authority(folder, common):
    key = ec.generate_private_key(ec.SECP256R1())
    root = certificate(common, key, common, key, x509.BasicConstraints(ca=True, path_length=None))
    return write(folder / f"{common}.pem", root), key


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """PEM files by role; ``server`` is valid for 127.0.0.1 only."""
    folder = tmp_path_factory.mktemp("tls")
    root, key = authority(folder, "ours")
    other, _ = authority(folder, "another")
    server_key = ec.generate_private_key(ec.SECP256R1())
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = certificate("split server", server_key, "ours", key, host)
    return {
        "root": root,
        "other": other,
        "server": write(folder / "server.pem", server),
        "key": write(folder / "server.key", server_key),
    }


@pytest.fixture
def serving(files):
    """A split server with TLS whose trainer doubles what it gets; yields its address and its session."""
    session = Session([Ticket("0", "token", 1)], join_timeout=20, step_timeout=20)
    server = SplitServer("127.0.0.1:0", Certificates(None, files["server"], files["key"]))
    server.open(session)

    def answer():
        while arrived := session.gather(STEP):
            for seat, packet in arrived:
                doubled = {name: tensor * 2 for name, tensor in packet.tensors.items()}
                session.answer(seat, Packet(GRADIENT, packet.step, doubled))

    thread = threading.Thread(target=answer)
    thread.start()
    yield f"127.0.0.1:{server.port}", session
    session.close("test over")
    thread.join(20)
    server.close()
    assert not thread.is_alive()


def test_steps_go_over_tls(serving, files):
    address, session = serving
    hidden = torch.arange(12.0).reshape(1, 3, 4)
    with SplitStream(address, "token", Certificates(root=files["root"]), connect_timeout=20) as stream:
        stream.send(Packet(STEP, 1, {"hidden": hidden}))
        assert torch.equal(stream.receive(GRADIENT).tensors["hidden"], 2 * hidden)
        stream.finish()
    assert session.seats[0].reason is None


def test_a_client_that_trusts_another_authority_is_told_the_address_in_time(serving, files):
    address, session = serving
    started = time.monotonic()
    with pytest.raises(SplitError, match=rf"{address} did not answer within 1 s.*trust its certificate"):
        SplitStream(address, "token", Certificates(root=files["other"]), connect_timeout=1)
    assert time.monotonic() - started < 10
    # The token has not been used up: the right client still gets in.
    with SplitStream(address, "token", Certificates(root=files["root"]), connect_timeout=20) as stream:
        stream.finish()
    assert session.seats[0].reason is None


def test_a_plain_client_does_not_get_in(serving):
    address, _ = serving
    with pytest.raises(SplitError, match=address):
        SplitStream(address, "token", connect_timeout=1)


def test_files_that_are_missing_or_none_are_named(files, tmp_path):
    absent = tmp_path / "absent.pem"
    with pytest.raises(SplitError, match=rf"TLS file {absent} cannot be read"):
        SplitServer("127.0.0.1:0", Certificates(None, absent, files["key"]))
    with pytest.raises(SplitError, match=rf"TLS file {absent} cannot be read"):
        SplitServer("127.0.0.1:0", Certificates(None, files["server"], absent))
    with pytest.raises(SplitError, match="needs a certificate and its key"):
        SplitServer("127.0.0.1:0", Certificates(None, files["server"]))
    with pytest.raises(SplitError, match=rf"TLS file {absent} cannot be read"):
        SplitStream("127.0.0.1:1", "token", Certificates(root=absent))
    with pytest.raises(ConfigError, match="go together"):
        build("strategies", "hsplitlora", {"certificate": str(files["server"])})


def test_files_that_are_no_certificates_are_refused(files, tmp_path):
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    with pytest.raises(SplitError, match="cannot"):
        SplitServer("127.0.0.1:0", Certificates(None, rubbish, files["key"]))
