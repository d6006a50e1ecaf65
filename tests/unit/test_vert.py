"""VERT: judgements on made-up histories whose right answer is known, and the wrapper around strategies."""

import math

import flwr.serverapp.strategy as flower
import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.predict import Ladder
from fedllm.strategies.vert.select import FOREIGN_LOG_SIZE, Yardstick, against_root, twins
from fedllm.strategies.vert.sketch import Sketch
from fedllm.strategies.vert.strategy import VERT
from flwr.app import ConfigRecord
from torch.nn import functional as F

from fedllm import registry
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.errors import ConfigError
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.records import decode, encode
from fedllm.rounds import run_rounds
from fedllm.seeding import derive_seed
from fedllm.wrapper import core_of
from tests.fakes import FakeGrid, initial_arrays, reply_with

N, Q = 20, 256
NAMES = [str(index) for index in range(N)]


def normal(*key, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(*key)))


def honest(server_round, size=1.0, clients=N, common=1.0, own=0.6, noise=0.6):
    """Updates with a slowly turning common direction, a habit of each client, and fresh noise."""
    rows = [client_update(server_round, c, common, own, noise) for c in range(clients)]
    return size / Q**0.5 * torch.stack(rows)


def client_update(server_round, c, common=1.0, own=0.6, noise=0.6):
    angle = 0.15 * server_round
    direction = math.cos(angle) * normal(1, shape=(Q,)) + math.sin(angle) * normal(2, shape=(Q,))
    habit, fresh = normal(3, c, shape=(Q,)), normal(4, c, server_round, shape=(Q,))
    return common * direction + own * habit + noise * fresh


def judge(detector, server_round, updates, names=NAMES, root=None):
    return detector.judge(server_round, names, updates, updates.norm(dim=1), root)


def after(rounds, detector=None, size=1.0):
    detector = detector or Detector(Q)
    for server_round in range(1, rounds + 1):
        assert judge(detector, server_round, honest(server_round, size)).kept.all()
    return detector


def attacked(updates, forge, count=16):
    """The last ``count`` clients send what ``forge`` makes of the others' honest updates and their own."""
    forged = updates.clone()
    forged[N - count :] = forge(updates[: N - count], updates[N - count :])
    return forged


ATTACKS = {
    "sign-flip": lambda others, own: -own,
    "scaling": lambda others, own: 10 * own,
    "zero": lambda others, own: 0 * own,
    "noise": lambda others, own: normal(9, shape=own.shape) * own.norm(dim=1).mean() / Q**0.5,
    "ipm": lambda others, own: -0.5 * others.mean(0).expand_as(own),
    "alie": lambda others, own: (others.mean(0) - 1.5 * others.std(0)).expand_as(own),
    "min-max-like": lambda others, own: (0.2 * others.mean(0)).expand_as(own),
    "mimic": lambda others, own: others[0].expand_as(own),
}


@pytest.mark.parametrize("keep", [0.0, 4.0, 0.2], ids=["auto", "number", "share"])
@pytest.mark.parametrize("name", ATTACKS)
def test_most_clients_turn_hostile_and_none_gets_through(name, keep):
    detector = after(2, Detector(Q, keep=keep))
    for server_round in range(3, 8):
        found = judge(detector, server_round, attacked(honest(server_round), ATTACKS[name])).kept
        # Copies of an honest update cannot all be told from it, and do no harm: one may stand in for it.
        assert found[4:].sum() <= (1 if name == "mimic" else 0), server_round
        assert found[:4].sum() >= (3 if name == "mimic" else 4), server_round


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_turned_sign_scores_below_zero_whatever_the_size(size):
    detector = after(3, size=size)
    updates = honest(4, size)
    assert (judge(detector, 4, torch.cat([updates[:10], -updates[10:]])).scores[10:] < 0).all()


def test_without_an_attack_nearly_all_are_kept():
    detector, kept = Detector(Q), 0
    for server_round in range(1, 41):
        kept += int(judge(detector, server_round, honest(server_round, size=0.95**server_round)).kept.sum())
    assert kept >= 0.95 * 40 * N


