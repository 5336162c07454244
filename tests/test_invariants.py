"""One test or more for each invariant, by its name. What they say in general the state machine tries in
particular."""

from __future__ import annotations

import heapq
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcache.cache import Lease
from hybridcache.values import Missed
from tests.conftest import Driver, tokens
from tests.small_parts import parts_of


def test_i1_every_page_and_slot_has_one_owner(driver: Driver) -> None:
    stats = driver.cache.stats
    lease = driver.cache.reserve(tokens(30), max_new_tokens=10)
    assert lease is not None
    assert (stats()["taken_pages"], stats()["taken_slots"], stats()["tree_pages"]) == (10, 1, 0)
    driver.prefill(lease)
    before = stats()
    assert before["checkpoints"] == 2  # the cut before the end of the prompt, and its end
    assert before["tree_pages"] == 8  # the last one as a tail, in which the lease goes on
    lease.close(keep="nothing")
    driver.cache.clear()
    driver.cache.check()
    after = stats()
    assert [
        after[k] for k in ("taken_pages", "taken_slots", "tree_pages", "nodes", "checkpoints", "cached_bytes")
    ] == [0] * 6


def test_i1_a_duplicate_is_freed_when_its_lease_closes(driver: Driver) -> None:
    prompt = tokens(17)
    a, b = driver.cache.reserve(prompt), driver.cache.reserve(prompt)
    assert a is not None and b is not None
    driver.prefill(a)
    table = b.pages.tolist()
    driver.prefill(b)
    assert b.pages.tolist()[:4] == table[:4]  # ids never change under a running request
    assert not set(a.pages.tolist()) & set(b.pages.tolist())
    taken = driver.cache.stats()["taken_pages"]
    b.close()
    driver.cache.check()
    assert driver.cache.stats()["taken_pages"] == taken - 5
    a.close()
    driver.cache.check()


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 64])
def test_i2_a_checkpoint_holds_exactly_its_position(page_size: int) -> None:
    driver = Driver(page_size=page_size, slabs=200)
    prompt = tokens(41)
    driver.turn(prompt, [1, 2, 3])  # the state has read 44 tokens: 41 + 1, 2, 3
    known = [*prompt, 1, 2, 3]
    assert driver.cache.match([*known, 4]).length == 44
    assert driver.cache.match([*known[:43], 9, 9]).length == 41  # the end of the prompt, not the page below
    assert driver.cache.match([*known[:40], 9, 9]).length == 33  # the cut before it


def test_i3_at_least_one_token_is_computed(driver: Driver) -> None:
    prompt = tokens(12)
    driver.turn(prompt)
    match = driver.cache.match(prompt)
    assert (match.length, match.kv_length, match.reason) == (4, 12, "remainder")
    driver.turn(prompt)
    assert driver.start == 4
    for length in (1, 2, 4, 5):  # one token, less than a page, exactly a page, one more
        once = Driver()
        for _ in range(3):
            once.turn(prompt[:length])
            assert once.start < length


def test_i4_only_committed_tokens_enter_the_tree(driver: Driver) -> None:
    prompt = tokens(16)
    lease = driver.cache.reserve(prompt)
    assert lease is not None
    lease.launch(16)
    assert driver.cache.match(prompt).kv_length == 0
    driver.apply()
    assert driver.cache.match(prompt).kv_length == 0
    lease.close()  # cancelled: its step was launched, never committed
    driver.cache.check()
    assert driver.cache.match(prompt).kv_length == 0
    lease = driver.cache.reserve(prompt)
    assert lease is not None
    driver.prefill(lease)
    lease.launch(1)
    driver.apply()
    lease.close()  # the state is past `committed`, so it does not join the tree
    assert driver.cache.match([*prompt, 5, 6]).kv_length == 16


