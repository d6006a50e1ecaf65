"""The supervisor: restarts with growing pauses, says why, starts in order, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from fedllm.node.logs import PartLog, reason_in
from fedllm.node.supernode import stuck
from fedllm.node.supervise import Backoff, Part, Supervisor, SupervisorError, read_status
from fedllm.processes import of_home
from tests.waiting import wait_for


@pytest.fixture
def supervise(tmp_path):
    """Run a supervisor of Python snippets in a process of its own; afterwards nothing of it may be left."""
    started = []

    def supervise(trouble=None, **parts):
        lines = [
            f"Part({name!r}, lambda: [sys.executable, '-u', '-c', {textwrap.dedent(code)!r}], "
            f"state / 'home' / {name!r}, "
            "dict(os.environ), lambda lines: 'ready' in lines, state, {'no such key': 'get another'}, "
            f"{trouble}),"
            for name, code in parts.items()
        ]
        script = (
            "import logging, os, sys\n"
            "from pathlib import Path\n"
            "from fedllm.node.supervise import Backoff, Part, Supervisor, Watch\n"
            "logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
            f"state = Path({str(tmp_path)!r}) / 'state'\n"
            f"parts = [{' '.join(lines)}]\n"
            "Supervisor('node a', parts, state, backoff=Backoff(0.1, 2.0, 0.4), watch=Watch(0.1, 3)).run()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield supervise
    for process in started:
        process.kill()
        process.communicate()
    home = tmp_path / "state" / "home"
    wait_for(lambda: not [p for name in ("one", "two") for p in of_home(home / name)])


def parts(tmp_path):
    told = read_status(tmp_path / "state")
    return told["parts"] if told else {}


def all_running(tmp_path, count):
    found = parts(tmp_path)
    return found if len(found) == count and all(p["state"] == "running" for p in found.values()) else None


RUNS = "import time; print('ready'); time.sleep(60)"


def test_a_killed_process_is_restarted_and_a_signal_ends_all(supervise, tmp_path):
    process = supervise(one=RUNS, two=RUNS)
    first = wait_for(lambda: all_running(tmp_path, 2))
    os.kill(first["one"]["pid"], signal.SIGKILL)
    wait_for(lambda: (found := all_running(tmp_path, 2)) and found["one"]["pid"] != first["one"]["pid"])
    again = all_running(tmp_path, 2)
    assert again["one"]["restarts"] == 1
    assert again["two"]["pid"] == first["two"]["pid"]
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - started < 10
    assert "one was ended by SIGKILL" in err
    assert read_status(tmp_path / "state") is None
    assert not any(psutil.pid_exists(entry["pid"]) for entry in again.values())


def test_a_crash_loop_is_told_with_its_reason_and_slows_down(supervise, tmp_path):
    process = supervise(one="print('hello'); raise ValueError('no such key')")
    wait_for(lambda: parts(tmp_path).get("one", {}).get("restarts", 0) >= 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "one ended with code 1" in line]
    assert len(lines) >= 3
    assert all("reason: ValueError: no such key → get another" in line for line in lines)
    assert "next start in 0.1 s" in lines[0]
    assert "2 times in a row; next start in 0.2 s" in lines[1]
    assert "next start in 0.4 s" in lines[2]


def test_a_process_that_hangs_is_restarted_after_several_questions(supervise, tmp_path):
    hung = tmp_path / "hung"
    asked = f"lambda lines: 'it does not answer' if os.path.exists({str(hung)!r}) else ''"
    process = supervise(trouble=asked, one=RUNS)
    first = wait_for(lambda: all_running(tmp_path, 1))["one"]["pid"]
    time.sleep(1.0)  # it is asked several times and is well
    assert parts(tmp_path)["one"] == {"pid": first, "state": "running", "restarts": 0, "reason": ""}
    hung.touch()
    wait_for(lambda: parts(tmp_path)["one"]["restarts"] == 1)
    hung.unlink()
    wait_for(lambda: (found := all_running(tmp_path, 1)) and found["one"]["pid"] != first)
    assert parts(tmp_path)["one"]["reason"] == "it does not answer, 3 times in 0.3 s"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "one was ended by SIGKILL" in err
    assert err.count("it does not answer") == 1


def test_a_supernode_that_waits_for_nobody_is_stuck(tmp_path):
    home = tmp_path / "home"
    taken = ["SuperNode ID: 3", "INFO : Receiving: train message (ID: 1)", "INFO : Received successfully"]
    assert "no ClientApp works on it" in stuck(taken, home)
    assert not stuck([*taken, "INFO : Sending: train message (ID: 2)", "INFO : Sent successfully"], home)
    assert not stuck(taken[:2], home)  # still downloads
    assert not stuck([], home)
    app = tmp_path / "flwr-clientapp"
    app.write_text("import time; time.sleep(60)")
    process = subprocess.Popen([sys.executable, str(app)], env={**os.environ, "FLWR_HOME": str(home)})
    try:
        wait_for(lambda: of_home(home))
        assert not stuck(taken, home)
    finally:
        process.kill()
        process.wait()
    assert stuck(taken, home)


def test_a_part_that_cannot_be_started_is_tried_again(supervise, tmp_path):
    process = supervise(one=RUNS)
    wait_for(lambda: all_running(tmp_path, 1))
    home = tmp_path / "state" / "home"
    for path in (home / "one", home):
        path.rmdir()
    home.write_text("in the way")
    os.kill(parts(tmp_path)["one"]["pid"], signal.SIGKILL)
    wait_for(lambda: "Not a directory" in parts(tmp_path)["one"]["reason"])
    home.unlink()
    wait_for(lambda: all_running(tmp_path, 1))
    process.send_signal(signal.SIGTERM)
    assert "one could not be started" in process.communicate(timeout=60)[1]


def test_a_part_waits_for_the_one_before_it(supervise, tmp_path):
    supervise(one="import time; time.sleep(60)", two=RUNS)
    wait_for(lambda: parts(tmp_path).get("one", {}).get("state") == "starting")
    time.sleep(0.6)
    assert parts(tmp_path)["two"] == {"pid": None, "state": "waiting", "restarts": 0, "reason": ""}


def test_descendants_end_too_even_those_of_a_killed_supervisor(supervise, tmp_path):
    code = """
    import subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("ready")
    time.sleep(60)
    """
    process = supervise(one=code)
    wait_for(lambda: all_running(tmp_path, 1))
    home = tmp_path / "state" / "home" / "one"
    assert len(of_home(home)) == 2
    process.kill()
    wait_for(lambda: not of_home(home))


def test_a_state_folder_has_one_supervisor(supervise, tmp_path):
    supervise(one=RUNS)
    wait_for(lambda: all_running(tmp_path, 1))
    second = supervise(one=RUNS)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "is in use by another supervisor" in err


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "state").write_text("in the way")
    part = Part("one", list, tmp_path / "home", {}, bool, tmp_path)
    with pytest.raises(SupervisorError, match="state: File exists"):
        Supervisor("node a", [part], tmp_path / "state")


def test_pauses_grow_to_their_limit():
    backoff = Backoff(first=1, factor=2, longest=60)
    assert [backoff.delay(n) for n in (1, 2, 3, 7, 1000)] == [1, 2, 4, 60, 60]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["INFO :  Starting", "Traceback (most recent call last):", "  File", "OSError: no port"], "OSError: no port"),
        (
            ["ERROR :   Exit Code: 305", "The key is not known.", "Ask for it.", "",
             "For more information, visit: <https://example.org>"],
            "The key is not known. Ask for it.",
        ),
        (["ERROR :  it broke", "INFO : bye"], "it broke"),
        (["INFO : all is well", "INFO : bye"], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_the_reason_is_found_in_the_last_lines(lines, reason):
    assert reason_in(lines) == reason


def test_a_log_keeps_only_the_newest_files(tmp_path, monkeypatch):
    monkeypatch.setattr("fedllm.node.logs._FILE_BYTES", 1000)
    log = PartLog(tmp_path / "one.log", "one")
    for number in range(1000):
        log.write(f"line {number}\n".encode())
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["one.log", "one.log.1", "one.log.2", "one.log.3", "one.log.4"]
    assert "line 999" in (tmp_path / "one.log").read_text()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