def test_a_replayed_update_is_refused():
    detector = after(3)
    updates = honest(4)
    updates[5] = 3 * honest(3)[5]
    kept = judge(detector, 4, updates).kept
    assert not kept[5]
    assert kept.sum() == N - 1


def test_the_order_of_clients_does_not_matter():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    names = [NAMES[index] for index in order]
    first, second = after(3), Detector(Q)
    for server_round in range(1, 4):
        judge(second, server_round, honest(server_round)[order], names)
    updates = attacked(honest(4), ATTACKS["noise"], 10)
    one, other = judge(first, 4, updates), judge(second, 4, updates[order], names)
    assert torch.equal(one.kept[order], other.kept)
    assert torch.allclose(one.scores[order], other.scores, atol=1e-4)


def test_equal_runs_judge_equally():
    updates = attacked(honest(4), ATTACKS["noise"], 10)
    one, other = judge(after(3), 4, updates), judge(after(3), 4, updates)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.factors, other.factors)


def test_absent_clients_keep_their_history_and_newcomers_are_judged_by_the_others():
    detector = Detector(Q)
    for server_round in range(1, 13):
        present = [c for c in range(N) if (c + server_round) % 4 == 0 or server_round == 1]
        updates = honest(server_round)[present]
        assert judge(detector, server_round, updates, [NAMES[c] for c in present]).kept.all(), server_round
    updates = honest(13, clients=N + 2)
    names = ["0", "1", "2", "new", "hostile"]
    batch = torch.stack([updates[0], updates[1], updates[2], updates[N], -updates[N + 1]])
    assert judge(detector, 13, batch, names).kept.tolist() == [True] * 4 + [False]


def test_history_is_bounded():
    detector = Detector(Q, clients=N, window=3)
    for server_round in range(1, 6):
        judge(detector, server_round, honest(server_round), [f"{server_round}-{c}" for c in range(N)])
    assert len(detector.state_dict()["history"]["names"]) == N
    after(6, bounded := Detector(Q, window=3))
    assert bounded.nbytes <= 4 * Q * 3 * (N + 1)


def test_a_number_above_the_replies_rejects_only_what_does_not_move():
    """A round may have fewer replies than asked for; the wrapper warns of it, see below."""
    detector = after(2, Detector(Q, keep=50.0))
    updates = honest(3)
    updates[0] = 0
    assert judge(detector, 3, updates).kept.tolist() == [False] + [True] * (N - 1)


def test_all_zero_updates_are_all_rejected_and_teach_nothing():
    detector = after(2)
    before = detector.state_dict()["judged"]
    assert not judge(detector, 3, torch.zeros(N, Q)).kept.any()
    assert detector.state_dict()["judged"] == before
    assert judge(detector, 4, honest(4)).kept.all()


def test_a_long_update_is_clipped_to_the_kept_ones():
    detector = after(2, Detector(Q, clip=1.1))
    updates = honest(3)
    updates[7] *= 1.4
    found = judge(detector, 3, updates)
    assert found.kept.all()
    limit = 1.1 * updates.norm(dim=1).median()
    assert found.factors[7] == pytest.approx(float(limit / updates[7].norm()), rel=1e-5)


def test_newcomers_do_not_set_the_size_to_which_all_are_clipped():
    """Twelve of sixteen kept are new and three times as long."""
    detector = Detector(Q)
    for server_round in range(1, 6):
        judge(detector, server_round, honest(server_round)[:4], NAMES[:4])
    updates = honest(6)
    updates[4:] *= 3
    found = judge(detector, 6, updates)
    usual = updates[:4].norm(dim=1).sort().values[1]
    assert found.kept[4:].sum() >= 8
    moved = found.factors * updates.norm(dim=1)
    assert moved.max() <= 1.5 * usual * 1.0001


@pytest.mark.parametrize("name", ["sign-flip", "noise", "ipm", "zero", "scaling"])
def test_a_trusted_update_settles_an_attack_from_the_first_round(name):
    detector = Detector(Q)
    for server_round in range(1, 9):
        vector = honest(server_round, clients=N + 1)[N]
        root = Sketch(vector, float(vector.norm()))
        found = judge(detector, server_round, attacked(honest(server_round), ATTACKS[name]), root=root)
        assert not found.kept[4:].any(), server_round
        assert found.kept[:4].sum() >= 3, server_round


