"""The chart: rendered, valid for Kubernetes' schemas, and its pieces fit each other and the images."""

import json
import shutil
import subprocess

import pytest
import yaml

from tests.deploy_files import DEPLOY, check_command, credentials, settings, unknown_variables
from tests.unit.test_deploy_docker import instructions

CHART = DEPLOY / "helm" / "fedllm"
VERSIONS = ("1.27", "1.30", "1.33", "1.37")
EVERYTHING = {
    "imagePullSecrets": [{"name": "registry"}],
    "superlink": {
        "service": {"type": "LoadBalancer", "annotations": {"example.org/a": "b"}},
        "persistence": {"existingClaim": "mine"},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "metrics": False,
        "env": {"HF_HUB_OFFLINE": 1},
    },
    "node": {
        "superlink": "superlink.example.org:9443",
        "gpus": 0,
        "metrics": False,
        "runtimeClassName": "nvidia",
        "cache": {"hostPath": "/srv/fedllm/cache"},
        "settings": {"worker-memory": "8GB", "threads": 4, "worker": True},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "resources": {"limits": {"memory": "4Gi"}},
    },
    "networkPolicy": {"nodeCIDRs": ["203.0.113.0/24"], "hubCIDRs": []},
    "serviceAccount": {"create": False},
}
VARIANTS = {
    "defaults": {},
    "everything": EVERYTHING,
    "server only": {"node": {"enabled": False}, "networkPolicy": {"enabled": False}},
    "nodes only": {"superlink": {"enabled": False}, "node": {"superlink": "a.example.org:9092"}},
}


class RenderError(Exception):
    """Helm refused the values or a template."""


def render_by_binary(values):
    command = [shutil.which("helm"), "template", "demo", str(CHART), "--namespace", "fl", "--values", "-"]
    result = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RenderError(result.stderr)
    return result.stdout


def render_by_library(values):
    import helm_python

    try:
        with helm_python.Chart.load(CHART) as chart:
            chart.validate_schema(values)
            found = chart.render(values, name="demo", namespace="fl")
    except helm_python.HelmError as error:
        raise RenderError(str(error)) from None
    return "\n---\n".join(part for name, part in sorted(found.items()) if name.endswith(".yaml"))


def render(values):
    """Objects by kind and name."""
    if shutil.which("helm"):
        text = render_by_binary(values)
    else:
        pytest.importorskip("helm_python", reason="no helm: install it, or pip install 'fedllm[helm]'")
        text = render_by_library(values)
    found = [entry for entry in yaml.safe_load_all(text) if entry]
    by_name = {(entry["kind"], entry["metadata"]["name"]): entry for entry in found}
    assert len(by_name) == len(found)
    return by_name


@pytest.fixture(scope="module")
def objects():
    return render({})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(variant, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    found = render(VARIANTS[variant])
    assert found
    for entry in found.values():
        kubernetes_validate.validate(entry, version, strict=True)


def test_the_validator_refuses_what_it_should(objects):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    broken = json.loads(json.dumps(objects["StatefulSet", "demo-fedllm-superlink"]))
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullPolcy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"superlnk": {}},
        {"node": {"gpus": -1}},
        {"node": {"settings": {"wrker": True}}},
        {"node": {"data": {"hostPath": "relative", "file": "a.csv"}}},
        {"superlink": {"logFormat": "xml"}},
        {"metricsPort": 0},
        {"superlink": {"enabled": False}},
        {"networkPolicy": {"apiClientLabels": {"fedllm.ai/api-client": None}}},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(RenderError):
        render(values)


def test_the_schema_knows_every_value():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def same(values, schema, path=""):
        if "properties" in schema:
            assert set(schema["properties"]) - {"global", "claims"} <= values.keys() | {
                "requests",
                "limits",
            }, path
            for key, value in values.items():
                same(value, schema["properties"][key], f"{path}.{key}")

    same(yaml.safe_load((CHART / "values.yaml").read_text()), schema)


def workloads(objects):
    return [entry for (kind, _), entry in objects.items() if kind in ("StatefulSet", "DaemonSet")]


def pod(entry):
    return entry["spec"]["template"]["spec"]


