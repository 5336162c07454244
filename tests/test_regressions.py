"""Bugs of our own, numbered, a sentence each."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from hybridcache.cache import HybridCache
from hybridcache.values import Missed
from tests.conftest import Driver, tokens


def test_1_the_pages_of_a_requests_own_hit_are_no_room_for_it() -> None:
    """A reserve evicted, and still found no room, because what it was to resume from counted as evictable."""
    driver = Driver(page_size=1, pages_per_slab=1, slabs=9, interior_spacing=1000, pass_cost=1000)
    driver.turn([9])
    driver.turn([1, 2, 3])
    held = driver.cache.reserve([8])
    assert held is not None
    before = driver.cache.dump()
    assert driver.cache.reserve([1, 2, 3, 4, 5, 6]) is None
    assert driver.cache.dump() == before


def test_2_a_match_is_not_read_from_a_checkpoint_that_has_left() -> None:
    """A lone request that resumed higher described the hit from the checkpoint that had just been evicted."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=3, interior_spacing=1000, pass_cost=1000)
    driver.turn(list(range(8)))
    driver.turn([*range(8), 9])
    assert driver.match == (0, 8, "no_room", False, Missed(8, "prompt_end", "no_room", 0, None))


def test_3_a_list_that_changes_while_it_is_read() -> None:
    """An element's __index__ cleared the list under the loop over it."""
    driver = Driver()

    class Evil:
        def __index__(self) -> int:
            prompt.clear()
            return 1

    prompt: list[object] = [Evil(), *range(5000)]
    assert driver.cache.match(prompt).length == 0


def test_4_a_lone_lease_takes_its_boundary_back_rather_than_starve() -> None:
    """The checkpoint at the prompt's end, which is optional, took the slab that the first decode step
    needed."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=3, interior_spacing=1000, pass_cost=1000)
    lease = driver.cache.reserve(tokens(8))
    assert lease is not None
    driver.prefill(lease)
    live = driver.cache.stats()["checkpoints"]
    assert live == 1
    driver.decode(lease, range(8))
    assert driver.cache.stats()["checkpoints"] == 0
    lease.close()
    driver.cache.check()
    assert driver.cache.match([*tokens(8), *range(8), 1]).length == 16


def test_5_the_release_of_a_pin_honours_the_cap() -> None:
    """What a pin had kept above max_cached_bytes stayed after it."""
    driver = Driver(max_cached_bytes=0)
    lease = driver.cache.reserve(tokens(20))
    assert lease is not None
    driver.prefill(lease)
    pin = driver.cache.pin(tokens(20))
    assert pin is not None
    lease.close()
    assert driver.cache.stats()["cached_bytes"] > 0
    pin.release()
    assert driver.cache.stats()["cached_bytes"] == 0


def test_6_keep_nothing_does_not_demote_what_others_made() -> None:
    """close(keep="nothing") marked the checkpoint that the lease had resumed from, not one of its own."""
    driver = Driver()
    driver.turn(tokens(20))
    lease = driver.cache.reserve([*tokens(20), 5])
    assert lease is not None and lease.start == 20
    lease.close(keep="nothing")
    assert "prompt_end slot" in driver.cache.dump()
    (line,) = [line for line in driver.cache.dump().splitlines() if "prompt_end" in line]
    assert "superseded" not in line


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_7_a_buffer_that_changes_under_a_call_corrupts_no_memory(dtype: Any) -> None:
    """A token that turned negative after the check was taken for a (token, content) pair."""
    driver = Driver(page_size=64, pages_per_slab=4, slabs=4000, interior_spacing=10**9)
    prompt, stop = np.zeros(400_000, dtype), threading.Event()

    def spoil() -> None:
        while not stop.is_set():
            prompt[300_000:] = -5
            prompt[300_000:] = 7

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        for _ in range(30):
            try:
                lease = driver.cache.reserve(prompt)
            except ValueError:
                continue
            assert lease is not None
            lease.launch(10**6)
            driver.apply()
            lease.commit()
            lease.close(keep="nothing")
            driver.cache.clear()
    finally:
        stop.set()
        thread.join()
    assert driver.cache.stats()["taken_pages"] == 0


def test_8_a_fork_says_what_its_parent_found() -> None:
    """A fork in the middle of a prompt called its own match complete."""
    driver = Driver()
    lease = driver.cache.reserve(tokens(20))
    assert lease is not None
    driver.step(lease, 6)
    child = lease.fork()
    assert child is not None
    assert child.match == lease.match == (0, 0, "cold", False, None)


def test_9_a_batch_from_a_generator(driver: Driver) -> None:
    """A generator of leases was read twice, and the batch was empty."""
    lease = driver.cache.reserve(tokens(4))
    assert lease is not None
    driver.cache.launch((each for each in [lease]), [4])
    driver.apply()
    driver.cache.commit(each for each in [lease])
    assert lease.committed == 4


def test_10_a_plan_of_another_cache(driver: Driver) -> None:
    """Only the number of a plan was looked at."""
    other = Driver()
    for each in (driver, other):
        lease = each.cache.reserve(tokens(4))
        assert lease is not None
        lease.launch(4)
    plan = other.cache.plan()
    driver.cache.plan()
    with pytest.raises(ValueError, match="plan: number 1 of another cache"):
        driver.cache.applied(plan)


def test_11_a_lease_is_a_context(driver: Driver) -> None:
    """A lease that was forgotten after an exception kept what it held."""
    with driver.cache.reserve(tokens(8)) as lease:
        driver.prefill(lease)
    assert lease.closed
    with pytest.raises(RuntimeError, match="forward"), driver.cache.reserve(tokens(9)) as lease:  # noqa: PT012
        driver.step(lease, 4)
        raise RuntimeError("forward")
    assert lease.closed
    driver.cache.check()


def test_12_sizes_that_overflow() -> None:
    """Bytes of absurd layouts wrapped around."""

    class Layout:
        page_size = 1
        page_bytes = 2**62
        slot_bytes = 1

    with pytest.raises(ValueError, match="expected less than 2"):
        HybridCache(Layout(), num_pages=2, num_slots=1)


def test_13_keep_nothing_does_not_demote_what_another_made_at_the_same_place() -> None:
    """That a checkpoint stood where the lease had left one was taken for proof that it was the same."""
    driver = Driver()
    first = driver.cache.reserve(tokens(10))
    assert first is not None
    driver.prefill(first)
    driver.decode(first, [1])
    driver.cache.clear()
    driver.turn(tokens(10))
    first.close(keep="nothing")
    lines = [line for line in driver.cache.dump().splitlines() if "prompt_end" in line]
    assert lines and not any("superseded" in line for line in lines)
