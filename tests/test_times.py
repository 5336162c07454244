"""What operations take, and what is held: the parts of times() and stats() that no oracle knows."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hybridcache import StateError
from tests.conftest import Driver, tokens


def test_each_call_is_counted_and_timed_and_stats_say_nothing_of_it() -> None:
    driver, before = Driver(), time.perf_counter_ns()
    lease = driver.cache.reserve(tokens(12))
    assert lease is not None
    steps = len(driver.prefill(lease)) + 4
    driver.decode(lease, [1, 2, 3])
    with pytest.raises(ValueError, match="count"):  # refused in Python, so it never reached the core
        lease.launch(0)
    with pytest.raises(StateError, match="commit"):  # refused by the core
        lease.commit()
    lease.want(40)
    child = lease.fork()
    driver.cache.launch([lease], [1])
    driver.apply()
    driver.cache.commit([lease], [9])
    for each in (lease, child):
        assert each is not None
        each.close()
    with driver.cache.transcript() as transcript:
        transcript.extend(tokens(12))
        transcript.truncate(9)
        driver.cache.match(transcript)
        driver.cache.match(tokens(3))
    pin = driver.cache.pin(tokens(12))
    assert pin is not None
    pin.release()
    driver.cache.clear()
    driver.cache.take_events()
    passed = time.perf_counter_ns() - before
    times = driver.cache.times()
    calls = {name: each.calls for name, each in times.items()}
    assert calls == {
        **{"reserve": 1, "launch": steps, "plan": steps, "applied": steps, "commit": steps + 1},
        **{"want": 1, "fork": 1, "close": 2},
        **{"transcript": 1, "extend": 1, "truncate": 1, "close_transcript": 1, "match": 2},
        **{"pin": 1, "release": 1, "clear": 1, "take_events": 1},
    }
    assert all(each.nanoseconds > 0 for each in times.values())
    assert sum(each.nanoseconds for each in times.values()) < passed
    assert not [name for name in driver.cache.stats() if "time" in name or "second" in name]


def test_a_long_operation_takes_long() -> None:
    """Of a million tokens nearly all time is the core's; now and then another process may run instead."""
    driver, prompt, shares = Driver(page_size=64, slabs=20_000), np.ones(10**6, np.int32), []
    for _ in range(9):
        before, known = time.perf_counter_ns(), driver.cache.times()["reserve"].nanoseconds
        lease = driver.cache.reserve(prompt)
        assert lease is not None
        measured = driver.cache.times()["reserve"].nanoseconds - known
        shares.append(measured / (time.perf_counter_ns() - before))
        lease.close(discard=True)
    assert sorted(shares)[4] > 0.3 and max(shares) < 1, shares


def test_a_boundary_that_is_taken_back_is_held_no_more() -> None:
    """Published and not evicted: the difference of the two would count it for ever."""
    driver = Driver(slabs=5, pass_cost=1000, interior_spacing=1000)
    lease = driver.cache.reserve(tokens(8))
    assert lease is not None
    driver.prefill(lease)
    before = driver.cache.stats()
    assert (before["held_prompt_end"], before["pinned_checkpoints"]) == (1, 1)
    assert lease.launch(18) is not None  # seven pages: four slabs, and one for the slot
    driver.cache.check()
    stats = driver.cache.stats()
    assert (stats["published_prompt_end"], stats["evicted_prompt_end"], stats["held_prompt_end"]) == (1, 0, 0)
    assert (stats["checkpoints"], stats["pinned_checkpoints"], stats["slabs_with_pages"]) == (0, 0, 4)
