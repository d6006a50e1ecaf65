"""What is kept must not point away from a trusted update, whatever the attackers know."""

import copy

import pytest
import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.vert import detector as judging
from fedllm.strategies.vert.course import towards
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.sketch import Sketch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.unit.test_vert import N, Q, after, honest, judge, normal

TRUSTED = F.normalize(normal("trusted", shape=(Q,)), dim=0)


def points_away(directions):
    return float(F.cosine_similarity(directions.mean(0), TRUSTED, dim=0)) < -2 / Q**0.5


@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(-0.3, 0.3))
def test_those_who_agree_least_go_and_no_more_than_must(seed, count, agree):
    directions = F.normalize(normal(seed, shape=(count, Q)) / Q**0.5 + agree * TRUSTED, dim=1)
    kept = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.7
    held = towards(TRUSTED, kept, directions)
    out = kept & ~held
    agreement = directions @ TRUSTED
    assert not (held & ~kept).any()
    if held.any():
        assert not points_away(directions[held])
    if out.any():
        nearest = agreement.masked_fill(~out, -1).argmax()
        assert not held.any() or agreement[nearest] <= agreement[held].min()
        assert points_away(torch.cat([directions[held], directions[nearest, None]]))


def test_nobody_is_kept_where_even_the_nearest_points_away():
    assert not towards(TRUSTED, torch.ones(3, dtype=torch.bool), -TRUSTED.expand(3, Q)).any()


def last_step(detector, rounds):
    """Cosine to the trusted update of what is learned, after 16 of 20 have pushed as far as the detector lets them."""
    for server_round in rounds:
        updates = honest(server_round)
        vector = honest(server_round, clients=N + 1)[N]
        root = Sketch(vector, float(vector.norm()))

        def judged(candidates, updates=updates, server_round=server_round, root=root):
            trial = torch.cat([updates[:4], candidates])
            factors = judge(copy.deepcopy(detector), server_round, trial, root=root).factors
            return torch.cat([factors[4:], factors[:4]])

        sent = torch.cat([updates[:4], colluding.adaptive(updates[:4], updates[4:], judged)])
        moved = judge(detector, server_round, sent, root=root).factors @ sent
    return float(F.cosine_similarity(moved, vector, dim=0))


@pytest.mark.parametrize("held", [True, False])
def test_where_the_course_is_lost_a_trusted_update_holds(held, monkeypatch):
    """Without either, attackers who know the detector reverse the mean."""
    if not held:
        monkeypatch.setattr(judging, "towards", lambda trusted, kept, directions: kept)
    detector = after(4, Detector(Q))
    detector._course.hold = lambda kept, directions, relief: kept
    found = last_step(detector, range(5, 13))
    assert found >= -2 / Q**0.5 if held else found < -0.3
