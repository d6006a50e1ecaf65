"""node.toml and superlink.toml: everything wrong is said before anything starts."""

import pytest

from fedllm import resources
from fedllm.errors import ConfigError
from fedllm.node import settings

NODE = {
    "superlink": "superlink.example.org:9092",
    "root-certificates": "ca.crt",
    "private-key": "a.key",
    "partition-id": 1,
    "num-partitions": 4,
}


@pytest.fixture
def write(tmp_path):
    import tomli_w

    for name in ("ca.crt", "a.key", "train.csv", "server.crt", "server.key"):
        (tmp_path / name).touch()

    def write(values, name="node.toml"):
        path = tmp_path / name
        path.write_text(tomli_w.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def test_paths_count_from_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    read = settings.read_node(write(NODE))
    assert read.root_certificates == tmp_path / "ca.crt"
    assert read.state == tmp_path / "state"
    assert read.socket == tmp_path / "state" / "worker.sock"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": 1}, "partition: .*known keys: superlink"),
        ({"private-key": "b.key"}, r"private-key: .*b\.key does not exist"),
        ({"superlink": "superlink.example.org"}, "superlink: .*host:port"),
        ({"superlink": "https://superlink.example.org:9092"}, "superlink: .*host:port"),
        ({"superlink": None}, "superlink: Field required"),
        ({"num-partitions": None}, "go together"),
        ({"partition-id": 4}, "less than num-partitions"),
        ({"partition-id": None, "num-partitions": None}, "no data"),
        ({"data-file": "train.csv"}, "not both"),
        ({"device": "gpu"}, "device"),
        ({"worker-memory": "much"}, "worker-memory: .*8GB"),
        ({"name": "a b"}, "name"),
        ({"memory-megabytes": 0}, "memory-megabytes"),
        ({"state": "s" * 120}, "socket"),
    ],
)
def test_what_is_wrong_is_named(write, change, words):
    with pytest.raises(ConfigError, match=words):
        settings.read_node(write({**NODE, **change}))


def test_a_missing_file_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(ConfigError, match="fedllm node --example"):
        settings.read_node(tmp_path / "node.toml")
    (tmp_path / "node.toml").write_text("a = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        settings.read_node(tmp_path / "node.toml")


def test_flower_is_told_what_the_client_reads(write, tmp_path):
    told = settings.read_node(
        write(
            {
                **NODE,
                "gradient-mode": "forward-ad",
                "memory-megabytes": 800,
                "upload-rate": 1e6,
                "download-rate": 2e6,
                "flops-per-second": 3e9,
            }
        )
    ).node_config()
    assert told == {
        "partition-id": 1,
        "num-partitions": 4,
        resources.GRADIENT_MODE: "forward-ad",
        resources._MEGABYTES: 800,
        resources.SPEED: 3e9,
        resources.UPLOAD: 1e6,
        resources.DOWNLOAD: 2e6,
        "worker-socket": str(tmp_path / "state" / "worker.sock"),
    }


def test_a_node_with_its_own_file_has_the_name_of_its_key_unless_given_one(write, tmp_path):
    own = {**NODE, "partition-id": None, "num-partitions": None, "data-file": "train.csv", "worker": False}
    told = settings.read_node(write(own)).node_config()
    assert told == {"name": "a", "data-file": str(tmp_path / "train.csv")}
    assert settings.read_node(write({**own, "name": "hospital"})).node_config()["name"] == "hospital"


@pytest.mark.parametrize("kind", ["node", "superlink"])
def test_the_samples_are_valid_with_and_without_their_commented_keys(tmp_path, kind):
    sample = settings.example(kind)
    for name in ("ca.crt", "hospital-a.key", "train.csv", "server.crt", "server.key"):
        (tmp_path / name).touch()
    path, read = tmp_path / f"{kind}.toml", getattr(settings, f"read_{kind}")
    path.write_text(sample)
    read(path)
    lines = [line for line in sample.splitlines() if "partition" not in line]
    path.write_text("\n".join(line.removeprefix("# ") if " = " in line else line for line in lines))
    model = type(read(path))
    mentioned = set(read(path).model_fields_set) | {"partition_id", "num_partitions"}
    assert set(model.model_fields) - mentioned <= {"runtime_port"}


def test_superlink_settings(write, tmp_path):
    given = {"certificate": "server.crt", "private-key": "server.key", "root-certificates": "ca.crt"}
    read = settings.read_superlink(write(given, "superlink.toml"))
    assert (read.api_host, read.api_port, read.runs_from) == ("127.0.0.1", 8000, tmp_path)
    assert read.database == tmp_path / "state" / "superlink.db"
    with pytest.raises(ConfigError, match=r"certificate: .*other\.crt does not exist"):
        settings.read_superlink(write({**given, "certificate": "other.crt"}, "superlink.toml"))
