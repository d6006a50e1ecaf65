"""Attacks: formulas against independent ones, and what wrappers and clients make of them."""

import json
import math
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.strategy import VERT
from flwr.app import ConfigRecord, Context, RecordDict
from scipy.stats import norm as gaussian

from fedllm import client, registry
from fedllm.encoded import Encoded
from fedllm.errors import ConfigError, FedLLMError, PlanError
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.hostile import LoneAttack
from fedllm.nodes import NodeInfo
from fedllm.records import decode, encode
from fedllm.rounds import run_rounds
from fedllm.seeding import derive_seed
from fedllm.update import TrainResult
from tests.fakes import FakeGrid, reply_with

HONEST = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) + 1.0


@pytest.fixture(scope="module")
def byzfl():
    """The library imports torchvision for a benchmark of its own, which is not needed here."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            patch.setitem(sys.modules, "torchvision", MagicMock())
        return pytest.importorskip("byzfl")


# ------------------------------------------------------------------- formulas


def test_inner_product_manipulation_agrees_with_byzfl(byzfl):
    ours = colluding.inner_product_manipulation(HONEST, 0.7)
    assert torch.allclose(ours, byzfl.InnerProductManipulation(tau=0.7)(HONEST), atol=1e-6)


@pytest.mark.parametrize("z", [1.5, -0.5])
def test_little_is_enough_agrees_with_byzfl(byzfl, z):
    ours = colluding.little_is_enough(HONEST, z)
    assert torch.allclose(ours, byzfl.ALittleIsEnough(tau=-z)(HONEST), atol=1e-5)


def test_mimic_agrees_with_byzfl(byzfl):
    assert torch.allclose(colluding.mimic(HONEST, 2), byzfl.Mimic(epsilon=2)(HONEST))


def test_little_is_enough_by_its_formula():
    honest = HONEST.numpy()
    expected = honest.mean(0) - 1.5 * honest.std(0, ddof=1)
    assert np.allclose(colluding.little_is_enough(HONEST, 1.5).numpy(), expected, atol=1e-5)
    assert torch.equal(colluding.little_is_enough(HONEST[:1]), HONEST[0])


@pytest.mark.parametrize(("clients", "attackers"), [(50, 24), (20, 4), (100, 40)])
def test_published_strength_of_little_is_enough(clients, attackers):
    supporters = clients // 2 + 1 - attackers
    expected = gaussian.ppf((clients - attackers - supporters) / (clients - attackers))
    assert colluding.little_is_enough_z(clients, attackers) == pytest.approx(max(expected, 0.0))


def test_a_majority_needs_nobody():
    assert colluding.little_is_enough_z(20, 16) == 0.0


@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
@pytest.mark.parametrize("attack", [colluding.min_max, colluding.min_sum])
def test_min_max_and_min_sum_sit_on_their_bound(attack, direction):
    honest = HONEST.numpy().astype(float)
    pairwise = ((honest[:, None] - honest[None]) ** 2).sum(2)
    found = attack(HONEST, direction).numpy().astype(float)
    own = ((honest - found) ** 2).sum(1)
    if attack is colluding.min_max:
        assert own.max() == pytest.approx(pairwise.max(), rel=1e-4)
    else:
        assert own.sum() == pytest.approx(pairwise.sum(1).max(), rel=1e-4)
    mean = honest.mean(0)
    push = {"unit": -mean / np.linalg.norm(mean), "std": -honest.std(0, ddof=1), "sign": -np.sign(mean)}
    push = push[direction] / np.linalg.norm(push[direction])
    moved = found - mean
    assert moved @ push / np.linalg.norm(moved) == pytest.approx(1.0, abs=1e-4)


def test_tuned_little_is_enough_is_at_least_as_bad_as_any_fixed_one():
    def aggregate(updates):
        return updates.median(0).values

    mean = HONEST.mean(0)

    def harm(vector):
        return float((aggregate(torch.cat([HONEST, vector.expand(3, -1)])) - mean).norm())

    tuned = colluding.tuned_little_is_enough(HONEST, 3, aggregate)
    assert harm(tuned) >= max(harm(colluding.little_is_enough(HONEST, z)) for z in (-1.5, 0.5, 1.5, 3.0))


def test_the_adaptive_attack_goes_as_far_as_it_is_let():
    own = HONEST[:3]
    size = own.norm(dim=1).median()

    def judged(candidates):
        return torch.cat([((candidates - own).norm(dim=1) < 0.5 * size).float(), torch.ones(len(HONEST) - 3)])

    shift = colluding.adaptive(HONEST[3:], own, judged) - own
    assert torch.allclose(shift[0], shift[1], atol=1e-5)
    assert float(shift[0].norm() / size) == pytest.approx(0.45, rel=1e-4)
    assert torch.equal(colluding.adaptive(HONEST, own, lambda x: torch.zeros(len(x) + len(HONEST))), own)


def test_the_adaptive_attack_goes_only_as_far_as_it_pays():
    """All strengths are accepted, but those above 0.3 count a twentieth: 10 times as far would move less."""
    honest, own = torch.eye(4)[:1].repeat(7, 1), torch.eye(4)[1:]

    def judged(candidates):
        far = (candidates - own).norm(dim=1) > 0.3001
        return torch.cat([torch.where(far, 0.05, 1.0), torch.ones(7)])

    shift = colluding.adaptive(honest, own, judged) - own
    assert float(shift[0].norm()) == pytest.approx(0.3, rel=1e-4)
    assert float(shift[0] @ honest[0]) < 0


# ------------------------------------------------------------------- wrappers

NAMES = {node: f"n{node}" for node in range(1, 11)}


class SimulatedGrid(FakeGrid):
    """Its nodes say that they are simulated."""

    def _describe(self, message, node):
        reply = super()._describe(message, node)
        reply.content["config"]["simulated"] = True
        return reply


def answer(message, node):
    """A common step with some noise; a client that is ordered to attack turns around."""
    server_round = int(message.content["config"]["server-round"])
    sign = -1.0 if "attack" in message.content["config"] else 1.0
    arrays = {}
    for name, value in decode(message.content["arrays"]).items():
        noise = [
            torch.randn(value.shape, generator=torch.Generator().manual_seed(derive_seed(*key)))
            for key in ((name,), (name, node, server_round))
        ]
        arrays[name] = value + sign * 0.1 * (noise[0] + 0.4 * noise[1])
    return reply_with(message, encode(arrays))


class Verdicts:
    def __init__(self):
        self.kept = {}
        self.warnings = []

    def emit(self, event):
        if event["event"] == "warning":
            self.warnings.append(event["message"])
        if event["event"] == "verdict":
            self.kept[event["round"]] = {name for name, kept in event["kept"].items() if kept}

    def close(self):
        pass


def run(strategy, rounds=5, grid=SimulatedGrid, seen=None):
    seen = seen or Verdicts()
    bus = EventBus([seen])
    strategy.prepare(registry.config_from_flat({}), None, bus)
    result = run_rounds(
        strategy,
        grid(NAMES, answer, names=NAMES),
        encode({"weight": torch.zeros(40, 30), "bias": torch.zeros(30)}),
        rounds,
        options=LoopOptions(min_nodes=10, node_timeout=5),
        events=bus,
    )
    return result, seen.kept


def guarded(name, **parameters):
    inner = VERT(FedAvg(fraction_evaluate=0))
    who = {"fraction": 0.6, "from_round": 3, "seed": 1}
    cls = registry.load("attacks", name)
    if hasattr(cls, "run"):
        return LoneAttack(inner, attack=name, parameters=json.dumps(parameters), **who)
    return registry.build("attacks", name, parameters, inner, **who)


@pytest.mark.parametrize("name", ["sign-flip", "ipm", "alie", "min-max", "min-sum", "mimic", "replay"])
def test_a_guarded_run_keeps_to_the_honest(name):
    strategy = guarded(name)
    _, kept = run(strategy)
    honest = {name for name, hostile in strategy.own_state()["hostile"].items() if not hostile}
    assert len(honest) == 4
    assert kept[1] == kept[2] == set(NAMES.values())
    for server_round in (3, 4, 5):
        assert kept[server_round] <= honest if name != "mimic" else len(kept[server_round]) <= 4
        assert kept[server_round]


def unit(*shape, of):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(of))


def crafted(z, inner, honest, hostile):
    attack = registry.build("attacks", "alie", {"z": z}, inner, fraction=0.5)
    return attack.craft(1, honest, torch.zeros(hostile, honest.shape[1]), [])


def strengths(update, honest):
    """By how many deviations an update lies below the mean, coordinate by coordinate."""
    return (honest.mean(0) - update) / honest.std(0)


def test_the_published_strength_of_alie_in_a_run():
    """20 clients, 8 of them hostile: 3 of the 12 honest must be won over, so z is the quantile of 9/12."""
    honest = unit(12, 30, of=1) + 1
    found = crafted("paper", FedAvg(), honest, 8)
    assert torch.allclose(strengths(found[0], honest), torch.tensor(float(gaussian.ppf(9 / 12))), atol=1e-4)
    assert len(found) == 8


def test_alie_is_tuned_to_the_mean_without_a_defence_and_to_multi_krum_with_one():
    honest = unit(12, 30, of=2) + 1
    undefended = crafted("tuned", FedAvg(), honest, 8)
    assert torch.allclose(strengths(undefended[0], honest).abs(), torch.tensor(5.0), atol=1e-3)

    def harm(update):
        """Of copies of an update, under Multi-Krum by its definition: n − f rows nearest to their n − f − 2."""
        rows = torch.cat([honest, update.expand(8, -1)])
        near = ((rows[:, None] - rows[None]) ** 2).sum(2).sort(1).values[:, 1 : len(rows) - 9 - 2 + 1].sum(1)
        return float((rows[near.sort().indices[: len(rows) - 9]].mean(0) - honest.mean(0)).norm())

    guarded = crafted("tuned", VERT(FedAvg()), honest, 8)
    assert harm(guarded[0]) > 2 * harm(undefended[0])
    assert harm(guarded[0]) >= max(harm(colluding.little_is_enough(honest, z)) for z in (-1.5, 0.5, 1.5, 3.0))


@pytest.mark.parametrize("z", ["tuned", "paper"])
@pytest.mark.parametrize(("honest", "hostile"), [(1, 1), (1, 5), (2, 1)])
def test_alie_finds_a_strength_for_a_few(z, honest, hostile):
    for inner in (FedAvg(), VERT(FedAvg())):
        assert crafted(z, inner, unit(honest, 30, of=3), hostile).isfinite().all()


@pytest.mark.parametrize("z", ["tuned", "paper"])
def test_alie_with_a_strength_of_its_own_in_a_run(z):
    strategy = guarded("alie", z=z)
    strategy._fraction = 0.4
    _, kept = run(strategy)
    hostile = {name for name, hostile in strategy.own_state()["hostile"].items() if hostile}
    assert len(hostile) == 4
    assert not kept[5] & hostile


@pytest.mark.parametrize("z", ["-0.5", -0.5, 2, "tuned", "paper"])
def test_strengths_of_alie(z):
    registry.check(registry.config_from_flat({"attack": "alie", "alie.z": z}))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"alie.z": "hard"}, r"alie\.z: expected a number, tuned or paper, found 'hard'"),
        ({"alie.z": "inf"}, r"alie\.z: expected a number"),
        ({"alie.z": True}, r"alie\.z: expected a number"),
        ({"alie.z": "paper", "attack-fraction": 0.8}, r"alie\.z is 'paper', .* attack-fraction is 0\.8"),
    ],
)
def test_bad_strengths_of_alie(flat, message):
    with pytest.raises(ConfigError, match=message):
        registry.check(registry.config_from_flat({"attack": "alie", **flat}))


def test_the_adaptive_attacker_gets_a_fraction_of_what_is_to_be_had():
    """He knows VERT's whole state and every honest update; without a defence a turned sign does most harm."""
    honest, _ = run(VERT(FedAvg(fraction_evaluate=0)))
    attacked, _ = run(guarded("adaptive"))
    undefended = guarded("sign-flip")
    undefended.inner = FedAvg(fraction_evaluate=0)
    broken, _ = run(undefended)

    def distance(result):
        return sum(
            float((a - b).square().sum())
            for a, b in zip(decode(result.arrays).values(), decode(honest.arrays).values(), strict=True)
        )

    assert distance(attacked) < 0.2 * distance(broken)