@pytest.mark.parametrize("variant", ["defaults", "everything"])
def test_commands_settings_and_mounts_fit(variant):
    found = render(VARIANTS[variant])
    for entry in workloads(found):
        container = pod(entry)["containers"][0]
        context = check_command(container["args"])
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert str(context.params["config"]) in mounts
        text = found["ConfigMap", entry["metadata"]["name"]]["data"][f"{context.info_name}.toml"]
        read = settings(text)
        for path in credentials(read):
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
        for folder in (read.state, getattr(read, "data_file", None) or read.state):
            mount = next(path for path in mounts if folder.is_relative_to(path))
            assert mounts[mount].get("readOnly", False) == (mount == "/data")
        volumes = {volume["name"] for volume in pod(entry)["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in entry["spec"].get("volumeClaimTemplates", [])}
        for part in [container, *pod(entry).get("initContainers", [])]:
            assert {mount["name"] for mount in part["volumeMounts"]} <= volumes
            assert not unknown_variables({variable["name"] for variable in part["env"]})


def test_settings_of_the_values_reach_the_node():
    text = render(EVERYTHING)["ConfigMap", "demo-fedllm-node"]["data"]["node.toml"]
    read = settings(text)
    assert (read.worker_memory, read.threads, read.worker, read.metrics_port) == ("8GB", 4, True, 0)
    assert read.superlink == "superlink.example.org:9443"


def test_the_images_and_the_chart_agree(objects):
    users = {rest for _, name, rest in instructions() if name == "USER"}
    for entry in workloads(objects):
        security = pod(entry)["securityContext"]
        assert users == {f"{security['runAsUser']}:{security['runAsGroup']}"}
        assert security["runAsNonRoot"] is True
        assert pod(entry)["automountServiceAccountToken"] is False
        for part in [*pod(entry)["containers"], *pod(entry).get("initContainers", [])]:
            own = part["securityContext"]
            assert own["readOnlyRootFilesystem"] is True
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}


def test_probes_services_and_policies_name_ports_that_answer(objects):
    ports = {}
    for entry in workloads(objects):
        container = pod(entry)["containers"][0]
        component = entry["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        ports[component] = {port["name"]: port["containerPort"] for port in container["ports"]}
        read = settings(next(iter(objects["ConfigMap", entry["metadata"]["name"]]["data"].values())))
        answering = {read.health_address.rpartition(":")[2]: "health"}
        assert all(f"{number}" in answering or name != "health" for name, number in ports[component].items())
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            told = container[probe]
            port = told["grpc"]["port"] if "grpc" in told else ports[component][told["tcpSocket"]["port"]]
            assert port in ports[component].values()
        if component == "node":
            assert ports[component]["metrics"] == read.metrics_port
        else:
            assert ports[component]["fleet"] == int(read.fleet_address.rpartition(":")[2])
            assert ports[component]["api"] == read.api_port
            assert str(ports[component]["metrics"]) in {
                variable.get("value") for variable in container["env"]
            }
    for (kind, _), entry in objects.items():
        if kind == "Service":
            target = entry["spec"]["selector"]["app.kubernetes.io/component"]
            assert {port["targetPort"] for port in entry["spec"]["ports"]} <= ports[target].keys()
        if kind == "NetworkPolicy":
            own = entry["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in entry["spec"]["ingress"]:
                assert {port["port"] for port in rule["ports"]} <= ports[own].keys()


def test_the_api_never_leaves_the_cluster():
    found = render(EVERYTHING)
    for (kind, _), entry in found.items():
        if kind == "Service" and entry["spec"]["type"] != "ClusterIP":
            assert [port["name"] for port in entry["spec"]["ports"]] == ["fleet"]
    policy = found["NetworkPolicy", "demo-fedllm-superlink"]["spec"]
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    assert by_port["api"] == [{"podSelector": {"matchLabels": {"fedllm.ai/api-client": "true"}}}]
    assert {"ipBlock": {"cidr": "203.0.113.0/24"}} in by_port["fleet"]
    assert all("443" not in str(rule) for rule in policy["egress"])


def test_gpus_are_asked_for_only_where_wanted(objects):
    limits = pod(objects["DaemonSet", "demo-fedllm-node"])["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    without = pod(render(EVERYTHING)["DaemonSet", "demo-fedllm-node"])["containers"][0]["resources"]
    assert without["limits"] == {"memory": "4Gi"}


def test_a_node_sees_its_own_key_only(objects):
    spec = pod(objects["DaemonSet", "demo-fedllm-node"])
    paths = {mount.get("subPath") or mount.get("subPathExpr") for c in spec["containers"] + spec["initContainers"]
             for mount in c["volumeMounts"] if mount["name"] == "keys"}  # fmt: skip
    assert paths == {"ca.crt", "$(MACHINE).key"}


def test_other_settings_mean_other_pods(objects):
    def checksum(found):
        template = found["DaemonSet", "demo-fedllm-node"]["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/settings"]

    assert checksum(objects) == checksum(render({"superlink": {"cache": {"sizeLimit": "1Gi"}}}))
    assert checksum(objects) != checksum(render({"node": {"settings": {"threads": 2}}}))
