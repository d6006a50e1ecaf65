"""What a process keeps, against a limit that several kinds share."""

import threading

import pytest

from fedllm.errors import ConfigError
from fedllm.kept import Kept, kept_bytes, limit_kept_bytes


@pytest.fixture
def kinds(monkeypatch):
    """Two kinds, without the models that other tests in this process have left."""
    monkeypatch.setattr("fedllm.kept._kinds", [])
    kinds = Kept("letter", len), Kept("digit", len)
    yield (*kinds, kept_bytes())
    limit_kept_bytes(None)


def put(kind, key, size, at_most=9):
    return kind.get(key, lambda: bytearray(size), at_most)


def test_a_value_is_made_once_and_the_oldest_goes_at_the_number(kinds):
    letters, _, _ = kinds
    first = put(letters, "a", 1)
    assert put(letters, "a", 5) is first
    put(letters, "b", 2)
    put(letters, "a", 1)
    put(letters, "c", 3, at_most=2)
    assert [len(value) for value in letters.values()] == [1, 3]  # b was used least recently
    assert letters.loads == 3


def test_bytes_are_limited_over_all_kinds_by_last_use(kinds):
    letters, digits, before = kinds
    limit_kept_bytes(before + 100)
    put(letters, "a", 40)
    put(digits, "1", 40)
    put(letters, "a", 40)
    put(digits, "2", 30)
    assert kept_bytes() - before == 70
    assert [len(value) for value in digits.values()] == [30]
    assert len(letters) == 1


def test_room_is_made_before_a_value_of_known_size(kinds):
    letters, _, before = kinds
    limit_kept_bytes(before + 100)
    put(letters, "big", 90)
    put(letters, "small", 10)  # not known yet: taken to be as large as the largest, which goes
    assert [len(value) for value in letters.values()] == [10]
    seen = []

    def make():
        seen.append(kept_bytes() - before)
        return bytearray(90)

    letters.get("big", make, 9)
    assert seen == [10]
    assert [len(value) for value in letters.values()] == [10, 90]


def test_a_value_that_is_discarded_is_made_again(kinds):
    letters, _, _ = kinds
    letters.discard(put(letters, "a", 1))
    letters.discard(bytearray(1))  # one that is equal but not kept
    put(letters, "b", 1)
    put(letters, "a", 1)
    assert (len(letters), letters.loads) == (2, 3)


def test_the_value_used_last_stays_even_if_it_is_too_large(kinds):
    letters, _, before = kinds
    limit_kept_bytes(before + 10)
    put(letters, "a", 50)
    put(letters, "a", 50)
    assert letters.loads == 1
    put(letters, "b", 60)
    assert [len(value) for value in letters.values()] == [60]


def test_what_fails_is_not_kept(kinds):
    letters, _, _ = kinds
    with pytest.raises(ZeroDivisionError):
        letters.get("a", lambda: 1 / 0, 2)
    assert (len(letters), letters.loads) == (0, 0)


def test_values_do_not_wait_for_one_that_is_being_made(kinds):
    letters, _, _ = kinds
    put(letters, "a", 1)
    making, go_on = threading.Event(), threading.Event()

    def make():
        making.set()
        assert go_on.wait(10)
        return bytearray(2)

    thread = threading.Thread(target=letters.get, args=("b", make, 9))
    thread.start()
    assert making.wait(10)
    assert len(letters.values()) == 1
    go_on.set()
    thread.join(10)
    assert len(letters.values()) == 2


def test_a_limit_must_be_positive():
    with pytest.raises(ConfigError, match="memory limit is 0"):
        limit_kept_bytes(0)
