"""The units: systemd accepts them, what they name exists, and they are confined."""

import re
import shutil
import subprocess

import pytest

from tests.deploy_files import DEPLOY, ROOT, check_command, credentials, settings, unknown_variables

FOLDER = DEPLOY / "systemd"
UNITS = ["superlink", "node"]


def unit(name):
    """Values by key, in order; a key may come again."""
    found = {}
    for line in (FOLDER / f"fedllm-{name}.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def lines(name):
    return [line.split() for line in (FOLDER / name).read_text().splitlines() if line and line[0] != "#"]


def runnable(folder):
    """The units with a command that exists here."""
    for name in UNITS:
        source = (FOLDER / f"fedllm-{name}.service").read_text()
        (folder / f"fedllm-{name}.service").write_text(source.replace("/opt/fedllm/bin/fedllm", "/bin/true"))
    return [str(folder / f"fedllm-{name}.service") for name in UNITS]


@pytest.fixture
def analyze():
    if (tool := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    return lambda *arguments: subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)


def test_systemd_accepts_the_units(analyze, tmp_path):
    result = analyze("verify", *runnable(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")


def test_the_units_are_confined(analyze, tmp_path):
    for path in runnable(tmp_path):
        # 10 is a process without any bounds; 2.5 leaves room for GPUs and the network.
        result = analyze("security", "--offline=true", "--threshold=25", path)
        assert result.returncode == 0, result.stdout[-300:]


@pytest.mark.parametrize("name", UNITS)
def test_the_command_exists_and_its_settings_are_valid(name):
    command = unit(name)["ExecStart"][0].split()
    assert command[0] == "/opt/fedllm/bin/fedllm"
    context = check_command(["fedllm", *command[1:]])
    assert context.info_name == name
    assert str(context.params["config"]) == f"/etc/fedllm/{name}.toml"
    read = settings((FOLDER / f"{name}.toml").read_text())
    state = f"/var/lib/{unit(name)['StateDirectory'][0]}"
    assert str(read.state).startswith(f"{state}/")
    assert all(path.startswith("/etc/fedllm/certs/") for path in credentials(read))


def test_both_sides_fit_on_one_machine():
    one, other = (settings((FOLDER / f"{name}.toml").read_text()) for name in UNITS)
    assert one.state != other.state
    environment = dict(line[0].split("=", 1) for line in lines("superlink.env"))
    assert int(environment["FEDLLM_METRICS_PORT"]) != other.metrics_port
    assert one.health_address != other.health_address


@pytest.mark.parametrize("name", UNITS)
def test_environment_is_known_and_the_unit_comes_back(name):
    told = unit(name)
    assert told["EnvironmentFile"] == [f"-/etc/fedllm/{name}.env"]
    assert not unknown_variables(re.findall(r"(\w+)=", (FOLDER / f"{name}.env").read_text()))
    assert not unknown_variables(re.findall(r"(\w+)=", told["Environment"][0]))
    assert told["Restart"] == ["always"]
    # The supervisor gives each of its parts ten seconds.
    assert int(told["TimeoutStopSec"][0]) >= 30


@pytest.mark.parametrize("name", UNITS)
def test_user_and_folders_are_made(name):
    users = [line[1] for line in lines("fedllm.sysusers.conf") if line[0] == "u"]
    assert users == unit(name)["User"] == unit(name)["Group"]
    folders = {line[1]: line[2:5] for line in lines("fedllm.tmpfiles.conf") if line[0] == "d"}
    assert folders["/etc/fedllm/certs"] == ["0750", "root", users[0]]


def test_the_page_installs_every_file():
    page = (ROOT / "docs" / "deploy-systemd.md").read_text()
    for path in FOLDER.iterdir():
        assert f"deploy/systemd/{path.name}" in page, path.name
    for path in re.findall(r"deploy/systemd/[\w.-]+", page):
        assert (ROOT / path).is_file(), path
