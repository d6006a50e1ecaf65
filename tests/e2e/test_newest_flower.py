"""Simulation works unchanged with Flower's newest release, in an environment of its own.

Deployments need the pinned line, whose SuperNodes speak gRPC. ``FEDLLM_NEWEST_FLOWER`` names another version, such as
``==1.40.0``; by default it is the newest that can be installed with all that it depends on.
"""

import os
import subprocess
import sys
import sysconfig
import venv

import pytest
from safetensors.torch import load_file

from tests.e2e.test_runs import CONFIG
from tests.e2e.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

WANTED = "flwr" + os.environ.get("FEDLLM_NEWEST_FLOWER", ">=1.40")
UNREACHABLE = (
    "Could not find a version that satisfies the requirement flwr",
    "Failed to establish a new connection",
)


def ask(python, code):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that has the newest Flower, and everything else from the running one."""
    folder = tmp_path_factory.mktemp("newest") / "venv"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", WANTED],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if any(words in done.stderr for words in UNREACHABLE):
        pytest.skip(f"no package index has {WANTED}: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    # addsitedir, unlike a plain path, also finds packages that are installed in editable form.
    own = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    with open(f"{own}/outer.pth", "w") as file:
        file.write(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


def simulate(python, app, name):
    command = [python, "-m", "fedllm", "simulate", str(app), "--name", name, "-c", "rounds=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=app.parent, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(app.parent / "runs" / name / "adapter" / "adapter_model.safetensors")


def test_a_simulation_ends_with_the_same_bits_under_the_newest_flower(python, tmp_path):
    version = "import flwr; print(flwr.__version__)"
    newest, pinned = ask(python, version), ask(sys.executable, version)
    print(f"Flower {newest} against {pinned}")
    assert newest != pinned
    app = write_app(tmp_path / "app", CONFIG, 240)
    one, other = simulate(python, app, "newest"), simulate(sys.executable, app, "pinned")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
