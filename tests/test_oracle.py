"""Small cases of the oracle worked out by hand from docs/design.md, and a walk of oracle and symbolic memory
alone.

The walk tests the design itself, before and without the core: if a lease of the oracle could ever read a
wrong slot or page, the symbolic memory says so. The faults at the end show that it would.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.actions import random_walk
from tests.harness import Config, Flight, Harness, draw_config
from tests.oracle import Oracle
from tests.oracle_store import Arena, Store
from tests.oracle_types import Lease, Missed, OpenStep, Step, Wanted
from tests.walk_events import WALK_EVENTS


def harness(
    page_size: int = 4,
    per_slab: int = 2,
    slabs: int = 40,
    pages: int = 0,
    slots: int = 0,
    lookahead: int = 0,
    **options: Any,
) -> Harness:
    options = {"pass_cost": 512, "interior_spacing": 1024, **options}
    return Harness(Config(page_size, per_slab, slabs, pages, slots, lookahead=lookahead, options=options))


def ordinary(begin: int, end: int, read: int, write: int) -> Step:
    """An ordinary step without inner checkpoints."""
    return Step(begin, end, read, write, [], begin, [read], [write])


def opened(
    h: Harness, tokens: list[Any], breakpoints: tuple[int, ...] = (), max_new: int = 0, salt: bytes = b""
) -> Flight:
    flights = len(h.flights)
    h.reserve(salt, tokens, list(breakpoints), max_new)
    assert len(h.flights) == flights + 1, "no room"
    return h.flights[-1]


def ahead(h: Harness, flight: Flight, n: int, feed: tuple[int, ...] = ()) -> Any:
    """Launches, plans, applies and runs a step, and leaves it open."""
    h.launch(flight, n, feed)
    h.plan()
    h.apply()
    h.run(flight)
    h.verify()
    return flight.oracle.open[-1].step


def commit(h: Harness, flight: Flight) -> None:
    h.commit([flight], batch=False)
    h.verify()


def advance(h: Harness, flight: Flight, n: int, feed: tuple[int, ...] = ()) -> Any:
    step = ahead(h, flight, n, feed)
    commit(h, flight)
    return step


def prefill(h: Harness, flight: Flight) -> None:
    while flight.oracle.computed < flight.oracle.prompt_length:
        advance(h, flight, flight.oracle.prompt_length)


def conversation(h: Harness, tokens: list[Any], salt: bytes = b"", **kw: Any) -> None:
    flight = opened(h, tokens, salt=salt, **kw)
    prefill(h, flight)
    h.close(flight, "all", False)
    h.verify()


def depths(h: Harness) -> list[int]:
    return sorted(len(path) for _, path in h.oracle.store.checkpoints)


def kinds(h: Harness) -> dict[int, str]:
    return {len(c.key[1]): c.kind for c in h.oracle.store.checkpoints.values()}


# ---- arena


def test_pages_fill_home_then_the_fullest_slab_then_the_lowest_free_one() -> None:
    arena = Arena(True, 3, 12, 4)
    assert [arena.take_page(None) for _ in range(4)] == [0, 1, 2, 3]
    assert arena.take_slot() == 2
    assert arena.take_page(0) == 4, "home is full: the fullest partly used slab"
    arena.free_page(0)
    arena.free_page(1)
    assert arena.take_page(None) == 5, "slab 1 has two used pages, slab 0 one"
    arena.free_page(5)
    assert arena.take_page(0) == 0, "home first, although slab 1 is fuller"
    assert arena.take_page(3) == 1, (
        "a free home slab is no home, and among equally full ones the lowest id counts"
    )
    assert arena.take_page(None) == 5
    assert arena.satisfied(1, 0) and arena.satisfied(0, 3) and not arena.satisfied(1, 1), (
        "only slab 3 is left"
    )


def test_a_free_slab_can_become_a_slot_and_its_pages_become_dirty() -> None:
    arena = Arena(True, 2, 4, 2)
    arena.dirty.clear()
    page = arena.take_page(None)
    arena.free_page(page)
    assert arena.take_slot() == 0 and arena.dirty == {0, 1}
    assert arena.satisfied(1, 0) and arena.satisfied(0, 2) and not arena.satisfied(1, 1)


def test_fixed_regions_never_trade_and_the_last_slab_may_be_short() -> None:
    arena = Arena(False, 2, 5, 3)
    assert [arena.take_page(None) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert arena.take_slot() == 0 and arena.free_slots() == [1, 2]
    assert not arena.satisfied(0, 1) and arena.satisfied(2, 0) and not arena.satisfied(3, 0)


# ---- match


def never_made(position: int) -> Missed:
    return Missed(position, None, "never_made", None, None)


def test_match_reasons() -> None:
    h = harness()
    path = list(range(1, 11))
    assert h.oracle.match(path) == (0, 0, "cold", False, None)
    conversation(h, path)
    assert depths(h) == [10] and kinds(h) == {10: "prompt_end"}
    assert h.oracle.match(path) == (0, 10, "remainder", False, never_made(9))
    assert h.oracle.match([*path, 7]) == (10, 10, "complete", False, None)
    assert h.oracle.match([*path, 7, 7]) == (10, 10, "unknown", False, None)
    assert h.oracle.match([*path[:6], 77]) == (0, 6, "no_checkpoint", True, never_made(6))
    assert h.oracle.match(path[:6]) == (0, 6, "no_checkpoint", False, never_made(5)), (
        "I3, and nothing diverges at the end of the prompt"
    )
    assert h.oracle.match([*path, 7], salt=b"other") == (0, 0, "cold", False, None), "I8"


def test_a_partial_match_in_one_child_does_not_go_on_in_that_childs_children() -> None:
    h = harness(page_size=1)
    for path in ([1, 2, 3, 7, 8], [1, 2, 3, 9, 9]):
        conversation(h, path)
    assert h.oracle.match([1, 2, 7, 8, 5])[:2] == (0, 2)
    assert kinds(h) == {5: "prompt_end"} and len(h.oracle.store.pages) == 7


def test_content_keys_and_salts_keep_equal_tokens_apart() -> None:
    h = harness(page_size=1)
    conversation(h, [5, (6, b"cat"), 7])
    assert h.oracle.match([5, 6, 7, 8], content_keys=[(1, b"cat")]).length == 3
    assert h.oracle.match([5, 6, 7, 8], content_keys=[(1, b"dog")])[:2] == (0, 1)
    assert h.oracle.match([5, 6, 7, 8])[:2] == (0, 1)


# ---- one lease


def test_a_boundary_inside_a_page_hands_over_the_slot_and_shares_the_page() -> None:
    h = harness(page_size=4, per_slab=2)
    flight = opened(h, list(range(1, 7)), max_new=4)
    lease, store = flight.oracle, h.oracle.store
    assert (lease.live_slot, lease.pages, lease.capacity) == (0, [2, 3, 4], 12)
    step = advance(h, flight, 6)
    assert step == ordinary(0, 6, -1, 0)
    assert (lease.live_slot, lease.pages, lease.boundary, lease.fresh) == (3, [2, 3, 4], 6, True)
    assert store.checkpoints[b"", (1, 2, 3, 4, 5, 6)].tail == 3 and 3 in store.held and store.counts[3] == 1
    h.launch(flight, 1, (9,))
    assert lease.open[0].step == ordinary(6, 7, 0, 3)
    h.plan()
    assert h.pending[0][0] == (2, [(0, 3)], [], [], []), "the slot is copied, the page is not"
    h.apply()
    h.run(flight)
    commit(h, flight)
    assert (lease.boundary, lease.live_slot, lease.fresh) == (6, 3, False)
    advance(h, flight, 1, (9,))
    assert store.counts[3] == 2 and 3 not in store.held, "full: the node's, and still the tail's"
    h.close(flight, "all", False)
    h.verify()
    assert kinds(h) == {6: "prompt_end", 8: "turn_end"}
    assert store.checkpoints[b"", (1, 2, 3, 4, 5, 6)].superseded
    assert h.oracle.arena.slots == {0, 3} and h.oracle.arena.pages == {2, 3}, (
        "the page never reached (4) is free"
    )


def test_who_resumes_inside_a_page_copies_it_while_its_writer_goes_on() -> None:
    h = harness(page_size=4, per_slab=2)
    writer = opened(h, [1, 2, 3, 4, 5, 6], max_new=4)
    prefill(h, writer)
    reader = opened(h, [1, 2, 3, 4, 5, 6, 7, 8])
    assert reader.oracle.start == 6
    advance(h, writer, 1, (9,))
    h.launch(reader, 2, ())
    h.plan()
    tail, own = writer.oracle.pages[1], reader.oracle.pages[1]
    assert h.pending[0][0].copy_pages == [(tail, own)] and tail != own
    h.apply()
    h.run(reader)
    commit(h, reader)
    assert h.oracle.store.held == {tail, *writer.oracle.pages[2:]}, "the reader's page is full and the tree's"


def test_a_tail_may_leave_while_its_writer_goes_on_in_the_page() -> None:
    h = harness(page_size=4, per_slab=2)
    flight = opened(h, [1, 2, 3, 4, 5, 6], max_new=4)
    prefill(h, flight)
    advance(h, flight, 1, (7,))
    assert h.oracle.clear() == 1 and flight.oracle.pages[1] in h.oracle.store.held
    h.verify()
    advance(h, flight, 1, (8,))
    h.close(flight, "all", False)
    h.verify()
    assert kinds(h) == {8: "turn_end"}


def test_dirty_pages_are_zeroed_once_and_not_before_the_plan_is_collected() -> None:
    h = harness(page_size=2, per_slab=1)
    first = opened(h, [1, 2, 3])
    h.launch(first, 3, ())
    h.close(first, "all", False)
    h.plan()
    assert h.pending[0][0].zero_pages == [], "a booking that was not collected is dropped"
    h.apply()
    second = opened(h, [1, 2, 3])
    h.launch(second, 3, ())
    h.plan()
    assert h.pending[0][0].zero_pages == [1, 2] and h.pending[0][0].zero_slots == [0]
    h.apply()
    h.run(second)
    h.close(second, "all", True)
    third = opened(h, [1, 2, 3])
    h.launch(third, 3, ())
    h.plan()
    assert h.pending[0][0].zero_pages == [], "clean pages of the same role are not scrubbed again"


def test_a_lease_closed_under_a_collected_plan_rests_until_it_is_applied() -> None:
    h = harness(page_size=2, per_slab=1)
    flight = opened(h, [1, 2, 3])
    h.launch(flight, 3, ())
    h.plan()
    h.close(flight, "all", False)
    h.verify()
    assert h.oracle.arena.slots == {0} and h.oracle.arena.pages == {1, 2}, "I10"
    h.apply()
    assert not h.oracle.arena.slots and not h.oracle.arena.pages


def test_a_fork_publishes_where_its_parent_stands_and_both_go_on() -> None:
    h = harness(page_size=4, per_slab=1)
    flight = opened(h, [1, 2, 3, 4, 5], max_new=3)
    prefill(h, flight)
    advance(h, flight, 1, (6,))
    h.fork(flight)
    h.verify()
    child = h.flights[-1].oracle
    assert kinds(h) == {5: "prompt_end", 6: "fork"}
    assert (child.start, child.boundary, child.fresh, flight.oracle.fresh) == (6, 6, True, True)
    source = h.oracle.store.checkpoints[b"", (1, 2, 3, 4, 5, 6)]
    assert source.pins == 2 and child.read is source and flight.oracle.read is source
    advance(h, flight, 1, (7,))
    advance(h, h.flights[-1], 1, (8,))
    assert source.pins == 0
    h.fork(flight)
    assert kinds(h)[7] == "fork"
    h.fork(flight)
    assert len(h.oracle.store.checkpoints) == 3, "a fresh parent publishes nothing"


def test_inner_checkpoints_in_the_partial_page_share_it_with_the_lease() -> None:
    for use in ("close", "fork"):
        h = harness(page_size=8, inner_checkpoints=True)
        flight = opened(h, list(range(1, 41)), breakpoints=(10,))
        assert [p for p, _ in advance(h, flight, 12).checkpoints] == [10]
        inner = h.oracle.store.checkpoints[b"", tuple(range(1, 11))]
        page = flight.oracle.pages[1]
        assert inner.tail == page and inner.pins == 0 and page in h.oracle.store.held
        if use == "close":
            h.close(flight, "all", False)
        else:
            h.fork(flight)
            advance(h, h.flights[-1], 1)
            advance(h, flight, 28)
        h.verify()
        assert h.oracle.store.checkpoints[b"", tuple(range(1, 13))].tail == page


# ---- running ahead


def test_a_lease_goes_on_past_a_boundary_that_is_not_committed_yet() -> None:
    h = harness(page_size=4, per_slab=1, run_ahead=1)
    flight = opened(h, [1, 2, 3, 4, 5, 6], max_new=4)
    lease = flight.oracle
    first = lease.live_slot
    ahead(h, flight, 6)
    assert h.oracle.placement.asked["prompt_end"] == 1, "asked at the launch"
    h.launch(flight, 1, (7,))
    second = lease.live_slot
    assert second != first and lease.open[1].step == ordinary(6, 7, first, second) and lease.open[0].gone_on
    h.plan()
    assert h.pending[0][0] == (2, [(first, second)], [], [], [])
    h.apply()
    h.run(flight)
    h.verify()
    assert not h.oracle.store.checkpoints, "nothing is published before its commit"
    commit(h, flight)
    checkpoint = h.oracle.store.checkpoints[b"", (1, 2, 3, 4, 5, 6)]
    assert (checkpoint.slot, checkpoint.pins, lease.live_slot, lease.fresh) == (first, 1, second, False)
    ahead(h, flight, 1, (8,))
    assert lease.open[1].step == ordinary(7, 8, second, second), "no boundary stands at 7"
    commit(h, flight)
    assert checkpoint.pins == 0 and lease.committed == 7
    commit(h, flight)
    h.close(flight, "all", False)
    h.verify()
    assert kinds(h) == {6: "prompt_end", 8: "turn_end"}
    assert h.oracle.store.checkpoints[b"", tuple(range(1, 9))].slot == second


def test_a_boundary_is_dropped_at_the_launch_ahead_where_there_is_no_slot() -> None:
    h = harness(page_size=2, per_slab=1, slabs=3, run_ahead=1)
    flight = opened(h, [1, 2, 3], max_new=1)
    assert ahead(h, flight, 3) == ordinary(0, 3, -1, 0)
    assert flight.oracle.open[0].kind == "prompt_end"
    assert ahead(h, flight, 1, (4,)) == ordinary(3, 4, 0, 0)
    assert flight.oracle.open[0].kind is None and h.oracle.counters["dropped_checkpoints"] == 1
    commit(h, flight)
    assert not h.oracle.store.checkpoints
    commit(h, flight)
    h.close(flight, "all", False)
    h.verify()
    assert kinds(h) == {4: "turn_end"}


def test_a_duplicate_that_the_next_step_reads_is_left_behind_until_its_commit() -> None:
    h = harness(page_size=4, per_slab=1, run_ahead=1)
    one, two = opened(h, [1, 2, 3], max_new=4), opened(h, [1, 2, 3], max_new=4)
    for flight in (one, two):
        ahead(h, flight, 3)
    slot = two.oracle.live_slot
    ahead(h, two, 1, (4,))
    commit(h, one)
    commit(h, two)
    assert two.oracle.left_behind == slot and slot in h.oracle.arena.slots
    assert h.oracle.store.checkpoints[b"", (1, 2, 3)].slot != slot
    commit(h, two)
    assert two.oracle.left_behind is None and slot not in h.oracle.arena.slots
    assert two.oracle.boundary == 0 and two.oracle.committed == 4


def test_sparse_chunk_ends_count_from_the_boundary_that_is_still_open() -> None:
    for run_ahead, wait in ((1, False), (1, True), (0, True)):
        h = harness(page_size=4, slabs=200, interior_spacing=8, run_ahead=run_ahead)
        flight = opened(h, list(range(1, 101)))
        for _ in range(10):
            ahead(h, flight, 4)
            if wait or len(flight.steps) > 1:
                commit(h, flight)
        if not wait:
            commit(h, flight)
        assert depths(h) == [8, 16, 32]


def rest(h: Harness) -> Flight:
    """A request that was closed with its step on the device, beside one that goes on."""
    other, flight = opened(h, [5, 6]), opened(h, [1, 2, 3])
    h.launch_batch([other, flight], [2, 3], [])
    h.plan()
    h.close(flight, "all", False)
    h.verify()
    assert h.oracle.resting == [flight.oracle]
    h.apply()
    h.verify()
    return other


def test_without_run_ahead_a_rest_ends_when_its_plan_is_applied() -> None:
    h = harness(page_size=2, per_slab=1)
    rest(h)
    assert not h.oracle.resting and h.oracle.events["rest_ended_by_plan"] == 1


def test_with_run_ahead_a_rest_ends_one_plan_later() -> None:
    h = harness(page_size=2, per_slab=1, run_ahead=1)
    other = rest(h)
    assert len(h.oracle.resting) == 1
    h.launch(other, 1, (7,))
    h.plan()
    h.verify()
    assert len(h.oracle.resting) == 1
    h.apply()
    h.verify()
    assert not h.oracle.resting and h.oracle.events["rest_ended_by_plan"] == 1


def test_a_rest_ends_when_nothing_is_in_flight() -> None:
    h = harness(page_size=2, per_slab=1, run_ahead=1)
    other = rest(h)
    h.run(other)
    assert len(h.oracle.resting) == 1, "the other's step is open"
    commit(h, other)
    assert not h.oracle.resting and h.oracle.events["rest_ended_idle"] == 1
    other = rest(h)
    h.close(other, "all", False)
    assert not h.oracle.resting, "a closed lease's step is none"


def test_a_close_with_two_open_steps_drops_what_no_plan_collected_and_rests_whole() -> None:
    h = harness(page_size=2, per_slab=1, run_ahead=1)
    flight = opened(h, [1, 2, 3])
    h.launch(flight, 3, ())
    h.plan()
    h.launch(flight, 2, (4, 5))
    assert flight.oracle.open[0].gone_on
    slots, pages = set(flight.oracle.slots), set(flight.oracle.pages)
    h.close(flight, "all", False)
    h.verify()
    assert h.oracle.arena.slots == slots and h.oracle.arena.pages == pages and len(slots) == 2
    h.plan()
    assert h.pending[1][0] == (2, [], [], [], [])
    h.apply()
    assert h.oracle.resting
    h.apply()
    h.verify()
    assert not h.oracle.arena.slots and not h.oracle.arena.pages


# ---- placement


def test_a_fork_is_wanted_on_first_sight_and_serves_the_third_sharer() -> None:
    h = harness(page_size=4, pass_cost=2)
    conversation(h, [1, 2, 3, 4, 5, 6])
    flight = opened(h, [1, 2, 3, 4, 9, 9])
    assert flight.oracle.wanted == [Wanted(4, "fork")]
    assert advance(h, flight, 6)[:2] == (0, 4) and flight.oracle.extra_passes == 1
    assert kinds(h)[4] == "fork"
    assert h.oracle.match([1, 2, 3, 4, 7, 7]).length == 4
    dear = harness(page_size=4, pass_cost=5)
    conversation(dear, [1, 2, 3, 4, 5, 6])
    assert opened(dear, [1, 2, 3, 4, 9, 9]).oracle.wanted == []
    conversation(dear, [1, 2, 3, 4, 7, 7])
    assert opened(dear, [1, 2, 3, 4, 8, 8]).oracle.wanted == [Wanted(4, "fork")], "two have left there"


def test_the_first_prompt_is_cut_before_its_end_and_the_next_turn_is_not() -> None:
    h = harness(page_size=4, pass_cost=4)
    path = list(range(1, 21))
    flight = opened(h, path)
    assert advance(h, flight, 20)[:2] == (0, 12) and advance(h, flight, 20)[:2] == (12, 20)
    h.close(flight, "all", False)
    assert kinds(h) == {12: "cut", 20: "prompt_end"}
    following = opened(h, [*path, *range(30, 50)])
    assert following.oracle.start == 20 and not following.oracle.branches
    assert advance(h, following, 40)[:2] == (20, 40) and following.oracle.extra_passes == 0


def test_alignment_moves_a_paid_cut_down_and_drops_what_falls_on_begin() -> None:
    h = harness(page_size=4, alignment=4)
    flight = opened(h, list(range(1, 15)), breakpoints=(3, 6, 14))
    assert advance(h, flight, 14)[:2] == (0, 4), "3 falls on 0 and is dropped, 6 takes effect at 4"
    assert advance(h, flight, 2)[:2] == (4, 6), "a wanted end is exact"
    assert advance(h, flight, 14)[:2] == (6, 14)
    assert kinds(h) == {4: "breakpoint", 6: "breakpoint", 14: "breakpoint"}


def test_inner_checkpoints_do_not_shorten_the_step() -> None:
    h = harness(page_size=4, per_slab=1, inner_checkpoints=True, interior_spacing=2)
    flight = opened(h, list(range(1, 14)))
    kinds_wanted = [(w.position, w.kind) for w in flight.oracle.wanted]
    assert kinds_wanted == [(2, "interior"), (4, "interior"), (5, "cut"), (8, "interior")]
    step = advance(h, flight, 13)
    assert step[:2] == (0, 13) and [p for p, _ in step.checkpoints] == [2, 4, 5, 8]
    assert depths(h) == [2, 4, 5, 8, 13]
    tails = {len(c.key[1]): c.tail for c in h.oracle.store.checkpoints.values()}
    first_page, second_page = flight.oracle.pages[:2]
    assert (tails[2], tails[4], tails[5], tails[8]) == (first_page, None, second_page, None)
    assert [
        c.superseded for c in sorted(h.oracle.store.checkpoints.values(), key=lambda c: len(c.key[1]))
    ] == [True, True, True, True, False]


def test_a_kind_that_nobody_uses_is_soon_spare_but_for_every_sixteenth_time() -> None:
    h = harness(page_size=4, slabs=200)
    eager = []
    for i in range(50):
        flight = opened(h, [100 + i, 1, 2])
        h.launch(flight, 3, [])
        eager.append(not flight.oracle.open[-1].spare)
        h.plan()
        h.apply()
        h.run(flight)
        h.commit([flight], batch=False)
        assert flight.oracle.boundary == 3, "there is room"
        h.close(flight, "all", False)
    assert [i + 1 for i, each in enumerate(eager) if each] == [*range(1, 17), 32, 48]


def test_a_resend_is_cut_whatever_was_learned() -> None:
    h = harness(page_size=4, pass_cost=4, slabs=200)
    for i in range(40):
        conversation(h, [100 + i, *range(1, 20)])
    path = [9, *range(1, 20)]
    conversation(h, path)
    again = opened(h, path)
    assert again.oracle.resend and advance(h, again, 20)[:2] == (0, 12)


# ---- admission and eviction


def test_superseded_checkpoints_leave_first_then_the_oldest() -> None:
    h = harness(page_size=2, per_slab=1, slabs=8)
    conversation(h, [9, 9])
    flight = opened(h, [1, 2])
    prefill(h, flight)
    advance(h, flight, 2, (3, 4))
    h.close(flight, "all", False)
    ranked = [(c.key[1], c.superseded) for c in h.oracle.store.order.values()]
    assert ranked == [((1, 2), True), ((9, 9), False), ((1, 2, 3, 4), False)]
    opened(h, [7, 7, 7, 7])  # needs a slot and two pages; two slabs are free
    assert (b"", (1, 2)) not in h.oracle.store.checkpoints and (b"", (9, 9)) in h.oracle.store.checkpoints


def test_no_room_is_none_and_evicts_nothing() -> None:
    h = harness(page_size=2, per_slab=1, slabs=6)
    conversation(h, [9, 9])
    opened(h, [1, 2])
    before = list(h.oracle.store.order)
    h.reserve(b"", [3, 4, 5, 6, 7, 8, 9, 9], [], 0)
    assert len(h.flights) == 1 and list(h.oracle.store.order) == before
    with pytest.raises(ValueError, match="tokens"):
        h.oracle.reserve(list(range(12)))


def test_alone_a_request_gives_up_its_own_hit_rather_than_wait_for_ever() -> None:
    h = harness(page_size=2, per_slab=1, slabs=5)
    conversation(h, [1, 2])
    flight = opened(h, [1, 2, 3, 4, 5, 6, 7])
    given_up = Missed(2, "prompt_end", "no_room", 0, None)
    assert flight.oracle.start == 0 and flight.oracle.match == (0, 2, "no_room", False, given_up)
    assert not h.oracle.store.checkpoints


def test_a_lease_takes_its_boundary_back_when_only_that_makes_room() -> None:
    h = harness(page_size=2, per_slab=1, slabs=4)
    flight = opened(h, [1, 2, 3])
    prefill(h, flight)
    assert depths(h) == [3] and flight.oracle.live_slot == 3, "two slots and two pages: the arena is full"
    assert advance(h, flight, 2, (4, 5)) == ordinary(3, 5, 0, 0)
    assert not h.oracle.store.checkpoints and h.oracle.arena.slots == {0}
    assert flight.oracle.boundary == 3 and h.oracle.counters["dropped_checkpoints"] == 1
    h.close(flight, "all", False)
    assert kinds(h) == {5: "turn_end"}


def test_in_fixed_regions_missing_pages_take_the_lowest_leaf() -> None:
    h = harness(page_size=2, per_slab=1, pages=6, slots=9)
    flight = opened(h, [1, 2], max_new=2)
    prefill(h, flight)
    advance(h, flight, 2, (3, 4))
    h.close(flight, "all", False)
    conversation(h, [9, 9, 9, 9])
    opened(h, [7, 7, 7, 7, 7])
    assert depths(h) == [2, 4], "(1, 2, 3, 4) left, not the superseded (1, 2), whose page it shares"


def test_what_stays_when_nothing_runs_is_capped() -> None:
    h = harness(page_size=2, per_slab=1, max_cached_bytes=2 * 64)
    for i in range(4):
        conversation(h, [i, 1])
        assert h.oracle.cached_bytes() <= 128
    assert sorted(path for _, path in h.oracle.store.checkpoints) == [(2, 1), (3, 1)]


def test_what_a_pin_held_is_capped_when_it_is_released() -> None:
    h = harness(page_size=2, per_slab=1, max_cached_bytes=2 * 64)
    conversation(h, [1, 1])
    h.pin(b"", [1, 1])
    for each in (2, 3):
        conversation(h, [each, each])
    assert sorted(path for _, path in h.oracle.store.checkpoints) == [(1, 1), (3, 3)]
    h.oracle.max_cached_bytes = 64
    h.release(0)
    assert sorted(path for _, path in h.oracle.store.checkpoints) == [(3, 3)]


def test_keep_nothing_spares_what_the_lease_only_resumed_from() -> None:
    h = harness(page_size=2)
    conversation(h, [1, 2, 3])
    h.close(opened(h, [1, 2, 3, 4]), "nothing", False)
    assert [c.superseded for c in h.oracle.store.checkpoints.values()] == [False]


def test_keep_nothing_supersedes_at_the_end_of_a_rest() -> None:
    h = harness(page_size=2)
    flight = opened(h, [1, 2, 3])
    prefill(h, flight)
    checkpoint = h.oracle.store.checkpoints[b"", (1, 2, 3)]
    h.launch(flight, 1, (4,))
    h.plan()
    h.close(flight, "nothing", False)
    assert not checkpoint.superseded and checkpoint.pins == 1
    h.apply()
    assert checkpoint.superseded and checkpoint.pins == 0


def test_keep_nothing_supersedes_the_leaf_it_leaves() -> None:
    h = harness(page_size=2)
    flight = opened(h, [1, 2, 3])
    prefill(h, flight)
    advance(h, flight, 1, (4,))
    h.close(flight, "nothing", False)
    assert [c.superseded for c in h.oracle.store.checkpoints.values()] == [True] and depths(h) == [3]


def test_a_pin_holds_its_checkpoint_through_clear() -> None:
    h = harness(page_size=2)
    conversation(h, [1, 2, 3])
    conversation(h, [5, 5])
    h.pin(b"", [1, 2, 3, 4])
    assert h.pins[0][0].length == 3
    assert h.oracle.clear() == 1 and depths(h) == [3]
    h.release(0)
    assert h.oracle.clear(salt=b"other") == 0 and h.oracle.clear() == 1
    assert not h.oracle.arena.pages and not h.oracle.arena.slots


# ---- the design, walked at random, and faults that the walk must see


def test_the_design_alone_never_reads_what_was_not_written() -> None:
    events: Counter[str] = Counter()
    steps = 0
    drafts: Counter[tuple[bool, int]] = Counter()
    for seed in range(400):
        h = random_walk(seed, 150)
        events += h.total_events()
        steps += h.steps
        drafts[h.oracle.draft_tokens > 0, h.config.lookahead] += 1
    assert steps == 60_000
    assert min(drafts[key] for key in ((False, 0), (False, 1), (True, 0), (True, 1))) > 40
    assert not [name for name in WALK_EVENTS if events[name] < 5], events


def forget_dirty(patch: Any) -> None:
    take_slot = Arena.take_slot

    def faulty(self: Arena) -> int:
        dirty = set(self.dirty)
        slot = take_slot(self)
        self.dirty = dirty
        return slot

    patch.setattr(Arena, "take_slot", faulty)


def match_the_whole_prompt(patch: Any) -> None:
    find = Oracle._checkpoint_at_or_below
    patch.setattr(
        Oracle,
        "_checkpoint_at_or_below",
        lambda self, path, salt, depth: find(self, path, salt, depth + (depth == len(path) - 1)),
    )


def free_at_once(patch: Any) -> None:
    def faulty(self: Oracle, lease: Lease, *, keep: str = "all", discard: bool = False) -> None:
        lease.closed = True
        self.leases.remove(lease)
        self.booked = [x for x in self.booked if x not in lease.open]
        self._let_go(lease)

    patch.setattr(Oracle, "close", faulty)


def keep_bookings_of_the_closed(patch: Any) -> None:
    let_go = Oracle._let_go

    def faulty(self: Oracle, lease: Lease) -> None:
        self.booked += [opened for opened in lease.open if opened.number is None]
        let_go(self, lease)

    patch.setattr(Oracle, "_let_go", faulty)


def no_read_pin(patch: Any) -> None:
    patch.setattr(Store, "pin", lambda self, checkpoint, by: None)


def write_over_the_boundary(patch: Any) -> None:
    """The next step is launched ahead as if no boundary stood at the end of the one before."""
    patch.setattr(Oracle, "_go_on", lambda self, lease, before: None)


def go_on_without_the_state(patch: Any) -> None:
    """The next step writes another slot, and nothing copies the state there."""
    go_on = Oracle._go_on

    def faulty(self: Oracle, lease: Lease, before: OpenStep) -> None:
        go_on(self, lease, before)
        lease.fresh = False

    patch.setattr(Oracle, "_go_on", faulty)


def free_a_duplicate_that_is_read(patch: Any) -> None:
    to_publish = Oracle._to_publish

    def faulty(self: Oracle, lease: Lease, opened: OpenStep) -> Any:
        found = to_publish(self, lease, opened)
        if lease.left_behind is not None:
            self.arena.free_slot(lease.left_behind)
            lease.left_behind = None
        return found

    patch.setattr(Oracle, "_to_publish", faulty)


def resume_in_the_shared_page(patch: Any) -> None:
    """Who resumes inside a page takes no copy of it."""
    open_lease = Oracle._open

    def faulty(self: Oracle, *arguments: Any) -> Lease:
        lease = open_lease(self, *arguments)
        lease.copy_from = None
        return lease

    patch.setattr(Oracle, "_open", faulty)


def zero_the_shared_page(patch: Any) -> None:
    """A tail that its writer still holds counts as a page that was never written."""
    count = Store.count

    def faulty(self: Store, page: int) -> None:
        count(self, page)
        self.arena.dirty |= {page} & self.held

    patch.setattr(Store, "count", faulty)


def reversed_rows(patch: Any) -> None:
    """A boundary inside the accepted run, and the live state, come from another row."""
    keep = Oracle._keep

    def faulty(self: Oracle, lease: Lease, opened: OpenStep, tokens: Any) -> None:
        opened.step = opened.step._replace(write_slots=opened.step.write_slots[::-1])
        keep(self, lease, opened, tokens)

    patch.setattr(Oracle, "_keep", faulty)


def rows_freed_while_named(patch: Any) -> None:
    """Rows of a void step are free although the plan of the step behind copies from them."""

    def faulty(self: Oracle, lease: Lease, opened: OpenStep) -> None:
        for slot in opened.step.write_slots:
            self.arena.free_slot(slot)
        if lease.open:
            lease.open[0].void = True
        else:
            lease.computed = lease.committed

    patch.setattr(Oracle, "_keep_none", faulty)


def void_releases_the_read_pin(patch: Any) -> None:
    keep_none = Oracle._keep_none

    def faulty(self: Oracle, lease: Lease, opened: OpenStep) -> None:
        keep_none(self, lease, opened)
        self._release_read(lease)

    patch.setattr(Oracle, "_keep_none", faulty)


def unwritten_slot_after_a_duplicate(patch: Any) -> None:
    """What was read before an open verify step is left behind as before an ordinary one."""

    def faulty(self: Oracle, lease: Lease, slot: int) -> None:
        lease.left_behind = slot
        lease.fresh = lease.fresh and not lease.open[0].rows

    patch.setattr(Oracle, "_leave_behind", faulty)


def pages_for_the_lowest_begin(patch: Any) -> None:
    """A step that may begin later gets no page for that."""
    begins = Oracle._begins
    patch.setattr(
        Oracle,
        "pages_for",
        lambda self, lease, n, rows: self._pages_up_to(lease, begins(self, lease)[0] + n),
    )


def page_whole_too_early(patch: Any) -> None:
    """The entry of the draft layer that depends on the next token counts as known."""
    patch.setattr(Store, "whole", lambda self, depth: depth // self.page_size)
    patch.setattr(Store, "whole_at", lambda self, pages: pages * self.page_size)


def salts_are_one(patch: Any) -> None:
    patch.setattr(
        Store, "supports", lambda self, salt: (path for _, path in (*self.checkpoints, *self.anchors))
    )


def unlearned(pick: Any) -> Config:
    """The faults are none of the learned policy's: its worths would only make each walk slower."""
    config = draw_config(pick)
    learns = config.options["policy"] == "default"
    return replace(config, options=config.options | {"policy": "supersede"}) if learns else config


def walk_until_seen(seeds: int) -> None:
    for seed in range(seeds):
        random_walk(seed, 200)


@pytest.mark.parametrize(
    "fault",
    [
        forget_dirty,
        match_the_whole_prompt,
        free_at_once,
        keep_bookings_of_the_closed,
        no_read_pin,
        write_over_the_boundary,
        go_on_without_the_state,
        free_a_duplicate_that_is_read,
        resume_in_the_shared_page,
        zero_the_shared_page,
        reversed_rows,
        rows_freed_while_named,
        void_releases_the_read_pin,
        unwritten_slot_after_a_duplicate,
        pages_for_the_lowest_begin,
        page_whole_too_early,
        salts_are_one,
    ],
)
def test_a_faulty_design_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    monkeypatch.setattr("tests.actions.draw_config", unlearned)
    with pytest.raises(AssertionError):
        walk_until_seen(400)