def test_state_survives_a_checkpoint(tmp_path):
    first = after(4)
    CheckpointStore(tmp_path, "x").save(ServerState(4, encode({}), first.state_dict(), {}))
    second = Detector(Q)
    second.load_state_dict(CheckpointStore(tmp_path, "x").latest()[0].strategy)
    for server_round in range(5, 9):
        updates = attacked(honest(server_round), ATTACKS["noise"])
        one, other = judge(first, server_round, updates), judge(second, server_round, updates)
        assert torch.equal(one.factors, other.factors)
        assert torch.equal(one.scores, other.scores)


def test_the_ladder_climbs_only_for_a_better_prediction():
    """Targets that are the last own direction: weighing the inputs beats adding them up."""
    ladder = Ladder()
    for server_round in range(4):
        inputs = torch.nn.functional.normalize(normal(server_round, shape=(30, 5, Q)), dim=2)
        targets = torch.nn.functional.normalize(
            inputs[:, 1] + 0.02 * normal(server_round, 1, shape=(30, Q)), dim=1
        )
        if server_round < 2:
            assert ladder.chosen == "temporal"
        ladder.learn(inputs, targets)
    assert ladder.chosen == "ridge"
    assert (ladder.predict(inputs) * targets).sum(1).mean() > 0.9


# ---------------------------------------------------------------------- wrapper


def client(hostile=(), onset=3, strength=1.0):
    """Agrees on a direction with some noise; hostile nodes turn around from a round on."""

    def answer(message, node):
        server_round = int(message.content["config"]["server-round"])
        sign = -strength if node in hostile and server_round >= onset else 1.0
        arrays = {}
        for name, value in decode(message.content["arrays"]).items():
            step = normal(name, shape=value.shape) + 0.5 * normal(name, node, server_round, shape=value.shape)
            arrays[name] = value + sign * 0.1 * step
        return reply_with(message, encode(arrays))

    return answer


class Told:
    """Collects events."""

    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(dict(event))

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


def loop(strategy, hostile=(), rounds=5, nodes=8, told=None, answer=None, **kwargs):
    told = told or Told()
    bus = EventBus([told])
    strategy.prepare(registry.config_from_flat({}), None, bus)
    names = {node: f"n{node}" for node in range(1, nodes + 1)}
    grid = FakeGrid(names, answer or client(hostile), names=names)
    options = LoopOptions(min_nodes=nodes, node_timeout=5)
    result = run_rounds(strategy, grid, initial_arrays(), rounds, options=options, events=bus, **kwargs)
    return result, told


def inner(kind):
    return (
        FedAvg(fraction_evaluate=0)
        if kind == "ours"
        else flower.FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
    )


@pytest.mark.parametrize("kind", ["ours", "flower"])
def test_hostile_nodes_change_nothing(kind):
    """Guarded and attacked, the model ends where honest nodes alone take it."""
    guarded, told = loop(VERT(inner(kind)), hostile={4, 5, 6, 7, 8})
    verdicts = told.of("verdict")
    assert [v["round"] for v in verdicts] == [1, 2, 3, 4, 5]
    assert all(verdicts[0]["kept"].values())
    assert verdicts[4]["kept"] == {f"n{node}": node < 4 for node in range(1, 9)}
    assert verdicts[4]["scores"]["n8"] < 0 < verdicts[4]["scores"]["n1"]
    unguarded, _ = loop(VERT(inner(kind), keep="8"), hostile={4, 5, 6, 7, 8})
    good, bad = (
        sum(
            float((a - b).square().sum())
            for a, b in zip(decode(result.arrays).values(), decode(honest_only.arrays).values(), strict=True)
        )
        for honest_only in [loop(VERT(inner(kind)))[0]]
        for result in (guarded, unguarded)
    )
    assert good < 0.1 * bad


