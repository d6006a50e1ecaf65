"""The doctor's checks, with each kind of trouble made for it."""

import http.server
import json
import os
import socket
import threading
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from fedllm import doctor
from fedllm.doctor import Check


def only(checks):
    found = list(checks)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("text", "status"),
    [("pydantic>=2", "ok"), ("pydantic>=2,<2.1", "fail"), ("no-such-package-here>=1", "fail")],
)
def test_a_package_is_judged_by_the_requirement(text, status):
    requirement = Requirement(text)
    check = doctor.check_package(requirement.name, requirement)
    assert check.status == status
    assert bool(check.advice) == (status == "fail")
    if check.advice:
        assert f"pip install '{requirement}'" == check.advice


@pytest.mark.parametrize(
    ("installed", "status"),
    [("1.38.0", "fail"), ("1.39.0", "ok"), ("1.39.7", "ok"), ("1.40.0", "warn"), ("2.0.0rc1", "warn")],
)
def test_a_newer_flower_is_for_simulations_only_and_an_older_one_for_nothing(monkeypatch, installed, status):
    monkeypatch.setattr(doctor, "version", lambda name: installed if name == "flwr" else version(name))
    check = {check.name: check for check in doctor.check_packages()}["flwr"]
    assert check.status == status
    assert installed in check.found
    assert ("for `fedllm simulate` only" in check.found) == (status == "warn")
    assert ("deployments" in check.advice) == (status == "warn")
    assert bool(check.advice) == (status != "ok")


def test_flower_that_is_missing_must_be_installed(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    requirement = Requirement("flwr>=1,<1.1")
    assert doctor.check_flower(requirement).advice == f"pip install '{requirement}'"


def test_a_check_that_breaks_is_a_failure_and_not_an_exception():
    def check_broken():
        raise OSError("no such thing")
        yield

    check = only(doctor._guarded(check_broken))
    assert (check.name, check.status) == ("broken", "fail")
    assert "no such thing" in check.found


def test_the_hub_only_warns(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert only(doctor.check_hub()).status == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in only(doctor.check_hub()).found


def test_a_hub_that_answers_is_fine(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert only(doctor.check_hub()).status == "ok"
        server.shutdown()


def test_a_local_superlink_is_found_with_process_and_folder(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(listener.getsockname()[1]))
        assert only(doctor.check_local_superlink()).status == "ok"
        listener.listen()
        check = only(doctor.check_local_superlink())
    assert check.status == "warn"
    assert f"process {os.getpid()} " in check.found
    assert os.getcwd() in check.found
    assert f"kill {os.getpid()}" in check.advice


def test_a_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    assert doctor._writable("x", tmp_path / "a" / "b", "").status == "ok"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = doctor._writable("x", tmp_path, "do that")
    assert (check.status, check.advice) == ("fail", "do that")


def test_little_disk_space_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage())
    assert [check.status for check in doctor.check_folders() if check.name.startswith("disk")] == [
        "warn",
        "warn",
    ]


class Usage:
    free = 1_000_000


def test_what_is_not_packaged_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    checks = list(doctor.check_packaged())
    assert all(check.status == "warn" and "pip install" in check.advice for check in checks)
    assert only(doctor.check_quantization()).status == "warn"


def test_the_report_as_text_and_as_objects(capsys):
    checks = [Check("one", "ok", "fine"), Check("two", "fail", "[broken]", "mend it")]
    doctor.render(checks, Console(width=60))
    out = capsys.readouterr().out
    assert "[broken]" in out
    assert "→ mend it" in out
    assert "1 to fix" in out
    assert json.loads(json.dumps(doctor.to_json(checks)))[1]["advice"] == "mend it"
