"""A caller's mistake is a typed error that names the argument and what was expected, and it changes
nothing."""

from __future__ import annotations

import array
import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hybridcache.cache import HybridCache
from hybridcache.errors import ConcurrencyError, StateError
from tests.conftest import Driver

LAYOUT = SimpleNamespace(page_size=4, page_bytes=64, slot_bytes=128)


@pytest.fixture
def unchanged(driver: Driver):
    """Runs the test on a cache with content, and demands that nothing changed."""
    driver.turn([1, 2, 3, 4, 5, 6], [7, 8])
    before = driver.cache.dump(), driver.cache.digest, driver.cache.stats()
    yield driver
    driver.cache.check()
    assert (driver.cache.dump(), driver.cache.digest, driver.cache.stats()) == before


BAD_TOKENS = [
    ([], ValueError, "tokens: empty"),
    (np.array([], np.int32), ValueError, "tokens: empty"),
    ([1, -2, 3], ValueError, "tokens: -2 at index 1, expected 0 <= token < 2"),
    (np.array([1, 2, -3], np.int32), ValueError, "tokens: -3 at index 2"),
    (np.array([1, 2**31], np.int64), ValueError, "tokens: 2147483648 at index 1"),
    (np.array([-(2**40)], np.int64), ValueError, "tokens: -1099511627776 at index 0"),
    ([2**70], ValueError, "tokens: 1180591620717411303424 at index 0"),
    ([1.5], TypeError, "tokens: a float at index 0"),
    (["a"], TypeError, "tokens: a str at index 0"),
    ([True], TypeError, "tokens: a bool at index 0"),
    ("abc", TypeError, "tokens: a str"),
    (b"abc", TypeError, "tokens: a buffer of format 'B'"),
    (None, TypeError, "tokens: a NoneType"),
    (7, TypeError, "tokens: a int"),
    (np.array([1.0, 2.0]), TypeError, "tokens: a buffer of format 'd'"),
    (np.array([1, 2], np.uint32), TypeError, "tokens: a buffer of format 'I'"),
    (np.array([1, 2], np.int16), TypeError, "tokens: a buffer of format 'h'"),
    (np.arange(8, dtype=np.int32)[::2], ValueError, "tokens: stride 8 bytes, expected a contiguous buffer"),
    (np.zeros((2, 3), np.int32), ValueError, "tokens: 2 dimensions, expected 1"),
    (torch.tensor([1.0]), TypeError, "tokens: a buffer of format 'f'"),
    (torch.tensor([1, -1]), ValueError, "tokens: -1 at index 1"),
    (
        torch.empty(3, dtype=torch.int32, device="meta"),
        TypeError,
        "tokens: a tensor that is not plain CPU memory",
    ),
]


@pytest.mark.parametrize(("tokens", "error", "message"), BAD_TOKENS)
@pytest.mark.parametrize("call", ["match", "reserve", "pin"])
def test_tokens(unchanged: Driver, call: str, tokens: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message.replace("(", r"\(")):
        getattr(unchanged.cache, call)(tokens)


