"""The course of training: a bound on what attackers gain in many small steps."""

import copy
import math

import pytest
import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.vert.course import Course, upper_part
from fedllm.strategies.vert.detector import _TURN, _WIDEN, Detector
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.unit.test_vert import NAMES, N, Q, after, honest, judge, normal

FIRST = F.normalize(normal("course", shape=(1, Q)), dim=1)


def replies(count, agree, *key):
    """Directions with a given cosine to ``FIRST`` and noise of their own."""
    rest = normal(*key, shape=(count, Q))
    rest = F.normalize(rest - rest @ FIRST.T * FIRST, dim=1)
    return agree * FIRST + (1 - agree**2) ** 0.5 * rest


def course(rounds=4, agree=0.5):
    found = Course()
    for server_round in range(rounds):
        found.learn(replies(10, agree, server_round))
    return found


def everybody(directions):
    return torch.ones(len(directions), dtype=torch.bool)


def test_nothing_is_held_before_there_is_a_course():
    kept = torch.tensor([True, False, True])
    assert torch.equal(Course().hold(kept, replies(3, 0.5, "x"), 1.0), kept)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 40])
def test_as_many_as_go_on_are_kept_however_few_they_are(count):
    directions = replies(count, 0.5, "few")
    assert course().hold(everybody(directions), directions, 1.0).all()


def turned(count, cosine, *key):
    """Replies whose common part has a given cosine to ``FIRST``, all into one direction."""
    aside = normal("aside", shape=(1, Q))
    aside = F.normalize(aside - aside @ FIRST.T * FIRST, dim=1)
    common = cosine * FIRST + (1 - cosine**2) ** 0.5 * aside
    return F.normalize(0.5 * common + 0.87 * normal(*key, shape=(count, Q)) / Q**0.5, dim=1)


def test_of_those_who_pull_aside_some_are_left_out():
    """Half of the usual agreement would do for all of them."""
    directions = torch.cat([replies(8, 0.5, "honest"), turned(12, 0.0, "aside")])
    held = course().hold(everybody(directions), directions, 1.0)
    assert held[:8].all()
    assert held[8:].sum() <= 9


def test_if_all_turn_alike_it_is_training_that_turns():
    directions = turned(20, 0.65, "all")
    assert course().hold(everybody(directions), directions, 1.0).all()


def test_more_noise_is_nobodys_fault():
    directions = replies(10, 0.3, "noisy")
    assert course().hold(everybody(directions), directions, 1.0).all()


def test_those_who_pull_the_mean_around_are_left_out():
    directions = torch.cat([replies(4, 0.5, "honest"), replies(16, -0.5, "hostile")])
    held = course().hold(everybody(directions), directions, 1.0)
    assert held[:4].all()
    assert held[4:].sum() <= 2  # as many as the agreement of the others makes up for


def test_if_all_pull_nobody_is_kept_until_it_must_be_a_turn():
    directions = replies(10, -0.5, "turned")
    assert not course().hold(everybody(directions), directions, 1.0).any()
    assert course().hold(everybody(directions), directions, 4.0).all()


def test_noise_has_no_course():
    directions = replies(10, -0.5, "turned")
    assert course(agree=0.0).hold(everybody(directions), directions, 1.0).all()


def test_a_noisy_crowd_follows_the_course_and_a_hostile_one_does_not():
    found = course()
    assert found.carries(replies(13, 0.2, "noisy")).all()
    assert not found.carries(replies(13, 0.0, "noise")).any()
    assert not found.carries(replies(13, -0.3, "turned")).any()
    alike = 0.2 * FIRST + 0.6 * replies(1, 0.0, "elsewhere") + 0.2 * replies(13, 0.0, "own")
    assert not found.carries(F.normalize(alike, dim=1)).any()
    assert not found.carries(replies(1, 0.5, "one")).any()
    assert not Course().carries(replies(13, 0.5, "nothing yet")).any()
    assert not course(agree=0.0).carries(replies(13, 0.5, "noise has no course")).any()


@pytest.mark.parametrize("hostile", [-0.5, -0.15, 0.0])
def test_the_part_of_a_crowd_that_follows_the_course_is_told_apart(hostile):
    crowd = torch.cat([replies(16, hostile, "hostile"), replies(4, 0.25, "noisy")])
    assert course().carries(crowd).tolist() == [False] * 16 + [True] * 4


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=12))
def test_the_upper_part_leaves_the_least_squares_within_both(values):
    values = torch.tensor(values, dtype=torch.float64)
    ordered = values.sort(descending=True).values

    def within(part):
        return float((part - part.mean()).square().sum())

    least = min(within(ordered[:k]) + within(ordered[k:]) for k in range(1, len(values)))
    upper = upper_part(values)
    assert 0 < int(upper.sum()) < len(values)
    assert values[upper].min() >= values[~upper].max()
    assert within(values[upper]) + within(values[~upper]) == pytest.approx(least, abs=1e-9)


def test_honest_scores_that_sink_as_training_settles_are_no_attack():
    """Half of the signal goes from one round to the next; most scores then lie below half of what they were."""
    detector = Detector(Q)
    for server_round in range(1, 6):
        judge(detector, server_round, honest(server_round, common=0.6, own=0.2, noise=1.0))
    for server_round in range(6, 11):
        assert judge(detector, server_round, honest(server_round, common=0.3, own=0.1, noise=1.0)).kept.all()


