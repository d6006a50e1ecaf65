"""Simulations work unchanged with Flower's newest release: the same bits as with the pinned one, for the same seed.

The newest release is the newest that pip can install beside the packages of the running environment and that the pin
does not admit. ``FEDLLM_NEWEST_FLOWER=1.42.0 pytest -m slow tests/e2e/test_newest_flower.py`` names one.
Without a package index to install it from, the test is skipped. Deployments are another matter: they need the pinned
versions, whose SuperNodes speak gRPC.
"""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fedllm.flower import pinned
from tests.e2e.test_runs import CONFIG
from tests.e2e.test_simulate import MARK, marked
from tests.tiny_app import write_app
from tests.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

WANTED = os.environ.get("FEDLLM_NEWEST_FLOWER", "")
UNREACHABLE = ("(from versions: none)", "Max retries exceeded", "Read timed out")
SUMMARY = """
import json, flwr
from importlib.metadata import version
from fedllm.flower import is_newer, pinned
found = version("flwr")
print(json.dumps({"version": found, "file": flwr.__file__, "newer": is_newer(found, pinned())}))
"""

# A strategy and a client update that leave word of the Flower in whose processes they run.
WITNESS = f"""
import os
from pathlib import Path
import flwr
from fedllm.clients.backprop import Backprop
from fedllm.strategies.fedopt import FedAdam

def tell(who):
    (Path(os.environ[{MARK!r}]) / who).write_text(flwr.__file__)

class Server(FedAdam):
    def configure_train(self, *args):
        tell("server")
        return super().configure_train(*args)

class Client(Backprop):
    def run(self, job):
        tell("client")
        return super().run(job)
"""


def summary(python):
    """Which Flower an interpreter finds."""
    done = subprocess.run([python, "-c", SUMMARY], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def newest(tmp_path):
    """The interpreter of an environment with the newest Flower; it shares all other packages with the running one."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = next(folder.glob("lib/python*/site-packages"))
    # Unlike a plain path this also finds what is installed in editable form. Being last, it only fills gaps.
    shared = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (own / "zz_shared.pth").write_text("".join(shared))
    end = next(bound.version for bound in pinned().specifier if bound.operator == "<")
    wanted = f"flwr[simulation]=={WANTED}" if WANTED else f"flwr[simulation]>={end}"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--upgrade", "--retries", "2", wanted],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    output = done.stdout + done.stderr
    if done.returncode and any(words in output for words in UNREACHABLE):
        pytest.skip(f"no package index could be reached to install {wanted}: {output.splitlines()[-1]}")
    assert done.returncode == 0, output
    return python


def simulate(python, app, name):
    """Run the app with one torch thread; returns the bytes of the adapter and the Flower of both sides."""
    words = app.parent / f"words-{name}"
    words.mkdir()
    process = subprocess.Popen(
        [python, "-m", "fedllm", "simulate", app, "--name", name,
         "-c", 'rounds=3 strategy="witness:Server" client="witness:Client" run.root="runs"'],
        cwd=app.parent,
        env={**os.environ, MARK: str(words), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()  # a guard cleans up behind it
        process.wait()
        wait_for(lambda: not marked(str(words)))
    assert process.returncode == 0, output
    adapter = app.parent / "runs" / name / "adapter" / "adapter_model.safetensors"
    return adapter.read_bytes(), {path.name: path.read_text() for path in words.iterdir()}


def test_a_simulation_ends_with_the_same_bits_under_the_newest_flower(newest, tmp_path):
    before, after = summary(sys.executable), summary(newest)
    print(f"Flower {after['version']} against the pinned {before['version']}")
    assert pinned().specifier.contains(before["version"])
    assert after["newer"]
    app = write_app(tmp_path / "app", CONFIG, 240)
    (app / "witness.py").write_text(WITNESS)
    adapter, words = simulate(sys.executable, app, "pinned")
    assert words == {"server": before["file"], "client": before["file"]}
    same, words = simulate(newest, app, "newest")
    assert words == {"server": after["file"], "client": after["file"]}
    assert Path(after["file"]).is_relative_to(tmp_path)
    assert same == adapter
