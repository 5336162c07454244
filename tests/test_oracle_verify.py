"""Small cases of the oracle's verify steps and `want`, worked out by hand from docs/design.md.

In the arenas here a slab is one page or one slot, so ids count up: a prompt of 5 tokens takes slot 0 and
pages from 1 on. Its end becomes a checkpoint in slot 0, and the lowest free slab the next live slot, fresh.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import Flight, Harness
from tests.oracle_types import Step, Wanted
from tests.test_oracle import (
    advance,
    ahead,
    commit,
    conversation,
    depths,
    harness,
    kinds,
    opened,
    ordinary,
    prefill,
)

PROMPT = [1, 2, 3, 4, 5]
DRAFT = (6, 7, 8, 9, 10, 11, 12, 13)


def decoding(max_new: int = 11, breakpoints: tuple[int, ...] = (), **options: Any) -> tuple[Harness, Flight]:
    """A request that has read its prompt: slot 0 is the checkpoint at 5, the live slot is fresh."""
    h = harness(page_size=4, per_slab=1, **{"draft_tokens": 3, **options})
    flight = opened(h, PROMPT, breakpoints, max_new)
    prefill(h, flight)
    assert kinds(h) == {5: "prompt_end"} and flight.oracle.fresh and flight.oracle.read.slot == 0
    return h, flight


def draft(h: Harness, flight: Flight, n: int, rows: int | None = None, stay: int = 99) -> Step:
    """Launches, plans, applies and runs a step of drafts, and leaves it open."""
    h.launch(flight, n, DRAFT, rows, stay)
    h.plan()
    h.apply()
    while flight.next_to_run is not None:
        h.run(flight)
    h.verify()
    return flight.oracle.open[-1].step


def keep(h: Harness, flight: Flight, m: int) -> None:
    h.commit([flight], batch=False, keep=m)
    h.verify()


def state(flight: Flight) -> tuple[int, int, int, bool]:
    lease = flight.oracle
    return lease.committed, lease.computed, lease.live_slot, lease.fresh


# ---- which step is one


def test_the_default_is_a_row_for_each_token_of_a_step_that_can_be_drafts() -> None:
    h = harness(draft_tokens=3)
    flight = opened(h, PROMPT, max_new=8)
    rows, lease = h.oracle.rows_of, flight.oracle
    assert rows(lease, 3, None) == 0, "begin < L"
    prefill(h, flight)
    assert [rows(lease, n, None) for n in range(1, 6)] == [0, 2, 3, 4, 0]
    assert [rows(lease, 6, r) for r in (0, 1, 4)] == [0, 1, 4]
    assert rows(lease, 1, 1) == 1


@pytest.mark.parametrize(
    ("drafts", "prefilled", "n", "rows"),
    [(0, True, 2, 1), (3, False, 5, 1), (3, True, 2, 3), (3, True, 6, 5), (3, True, 2, -1)],
)
def test_rows_that_a_step_cannot_have(drafts: int, prefilled: bool, n: int, rows: int) -> None:
    h = harness(draft_tokens=drafts)
    flight = opened(h, PROMPT, max_new=8)
    if prefilled:
        prefill(h, flight)
    before = h.oracle.dump()
    with pytest.raises(ValueError, match="rows"):
        h.oracle.launch(flight.oracle, n, rows)
    assert h.oracle.dump() == before


# ---- rows and counts


def test_an_index_moves_and_no_state_does() -> None:
    h, flight = decoding()
    assert flight.oracle.pages == [1, 2, 3, 4] and state(flight) == (5, 5, 5, True)
    h.launch(flight, 3, DRAFT, None, 2)
    assert flight.oracle.open[0].step == Step(5, 8, 0, 8, [], 5, [0], [6, 7, 8])
    h.plan()
    assert h.pending[0][0] == (2, [], [], [], []), "its kernels read the slot that they are told"
    h.apply()
    h.run(flight)
    assert state(flight) == (5, 8, 5, True), "fresh stays as it is"
    keep(h, flight, 2)
    assert state(flight) == (7, 7, 7, False), "row 7 holds the state after 5 + 2 tokens"
    assert h.oracle.arena.slots == {0, 7} and flight.oracle.tokens == [*PROMPT, 6, 7]
    assert h.oracle.store.checkpoints[b"", tuple(PROMPT)].pins == 0, "the read pin is released"
    h.launch(flight, 4, DRAFT)
    assert flight.oracle.open[0].step == Step(7, 11, 7, 9, [], 7, [7], [5, 6, 8, 9])


def test_fewer_rows_than_tokens_hold_the_states_after_the_last_ones() -> None:
    h, flight = decoding()
    assert draft(h, flight, 4, rows=2) == Step(5, 9, 0, 7, [], 5, [0], [6, 7])
    for m in (1, 2, 5):
        h.commit_wrong(flight, m)
    keep(h, flight, 3)
    assert state(flight) == (8, 8, 6, False), "row 6 is that after 8 tokens"


def test_with_one_row_the_plan_copies_the_state_there_and_all_or_nothing_stays() -> None:
    h, flight = decoding()
    h.launch(flight, 3, DRAFT, 1, 2)
    assert flight.oracle.open[0].step == Step(5, 8, 0, 6, [], 5, [0], [6])
    h.plan()
    assert h.pending[0][0] == (2, [(0, 6)], [], [], [])
    h.apply()
    h.run(flight)
    for m in (1, 2):
        h.commit_wrong(flight, m)
    keep(h, flight, 0)
    checkpoint = h.oracle.store.checkpoints[b"", tuple(PROMPT)]
    assert state(flight) == (5, 5, 5, True) and checkpoint.pins == 1 and h.oracle.arena.slots == {0, 5}
    h.launch(flight, 2, DRAFT, 0)
    assert flight.oracle.open[0].step == ordinary(5, 7, 0, 5), "it reads the tokens that stay again"
    h.plan()
    assert h.pending[0][0] == (3, [(0, 5)], [], [], [])
    h.apply()
    h.run(flight)
    commit(h, flight)
    assert draft(h, flight, 3, rows=1) == Step(7, 10, 5, 6, [], 7, [5], [6])
    keep(h, flight, 3)
    assert state(flight) == (10, 10, 6, False) and h.oracle.arena.slots == {0, 6}


def test_what_was_drafted_and_not_accepted_is_nowhere() -> None:
    h, flight = decoding()
    draft(h, flight, 4, stay=2)
    keep(h, flight, 2)
    advance(h, flight, 1, (1,))
    h.close(flight, "all", False)
    h.verify()
    assert h.oracle.match([*PROMPT, 6, 7, 8, 9, 9])[:2] == (5, 7)
    assert h.oracle.match([*PROMPT, 6, 7, 1, 9])[:2] == (8, 8) and kinds(h)[8] == "turn_end"


# ---- boundaries


def test_a_boundary_inside_the_accepted_run_is_its_own_row() -> None:
    h, flight = decoding(breakpoints=(7,))
    assert draft(h, flight, 4).write_slots == [6, 7, 8, 9]
    keep(h, flight, 4)
    checkpoint = h.oracle.store.checkpoints[b"", (*PROMPT, 6, 7)]
    assert (checkpoint.slot, checkpoint.kind, checkpoint.pins) == (7, "breakpoint", 0)
    assert checkpoint.tail == flight.oracle.pages[1], "of page number 1, whole at 8"
    assert h.oracle.store.pages[b"", (*PROMPT, 6, 7, 8)] == checkpoint.tail
    assert state(flight) == (9, 9, 9, False) and flight.oracle.boundary == 7
    assert h.oracle.arena.slots == {0, 7, 9}
    assert h.oracle.store.checkpoints[b"", tuple(PROMPT)].superseded


def test_a_boundary_at_the_end_of_the_accepted_run_needs_no_slot() -> None:
    h, flight = decoding(max_new=3, breakpoints=(7,), slabs=6)
    assert h.oracle.arena.satisfied(2, 0) and not h.oracle.arena.satisfied(3, 0)
    assert draft(h, flight, 2).write_slots == [4, 5] and flight.oracle.live_slot == 3
    keep(h, flight, 2)
    checkpoint = h.oracle.store.checkpoints[b"", (*PROMPT, 6, 7)]
    assert (checkpoint.slot, checkpoint.pins) == (5, 1)
    assert state(flight) == (7, 7, 3, True), "the live slot, which nobody needs any more, is the next one"
    assert h.oracle.counters["dropped_checkpoints"] == 0
    h.launch(flight, 1, (8,))
    assert flight.oracle.open[0].step == ordinary(7, 8, 5, 3)


def test_a_boundary_that_was_not_accepted_stays_wanted() -> None:
    h, flight = decoding(breakpoints=(7,))
    draft(h, flight, 3, stay=1)
    keep(h, flight, 1)
    assert depths(h) == [5]
    draft(h, flight, 3)
    keep(h, flight, 3)
    assert kinds(h) == {5: "prompt_end", 7: "breakpoint"} and flight.oracle.committed == 9


def test_rows_of_duplicates_are_not_needed() -> None:
    h = harness(page_size=4, per_slab=1, draft_tokens=3)
    one, two = (opened(h, PROMPT, (6, 7), 3) for _ in range(2))
    prefill(h, one)
    prefill(h, two)
    for flight in (one, two):
        draft(h, flight, 2)
    keep(h, one, 2)
    published = {c.slot for c in h.oracle.store.checkpoints.values()}
    rows = two.oracle.open[0].step.write_slots
    keep(h, two, 2)
    assert depths(h) == [5, 6, 7] and {c.slot for c in h.oracle.store.checkpoints.values()} == published
    assert state(two) == (7, 7, rows[1], False) and rows[0] not in h.oracle.arena.slots
    assert two.oracle.boundary == 0, "it has published nothing and restored nothing"


def test_a_wanted_position_that_no_row_covers_shortens_the_step() -> None:
    for n, rows, w, end, left in (
        (4, 1, 6, 6, 1),
        (4, 2, 7, 7, 2),
        (4, 2, 6, 6, 1),
        (4, 2, 8, 9, 2),
        (4, 4, 6, 9, 4),
    ):
        h, flight = decoding(breakpoints=(w,))
        step = draft(h, flight, n, rows)
        assert (step.begin, step.end, len(step.write_slots)) == (5, end, left), (n, rows, w)
        keep(h, flight, step.end - 5)
        assert kinds(h) == {5: "prompt_end", w: "breakpoint"} and h.oracle.counters["extra_passes"] == 0


def test_an_ordinary_step_beyond_the_prompt_ends_at_a_breakpoint_and_takes_pages_up_to_it() -> None:
    h, flight = decoding(max_new=3, breakpoints=(8,))
    assert advance(h, flight, 9, (6, 7, 8)) == ordinary(5, 8, 0, 3)
    assert flight.oracle.capacity == 8 and flight.oracle.extra_passes == 1
    assert kinds(h)[8] == "breakpoint"


# ---- room


def test_room_is_made_for_rows_and_pages_together_and_none_is_a_value() -> None:
    h, flight = decoding(max_new=3, slabs=5)
    before = (flight.oracle.live_slot, set(h.oracle.arena.slots), depths(h))
    assert before == (3, {0, 3}, [5]), "one slab is free, and the checkpoint is pinned"
    h.launch(flight, 2, DRAFT)
    assert not flight.steps and h.oracle.counters["refused_launches"] == 1
    assert before == (flight.oracle.live_slot, set(h.oracle.arena.slots), depths(h))
    assert draft(h, flight, 2, rows=1) == Step(5, 7, 0, 4, [], 5, [0], [4])
    keep(h, flight, 0)
    assert draft(h, flight, 1) == ordinary(5, 6, 0, 3), "an ordinary step of one token may still go"


def test_rows_are_taken_before_pages() -> None:
    h, flight = decoding(max_new=0)
    assert flight.oracle.pages == [1, 2] and flight.oracle.live_slot == 3
    step = draft(h, flight, 4)
    assert step.write_slots == [4, 5, 6, 7] and flight.oracle.pages == [1, 2, 8]


# ---- running ahead


def test_a_step_behind_a_verify_step_begins_in_a_range() -> None:
    h, flight = decoding(max_new=3, run_ahead=1)
    assert draft(h, flight, 3, stay=2).write_slots == [4, 5, 6] and flight.oracle.pages == [1, 2]
    for rows in (0, 3):
        h.launch(flight, 4, DRAFT, rows)
        assert len(flight.steps) == 1
    step = draft(h, flight, 4)
    assert step == Step(6, 10, 4, 10, [], 8, [4, 5, 6], [7, 8, 9, 10])
    assert flight.steps[1].begin == 7 and flight.steps[1].ran, "the device knows that two stay"
    assert flight.oracle.computed == 12 and flight.oracle.pages == [1, 2, 11], "pages up to begin_max + n"
    keep(h, flight, 2)
    assert flight.oracle.open[0].step[:2] == (7, 11) and flight.oracle.open[0].step.begin_max == 7
    assert state(flight) == (7, 11, 5, False)
    keep(h, flight, 3)
    assert state(flight) == (10, 10, 9, False) and h.oracle.arena.slots == {0, 9}


def test_behind_a_single_row_a_step_begins_where_that_ends() -> None:
    h, flight = decoding(run_ahead=1)
    draft(h, flight, 3, rows=1)
    h.launch(flight, 2, DRAFT, 1)
    assert flight.oracle.open[1].step == Step(8, 10, 6, 7, [], 8, [6], [7])
    h.plan()
    assert h.pending[0][0].copy_slots == [(6, 7)]
    h.apply()
    h.run(flight)
    keep(h, flight, 3)
    assert state(flight) == (8, 10, 6, False)
    keep(h, flight, 2)
    assert state(flight) == (10, 10, 7, False)


def test_rows_of_a_void_step_pass_to_the_one_behind_which_is_void_too() -> None:
    h, flight = decoding(run_ahead=1)
    draft(h, flight, 3, rows=1, stay=2)
    h.launch(flight, 2, DRAFT, 1)
    h.plan()
    keep(h, flight, 0)
    assert h.oracle.arena.slots == {0, 5, 6, 7}, "the pending plan copies from row 6"
    assert flight.oracle.computed == 10 and not h.oracle.may_launch(flight.oracle)
    h.apply()
    h.run(flight)
    h.commit_wrong(flight, 2)
    with pytest.raises(ValueError, match="position"):
        h.oracle.want(flight.oracle, 10)
    keep(h, flight, 0)
    assert h.oracle.arena.slots == {0, 5} and state(flight) == (5, 5, 5, True)
    assert advance(h, flight, 1, (6,)) == ordinary(5, 6, 0, 5)


def test_an_engine_may_stop_short_of_what_the_device_accepted() -> None:
    h, flight = decoding(run_ahead=1)
    draft(h, flight, 3)
    draft(h, flight, 2)
    assert flight.steps[1].begin == 8
    keep(h, flight, 1)
    assert flight.steps[0].void and flight.oracle.open[0].step[:2] == (6, 8)
    keep(h, flight, 0)
    assert state(flight) == (6, 6, 6, False) and h.oracle.arena.slots == {0, 6}
    assert advance(h, flight, 1, (9,)) == ordinary(6, 7, 6, 6)


def test_before_a_verify_step_a_lease_goes_on_into_a_slot_that_stays_unwritten() -> None:
    h = harness(page_size=4, per_slab=1, run_ahead=1, draft_tokens=3)
    flight = opened(h, PROMPT, max_new=3)
    assert ahead(h, flight, 5) == ordinary(0, 5, -1, 0)
    h.launch(flight, 2, DRAFT)
    assert flight.oracle.open[1].step == Step(5, 7, 0, 4, [], 5, [0], [3, 4])
    assert flight.oracle.open[0].gone_on and (flight.oracle.live_slot, flight.oracle.fresh) == (5, True)
    h.plan()
    assert h.pending[0][0] == (2, [], [], [], []), "nothing is copied to slot 5"
    h.apply()
    h.run(flight)
    commit(h, flight)
    assert kinds(h) == {5: "prompt_end"} and flight.oracle.read.slot == 0 and state(flight) == (5, 7, 5, True)
    keep(h, flight, 0)
    assert advance(h, flight, 1, (6,)) == ordinary(5, 6, 0, 5)


def test_nothing_is_left_behind_before_a_verify_step() -> None:
    h = harness(page_size=4, per_slab=1, run_ahead=1, draft_tokens=3)
    one, two = opened(h, PROMPT, max_new=3), opened(h, PROMPT, max_new=3)
    for flight in (one, two):
        ahead(h, flight, 5)
    read = two.oracle.live_slot
    draft(h, two, 2)
    unwritten = two.oracle.live_slot
    assert unwritten != read
    commit(h, one)
    commit(h, two)
    assert state(two) == (5, 7, read, False) and two.oracle.left_behind is None
    assert unwritten not in h.oracle.arena.slots
    keep(h, two, 2)
    assert read not in h.oracle.arena.slots and not two.oracle.fresh


def test_a_request_that_closes_over_two_verify_steps_rests_whole() -> None:
    h, flight = decoding(run_ahead=1)
    draft(h, flight, 3)
    h.launch(flight, 2, DRAFT)
    h.plan()
    slots = set(h.oracle.arena.slots)
    h.close(flight, "all", False)
    h.verify()
    assert h.oracle.arena.slots == slots == {0, 5, 6, 7, 8, 9, 10} and depths(h) == [5]
    h.run_ghost(h.ghosts[0])
    h.apply()
    h.verify()
    assert h.oracle.arena.slots == {0}, "nothing is in flight"


# ---- want


def test_want_takes_what_a_row_covers_and_what_lies_beyond() -> None:
    h, flight = decoding()
    draft(h, flight, 4, rows=2)
    for position in (4, 5, 6, 7):
        h.want(flight, position)
    assert h.events["want_refused"] == 4 and not flight.oracle.wanted
    for position in (8, 9, 10):
        h.want(flight, position)
    keep(h, flight, 4)
    assert kinds(h) == {5: "prompt_end", 8: "breakpoint", 9: "breakpoint"}
    assert state(flight) == (9, 9, 5, True), "the live slot from before is the next one"
    h.want(flight, 9)
    assert h.events["want_refused"] == 5, "no step is open"


def test_want_at_the_open_end_of_an_ordinary() -> None:
    h, flight = decoding()
    ahead(h, flight, 1, (6,))
    h.want(flight, 6)
    assert (flight.oracle.open[0].kind, flight.oracle.open[0].spare) == ("breakpoint", False)
    commit(h, flight)
    assert kinds(h) == {5: "prompt_end", 6: "breakpoint"}


def test_want_needs_to_know_where_the_step_begins() -> None:
    h, flight = decoding(run_ahead=1)
    draft(h, flight, 3, stay=1)
    draft(h, flight, 2)
    for position in (9, 10):
        h.want(flight, position)
    assert h.events["want_refused"] == 2, "the second step is not the oldest, and ends at 10 at most"
    keep(h, flight, 1)
    for position in (7, 8):
        h.want(flight, position)
    assert h.events["want_refused"] == 2, "it is [6, 8)"
    keep(h, flight, 2)
    assert depths(h) == [5, 7, 8]


def test_what_is_wanted_already_becomes_a_breakpoint() -> None:
    h = harness(page_size=4, pass_cost=2)
    conversation(h, [1, 2, 3, 4, 5, 6])
    flight = opened(h, [1, 2, 3, 4, 9, 9])
    assert flight.oracle.wanted == [Wanted(4, "fork")]
    h.want(flight, 4)
    assert flight.oracle.wanted == [Wanted(4, "breakpoint")]