def test_i5_a_lease_goes_on_in_a_private_copy_of_the_page_that_a_boundary_cuts(driver: Driver) -> None:
    prompt = tokens(6)
    driver.turn(prompt, [7])
    a, b = driver.cache.reserve([*prompt, 7, 8]), driver.cache.reserve([*prompt, 7, 9])
    assert a is not None and b is not None
    assert a.start == b.start == 7
    assert a.pages[0] == b.pages[0] and a.pages[1] != b.pages[1]
    a.launch(1), b.launch(1)
    plan = driver.apply()
    assert {tuple(pair) for pair in plan.copy_pages.tolist()} == {
        (plan.copy_pages[0, 0], a.pages[1]),
        (plan.copy_pages[0, 0], b.pages[1]),
    }
    assert plan.copy_pages[0, 0] not in (a.pages[1], b.pages[1])
    assert len({a.live_slot, b.live_slot, *plan.copy_slots[:, 0].tolist()}) == 3


def test_i6_no_room_leaves_nothing_behind() -> None:
    driver = Driver(slabs=6)
    lease = driver.cache.reserve(tokens(24))
    assert lease is not None
    before = driver.cache.dump(), driver.cache.digest
    assert driver.cache.reserve(tokens(24, seed=1)) is None
    assert (driver.cache.dump(), driver.cache.digest) == before
    driver.prefill(lease)
    driver.decode(
        lease,
        range(
            driver.cache.geometry.num_pages * 4 - 24 - 4 * 2 * 1 - 4 * 2 * driver.cache.stats()["checkpoints"]
        ),
    )
    driver.cache.check()


def test_i6_launch_without_room_changes_nothing() -> None:
    driver = Driver(slabs=4, interior_spacing=1000)
    a, b = driver.cache.reserve(tokens(4)), driver.cache.reserve(tokens(4, seed=1))
    assert a is not None and b is not None
    driver.prefill(a), driver.prefill(b)
    refused = None
    for token in range(40):
        before = driver.cache.dump(), driver.cache.digest
        if driver.step(a, 1, [token]) is None:
            refused = before
            break
    assert refused == (driver.cache.dump(), driver.cache.digest)
    b.close()
    driver.cache.clear()
    assert driver.step(a, 1, [1]) is not None


WALK = """
import random
from tests.conftest import Driver
driver = Driver(slabs=12)
rng = random.Random(7)
leases = []
for _ in range(400):
    if leases and rng.random() < 0.5:
        leases.pop(rng.randrange(len(leases))).close(keep=rng.choice(["all", "prompt", "nothing"]))
    prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
    lease = driver.cache.reserve(prompt, salt=bytes([rng.randrange(3)]))
    if lease is not None and driver.step(lease, rng.randrange(1, 30)) is not None:
        leases.append(lease)
print(driver.cache.digest, sum(v for k, v in driver.cache.stats().items() if "evicted" in k) > 0)
"""


def test_i7_equal_calls_make_equal_decisions_in_every_process() -> None:
    outputs = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "MALLOC_PERTURB_": seed}
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", WALK], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(outputs) == 1
    assert outputs.pop().strip().endswith("True")


@pytest.mark.parametrize("count", [1, 64, 65, 5000])
def test_i7_the_lowest_free_slot_is_taken_in_an_arena_of_any_size(count: int) -> None:
    driver = Driver(num_pages=count, num_slots=count)
    rng = random.Random(count)
    open_leases: list[Lease] = []
    free = list(range(count))  # a heap
    for _ in range(3 * count):
        if free and (not open_leases or rng.random() < 0.7):
            lease = driver.cache.reserve([rng.randrange(1000)])
            assert lease is not None and lease.live_slot == heapq.heappop(free)
            open_leases.append(lease)
        else:
            assert free or driver.cache.reserve([0]) is None
            lease = open_leases.pop(rng.randrange(len(open_leases)))
            heapq.heappush(free, lease.live_slot)
            lease.close(discard=True)
    driver.cache.check()


def test_a_view_of_pages_stays_as_it_was(driver: Driver) -> None:
    """Also when its lease has closed, whose memory the next lease may get, or goes on to more pages."""
    seen = []
    for turn in range(30):
        lease = driver.cache.reserve(tokens(10 + turn, seed=turn % 3))
        assert lease is not None
        seen.append((lease.pages, lease.pages.tolist()))
        driver.prefill(lease)
        for token in range(20):
            driver.step(lease, 1, [token])
        seen.append((lease.pages, lease.pages.tolist()))
        lease.close()
        assert all(view.tolist() == before for view, before in seen)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux tells it")
