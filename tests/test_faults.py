"""A fault at every call site: each tensor operation of a whole run fails once, in a run of its own (I6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from hybridcache.cache import Lease
from hybridcache.errors import ConcurrencyError, StateError
from tests.conftest import Driver, tokens
from tests.toy_engine import Faults, InjectedError, ToyEngine

Requests = list[tuple[list[int], list[int]]]

SHARED = list(range(10, 22))
FIRST: Requests = [(SHARED, [1, 2, 3]), ([*SHARED, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6])]
SECOND: Requests = [
    ([*SHARED, 1, 2, 3, 4, 4, 4, 4], [9, 9]),  # the next turn of the first
    ([*SHARED, 5, 6, 7, 7, 7], [8, 8, 8, 8, 8]),  # branches off the second
    ([3, 1, 4, 1, 5], [9, 2, 6]),
]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eager": ({}, {}),
    "indirect": ({"copies": "indirect"}, {}),
    "inner checkpoints": ({"inner_checkpoints": True}, {"chunk": 100}),
    "drafts": ({"draft_tokens": 3}, {"drafts": 3}),
    "fixed": ({"memory_bytes": None, "num_pages": 40, "num_slots": 20}, {}),
}


def run(variant: str, fault: int) -> ToyEngine:
    options, how = VARIANTS[variant]
    engine = ToyEngine(fault=fault, **options)
    engine.run(FIRST, **how)
    engine.run(SECOND, **how)
    return engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_operation_fails_once(variant: str, one_thread: None) -> None:
    whole = run(variant, 0)
    ideal = whole.verify([*FIRST, *SECOND])
    assert ideal == [len(prompt) + len(output) for prompt, output in [*FIRST, *SECOND]]
    sites = run(variant, -1).faults.seen
    assert sites > 100
    for site in range(1, sites + 1):
        engine = run(variant, site)
        assert engine.failures == 1, f"operation {site} of {sites} did not fail"
        reached = engine.verify([*FIRST, *SECOND])
        stats = engine.cache.stats()
        assert stats["open_leases"] == stats["resting_leases"] == 0
        assert stats["taken_pages"] == stats["tree_pages"] and stats["taken_slots"] == stats["checkpoints"]
        assert sum(a != b for a, b in zip(reached, ideal, strict=True)) <= 1, "one fault costs one request"


def test_a_fault_that_nobody_handles_reaches_the_caller() -> None:
    engine = ToyEngine()
    lease = engine.cache.reserve(SHARED)
    assert lease is not None and lease.launch(12) is not None
    plan = engine.cache.plan()
    faults = Faults(1)
    with faults, faults.sites(), pytest.raises(InjectedError):
        engine.pools.apply(plan)
    assert engine.cache.stats()["open_leases"] == 1  # it can be applied again, or the lease closed
    lease.close(discard=True)
    engine.cache.check()
    engine.pools.apply(plan)
    engine.cache.applied(plan)
    assert engine.cache.stats()["taken_slots"] == 0


# ---- callbacks: what a caller hands over may run code of its own, which may raise or call back


class Number:
    """A token, a count or a position that runs `action` when it is read."""

    def __init__(self, value: int, action: Any) -> None:
        self.value, self.action = value, action

    def __index__(self) -> int:
        self.action()
        return self.value


def broken() -> None:
    raise InjectedError("in a callback")


def each(values: Sequence[Any], action: Any, at: int) -> Iterator[Any]:
    for index, value in enumerate(values):
        if index == at:
            action()
        yield value


CALLS: dict[str, Any] = {
    "match": lambda c, ls, one, many: c.match([1, one(2), 3]),
    "reserve": lambda c, ls, one, many: c.reserve([1, one(2), 3]),
    "reserve, breakpoints": lambda c, ls, one, many: c.reserve([1, 2, 3], breakpoints=many([1, 2])),
    "reserve, a breakpoint": lambda c, ls, one, many: c.reserve([1, 2, 3], breakpoints=[1, one(2)]),
    "reserve, content": lambda c, ls, one, many: c.reserve([1, 2, 3], content_keys=many([(0, b"x")])),
    "reserve, position": lambda c, ls, one, many: c.reserve([1, 2, 3], content_keys=[(one(0), b"x")]),
    "reserve, length": lambda c, ls, one, many: c.reserve([1, 2, 3], max_new_tokens=one(4)),
    "launch": lambda c, ls, one, many: ls[0].launch(one(2)),
    "launch, rows": lambda c, ls, one, many: ls[0].launch(2, rows=one(0)),
    "launch of a batch": lambda c, ls, one, many: c.launch(many(ls[:2]), [2, 2]),
    "launch of a batch, counts": lambda c, ls, one, many: c.launch(ls[:2], [2, one(2)]),
    "launch of a batch, rows": lambda c, ls, one, many: c.launch(ls[:2], [2, 2], rows=many([0, 0])),
    "commit": lambda c, ls, one, many: ls[2].commit([one(7)]),
    "commit of a batch": lambda c, ls, one, many: c.commit(many(ls[2:]), [7, 7]),
    "commit of a batch, tokens": lambda c, ls, one, many: c.commit(ls[2:], [7, one(7)]),
    "commit of a batch, counts": lambda c, ls, one, many: c.commit(ls[2:], [7, 7], many([1, 1])),
    "want": lambda c, ls, one, many: ls[0].want(one(5)),
    "pin": lambda c, ls, one, many: c.pin([1, one(2), 3]),
}


@pytest.fixture
def busy() -> tuple[Driver, list[Any]]:
    """Two leases that may launch, two that may commit."""
    driver = Driver(draft_tokens=3)
    leases = [driver.cache.reserve(tokens(6, seed)) for seed in range(4)]
    for lease in leases[2:]:
        assert lease is not None
        driver.prefill(lease)
        lease.launch(1)
    driver.apply()
    return driver, leases


@pytest.mark.parametrize("name", CALLS)
def test_a_callback_that_raises_changes_nothing(busy: tuple[Driver, list[Any]], name: str) -> None:
    driver, leases = busy
    before = driver.cache.dump(), driver.cache.digest, driver.cache.stats()
    with pytest.raises(InjectedError):
        CALLS[name](
            driver.cache, leases, lambda value: Number(value, broken), lambda values: each(values, broken, 0)
        )
    with pytest.raises(InjectedError):
        CALLS[name](
            driver.cache,
            leases,
            lambda value: Number(value, broken),
            lambda values: each(values, broken, len(values) - 1),
        )
    assert (driver.cache.dump(), driver.cache.digest, driver.cache.stats()) == before
    driver.cache.check()


@pytest.mark.parametrize("name", CALLS)
def test_a_callback_that_closes_a_lease_is_refused_or_comes_first(
    busy: tuple[Driver, list[Any]], name: str
) -> None:
    """Either the cache is inside the call, and says so, or the close is done before the call begins."""
    driver, leases = busy

    def close() -> None:
        if not leases[3].closed:
            leases[3].close()

    made = None
    with suppress(ConcurrencyError, StateError):
        made = CALLS[name](
            driver.cache, list(leases), lambda value: Number(value, close), lambda v: each(v, close, 0)
        )
    driver.cache.check()
    for lease in [*leases, *([made] if isinstance(made, Lease) else [])]:
        if not lease.closed:
            lease.close()
    driver.cache.check()
    assert driver.cache.stats()["taken_slots"] == driver.cache.stats()["checkpoints"]


@pytest.mark.parametrize("bad", range(3))
def test_bad_input_in_the_middle_of_a_batch_refuses_all_of_it(bad: int) -> None:
    driver = Driver()
    leases: list[Any] = [driver.cache.reserve(tokens(6, seed)) for seed in range(3)]
    counts = [2, 2, 2]
    before = driver.cache.dump(), driver.cache.digest

    def refused(call: Any) -> None:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call()
        assert (driver.cache.dump(), driver.cache.digest) == before
        driver.cache.check()

    refused(lambda: driver.cache.launch(leases, [*counts[:bad], 0, *counts[bad + 1 :]]))
    refused(lambda: driver.cache.launch(leases, [*counts[:bad], 2**31, *counts[bad + 1 :]]))
    refused(lambda: driver.cache.launch([*leases[:bad], None, *leases[bad + 1 :]], counts))
    refused(lambda: driver.cache.launch([*leases[:bad], leases[bad - 1], *leases[bad + 1 :]], counts))
    for lease in leases:
        driver.prefill(lease)
    driver.cache.launch(leases, [2, 2, 2])
    driver.apply()
    before = driver.cache.dump(), driver.cache.digest
    fed = np.arange(6, dtype=np.int64)
    refused(lambda: driver.cache.commit(leases, np.where(np.arange(6) == 2 * bad, -1, fed)))
    refused(lambda: driver.cache.commit(leases, fed, [2 - (i == bad) for i in range(3)]))
    refused(lambda: driver.cache.commit(leases, fed[1:]))
    refused(lambda: driver.cache.commit([*leases[:bad], leases[bad - 1], *leases[bad + 1 :]], fed))
    driver.cache.commit(leases, fed)
    assert [lease.committed for lease in leases] == [8, 8, 8]


def test_no_room_in_a_batch_is_for_that_lease_alone() -> None:
    driver = Driver(num_pages=8, num_slots=8)
    leases: list[Any] = [driver.cache.reserve(tokens(8, seed)) for seed in range(3)]
    for lease in leases:
        driver.prefill(lease)
    pins = [driver.cache.pin(tokens(8, seed)) for seed in range(3)]
    assert all(pins)
    steps = driver.cache.launch(leases, [4, 8, 4])  # six pages are taken, two are left
    assert steps.ready.tolist() == [True, False, True]
    driver.apply()
    driver.cache.commit([leases[0], leases[2]], list(range(8)))
    driver.cache.check()
    assert [lease.committed for lease in leases] == [12, 8, 12]
