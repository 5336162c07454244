"""Tests that the mutation run (mutants.py) asked for: each says which mutant no other test had noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hybridcache._handles import Pin
from hybridcache.cache import HybridCache
from tests.conftest import Driver, tokens


def published(driver: Driver, kind: str) -> int:
    return driver.cache.stats()[f"published_{kind}"]


def test_every_decision_is_in_the_digest() -> None:
    """Page ids could be left out of the digest, and so could events that take nothing."""
    one, two = Driver(), Driver()
    one.cache.reserve(tokens(4))
    two.cache.reserve(tokens(8))
    assert one.cache.digest != two.cache.digest  # they differ in one page
    driver, seen = Driver(run_ahead=1), []
    lease = driver.cache.reserve(tokens(16), max_new_tokens=16)
    assert lease is not None
    seen.append(driver.cache.digest)
    lease.launch(4)
    seen.append(driver.cache.digest)
    plan = driver.cache.plan()
    driver.cache.applied(plan)
    seen.append(driver.cache.digest)
    lease.commit()
    seen.append(driver.cache.digest)
    lease.close(discard=True)
    seen.append(driver.cache.digest)
    assert len(set(seen)) == 5


def test_the_digest_tells_which_lease_and_which_ids() -> None:
    """The values of the events could be left out of the digest."""
    digests = set()
    for first in (0, 1):
        driver = Driver()
        leases = [driver.cache.reserve(tokens(4, seed)) for seed in range(2)]
        lease = leases[first]
        assert lease is not None
        lease.close()
        digests.add(driver.cache.digest)
    assert len(digests) == 2


@pytest.mark.parametrize("at", [0, 255, 256, 700, 1023, 1024, 1500, 2047, 2048, 2999])
def test_long_edges_are_compared_to_the_last_token(at: int) -> None:
    """Of each stride of an edge only a part could be compared: all other prompts were shorter than one."""
    driver = Driver(page_size=64, pages_per_slab=4, slabs=200)
    prompt = tokens(3000).tolist()
    driver.turn(prompt)
    other = [*prompt[:at], prompt[at] ^ 1, *prompt[at + 1 :], 5]
    assert driver.cache.match(other).kv_length == at
    assert driver.cache.match([*prompt, 5]).kv_length == 3000


def test_a_kind_without_use_is_tried_again_once_in_sixteen() -> None:
    """A kind could be given up for ever."""
    driver = Driver(slabs=40, interior_spacing=1000)
    for seed in range(100):
        driver.turn(tokens(40, seed), [1])
        driver.cache.clear()
    assert published(driver, "cut") == 16 + len([32, 48, 64, 80, 96])
    assert published(driver, "prompt_end") == 100  # it costs no pass, and there is room


def test_use_is_remembered_and_forgotten_at_the_pace_of_what_is_made() -> None:
    """Of the two counters that are halved at 256 made, one could have stayed."""
    driver = Driver(slabs=40, interior_spacing=1000)
    for seed in range(300):
        for output in (1, 2):  # the second time it resumes at the cut
            driver.turn(tokens(40, seed), [output])
        driver.cache.clear()
    assert published(driver, "cut") == 300  # a use each: never given up
    for seed in range(300, 1000):
        driver.turn(tokens(40, seed), [1])
        driver.cache.clear()
    # what 300 uses are worth is used up long before 500 more; with uses that are not halved it would never be
    assert 300 + 128 < published(driver, "cut") < 300 + 500


def test_a_fork_whose_tail_is_still_to_be_copied_takes_no_boundary_back() -> None:
    """The checkpoint could be taken back while the copy of its tail was due."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=5, pass_cost=1000, interior_spacing=1000)
    parent = driver.cache.reserve(tokens(5))
    assert parent is not None
    driver.prefill(parent)
    driver.decode(parent, [1])
    child = parent.fork()
    assert child is not None and child.start == 6
    parent.close(discard=True)
    driver.cache.clear()
    assert driver.cache.stats()["checkpoints"] == 1  # what the child is to start from
    before = driver.cache.dump()
    assert child.launch(18) is None
    assert driver.cache.dump() == before
    assert child.launch(1) is not None
    assert len(driver.apply().copy_pages) == 1
    child.commit([2])
    driver.cache.check()


