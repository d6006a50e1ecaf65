"""Which Flower is good for what: simulations also take a newer one, deployments only the pinned versions."""

import pytest
from packaging.requirements import Requirement

from fedllm import flower
from fedllm.flower import SuperLinkError, check_deployable, is_newer, pinned
from fedllm.node import settings, superlink, supernode

NODE = settings.NodeSettings.model_validate(
    {
        "superlink": "localhost:9092",
        "root-certificates": "/x/ca.crt",
        "private-key": "/x/a.key",
        "data-file": "/x/a.csv",
    }
)
SUPERLINK = settings.SuperLinkSettings.model_validate(
    {
        "certificate": "/x/server.crt",
        "private-key": "/x/server.key",
        "root-certificates": "/x/ca.crt",
    }
)


def test_the_pin_is_that_of_the_metadata():
    assert pinned().extras == {"simulation"}
    assert pinned().specifier.contains("1.39.7")
    assert not pinned().specifier.contains("1.40.0")


@pytest.mark.parametrize(
    ("found", "newer"),
    [("1.38.9", False), ("1.39.0", False), ("1.39.5.dev1", False), ("1.40.0", True), ("2.0.0rc1", True)],
)
def test_newer_means_beyond_the_end_and_not_before_the_beginning(found, newer):
    assert is_newer(found, Requirement("flwr>=1.39,<1.40")) is newer


def test_a_version_that_is_left_out_is_not_newer():
    assert not is_newer("1.39.2", Requirement("flwr>=1.39,!=1.39.2,<1.40"))


def test_a_pinned_flower_can_be_deployed(monkeypatch):
    monkeypatch.setattr(flower, "version", lambda name: "1.39.7")
    check_deployable()


@pytest.mark.parametrize("found", ["1.38.0", "1.42.0"])
@pytest.mark.parametrize(
    "start",
    [lambda: superlink.supervisor(SUPERLINK), lambda: supernode.supervisor(NODE)],
    ids=["superlink", "node"],
)
def test_another_flower_is_refused_before_anything_starts(monkeypatch, found, start):
    monkeypatch.setattr(flower, "version", lambda name: found)
    with pytest.raises(
        SuperLinkError, match=rf"Flower {found} is installed.*pip install 'flwr\[simulation\]"
    ):
        start()