@pytest.mark.parametrize(("kind", "tolerance"), [("ours", 0.0), ("flower", 1e-5)])
def test_without_an_attack_the_wrapper_changes_nothing(kind, tolerance):
    """Flower's strategies add up in an order drawn anew every time."""
    guarded, _ = loop(VERT(inner(kind)))
    names = {node: f"n{node}" for node in range(1, 9)}
    plain = run_rounds(
        inner(kind),
        FakeGrid(names, client(), names=names),
        initial_arrays(),
        5,
        options=LoopOptions(min_nodes=8, node_timeout=5),
        events=EventBus([]),
    )
    for name, array in plain.arrays.items():
        assert abs(array.numpy() - guarded.arrays[name].numpy()).max() <= tolerance


def test_a_round_whose_replies_are_all_rejected_is_skipped():
    strategy = VERT(FedAvg(fraction_evaluate=0))
    result, told = loop(strategy, hostile=set(range(1, 9)))
    assert [e["round"] for e in told.of("round-skipped")] == [3, 4, 5]
    reasons = {e["reason"] for e in told.of("round-skipped")}
    assert reasons == {"VERT rejected all 8 replies; the model stays as it was"}
    two, _ = loop(VERT(FedAvg(fraction_evaluate=0)), rounds=2)
    for name, array in two.arrays.items():
        assert (array.numpy() == result.arrays[name].numpy()).all()


def test_rounds_that_reject_most_replies_are_warned_of_once():
    _, told = loop(VERT(FedAvg(fraction_evaluate=0)), hostile={4, 5, 6, 7, 8}, rounds=8)
    warnings = [e["message"] for e in told.of("warning") if "most replies" in e["message"]]
    assert [message.split(":")[0] for message in warnings] == ["round 5"]
    _, told = loop(VERT(FedAvg(fraction_evaluate=0)), hostile={6, 7, 8}, rounds=8)
    assert not [e for e in told.of("warning") if "most replies" in e["message"]]


def test_a_resumed_run_has_the_same_verdicts(tmp_path):
    hostile = {4, 5, 6, 7, 8}
    whole, told = loop(VERT(FedAvg(fraction_evaluate=0)), hostile, rounds=6)
    store = CheckpointStore(tmp_path, "x")
    loop(VERT(FedAvg(fraction_evaluate=0)), hostile, rounds=4, checkpoints=store)
    resumed, later = loop(
        VERT(FedAvg(fraction_evaluate=0)), hostile, rounds=6, checkpoints=store, resume=True
    )
    drop = {"time"}
    assert [{k: v for k, v in e.items() if k not in drop} for e in later.of("verdict")] == [
        {k: v for k, v in e.items() if k not in drop} for e in told.of("verdict")[4:]
    ]
    for name, array in whole.arrays.items():
        assert (array.numpy() == resumed.arrays[name].numpy()).all()


def test_replies_wait_on_disk(monkeypatch):
    strategy = VERT(FedAvg(fraction_evaluate=0))
    plain, _ = loop(VERT(FedAvg(fraction_evaluate=0)), rounds=2)
    names = {node: f"n{node}" for node in range(1, 9)}
    strategy._spool_bytes = 0
    spooled = run_rounds(
        strategy,
        FakeGrid(names, client(), names=names),
        initial_arrays(),
        2,
        options=LoopOptions(min_nodes=8, node_timeout=5),
        events=EventBus([]),
    )
    for name, array in plain.arrays.items():
        assert (array.numpy() == spooled.arrays[name].numpy()).all()


def test_a_scaled_reply_moves_by_its_factor():
    strategy = VERT(FedAvg(), clip=1.0)
    grid = FakeGrid([1], client())
    (message,) = strategy.configure_train(1, initial_arrays(), ConfigRecord(), grid)
    reply = client()(message, 1)
    reply.metadata.__dict__["_src_node_id"] = 1
    before = decode(reply.content["arrays"])
    strategy._scale(reply, 0.25)
    start = decode(initial_arrays())
    for name, value in decode(reply.content["arrays"]).items():
        assert torch.allclose(value - start[name], 0.25 * (before[name] - start[name]), atol=1e-6)


