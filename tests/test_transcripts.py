"""Transcripts as a caller has them: a log of tokens, beside leases, and what is refused.

What they answer is in test_transcript_memo.py, what they change in test_transcript_digests.py: nothing. Each
sentence of their section in docs/design.md has its test; the walks (test_state_machine.py) have them all at
once.
"""

from __future__ import annotations

import array
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybridcache.cache import HybridCache
from hybridcache.errors import ConcurrencyError, StateError
from tests.conftest import Driver
from tests.test_bad_input import BAD_TOKENS, Intruder
from tests.test_transcript_memo import CAT, DOG, PATH, finish, same

# ---- a log of tokens


def test_it_is_a_log_of_tokens(driver: Driver) -> None:
    t = driver.cache.transcript()
    assert (len(t), t.tokens.tolist(), t.salt, t.closed) == (0, [], b"", False)
    t.extend([1, 2, 3])
    t.extend(np.array([4, 5], np.int32))
    t.extend(np.array([6], np.int64))
    t.extend(torch.tensor([7, 8]))
    t.extend(array.array("i", [9]))
    t.extend((2**31 - 1,))
    assert t.tokens.tolist() == [*range(1, 10), 2**31 - 1] and t.tokens.dtype == np.int32
    assert len(t) == 10


@pytest.mark.parametrize("nothing", [[], (), np.array([], np.int32), np.array([], np.int64)])
def test_to_append_nothing_does_nothing(driver: Driver, nothing: Any) -> None:
    t = driver.cache.transcript()
    t.extend(nothing)
    t.extend([1, 2])
    t.extend(nothing, content_keys=())
    assert t.tokens.tolist() == [1, 2]


def test_tokens_are_a_copy_at_both_ends(driver: Driver) -> None:
    given = np.array([1, 2, 3], np.int32)
    t = driver.cache.transcript()
    t.extend(given)
    given[0] = 9
    before = t.tokens
    before[1] = 9
    t.truncate(2)
    t.extend([7])
    assert t.tokens.tolist() == [1, 2, 7] and before.tolist() == [1, 9, 3]