def test_a_boundary_that_another_request_reads_is_not_taken_back() -> None:
    """The slot that a second request was still to start from could have been written on."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=5, pass_cost=1000, interior_spacing=1000)
    writer = driver.cache.reserve(tokens(8))
    assert writer is not None
    driver.prefill(writer)
    reader = driver.cache.reserve([*tokens(8), 1])
    assert reader is not None and reader.start == 8
    before = driver.cache.dump()
    assert writer.launch(8) is None
    assert driver.cache.dump() == before
    reader.close(discard=True)
    assert writer.launch(8) is not None  # it was that request alone


def test_a_boundary_is_not_taken_back_in_vain() -> None:
    """A launch that was refused all the same could have cost the lease its boundary."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=5, pass_cost=1000, interior_spacing=1000)
    other, lease = driver.cache.reserve(tokens(1, seed=1)), driver.cache.reserve(tokens(8))
    assert other is not None and lease is not None
    driver.prefill(lease)
    assert driver.cache.stats()["checkpoints"] == 1
    before = driver.cache.dump()
    assert lease.launch(16) is None
    assert driver.cache.dump() == before
    assert lease.launch(12) is not None  # for this it was worth it
    assert driver.cache.stats()["checkpoints"] == 0


def test_a_number_that_stands_for_content_is_no_token() -> None:
    """Content has negative numbers in the tree; who sent one as a token could have read another's image."""
    driver = Driver(page_size=4, pages_per_slab=2, slabs=40)
    prompt = tokens(20)
    for position, content in ((5, b"one"), (6, b"two")):
        lease = driver.cache.reserve(prompt, content_keys=[(position, content)])
        assert lease is not None
        driver.prefill(lease)
        lease.close()
    for position in (5, 6):
        for number in range(-4, 0):
            forged = np.array(prompt, dtype=np.int32)
            forged[position] = number
            for call in (driver.cache.match, driver.cache.reserve, driver.cache.pin):
                with pytest.raises(ValueError, match=f"tokens: {number} at index {position}"):
                    call(forged)


OUT_OF_MEMORY = """
import resource
from tests.conftest import Driver
driver = Driver(page_size=1, slabs=2_000_000)
driver.cache.reserve([1])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    driver.cache.reserve([2], max_new_tokens=3_999_000)
except MemoryError:
    print("no memory", driver.cache.stats()["open_leases"])
for call in (driver.cache.check, lambda: driver.cache.match([1]), lambda: driver.cache.reserve([3])):
    try:
        call()
    except AssertionError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer takes all addresses")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_cache_in_which_a_change_broke_off_serves_nothing_any_more() -> None:
    """After an exception in the middle of a change the door could have stayed open."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["no memory 1", *["InvariantError"] * 3], done.stderr


def test_every_question_at_a_reserve_is_counted() -> None:
    """With inner checkpoints a kind could be given up for ever, since it is asked for at the reserve."""
    driver = Driver(num_pages=400, num_slots=3, inner_checkpoints=True, interior_spacing=10**6)
    for seed in range(40):
        driver.turn(tokens(40, seed), [1])
        driver.cache.clear()
    held = [driver.cache.reserve(tokens(4, seed + 500)) for seed in range(2)]
    assert None not in held and driver.cache.stats()["dropped_checkpoints"] == 0
    for seed in range(40, 90):
        driver.turn(tokens(40, seed), [1])
    # Only what is not spare counts as dropped: questions 48, 64 and 80, of the cut and of the prompt's end.
    assert driver.cache.stats()["dropped_checkpoints"] == 6