def test_trusted_function_is_asked_every_round():
    asked = []

    def root(server_round, current):
        asked.append(server_round)
        return {name: value + 0.1 * normal(name, shape=value.shape) for name, value in current.items()}

    _, told = loop(VERT(FedAvg(fraction_evaluate=0), root=root), hostile=set())
    assert asked == [1, 2, 3, 4, 5]
    assert not told.of("warning")


def test_without_trusted_data_the_run_says_what_it_relies_on():
    _, told = loop(VERT(FedAvg(fraction_evaluate=0)), rounds=1)
    assert "updates alone cannot tell who is right" in told.of("warning")[0]["message"]


@pytest.mark.parametrize(
    "keep", ["0", "-1", "1.5", "many", "nan", "inf", "1e400", "0.0", 0, -1, 1.5, -0.2, float("inf"), True]
)
def test_bad_keep_is_refused(keep):
    with pytest.raises(ConfigError, match=r"vert\.keep: expected auto"):
        VERT(FedAvg(), keep=keep)
    with pytest.raises(ConfigError, match=r"vert\.keep: expected auto"):
        registry.check_parameters("defences", "vert", {"keep": keep})


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("1", 1), (1, 1), ("4", 4), (4, 4), (0.5, 4), ("0.5", 4), (0.01, 1), ("1.0", 8), (1.0, 8)],
)
def test_a_number_of_replies_or_a_share_quoted_or_not(keep, kept):
    """Eight clients, all of them honest; a dot makes a share of it."""
    assert registry.check_parameters("defences", "vert", {"keep": keep}) == {"keep": keep}
    VERT.check_cohort({"keep": keep}, 8)
    _, told = loop(VERT(FedAvg(fraction_evaluate=0), keep=keep), hostile=set(), rounds=5)
    assert [sum(event["kept"].values()) for event in told.of("verdict")][2:] == [kept] * 3
    assert not [event for event in told.of("warning") if "vert.keep" in event["message"]]


@pytest.mark.parametrize(("keep", "warned"), [("50", [1, 2, 3]), ("9", [1, 2, 3]), ("8", []), ("0.9", [])])
def test_every_round_with_fewer_replies_than_keep_is_warned_of(keep, warned):
    _, told = loop(VERT(FedAvg(fraction_evaluate=0), keep=keep), rounds=3)
    found = [event["message"] for event in told.of("warning") if "vert.keep" in event["message"]]
    assert [
        f"round {r}: vert.keep is {keep}, but only 8 replies came" in m
        for r, m in zip(warned, found, strict=True)
    ] == [True] * len(warned)


@pytest.mark.parametrize(
    "rule", ["geometric-median", "mixed-geometric-median", "trimmed-mean", "median", "nnm"]
)
def test_a_robust_rule_among_the_kept(rule):
    """Told to keep everybody, VERT lets one hostile reply through; the rule bounds it, and the verdict is VERT's."""

    def ended(rule, hostile):
        guarded = VERT(FedAvg(fraction_evaluate=0), keep="8", clip=1e6, rule=rule)
        result, told = loop(guarded, rounds=3, answer=client(hostile, strength=10.0))
        return decode(result.arrays), told

    def distance(one, other):
        return sum(float((a - b).square().sum()) for a, b in zip(one.values(), other.values(), strict=True))

    honest, _ = ended("mean", set())
    plain, _ = ended("mean", {8})
    robust, told = ended(rule, {8})
    assert distance(robust, honest) < 0.2 * distance(plain, honest)
    assert [event["defence"] for event in told.of("verdict")] == ["VERT"] * 3


def test_the_loop_looks_through_wrappers():
    core = FedAvg()
    assert core_of(VERT(VERT(core))) is core


def test_gradients_of_whole_data_sets_hardly_change_and_are_no_replay():
    """Each client's direction turns by a thousandth of itself from round to round."""
    detector, still = Detector(Q), honest(1)
    for server_round in range(1, 9):
        updates = still + 1e-3 * honest(server_round, common=0.0, own=0.0)
        assert judge(detector, server_round, updates).kept.all(), server_round