@pytest.mark.parametrize(
    ("tokens", "error", "message"), [each for each in BAD_TOKENS if "empty" not in each[2]]
)
def test_tokens_of_a_commit_and_of_a_transcript(tokens: object, error: type[Exception], message: str) -> None:
    """These are new to the tree: nothing but the look at each of them refuses what is no id."""
    driver = Driver()
    lease = driver.cache.reserve([1, 2, 3], max_new_tokens=8)
    assert lease is not None
    driver.prefill(lease)
    assert lease.launch(3) is not None
    driver.apply()
    transcript = driver.cache.transcript()
    transcript.extend([7, 8])
    for call in (lease.commit, transcript.extend):
        with pytest.raises(error, match="^" + message.replace("(", r"\(")):
            call(tokens)
    assert lease.committed == 3 and transcript.tokens.tolist() == [7, 8]
    lease.commit([4, 5, 6])
    driver.cache.check()


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 3, 4, 5, 6, 7, 9],
        (1, 2, 3, 4, 5, 6, 7, 9),
        np.array([1, 2, 3, 4, 5, 6, 7, 9], np.int32),
        np.array([1, 2, 3, 4, 5, 6, 7, 9], np.int64),
        array.array("i", [1, 2, 3, 4, 5, 6, 7, 9]),
        memoryview(np.array([1, 2, 3, 4, 5, 6, 7, 9], np.int32)),
        (ctypes.c_int32 * 8)(1, 2, 3, 4, 5, 6, 7, 9),
        torch.tensor([1, 2, 3, 4, 5, 6, 7, 9]),
        torch.tensor([1, 2, 3, 4, 5, 6, 7, 9], dtype=torch.int32),
        [np.int64(1), 2, 3, 4, 5, 6, 7, 9],
    ],
)
def test_every_form_of_tokens_is_the_same_prompt(driver: Driver, tokens: object) -> None:
    driver.turn([1, 2, 3, 4, 5, 6], [7, 8])
    assert driver.cache.match(tokens)[:2] == (6, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"breakpoints": [0]}, ValueError, "breakpoints: 0, expected positions in .1, 3."),
        ({"breakpoints": [4]}, ValueError, "breakpoints: 4, expected positions in .1, 3."),
        ({"breakpoints": [-1]}, ValueError, "breakpoints: -1"),
        ({"breakpoints": [1.5]}, TypeError, "breakpoints: 1.5, expected an integer"),
        ({"salt": "tenant"}, TypeError, "salt: 'tenant', expected bytes"),
        ({"content_keys": [(3, b"x")]}, ValueError, "content_keys: position 3"),
        (
            {"content_keys": [(1, b"x"), (1, b"y")]},
            ValueError,
            "content_keys: position 1, expected ascending",
        ),
        ({"content_keys": [(0, "x")]}, TypeError, "content_keys: .0, 'x'., expected .position, bytes."),
        ({"content_keys": [(-1, b"x")]}, ValueError, "content_keys: -1"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: -1"),
        ({"max_new_tokens": 10**6}, ValueError, "tokens: a prompt of 3 and max_new_tokens=1000000 need"),
        ({"max_new_tokens": "9"}, TypeError, "max_new_tokens: '9'"),
        ({"breakpoints": None}, TypeError, "breakpoints: None, expected a sequence"),
        ({"content_keys": 3}, TypeError, "content_keys: 3, expected a sequence"),
    ],
)
def test_reserve(
    unchanged: Driver, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        unchanged.cache.reserve([1, 2, 3], **arguments)


def test_a_prompt_that_the_empty_arena_cannot_hold_is_an_error_not_none(unchanged: Driver) -> None:
    with pytest.raises(ValueError, match="more than the empty arena can hold"):
        unchanged.cache.reserve(np.zeros(63 * 2 * 4 + 1, np.int32))
    assert Driver().cache.reserve(np.zeros(63 * 2 * 4, np.int32)) is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {},
            ValueError,
            "memory_bytes: None, num_pages: None, num_slots: None, "
            "expected memory_bytes alone, or both others",
        ),
        (
            {"memory_bytes": 4096, "num_pages": 3, "num_slots": 1},
            ValueError,
            "memory_bytes: 4096, num_pages: 3",
        ),
        ({"num_pages": 4}, ValueError, "num_pages: 4, num_slots: None"),
        ({"num_pages": 0, "num_slots": 1}, ValueError, "num_pages: 0, expected 1 <= num_pages"),
        ({"num_pages": 1, "num_slots": 0}, ValueError, "num_slots: 0"),
        ({"memory_bytes": 255}, ValueError, "memory_bytes: 255, expected at least 256"),
        ({"memory_bytes": -1}, ValueError, "memory_bytes: -1"),
        ({"memory_bytes": 4096.0}, TypeError, "memory_bytes: 4096.0, expected an integer"),
        ({"memory_bytes": 4096, "policy": "best"}, ValueError, "policy: 'best', expected one of"),
        (
            {"memory_bytes": 4096, "inner_checkpoints": 1},
            TypeError,
            "inner_checkpoints: 1, expected True or False",
        ),
        ({"memory_bytes": 4096, "run_ahead": 2}, ValueError, "run_ahead: 2, expected 0 <= run_ahead <= 1"),
        ({"memory_bytes": 4096, "alignment": 0}, ValueError, "alignment: 0"),
        ({"memory_bytes": 4096, "pass_cost": -1}, ValueError, "pass_cost: -1"),
        ({"memory_bytes": 4096, "interior_spacing": 0}, ValueError, "interior_spacing: 0"),
        ({"memory_bytes": 4096, "max_cached_bytes": -1}, ValueError, "max_cached_bytes: -1"),
    ],
)
def test_constructor(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HybridCache(LAYOUT, **arguments)


def test_order_of_calls(driver: Driver) -> None:
    cache = driver.cache
    lease = cache.reserve([1, 2, 3, 4, 5])
    assert lease is not None

    def refused(call, error: type[Exception], message: str) -> None:
        before = cache.dump(), cache.digest, cache.stats()
        with pytest.raises(error, match=message):
            call()
        assert (cache.dump(), cache.digest, cache.stats()) == before

    refused(lease.commit, StateError, "commit: lease 1 has no launched step")
    refused(lambda: lease.launch(0), ValueError, "count: 0, expected 1 <= count")
    assert lease.launch(3) is not None
    refused(lease.commit, StateError, "commit: the plan 1 of lease 1 is not applied")
    refused(
        lambda: lease.launch(1),
        StateError,
        "launch: lease 1 has 1 steps that are not committed, expected at most 0",
    )
    refused(lease.fork, StateError, "fork: lease 1 has a step that is not committed")
    plan = cache.plan()
    refused(cache.plan, StateError, "plan: number 1 is pending")
    refused(lease.commit, StateError, "is not applied")
    refused(lambda: cache.applied(plan._replace(number=2)), ValueError, "plan: number 2")
    refused(lambda: cache.applied(1), TypeError, "plan: 1, expected a Plan")
    cache.applied(plan)
    refused(lambda: lease.commit([9]), ValueError, "tokens: 1 given, expected 0")
    lease.commit()
    driver.step(lease, 9)
    assert lease.launch(2) is not None
    cache.applied(cache.plan())
    refused(lambda: lease.commit([9]), ValueError, "tokens: 1 given, expected 2")
    refused(lambda: lease.commit([9, 9, 9]), ValueError, "tokens: 3 given, expected 2")
    refused(lambda: lease.commit([9, -9]), ValueError, "tokens: -9 at index 1")
    lease.commit([9, 9])
    refused(
        lambda: lease.launch(10**6),
        ValueError,
        "counts: 1000000 tokens end at 1000007, more than the empty arena",
    )
    refused(lambda: lease.close(keep="some"), ValueError, "keep: 'some', expected one of")
    refused(lambda: lease.close(keep=["all"]), ValueError, "keep: .'all'., expected one of")
    refused(lambda: lease.close(discard="no"), TypeError, "discard: 'no', expected True or False")
    lease.close()
    for use in (
        lease.close,
        lease.commit,
        lease.fork,
        lambda: lease.launch(1),
        lambda: lease.pages,
        lambda: lease.start,
    ):
        refused(use, StateError, "lease: number 1 is closed, an open one was expected")
    assert lease.closed


def test_a_mistake_refuses_the_whole_batch(driver: Driver) -> None:
    cache = driver.cache
    a, b = cache.reserve([1, 2, 3]), cache.reserve([4, 5, 6, 7])
    assert a is not None and b is not None
    before = cache.dump(), cache.digest
    other = Driver().cache.reserve([1])
    for leases, counts, error in [
        ([a, b], [1], ValueError),
        ([a, a], [1, 1], ValueError),
        ([a, b], [1, 0], ValueError),
        ([a, b], [1, 10**6], None),  # a prefill step ends at the end of the prompt
        ([a, other], [1, 1], ValueError),
        ([a, "b"], [1, 1], ValueError),
    ]:
        if error is None:
            continue
        with pytest.raises(error):
            cache.launch(leases, counts)
        assert (cache.dump(), cache.digest) == before
    steps = cache.launch([a, b], [10, 10])
    assert steps.ready.all() and steps.end.tolist() == [3, 4]
    driver.apply()
    with pytest.raises(ValueError, match="tokens: 1 given, expected 0"):
        cache.commit([a, b], [1])
    assert (a.committed, b.committed) == (0, 0)
    cache.commit([a, b])
    assert (a.committed, b.committed) == (3, 4)
    cache.launch([a], [1])
    driver.apply()
    with pytest.raises(StateError, match="commit: lease 2 has no launched step"):
        cache.commit([a, b], [7])
    assert a.committed == 3
    before = cache.dump(), cache.digest
    with pytest.raises(StateError, match="launch: lease 1 has 1 steps that are not committed"):
        cache.launch([b, a], [1, 1])  # the first of them could be launched
    with pytest.raises(ValueError, match="counts: 1000000 tokens end at 1000004"):
        cache.launch([b], [10**6])
    assert (cache.dump(), cache.digest) == before
    cache.check()


def test_release_of_a_pin_twice(driver: Driver) -> None:
    driver.turn([1, 2, 3, 4], [5])
    pin = driver.cache.pin([1, 2, 3, 4, 9])
    assert pin is not None
    pin.release()
    with pytest.raises(StateError, match="pin: number 1 is released"):
        pin.release()


class Intruder:
    """A sequence that calls the cache while the cache reads it."""

    def __init__(self, call) -> None:
        self.call = call

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if index >= 2:
            raise IndexError
        self.call()
        return index


def test_a_callback_inside_a_call(unchanged: Driver) -> None:
    with pytest.raises(ConcurrencyError, match="expected one thread at a time"):
        unchanged.cache.match(Intruder(lambda: unchanged.cache.match([1])))


def test_a_second_thread_inside_a_call(unchanged: Driver) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert leave.wait(20)

    first = threading.Thread(target=lambda: unchanged.cache.match(Intruder(wait)))
    first.start()
    try:
        assert inside.wait(20)
        for call in (
            lambda: unchanged.cache.match([1]),
            lambda: unchanged.cache.reserve([1]),
            unchanged.cache.check,
        ):
            with pytest.raises(ConcurrencyError):
                call()
        assert unchanged.cache.stats()["reserves"] == 1  # may be read from any thread at any time
    finally:
        leave.set()
        first.join()