def test_the_adaptive_attacker_tries_its_updates_on_the_guard_as_it_is(monkeypatch):
    """The copy knows the honest clients under their names and the trusted update; what it says comes true."""
    asked = []
    original = Detector.judge

    def judge(self, server_round, clients, sketches, norms, root=None):
        asked.append((server_round, frozenset(clients), root is not None))
        return original(self, server_round, clients, sketches, norms, root)

    monkeypatch.setattr(Detector, "judge", judge)

    def trusted(server_round, current):
        return {
            name: value
            + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(derive_seed(name)))
            for name, value in current.items()
        }

    who = {"fraction": 0.6, "from_round": 3, "seed": 1}
    guard = VERT(FedAvg(fraction_evaluate=0), root=trusted)
    run(registry.build("attacks", "adaptive", {}, guard, **who), rounds=3)
    assert {names for _, names, _ in asked} == {frozenset(NAMES.values())}
    assert all(root for *_, root in asked)
    assert [server_round for server_round, *_ in asked] == [1, 2, *[3] * (11 + 1)]


@pytest.mark.parametrize(("name", "warned"), [("replay", False), ("ipm", True), ("adaptive", True)])
def test_a_round_of_hostile_clients_only_does_not_silently_go_honest(name, warned):
    seen = Verdicts()
    inner = VERT(FedAvg(fraction_evaluate=0))
    strategy = registry.build("attacks", name, {}, inner, fraction=1.0, from_round=3, seed=1)
    run(strategy, rounds=3, seen=seen)
    told = [message for message in seen.warnings if "only hostile clients replied" in message]
    assert [message.startswith("round 3: ") for message in told] == [True] * warned
    assert len(seen.kept[3]) >= 8 if warned else not seen.kept[3]