def test_hostile_clients_alone_do_not_widen_what_is_expected():
    """Four honest clients stood out for three rounds; then none of them is asked for ten."""
    detector = after(3)
    for server_round in range(4, 7):
        updates = attacked(honest(server_round), ATTACKS["sign-flip"])
        assert judge(detector, server_round, updates).kept.tolist() == [True] * 4 + [False] * 16
    for server_round in range(7, 17):
        updates = attacked(honest(7), ATTACKS["sign-flip"])[4:] + 0.1 * honest(server_round)[4:]
        assert not judge(detector, server_round, updates, NAMES[4:]).kept.any(), server_round
    assert judge(detector, 17, honest(8)).kept[:4].all()


def test_a_thousand_rounds_that_keep_nobody_do_no_harm():
    detector = after(3)
    for _ in range(2000):
        detector._relieve(NAMES)
    assert judge(detector, 2000, honest(4)).kept.all()


def test_a_turn_of_training_does_not_lock_everybody_out():
    """All clients turn at once: nobody fits for a round or two, then the nearest come back."""
    detector = after(3)
    kept = [int(judge(detector, r, honest(r + 12, size=0.1)).kept.sum()) for r in range(4, 12)]
    assert kept[0] == 0
    assert kept[-1] >= 0.95 * N


def adapter(rank):
    generator = torch.Generator().manual_seed(7)
    return {
        "m.lora_A.weight": torch.randn(rank, 40, generator=generator),
        "m.lora_B.weight": torch.zeros(30, rank),
    }


def mixed_client(message, node):
    """Adds one common product of rank 1, and noise, to whatever rank it was sent; nodes above 6 subtract it."""
    server_round = int(message.content["config"]["server-round"])
    start = decode(message.content["arrays"])
    a, b = start["m.lora_A.weight"], start["m.lora_B.weight"]
    sign = -1.0 if node > 6 and server_round > 2 else 1.0
    # The change of B that gives the wanted product with this client's own A.
    wanted = normal("left", shape=(30, 1)) @ normal("right", shape=(1, 40))
    step = sign * wanted @ torch.linalg.pinv(a) + 0.2 * normal(node, server_round, shape=b.shape)
    return reply_with(message, encode({"m.lora_A.weight": a, "m.lora_B.weight": b + step}))


def test_clients_of_mixed_ranks_are_compared_by_their_products():
    strategy = VERT(FedAvg(fraction_evaluate=0, aggregation="exact", client_ranks=(2, 4, 8)))
    told = Told()
    bus = EventBus([told])
    strategy.prepare(registry.config_from_flat({}), None, bus)
    names = {node: f"n{node}" for node in range(1, 10)}
    run_rounds(
        strategy,
        FakeGrid(names, mixed_client, names=names),
        encode(adapter(8)),
        5,
        options=LoopOptions(min_nodes=9, node_timeout=5),
        events=bus,
    )
    kept = [{name for name, is_kept in v["kept"].items() if is_kept} for v in told.of("verdict")]
    assert kept == [set(names.values())] * 2 + [{f"n{node}" for node in range(1, 7)}] * 3


