"""`fedllm doctor --node`: each thing that can be wrong is named, with what to do."""

import http.server
import os
import shutil
import socket
import ssl
import threading
from datetime import datetime
from email.utils import formatdate

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedllm import doctor
from fedllm.node import certs, node_checks


@pytest.fixture
def folder(tmp_path):
    certs.create_authority(tmp_path, ["localhost"], ["127.0.0.1"])
    certs.create_node_key(tmp_path, "a")
    (tmp_path / "train.csv").write_text("text,label\n")
    return tmp_path


@pytest.fixture
def serve():
    """Serve HTTPS (or plain HTTP) on a loopback port; the answer's date can be shifted."""
    servers = []

    def serve(credentials=None, off=0.0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()

            def date_time_string(self, timestamp=None):
                return formatdate(datetime.now().timestamp() + off, usegmt=True)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if credentials is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(credentials / "server.crt", credentials / "server.key")
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def check(folder, serve, monkeypatch):
    """The checks of a node, by name; the server has the credentials of ``credentials``."""

    def check(host="localhost", credentials=folder, port=None, installed="1.39.7", **settings):
        monkeypatch.setattr(doctor, "version", lambda name: installed)
        port = port or serve(credentials)
        path = folder / "node.toml"
        path.write_text(
            tomli_w.dumps(
                {
                    "superlink": f"{host}:{port}",
                    "root-certificates": "ca.crt",
                    "private-key": "a.key",
                    "data-file": "train.csv",
                    "worker": False,
                    **settings,
                }
            )
        )
        return {result.name: result for result in node_checks.run_node_checks(path)}

    return check


def failures(found):
    return {name for name, result in found.items() if result.status == "fail"}


def test_a_sound_node_has_nothing_to_mend(check):
    found = check()
    assert {result.status for result in found.values()} == {"ok"}, found
    named = {"flwr", "authority", "private key", "public key", "address", "port", "TLS", "data", "state"}
    assert named <= set(found)


def test_a_flower_that_cannot_be_deployed(check):
    found = check(installed="1.42.0")
    assert failures(found) == {"flwr"}
    assert "pip install 'flwr[simulation]" in found["flwr"].advice


def test_an_expired_server_certificate(check, folder):
    certs.renew_server(folder, ["localhost"], [], server_days=-0.001)
    found = check()
    assert failures(found) == {"server certificate", "TLS"}
    assert "expired" in found["server certificate"].found
    assert "certs renew" in found["server certificate"].advice


def test_a_clock_before_the_certificate_begins(check, monkeypatch):
    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2001, 1, 1, tzinfo=tz)

    monkeypatch.setattr(node_checks, "datetime", Past)
    found = check()
    assert failures(found) == {"authority", "server certificate"}
    assert "clock" in found["authority"].advice


def test_another_authority(check, tmp_path):
    certs.create_authority(tmp_path / "other")
    found = check(credentials=tmp_path / "other")
    assert failures(found) == {"server authority", "TLS"}


def test_a_name_that_the_certificate_does_not_have(check, folder):
    certs.renew_server(folder, ["superlink.example.org"], [])
    found = check()
    assert failures(found) == {"server name", "TLS"}
    assert "superlink.example.org, not localhost" in found["server name"].found
    assert "--server-name localhost" in found["server name"].advice


def test_an_authority_that_is_no_certificate(check, folder):
    served = folder / "served"
    shutil.copytree(folder, served)
    (folder / "ca.crt").write_text("nothing")
    assert failures(check(credentials=served)) == {"authority", "server authority", "TLS"}


def test_a_port_without_tls(check):
    found = check(credentials=None)
    assert failures(found) == {"TLS"}
    assert "something else than TLS" in found["TLS"].advice


def test_a_closed_port_and_a_name_that_does_not_resolve(check):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        found = check(port=port)
        assert failures(found) == {"port"}
        assert "9092" in found["port"].advice
    assert failures(check(host="superlink.invalid", port=1)) == {"address"}


def test_keys_that_do_not_work(check, folder):
    (folder / "a.key").write_bytes((folder / "server.key").read_bytes())  # PEM, not OpenSSH
    assert failures(check()) == {"private key"}
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (folder / "a.key").write_bytes(other)
    found = check()
    assert failures(found) == {"private key"}
    assert "elliptic-curve" in found["private key"].found


def test_a_key_that_others_can_read_and_one_of_another_pair(check, folder):
    os.chmod(folder / "a.key", 0o644)
    found = check()
    assert found["private key"].status == "warn"
    assert "chmod 600" in found["private key"].advice
    certs.create_node_key(folder, "b")
    (folder / "a.pub").write_bytes((folder / "b.pub").read_bytes())
    assert failures(check()) == {"public key"}


def test_data_that_cannot_be_used(check, folder):
    (folder / "train.csv").write_text("")
    assert failures(check()) == {"data"}
    (folder / "train.xls").write_text("x")
    assert failures(check(**{"data-file": "train.xls"})) == {"data"}


def test_a_worker_socket_that_nobody_serves(check, folder):
    (folder / "state").mkdir()
    (folder / "state" / "worker.sock").touch()
    found = check(worker=True)
    assert failures(found) == {"worker"}
    assert "worker.log" in found["worker"].advice


@pytest.mark.parametrize(
    ("off", "status"), [(0, "ok"), (-100, "fail"), (200, "ok"), (600, "fail"), (-600, "fail")]
)
def test_the_clock_is_compared_with_the_servers(folder, serve, off, status):
    """``off``: the server's clock less ours; Flower takes signatures up to five minutes old, but none of the future."""
    port = serve(folder, off=off)
    (result,) = node_checks.check_clock(f"127.0.0.1:{port}", folder / "ca.crt")
    assert result.status == status, result
