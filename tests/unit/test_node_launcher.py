"""ClientApps by fork: the program that stands for Flower's command behaves as that command would."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import psutil
import pytest

from fedllm.node.launcher import COMMAND, write_command
from fedllm.node.supernode import stuck
from fedllm.processes import alive, command_name
from tests import waiting

wait_for = partial(waiting.wait_for, seconds=30)

SERVER = """
import json, os, sys, time, threading
from pathlib import Path
from fedllm.errors import WorkerError
from fedllm.node import launcher

def command():
    what = sys.argv[1]
    if what == "tell":
        print(json.dumps([sys.argv[1:], os.environ.get("TOLD"), os.getcwd(), sys.stdin.read(), os.getppid()]))
        print("and here", file=sys.stderr)
    elif what == "exit":
        sys.exit(int(sys.argv[2]))
    elif what == "say":
        sys.exit("no token")
    elif what == "fail":
        raise ValueError("broken")
    else:
        print(os.getpid(), flush=True)
        time.sleep(60)

path = Path(sys.argv[1])
with launcher.owned(path), launcher.listen(path) as listener:
    assert path.stat().st_mode & 0o777 == 0o600
    print("ready", flush=True)
    launcher.Launcher(listener, command).run()
"""


@pytest.fixture
def real(tmp_path):
    """What runs where no launcher does."""
    path = tmp_path / "real"
    path.write_text(f"#!{sys.executable}\nimport sys; print('real', *sys.argv[1:]); sys.exit(7)\n")
    path.chmod(0o700)
    return path


@pytest.fixture
def program(tmp_path, real):
    return write_command(tmp_path / "commands", tmp_path / "launcher.sock", str(real))


@pytest.fixture
def server(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), str(tmp_path / "launcher.sock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def call(program, *arguments, **options):
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=30, **options
    )


def test_arguments_environment_folder_and_files_are_those_of_the_program(server, program, tmp_path):
    (tmp_path / "here").mkdir()
    done = call(
        program, "tell", "--token", "a b", cwd=tmp_path / "here", env={"TOLD": "so"}, input="from outside"
    )
    told = [["tell", "--token", "a b"], "so", str(tmp_path / "here"), "from outside", server.pid]
    assert json.loads(done.stdout) == told
    assert done.stderr == "and here\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(("exit", "3"), 3, ""), (("say",), 1, "no token"), (("fail",), 1, "ValueError: broken")],
)
def test_how_it_ends_is_passed_on(server, program, arguments, code, said):
    done = call(program, *arguments)
    assert done.returncode == code
    assert said in done.stderr


def test_without_a_launcher_the_command_itself_runs(program):
    done = call(program, "x", "y")
    assert done.stdout == "real x y\n"
    assert done.returncode == 7


def start(program):
    process = subprocess.Popen([program, "sleep"], stdout=subprocess.PIPE, text=True)
    return process, psutil.Process(int(process.stdout.readline()))


def test_signals_reach_the_child_and_its_end_the_program(server, program):
    process, child = start(program)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(child))


def test_the_supervisor_sees_that_a_client_app_works(server, program, tmp_path):
    """Else it would take the SuperNode for stuck, and start it anew in the middle of a long training."""
    taken = ["INFO : Received successfully"]
    home = tmp_path / "home"
    assert stuck(taken, home) == "it has taken a message, but no ClientApp works on it"
    process = subprocess.Popen(
        [program, "sleep"], stdout=subprocess.PIPE, text=True, env={**os.environ, "FLWR_HOME": str(home)}
    )
    child = psutil.Process(int(process.stdout.readline()))
    assert command_name(psutil.Process(process.pid)) == COMMAND
    assert stuck(taken, home) == ""
    process.kill()
    process.wait()
    assert stuck(taken, home) != ""
    wait_for(lambda: not alive(child))


def test_a_child_ends_with_its_program(server, program):
    process, child = start(program)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(child))
    assert call(program, "exit", "0").returncode == 0


@pytest.mark.parametrize("order", [1, -1])
def test_both_may_end_in_the_same_moment(server, program, order):
    process, child = start(program)
    server.send_signal(signal.SIGSTOP)
    for one in (process, child)[::order]:
        one.kill()
    process.wait()
    server.send_signal(signal.SIGCONT)
    assert call(program, "exit", "4").returncode == 4
    wait_for(lambda: not alive(child))


def test_a_program_ends_with_the_launcher_though_another_child_lives(server, program):
    first, one = start(program)
    second, other = start(program)
    server.kill()
    assert (first.wait(30), second.wait(30)) == (1, 1)
    one.kill()
    other.kill()


def test_a_program_ends_with_the_launcher(server, program):
    process, child = start(program)
    server.kill()
    assert process.wait(30) == 1
    child.kill()


def test_two_at_once(server, program):
    first, child = start(program)
    assert call(program, "exit", "5").returncode == 5
    assert first.poll() is None
    first.kill()
    first.wait()
    wait_for(lambda: not alive(child))


def test_a_stranger_who_says_nothing_useful_does_no_harm(server, program, tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "launcher.sock"))
        stranger.sendall(b"GET ")
        assert stranger.recv(1) == b""
    assert call(program, "exit", "0").returncode == 0


def test_flower_starts_no_thread_when_it_is_imported():
    """NumPy's OpenBLAS has threads of its own, and sees to it that a fork finds them at rest."""
    code = (
        "import os, threading; from fedllm.node import launcher; launcher._loaded(launcher.COMMAND); "
        "import fedllm.client_app; print(threading.active_count(), len(os.listdir('/proc/self/task')))"
    )
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone)
    assert done.stdout.split() == ["1", "1"]


def test_the_program_has_the_name_of_flowers_command(program):
    assert program.name == COMMAND
    assert os.access(program, os.X_OK)