def test_ten_of_a_hundred_a_round_with_clients_that_join_and_leave():
    """Every client is seen once in ten rounds; from round 31 on eight of those ten that reply are hostile."""
    detector, wrongly, missed, of_honest, of_hostile = Detector(Q), 0, 0, 0, 0
    for server_round in range(1, 51):
        joined = 2 * (server_round // 10)  # two clients leave and two join every ten rounds
        present = [joined + (7 * server_round + 10 * k) % 100 for k in range(10)]
        updates = torch.stack([client_update(server_round, c) for c in present])
        hostile = torch.tensor([server_round > 30 and c % 100 >= 20 for c in present])
        updates[hostile] *= -1
        kept = judge(detector, server_round, updates, [str(c) for c in present]).kept
        wrongly, missed = wrongly + int((~kept & ~hostile).sum()), missed + int((kept & hostile).sum())
        of_honest, of_hostile = of_honest + int((~hostile).sum()), of_hostile + int(hostile.sum())
    assert of_hostile == 20 * 8
    assert missed == 0
    assert wrongly <= 0.05 * of_honest


def test_late_onset_is_caught_in_the_round_of_turning():
    detector = after(5)
    found = judge(detector, 6, attacked(honest(6), ATTACKS["sign-flip"])).kept
    assert found[:4].all()
    assert not found[4:].any()


def test_a_reply_with_nan_is_dropped_before_it_is_sketched():
    def poisoned(message, node):
        reply = client()(message, node)
        if node == 3:
            arrays = decode(reply.content["arrays"])
            first = next(iter(arrays))
            arrays[first].view(-1)[0] = math.nan
            return reply_with(message, encode(arrays))
        return reply

    told = Told()
    bus = EventBus([told])
    names = {node: f"n{node}" for node in range(1, 9)}
    strategy = VERT(FedAvg(fraction_evaluate=0))
    strategy.prepare(registry.config_from_flat({}), None, bus)
    options = LoopOptions(min_nodes=8, node_timeout=5)
    run_rounds(
        strategy, FakeGrid(names, poisoned, names=names), initial_arrays(), 3, options=options, events=bus
    )
    assert {event["node"] for event in told.of("node-dropped")} == {"n3"}
    assert all("n3" not in verdict["kept"] for verdict in told.of("verdict"))
    assert all(all(verdict["kept"].values()) for verdict in told.of("verdict"))


def test_two_nodes_with_one_identity_are_not_taken_for_one_client():
    """The loop admits the first one only; the other's replies cannot write its history."""
    told = Told()
    bus = EventBus([told])
    names = {1: "a", 2: "b", 3: "b", 4: "c", 5: "d"}
    strategy = VERT(FedAvg(fraction_evaluate=0))
    strategy.prepare(registry.config_from_flat({}), None, bus)
    options = LoopOptions(min_nodes=4, node_timeout=5)
    run_rounds(
        strategy, FakeGrid(names, client(), names=names), initial_arrays(), 2, options=options, events=bus
    )
    assert [set(verdict["kept"]) for verdict in told.of("verdict")] == [{"a", "b", "c", "d"}] * 2


@pytest.mark.parametrize(("scores", "original"), [((0.4, 0.3, 0.35, 0.5), 0), ((0.4, 0.4, 0.3, 0.5), None)])
def test_of_copies_the_one_that_its_own_history_predicts_is_the_original(scores, original):
    directions = torch.eye(3)[[0, 0, 0, 1]]
    found = twins(directions, torch.tensor(scores))
    assert found.tolist() == [0.0 if index in (original, 3) else 1.0 for index in range(4)]


def test_copies_that_no_history_tells_apart_are_one_reply_where_the_server_has_trusted_rows():
    directions = torch.eye(3)[[1, 0, 0, 0]]
    found = twins(directions, torch.tensor([0.4, 0.3, 0.3, 0.3]), settle=True)
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_client_with_few_labels_is_held_to_the_trusted_update_not_to_one_round_of_others():
    detector, generator = Detector(64, warm_up=2), torch.Generator().manual_seed(0)
    common, own = (F.normalize(torch.randn(64, generator=generator), dim=0) for _ in range(2))
    for server_round in (1, 2):
        noise = torch.randn(5, 64, generator=generator)
        few_labels = 0.6 * common + own + 0.02 * noise[3]
        sketches = torch.stack([*(common + 0.1 * noise[:3]), few_labels, -common, noise[4]])
        found = detector.judge(
            server_round, list("abcdef"), sketches, sketches.norm(dim=1), Sketch(common, 1.0)
        )
        assert found.kept.tolist() == [True, True, True, True, False, False]


def test_however_sizes_scatter_ten_times_the_expected_one_is_suspicious_of_a_stranger():
    nothing = torch.zeros(5, 3)
    sizes = torch.tensor([-1.3, -0.6, 0.0, 0.6, 1.3])
    features = torch.stack([torch.full((5,), 0.6), sizes, torch.full((5,), 0.3)], 1)
    strangers, known = Yardstick(FOREIGN_LOG_SIZE), Yardstick()
    for yardstick in (strangers, known):
        yardstick.learn(features, nothing)
        assert bool((yardstick.distances(features, nothing) <= 1).all())
    features[2, 1] = math.log(10)
    assert (strangers.distances(features, nothing) > 1).tolist() == [False, False, True, False, False]
    assert bool((known.distances(features, nothing) <= 1).all())


def test_who_is_nearer_to_a_crowd_of_strangely_low_scores_than_to_the_level_goes_with_it():
    yardstick = Yardstick()
    honest_scores = torch.tensor([0.68, 0.71, 0.74, 0.77, 0.80])
    yardstick.learn(torch.stack([honest_scores, torch.zeros(5), torch.full((5,), 0.3)], 1), torch.zeros(5, 3))
    crowd = torch.linspace(0.15, 0.33, 15)

    def suspicious(score, others):
        scores = torch.cat([torch.tensor([score]), honest_scores[:4], others])
        features = torch.stack([scores, torch.zeros(20), torch.full((20,), 0.3)], 1)
        nothing = torch.zeros(20, 3)
        return bool(yardstick.crowd(scores)[0]) or bool(yardstick.distances(features, nothing)[0] > 1)

    assert suspicious(0.39, crowd)
    assert not suspicious(0.60, crowd)
    assert not suspicious(0.56, crowd + 0.03)  # still nearer to the level
    assert not suspicious(0.38, -crowd)  # a crowd of negative scores does not widen what is allowed
    assert not suspicious(0.39, torch.full((15,), 0.74))  # nobody else is strange: a score like this happens


def test_if_all_scores_sink_it_is_the_level_that_has_moved():
    yardstick = Yardstick()
    scores = torch.linspace(0.5, 0.7, 20)
    yardstick.learn(torch.stack([scores, torch.zeros(20), torch.full((20,), 0.3)], 1), torch.zeros(20, 3))
    below = torch.cat([torch.linspace(0.20, 0.29, 17), torch.tensor([0.31, 0.33, 0.36])])
    assert yardstick.crowd(below).tolist() == [True] * 17 + [False] * 3


def test_against_a_trusted_update_copies_never_come_in_however_wide_the_yardstick():
    features = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for scores in ([0.5, 0.9, 0.9], [-0.1, 0.9, 0.9]):
        distances = against_root(torch.tensor(scores), features, 1.0)
        assert torch.isinf(distances).tolist() == [False, True, True]


def test_what_a_stranger_sent_in_the_trusted_first_rounds_counts_against_it_later():
    """Rejected in four rounds, one compliant reply does not make it one of the others."""

    def kept_at_last(before):
        detector, common = Detector(Q, warm_up=4), normal(1, shape=(Q,))
        for server_round in range(1, 6):
            rows = [common + normal(server_round, c, shape=(Q,)) for c in range(6)]
            last = common + normal(server_round, 9, shape=(Q,))
            rows.append(last if server_round == 5 else before(last))
            sketches = torch.stack(rows)
            names = [*"abcdef", "stranger"]
            root = Sketch(common, float(common.norm()))
            found = detector.judge(server_round, names, sketches, sketches.norm(dim=1), root)
        return found.kept.tolist()

    assert kept_at_last(lambda update: 20 * update) == [True] * 7  # too long until now, but the right way
    assert kept_at_last(lambda update: -update) == [True] * 6 + [False]


def test_a_newcomer_of_ten_times_the_size_is_rejected_where_sizes_scatter_and_a_known_client_is_not():
    detector, common = Detector(Q), normal(1, shape=(Q,))
    generator = torch.Generator().manual_seed(1)
    for server_round in range(1, 9):
        factors = torch.empty(10).log_normal_(0, 1, generator=generator)
        factors[9] = 10.0 * factors[:9].median()
        names = [str(c) for c in range(10)]
        if server_round == 8:
            names[8] = "newcomer"
            factors[8] = 10.0 * factors[:8].median()
        rows = [f * (common + normal(server_round, c, shape=(Q,))) for c, f in enumerate(factors)]
        sketches = torch.stack(rows)
        found = detector.judge(server_round, names, sketches, sketches.norm(dim=1))
    assert not bool(found.kept[8])
    assert bool(found.kept[9])