def test_tokens_are_given_back_without_their_content(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend([5, 0, 0], content_keys=[(1, CAT), (2, DOG)])
    assert t.tokens.tolist() == [5, 0, 0]


def test_truncate_cuts_it_to_its_first_tokens(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    for length in (12, 11, 4, 4, 0, 0):
        t.truncate(length)
        assert t.tokens.tolist() == PATH[:length] and len(t) == length
    t.extend([5])
    assert t.tokens.tolist() == [5]


def test_truncate_counts_in_any_integer(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    t.truncate(np.int64(3))
    assert len(t) == 3


def test_close_ends_it(driver: Driver) -> None:
    t = driver.cache.transcript(salt=b"tenant")
    t.extend(PATH)
    t.close()
    assert t.closed
    for call in (
        t.close,
        lambda: t.extend([1]),
        lambda: t.extend([]),
        lambda: t.truncate(0),
        lambda: len(t),
        lambda: t.tokens,
        lambda: driver.cache.match(t),
        lambda: driver.cache.reserve(t),
    ):
        with pytest.raises(StateError):
            call()
    assert t.closed
    driver.cache.check()


def test_open_ones_are_counted_and_listed(driver: Driver) -> None:
    cache = driver.cache
    assert cache.stats()["transcripts"] == 0 and "transcript" not in cache.dump()
    first, second = cache.transcript(), cache.transcript()
    assert cache.stats()["transcripts"] == 2
    lines = [line for line in cache.dump().splitlines() if line.startswith("transcript")]
    assert len(lines) == 2
    first.close()
    assert cache.stats()["transcripts"] == 1
    second.close()
    assert cache.stats()["transcripts"] == 0 and "transcript" not in cache.dump()


def test_it_keeps_what_it_needs_of_its_cache_alive() -> None:
    layout = SimpleNamespace(page_size=4, page_bytes=64, slot_bytes=128)
    t = HybridCache(layout, memory_bytes=4096).transcript()
    gc.collect()
    t.extend([1, 2])
    t.truncate(1)
    assert t.tokens.tolist() == [1]
    t.close()


def test_an_empty_one_is_refused_as_an_empty_prompt_is(driver: Driver) -> None:
    t = driver.cache.transcript()
    for _ in range(2):
        for call in (driver.cache.match, driver.cache.reserve):
            with pytest.raises(ValueError, match=r"^tokens: empty"):
                call(t)
        t.extend([1, 2])
        same(driver, t)
        t.truncate(0)
    assert driver.cache.stats()["reserves"] == driver.cache.stats()["refused_reserves"] == 0


# ---- beside a lease


def test_a_lease_does_not_follow_its_transcript(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    lease = driver.cache.reserve(t)
    driver.prefill(lease)
    driver.decode(lease, [20, 21, 22])
    assert len(t) == len(PATH) and lease.committed == 15
    t.extend([30, 31])
    assert (lease.committed, lease.prompt_length) == (15, 12)
    lease.close()
    assert same(driver, t).kv_length == len(PATH)
    t.truncate(len(PATH))
    t.extend([20, 21, 22, 40])
    assert same(driver, t).length == 15


@pytest.mark.parametrize("change", ["truncate", "close", "another path"])
def test_either_may_be_changed_or_closed_while_the_other_is_open(driver: Driver, change: str) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    lease = driver.cache.reserve(t, max_new_tokens=8)
    table = lease.pages.tolist()
    driver.step(lease, 5)
    if change == "close":
        t.close()
    else:
        t.truncate(3)
        if change == "another path":
            t.extend([80, 81, 82])
            other = driver.cache.reserve(t)
            driver.prefill(other)
            other.close()
    driver.cache.check()
    assert lease.pages.tolist() == table and lease.prompt_length == len(PATH)
    driver.prefill(lease)
    driver.decode(lease, [20, 21])
    lease.close()
    assert driver.cache.match([*PATH, 20, 21, 22]).length == 14
    if change != "close":
        same(driver, t)


def test_one_transcript_has_many_leases(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    first, second = driver.cache.reserve(t), driver.cache.reserve(t)
    assert first.start == second.start == 0 and not set(first.pages) & set(second.pages)
    driver.prefill(first)
    third = driver.cache.reserve(t)
    assert third.match.kv_length == len(PATH)
    fork = first.fork()
    for lease in (second, third):
        driver.prefill(lease)
    for lease in (first, second, third, fork):
        lease.close()
        same(driver, t)


def test_two_transcripts_share_a_path_and_part(driver: Driver) -> None:
    first, second = driver.cache.transcript(), driver.cache.transcript()
    for t in (first, second):
        t.extend(PATH)
    finish(driver, driver.cache.reserve(first))
    assert same(driver, second).kv_length == len(PATH)
    first.extend([20, 21])
    second.extend([30, 31])
    for t in (first, second):
        finish(driver, driver.cache.reserve(t))
    assert same(driver, first).kv_length == same(driver, second).kv_length == 14
    first.close()
    second.truncate(len(PATH))
    second.extend([20, 21])
    assert same(driver, second).kv_length == 14


# ---- mistakes


@pytest.fixture
def told(driver: Driver) -> Any:
    """A transcript of six tokens on a cache that knows four of them; nothing may change."""
    driver.turn([1, 2, 3, 4], [7, 8])
    t = driver.cache.transcript()
    t.extend([1, 2, 3, 4, 5, 6], content_keys=[(4, CAT)])
    driver.cache.match(t)
    before = driver.cache.dump(), driver.cache.digest, driver.cache.stats(), t.tokens.tolist()
    yield SimpleNamespace(cache=driver.cache, t=t)
    driver.cache.check()
    assert (driver.cache.dump(), driver.cache.digest, driver.cache.stats(), t.tokens.tolist()) == before
    expected = driver.cache.match(t.tokens, content_keys=[(4, CAT)])
    assert driver.cache.match(t) == expected


@pytest.mark.parametrize(
    ("tokens", "error", "message"), [bad for bad in BAD_TOKENS if not bad[2].startswith("tokens: empty")]
)
def test_tokens_of_extend(told: Any, tokens: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message.replace("(", r"\(")):
        told.t.extend(tokens)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([(5, DOG)], ValueError, "content_keys: position 5"),
        ([(0, DOG)], ValueError, "content_keys: position 0"),
        ([(9, DOG)], ValueError, "content_keys: position 9"),
        ([(7, DOG), (7, CAT)], ValueError, "content_keys: position 7"),
        ([(8, DOG), (6, CAT)], ValueError, "content_keys: position 6"),
        ([(-1, DOG)], ValueError, "content_keys: -1"),
        ([(6, "dog")], TypeError, "content_keys: .6, 'dog'., expected .position, bytes."),
        (3, TypeError, "content_keys: 3, expected a sequence"),
    ],
)
def test_content_of_extend(told: Any, keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        told.t.extend([7, 8, 9], content_keys=keys)


def test_content_of_nothing(told: Any) -> None:
    with pytest.raises(ValueError, match=r"^content_keys: position 6"):
        told.t.extend([], content_keys=[(6, CAT)])


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (-1, ValueError, "length: -1, expected 0 <= length <= 6"),
        (7, ValueError, "length: 7, expected 0 <= length <= 6"),
        (2**40, ValueError, "length: 1099511627776, expected 0 <= length <= 6"),
        (1.5, TypeError, "length: 1.5, expected an integer"),
        ("1", TypeError, "length: '1', expected an integer"),
        (None, TypeError, "length: None, expected an integer"),
        (True, TypeError, "length: True, expected an integer"),
    ],
)
def test_length_of_truncate(told: Any, length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        told.t.truncate(length)


@pytest.mark.parametrize("call", ["match", "reserve"])
def test_salt_and_content_beside_it(told: Any, call: str) -> None:
    with pytest.raises(ValueError, match="salt"):
        getattr(told.cache, call)(told.t, salt=b"tenant")
    with pytest.raises(ValueError, match="content_keys"):
        getattr(told.cache, call)(told.t, content_keys=[(0, CAT)])


@pytest.mark.parametrize("call", ["match", "reserve"])
def test_one_of_another_cache(told: Any, call: str) -> None:
    other = Driver().cache.transcript()
    other.extend([1])
    with pytest.raises(ValueError, match="another cache"):
        getattr(told.cache, call)(other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"breakpoints": [7]}, ValueError, "breakpoints: 7"),
        ({"breakpoints": [0]}, ValueError, "breakpoints: 0"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: -1"),
        ({"max_new_tokens": 10**6}, ValueError, "tokens: a prompt of 6 and max_new_tokens=1000000 need"),
        ({"priority": 9}, ValueError, "priority: 9"),
        ({"now": -1}, ValueError, "now: -1"),
    ],
)
def test_arguments_beside_it(told: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        told.cache.reserve(told.t, **arguments)


def test_the_salt_of_a_transcript(told: Any) -> None:
    with pytest.raises(TypeError, match="salt: 'tenant', expected bytes"):
        told.cache.transcript(salt="tenant")


def test_a_callback_inside_extend(told: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: told.t.extend([1]),
        lambda: told.t.truncate(0),
        told.t.close,
        lambda: told.cache.match(told.t),
    ]
    for call in calls:
        with pytest.raises(ConcurrencyError, match="expected one thread at a time"):
            told.t.extend(Intruder(call))
    with pytest.raises(ConcurrencyError):
        told.cache.match(Intruder(lambda: told.t.truncate(0)))