def test_small_requests_do_not_hold_the_tables_of_large_ones_that_have_closed() -> None:
    driver = Driver(page_size=64, num_pages=20_000, num_slots=100)
    large = np.arange(1 << 20, dtype=np.int32)
    held = []
    for number in range(60):
        lease = driver.cache.reserve(large)
        assert lease is not None
        lease.close(discard=True)
        held.append(driver.cache.reserve([number, 1]))
        if number == 10:
            before = resident_bytes()
    assert None not in held and resident_bytes() - before < 100 << 20  # 196, were they to get them


@pytest.mark.parametrize("policy", ["default", "supersede"])
def test_i7_the_size_of_parts_changes_no_decision(policy: str) -> None:
    """Long turns, branches, evictions; parts of edges as they are shipped and as the tests have them."""
    drivers = []
    for size in (512, 8):
        with parts_of(size):
            drivers.append(Driver(page_size=16, pages_per_slab=8, slabs=120, policy=policy))
    rng = random.Random(7)
    known: list[np.ndarray] = [tokens(700, seed=number) for number in range(6)]
    for turn in range(150):
        which = rng.randrange(len(known))
        kept = len(known[which]) if rng.random() < 0.7 else rng.randrange(1, len(known[which]))
        new = tokens(rng.choice((1, 40, 300, 900)), seed=1000 + turn)
        known[which] = prompt = np.concatenate((known[which][:kept], new))[-4000:]
        for driver in drivers:
            driver.turn(prompt, [turn], chunk=512)
        assert drivers[0].start == drivers[1].start and drivers[0].match == drivers[1].match
        assert drivers[0].cache.digest == drivers[1].cache.digest
    stats = drivers[0].cache.stats()
    assert stats["tokens_hit"] > 50_000 and stats["evicted_prompt_end"] + stats["evicted_turn_end"] > 50, (
        stats
    )


def test_i8_nothing_crosses_a_salt(driver: Driver) -> None:
    prompt = tokens(40)
    driver.turn(prompt, [1, 2], salt=b"one")
    for salt in (b"", b"two", b"one\0"):
        assert driver.cache.match(prompt, salt=salt) == (0, 0, "cold", False, None)
        assert driver.cache.pin(prompt, salt=salt) is None
    driver.turn(prompt, [1, 2], salt=b"two")
    assert driver.start == 0
    assert driver.cache.clear(salt=b"one") > 0
    assert driver.cache.match([*prompt, 1, 2, 3], salt=b"one").kv_length == 0
    assert driver.cache.match([*prompt, 1, 2, 3], salt=b"two").length == 42


def test_i8_equal_ids_with_different_content_are_different(driver: Driver) -> None:
    prompt = tokens(20)
    cat, dog = [(6, b"cat")], [(6, b"dog")]
    driver.turn(prompt, [1], content_keys=cat)
    assert driver.cache.match([*prompt, 1, 2], content_keys=cat).length == 21
    for keys in (dog, (), [(7, b"cat")], [(6, b"cat"), (8, b"cat")]):
        assert driver.cache.match([*prompt, 1, 2], content_keys=keys).kv_length in (6, 8)
    driver.turn(prompt, [1], content_keys=dog)
    assert driver.cache.match([*prompt, 1, 2], content_keys=dog).length == 21
    driver.cache.clear()
    driver.cache.check()  # no pair stays interned


def test_i9_asking_changes_nothing(driver: Driver) -> None:
    prompt = tokens(30)
    driver.turn(prompt, [1, 2])
    before = driver.cache.dump(), driver.cache.digest, driver.cache.stats()
    for query in (prompt, prompt[:7], [*prompt, 1], [9, 9]):
        driver.cache.match(query)
        driver.cache.match(query, salt=b"x", content_keys=[(0, b"new")])
    assert (driver.cache.dump(), driver.cache.digest, driver.cache.stats()) == before