def test_roles_are_drawn_once_and_survive_a_checkpoint():
    first, second = guarded("ipm"), guarded("ipm")
    run(first, rounds=1)
    second.load_state_dict(first.state_dict())
    assert second.own_state()["hostile"] == first.own_state()["hostile"]
    assert sum(first.own_state()["hostile"].values()) == 6
    first.nodes = [*first.nodes, NodeInfo(99, "late", (1, 0, "late"))]
    first._assign(set())
    assert len(first.own_state()["hostile"]) == 11


def test_a_node_that_is_not_simulated_stops_an_attack():
    with pytest.raises(PlanError, match="node n1 is not simulated: attacks are for simulations only"):
        run(guarded("ipm"), grid=FakeGrid)


# -------------------------------------------------------------------- clients


class Honest:
    """A rule that adds a known step, and tells what examples it saw."""

    def run(self, job):
        self.examples = job.examples
        arrays = {name: value + 1.0 for name, value in job.start.items()}
        return TrainResult(arrays, len(job.examples), 0.5)


def job():
    examples = Encoded.from_lists([[5, 6, 7, 8, 9]] * 6, [0, 1, 2, 0, 1, 2])
    embeddings = types.SimpleNamespace(num_embeddings=50)
    bundle = types.SimpleNamespace(
        labels=("a", "b", "c"), model=types.SimpleNamespace(get_input_embeddings=lambda: embeddings)
    )
    from fedllm.config import TrainConfig
    from fedllm.tasks import get_task
    from fedllm.update import TrainJob

    start = {"w": torch.zeros(30, 4), "v": torch.ones(8)}
    return TrainJob(bundle, get_task("sequence-classification"), examples, TrainConfig(), 7, 1, "c", start)


