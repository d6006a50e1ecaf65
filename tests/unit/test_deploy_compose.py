"""The compose file: valid, every path and key in it exists, nothing more is open than must be."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy_files import DEPLOY, ROOT, credentials, settings, unknown_variables
from tests.unit.test_deploy_docker import instructions, of, stages

FOLDER = DEPLOY / "compose"
SCHEMA = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")


def text(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def read(name):
    """A compose file with every variable at its default."""
    return yaml.safe_load(_VARIABLE.sub(lambda match: match[2] or "", text(name)))


COMPOSE = read("compose.yaml")
SERVICES = COMPOSE["services"]


def mounts(service):
    """Source and mode by target."""
    found = {}
    for entry in SERVICES[service]["volumes"]:
        source, target, *mode = entry.split(":")
        found[target] = (source, mode == ["ro"])
    return found


def settings_of(service):
    kind = "superlink" if service == "superlink" else "node"
    source, read_only = mounts(service)[f"/etc/fedllm/{kind}.toml"]
    assert read_only
    return settings(text(source))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_file_is_valid(name):
    jsonschema.Draft202012Validator(SCHEMA).validate(read(name))


def test_the_schema_refuses_what_it_should():
    broken = json.loads(json.dumps(COMPOSE))
    broken["services"]["superlink"]["ports"] = "9092"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(broken)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_builds_name_stages_and_arguments_of_the_dockerfile(name):
    arguments = {rest.partition("=")[0] for _, instruction, rest in instructions() if instruction == "ARG"}
    for service in read(name)["services"].values():
        build = service["build"]
        assert build["target"] in stages()
        assert set(build["args"]) <= arguments
    assert (FOLDER / SERVICES["node-0"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / SERVICES["node-0"]["build"]["dockerfile"]).is_file()


def test_cuda_changes_services_that_exist():
    cuda = read("compose.cuda.yaml")["services"]
    assert set(cuda) == set(SERVICES) - {"superlink"}
    gpus = [s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for s in cuda.values()]
    assert gpus == [[str(index)] for index in range(len(cuda))]


@pytest.mark.parametrize("service", SERVICES)
def test_what_the_settings_name_is_mounted(service):
    read_settings, mounted = settings_of(service), mounts(service)
    for path in credentials(read_settings):
        assert mounted[path][1], path
    for path in (read_settings.state, getattr(read_settings, "runs_from", read_settings.state)):
        assert any(path.is_relative_to(t) and not ro for t, (_, ro) in mounted.items()), path
    for source, _ in mounted.values():
        assert (
            source in COMPOSE["volumes"]
            or re.match(r"\./(certs|data)", source)
            or (FOLDER / source).is_file()
        )
    writable = {target for target, (_, read_only) in mounted.items() if not read_only}
    assert writable == set(json.loads(of("node", "VOLUME")[0]))


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_do_little_and_comes_back(service):
    told = SERVICES[service]
    assert told["read_only"] is True
    assert told["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in told["security_opt"]
    assert told["restart"] == "unless-stopped"
    assert {"cpus", "memory", "pids"} <= told["deploy"]["resources"]["limits"].keys()
    assert not unknown_variables(told["environment"])


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_asks_for_health_where_the_settings_answer(service):
    read_settings = settings_of(service)
    check = json.loads(of(SERVICES[service]["build"]["target"], "HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[2] == read_settings.health_address
    assert check[3:] == ([] if service == "superlink" else [str(read_settings.socket)])


def test_only_three_ports_are_published_and_two_of_them_to_this_machine():
    superlink, published = settings_of("superlink"), {}
    for service, told in SERVICES.items():
        for entry in told.get("ports", []):
            address, outer, inner = entry.rsplit(":", 2)
            published[service, int(inner)] = (address, outer == inner)
    fleet = int(superlink.fleet_address.rpartition(":")[2])
    assert published == {
        ("superlink", fleet): ("127.0.0.1", True),
        ("superlink", superlink.api_port): ("127.0.0.1", True),
        ("superlink", int(SERVICES["superlink"]["environment"]["FEDLLM_METRICS_PORT"])): ("127.0.0.1", True),
    }


def test_nodes_differ_and_find_the_superlink():
    nodes = [settings_of(service) for service in SERVICES if service != "superlink"]
    assert [node.partition_id for node in nodes] == list(range(len(nodes)))
    assert {node.num_partitions for node in nodes} == {len(nodes)}
    assert len({node.name for node in nodes}) == len({node.private_key for node in nodes}) == len(nodes)
    fleet = settings_of("superlink").fleet_address.rpartition(":")[2]
    assert {node.superlink for node in nodes} == {f"superlink:{fleet}"}


def test_the_sample_environment_has_every_variable_with_its_default():
    defaults = {name: default or "" for name, default in _VARIABLE.findall(text("compose.yaml"))}
    sample = dict(line.split("=", 1) for line in text(".env.example").splitlines() if re.match(r"\w+=", line))
    assert sample == defaults


def test_a_page_names_the_files():
    page = (ROOT / "docs" / "deploy-docker.md").read_text()
    for path in re.findall(r"`?(deploy/[\w./-]+)", page):
        assert (ROOT / path).exists() or Path(path).parts[2:3] in (("certs",), ("data",), (".env",)), path