def test_i10_what_a_pending_plan_names_is_not_handed_out(driver: Driver) -> None:
    prompt = tokens(10)
    driver.turn(prompt, [1])
    lease = driver.cache.reserve([*prompt, 1, 2])
    assert lease is not None
    lease.launch(1)
    held = set(lease.pages.tolist()), lease.live_slot
    plan = driver.cache.plan()
    assert plan.copy_slots.size and plan.copy_pages.size
    lease.close()
    driver.cache.check()
    assert driver.cache.stats()["resting_leases"] == 1
    other = driver.cache.reserve(tokens(10, seed=1))
    assert other is not None
    assert other.live_slot != held[1] and not set(other.pages.tolist()) & held[0]
    driver.cache.applied(plan)
    driver.cache.applied(plan)  # again: harmless
    driver.cache.check()
    assert driver.cache.stats()["resting_leases"] == 0
    other.close()
    assert driver.cache.stats()["taken_slots"] == driver.cache.stats()["checkpoints"]


def test_i10_a_lease_that_closes_before_its_step_is_collected_books_nothing(driver: Driver) -> None:
    lease = driver.cache.reserve(tokens(10))
    assert lease is not None
    lease.launch(5)
    lease.close()
    plan = driver.apply()
    assert not any(len(ids) for ids in plan[1:5])
    assert driver.cache.stats()["taken_pages"] == 0
    again = driver.cache.reserve(tokens(10))
    assert again is not None
    again.launch(5)
    assert sorted(driver.apply().zero_pages.tolist()) == sorted(again.pages.tolist())  # still to be scrubbed


def test_i11_state_and_kv_have_one_length_at_every_restore() -> None:
    driver = Driver(page_size=4, slabs=40)
    prompt = tokens(60)
    for end in range(5, 60, 3):  # many endings, also several in one page
        driver.turn(prompt[:end])
    for length in range(1, 61):
        lease = driver.cache.reserve(prompt[:length])
        assert lease is not None
        assert len(lease.pages) == -(-length // 4)
        step = lease.launch(64)
        plan = driver.apply()
        tails = {int(destination) for _, destination in plan.copy_pages}
        assert tails == ({int(lease.pages[lease.start // 4])} if lease.start % 4 else set())
        assert (step is not None and step.read_slot >= 0) == (lease.start > 0)
        lease.close(discard=True)
        driver.cache.check()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([9, 9], (0, 0, "cold", True, None)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], (8, 8, "complete", False, None)),
        ([1, 2, 3, 4, 5, 6, 7, 8], (6, 8, "remainder", False, 7)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], (8, 8, "unknown", False, None)),
        ([1, 2, 3, 4, 5, 6, 7, 9, 9], (6, 7, "no_checkpoint", True, 7)),
        ([1, 2, 3, 4], (0, 4, "no_checkpoint", False, 3)),
        ([1, 2, 3, 4, 5, 6, 9, 9], (6, 6, "unknown", True, None)),
    ],
)
def test_i12_a_match_says_why(driver: Driver, query: list[int], expected: tuple[Any, ...]) -> None:
    """The last of `expected`: where a state was never made that would have helped."""
    driver.turn([1, 2, 3, 4, 5, 6], [7, 8])
    *known, position = expected
    missed = None if position is None else Missed(position, None, "never_made", None, None)
    assert driver.cache.match(query) == (*known, missed)
    lease = driver.cache.reserve(query)
    assert lease is not None
    assert lease.match == (*known, missed) and lease.start == expected[0]


def test_a_walk_does_not_go_on_into_the_children_of_a_child_that_differs(driver: Driver) -> None:
    driver.turn([1, 2, 3, 7, 8])
    driver.turn([1, 2, 3, 9, 9])
    assert driver.cache.match([1, 2, 7, 8, 5]).kv_length == 2


def test_a_slab_that_changes_role_is_scrubbed() -> None:
    driver = Driver(slabs=4, interior_spacing=1000)
    zeroed: set[int] = set()
    for seed in range(12):
        driver.turn(tokens(9, seed), [1])
        zeroed |= set(np.concatenate([plan.zero_pages for plan in driver.plans]).tolist())
        driver.plans.clear()
    lease = driver.cache.reserve(tokens(24, seed=99))
    assert lease is not None
    lease.launch(24)
    plan = driver.apply()
    assert set(plan.zero_pages.tolist()) <= set(lease.pages.tolist())
    assert len(plan.zero_pages) > 0  # some of its pages were slots