@pytest.mark.parametrize("seed", range(3))
def test_turned_signs_do_not_get_in_while_training_settles(seed):
    """Four honest ones' scores fall at once to a quarter, in the midst of an attack; training moves by what is kept."""

    def update(moved, server_round, c):
        signal, angle = 1.2 if server_round < 6 else 0.3, 0.1 * moved
        first, second = normal(seed, 1, shape=(Q,)), normal(seed, 2, shape=(Q,))
        common = math.cos(angle) * first + math.sin(angle) * second
        habit, fresh = normal(seed, 3, c, shape=(Q,)), normal(seed, 4, c, server_round, shape=(Q,))
        return signal * (common + habit / 3) + fresh

    detector, moved, honest_kept, hostile_kept = Detector(Q), 0, 0, 0
    for server_round in range(1, 17):
        updates = torch.stack([update(moved, server_round, c) for c in range(N)])
        if server_round > 2:
            updates[4:] *= -1
        kept = judge(detector, server_round, updates).kept
        moved += bool(kept.any())
        if server_round > 2:
            honest_kept += int(kept[:4].sum())
            hostile_kept += int(kept[4:].sum())
    assert honest_kept >= 0.95 * 4 * 14
    assert hostile_kept <= 0.01 * 16 * 14


@pytest.mark.parametrize("rounds", [1, 6, 10])
def test_who_was_hostile_comes_back(rounds):
    """Not in the round in which it behaves again, but not never, however stale its history has become."""
    detector, kept = Detector(Q), {}
    end = 3 + rounds
    for server_round in range(1, end + 9):
        updates = honest(server_round)
        if 3 <= server_round < end:
            updates[4:] *= -1
        kept[server_round] = int(judge(detector, server_round, updates).kept.sum())
    assert [kept[r] for r in range(3, end + 2)] == [4] * (rounds + 2)
    assert [kept[r] for r in range(end + 6, end + 9)] == [N] * 3


def test_a_round_of_none_but_hostile_ones_does_not_let_those_in_who_come_near():
    """Of many clients few are asked in a round: all of those may be known from hostile crowds."""
    detector = Detector(Q)
    for server_round in range(1, 8):
        updates = honest(server_round, common=0.5, own=0.1, noise=1.0)
        if server_round > 2:
            updates[4:] *= -1
        judge(detector, server_round, updates)
    updates = honest(8, common=0.15, own=0.0, noise=1.0)[4:]  # near enough for some, had they a better name
    assert not judge(detector, 8, updates, NAMES[4:]).kept.any()


def test_a_round_that_keeps_nobody_does_not_open_the_course_to_those_who_pull_against_it():
    """The yardstick gives way first; hostile replies near zero would make up for honest ones otherwise."""
    directions = torch.cat([replies(4, 0.15, "honest"), replies(4, -0.1, "hostile")])
    found = course()
    assert found.hold(everybody(directions), directions, _TURN)[4:].sum() <= 1
    assert found.hold(everybody(directions), directions, _WIDEN).all()


def test_noise_in_place_of_most_replies_is_rejected_also_when_scores_are_small():
    detector = Detector(Q)
    for server_round in range(1, 11):
        updates = honest(server_round, common=0.4, own=0.1, noise=1.0)
        if server_round > 5:
            updates[4:] = normal("noise", server_round, shape=(16, Q)) * updates.norm() / (N * Q) ** 0.5
        kept = judge(detector, server_round, updates).kept
        if server_round > 5:  # one of 16 may resemble a reply by chance
            assert kept[4:].sum() <= 1
            assert kept[:4].sum() >= 3


def test_a_course_survives_a_checkpoint():
    first, second = course(), Course()
    second.load_state_dict(first.state_dict())
    directions = torch.cat([replies(3, 0.5, "a"), replies(7, -0.2, "b")])
    assert torch.equal(
        first.hold(everybody(directions), directions, 1.0),
        second.hold(everybody(directions), directions, 1.0),
    )
    Course().load_state_dict(Course().state_dict())


def test_an_attacker_who_knows_the_detector_cannot_turn_training_around():
    """16 of 20 push as far as a copy of the detector lets most of them; without the course they reverse the mean."""

    def gained(bounded):
        detector = after(4, Detector(Q))
        if not bounded:
            detector._course.hold = lambda kept, directions, relief: kept
        for server_round in range(5, 11):
            updates = honest(server_round)

            def judged(candidates, updates=updates, server_round=server_round, detector=detector):
                trial = torch.cat([updates[:4], candidates])
                factors = judge(copy.deepcopy(detector), server_round, trial).factors
                return torch.cat([factors[4:], factors[:4]])

            pushed = colluding.adaptive(updates[:4], updates[4:], judged)
            found = judge(detector, server_round, torch.cat([updates[:4], pushed]))
            moved = (found.factors[:, None] * torch.cat([updates[:4], pushed])).sum(0)
            last = F.cosine_similarity(moved, updates.mean(0), dim=0)
        return float(last)

    assert gained(bounded=True) > 0.3
    assert gained(bounded=False) < 0


def test_a_crowd_that_half_trains_honestly_does_not_stand_out_from_itself():
    """As with a backdoor: some of it agree a little better than half of what is usual."""
    detector = after(3)
    for server_round in range(4, 16):
        updates = honest(server_round)
        honestly = torch.linspace(0.6, 1.1, 16)[:, None]
        updates[4:] = honestly * updates[4:] + 1.5 * normal("trigger", shape=(1, Q)) / Q**0.5
        kept = judge(detector, server_round, updates).kept
        assert kept.tolist() == [True] * 4 + [False] * 16, server_round


def test_slow_turns_of_honest_training_are_followed():
    detector = Detector(Q)
    kept = sum(int(judge(detector, r, honest(r, own=0.8, noise=0.8)).kept.sum()) for r in range(1, 25))
    assert kept >= 0.95 * 24 * N