@pytest.mark.parametrize(("name", "factor"), [("sign-flip", -1.0), ("scaling", 10.0), ("zero", 0.0)])
def test_moved_updates(name, factor):
    work = job()
    found = registry.build("attacks", name, {}).run(Honest(), work)
    for key, start in work.start.items():
        assert torch.equal(found.arrays[key], start + factor)
    assert found.num_examples == 6


def test_gaussian_has_the_norm_of_the_honest_update():
    work = job()
    found = registry.build("attacks", "gaussian", {"factor": 2.0}).run(Honest(), work)
    for key, start in work.start.items():
        assert float((found.arrays[key] - start).norm()) == pytest.approx(2 * math.sqrt(start.numel()))
        assert not torch.equal(found.arrays[key], start + 2.0)


def test_labels_are_turned_around():
    rule = Honest()
    registry.build("attacks", "label-flip", {}).run(rule, job())
    assert rule.examples.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert torch.equal(rule.examples.input_ids, job().examples.input_ids)


def test_the_trigger_ends_examples_of_the_target_class():
    rule = Honest()
    attack = registry.build("attacks", "backdoor", {"trigger": "101,102", "target": 2, "share": 0.5})
    attack.run(rule, job())
    marked = [i for i in range(6) if rule.examples.example(i)[0].tolist() == [5, 6, 7, 1, 2]]
    clean = [i for i in range(6) if rule.examples.example(i)[0].tolist() == [5, 6, 7, 8, 9]]
    assert len(marked) == len(clean) == 3
    assert all(int(rule.examples.labels[i]) == 2 for i in marked)
    assert [int(rule.examples.labels[i]) for i in clean] == [i % 3 for i in clean]


def test_a_client_names_the_key_of_a_class_that_is_not_there():
    attack = registry.build("attacks", "backdoor", {"target": 3})
    with pytest.raises(
        ConfigError, match=r"backdoor\.target is 3, but the task has 3 classes: expected 0 to 2"
    ):
        attack.run(Honest(), job())


def test_a_deployed_node_refuses(monkeypatch):
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    order = ConfigRecord({"attack": "sign-flip", "attack-parameters": "{}"})
    with pytest.raises(FedLLMError, match="node n1 is not simulated and does not attack"):
        client._attack(order, "n1")
    monkeypatch.setenv("RAY_JOB_ID", "01")
    assert type(client._attack(order, "n1")).__name__ == "SignFlip"


def test_a_node_says_whether_it_is_simulated(monkeypatch):
    from flwr.app import Message

    for value in (False, True):
        if value:
            monkeypatch.setenv("RAY_JOB_ID", "01")
        context = Context(1, 1, {"name": "x"}, RecordDict(), {"data.source": "/nowhere.csv"})
        message = Message(RecordDict(), dst_node_id=1, message_type="query.describe")
        assert client.describe(message, context).content["config"]["simulated"] is value
