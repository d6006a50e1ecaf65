"""Credentials: they are what TLS and Flower accept, private keys are private, nothing is overwritten."""

import socket
import ssl
import stat
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.errors import ConfigError
from fedllm.node import certs


def handshake(server_folder, client_folder, name):
    """The TLS library's own judgement of a server's certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(server_folder / "server.crt", server_folder / "server.key")
    client = ssl.create_default_context(cafile=str(client_folder / "ca.crt"))
    ours, theirs = socket.socketpair()

    def serve():
        try:
            with server.wrap_socket(ours, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname=name):
            pass
    finally:
        theirs.close()
        thread.join()


def test_a_server_is_trusted_under_its_names_only(tmp_path):
    certs.create_authority(tmp_path, ["localhost", "superlink.example.org"], ["127.0.0.1", "10.0.0.7"])
    for name in ("localhost", "superlink.example.org", "127.0.0.1", "10.0.0.7"):
        handshake(tmp_path, tmp_path, name)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch"):
        handshake(tmp_path, tmp_path, "other.example.org")


def test_another_authority_is_not_trusted(tmp_path):
    for name in ("ours", "theirs"):
        certs.create_authority(tmp_path / name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "theirs", tmp_path / "ours", "localhost")


def test_an_expired_certificate_is_not_trusted_and_a_renewed_one_is(tmp_path):
    certs.create_authority(tmp_path, server_days=-0.001)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, tmp_path, "localhost")
    authority = (tmp_path / "ca.crt").read_bytes()
    certs.renew_server(tmp_path, ["localhost"], [])
    assert (tmp_path / "ca.crt").read_bytes() == authority
    handshake(tmp_path, tmp_path, "localhost")


def test_a_node_key_is_an_elliptic_curve_pair_in_openssh_format(tmp_path):
    certs.create_node_key(tmp_path, "hospital-a")
    private = serialization.load_ssh_private_key((tmp_path / "hospital-a.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "hospital-a.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"  # Flower takes NIST curves
    assert private.public_key() == public


def test_private_keys_are_for_their_owner_only(tmp_path):
    certs.create_authority(tmp_path)
    certs.create_node_key(tmp_path, "a")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077 == 0} == {"ca.key", "server.key", "a.key"}


def test_nothing_is_overwritten(tmp_path):
    certs.create_authority(tmp_path)
    certs.create_node_key(tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.crt exists"):
        certs.create_authority(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.key exists"):
        certs.create_node_key(tmp_path, "a")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["", "../a", "a b", "ca", "server"])
def test_a_node_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        certs.create_node_key(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "addresses", "words"),
    [([], [], "at least one"), (["a b"], [], "host name"), ([], ["10.0.0.256"], "10.0.0.256")],
)
def test_wrong_server_names_are_refused_before_anything_is_written(tmp_path, names, addresses, words):
    with pytest.raises(ConfigError, match=words):
        certs.create_authority(tmp_path / "new", names, addresses)
    assert not (tmp_path / "new").exists()


def test_the_server_does_not_outlive_its_authority(tmp_path):
    with pytest.raises(ConfigError, match="outlive"):
        certs.create_authority(tmp_path, server_days=10, authority_days=5)


def test_the_authority_signs_no_further_authorities(tmp_path):
    certs.create_authority(tmp_path)
    for name, expected in (("ca.crt", (True, 0)), ("server.crt", (False, None))):
        certificate = x509.load_pem_x509_certificate((tmp_path / name).read_bytes())
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert (basic.ca, basic.path_length) == expected


def test_renewal_needs_the_authority(tmp_path):
    with pytest.raises(ConfigError, match="certs init"):
        certs.renew_server(tmp_path, ["localhost"], [])