def test_in_the_fixed_arena_a_requests_own_hit_is_no_room_for_it_either() -> None:
    """Its own path was left out of the most pages that may be pinned: another conversation left in vain."""
    driver = Driver(num_pages=16, num_slots=8, interior_spacing=1000, pass_cost=1000)
    driver.turn(tokens(12, seed=5))  # 3 pages, which alone would not do
    driver.turn(tokens(18))  # 4 pages and a tail
    held = driver.cache.reserve(tokens(8, seed=9))
    assert held is not None
    before = driver.cache.dump()
    assert driver.cache.reserve(tokens(56)) is None  # 10 pages beyond its hit; 9 are neither its own nor held
    assert driver.cache.dump() == before


def cut_page_that_another_node_owns(driver: Driver) -> Pin:
    """A pinned checkpoint at 6, whose page has become whole at 8 as the first of a node that may leave."""
    prompt = tokens(6)
    driver.turn(prompt, [1, 2, 3])
    pin = driver.cache.pin(prompt)
    assert pin is not None and pin.length == 6
    assert driver.cache.stats()["checkpoints"] == 2 and driver.cache.stats()["taken_pages"] == 3
    return pin


def test_the_page_that_a_pinned_boundary_cuts_is_no_room() -> None:
    """It was counted with the node that leaves: a request evicted it, and was refused all the same."""
    driver = Driver(num_pages=6, num_slots=8, interior_spacing=1000, pass_cost=1000)
    pin = cut_page_that_another_node_owns(driver)
    before = driver.cache.dump()
    assert driver.cache.reserve(tokens(20, seed=5)) is None  # 5 pages; 3 are free, one can leave
    assert driver.cache.dump() == before
    pin.release()
    assert driver.cache.reserve(tokens(20, seed=5)) is not None


def test_the_page_that_a_pinned_boundary_cuts_empties_no_slab() -> None:
    """The same where more slots are wanted than checkpoints can leave: a fork that publishes."""
    driver = Driver(pages_per_slab=1, slabs=8, interior_spacing=1000, pass_cost=1000)
    pin = cut_page_that_another_node_owns(driver)  # 5 slabs: two states, three pages
    lease = driver.cache.reserve([7], max_new_tokens=2)
    assert lease is not None
    driver.prefill(lease)
    kept = driver.cache.pin([7])  # with the slot of its boundary, all 8
    driver.decode(lease, [8])
    before = driver.cache.dump()
    assert kept is not None and driver.cache.stats()["checkpoints"] == 3
    assert lease.fork() is None  # two slots and a page; a state and its tail can leave
    assert driver.cache.dump() == before
    pin.release()
    assert lease.fork() is not None


@pytest.mark.parametrize(("slabs", "fits"), [(7, False), (8, True)])
def test_a_page_that_two_boundaries_cut_leaves_once(slabs: int, fits: bool) -> None:
    driver = Driver(pages_per_slab=1, slabs=slabs, draft_tokens=3, interior_spacing=1000, pass_cost=1000)
    driver.turn(tokens(5), [1])  # boundaries at 5 and at 6: two states, two pages
    lease = driver.cache.reserve(tokens(4, seed=5))
    assert lease is not None
    driver.prefill(lease)  # a boundary that it reads, its live slot, a page: 7 slabs
    before = driver.cache.dump()
    assert driver.cache.stats()["checkpoints"] == 3
    assert (lease.launch(4, rows=4) is not None) == fits  # four states and a page
    assert fits or driver.cache.dump() == before


@pytest.mark.parametrize("cap", [None, 3])
def test_what_is_worth_most_can_leave(cap: int | None) -> None:
    """A worth as large as numbers get was below no limit: a request that had been granted room was refused,
    and a cap ended in nothing to evict."""
    driver = Driver(num_pages=1, num_slots=1)
    layout = SimpleNamespace(page_size=1024, page_bytes=1, slot_bytes=1)
    driver.cache = HybridCache(layout, num_pages=20, num_slots=10, max_cached_bytes=cap)
    for conversation in (5, 6):
        prompt = np.full(8 * 1024, conversation, dtype=np.int32)
        driver.turn(prompt, priority=8, now=1, close={"now": 1, "expected_return": 0})
    assert driver.cache.stats()["checkpoints"] == (0 if cap else 4)
    lease = driver.cache.reserve(np.full(19 * 1024, 7, dtype=np.int32))
    assert lease is not None
