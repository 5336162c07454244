"""Speculative decoding: verify steps and their rows, boundaries inside what was accepted, draft layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hybridcache.cache import Lease, Step
from hybridcache.errors import StateError
from tests.conftest import Driver, tokens

PROMPT = tokens(12).tolist()
OUTPUT = list(range(100, 120))


def decoding(driver: Driver, **options: Any) -> Lease:
    """A lease that has read its prompt."""
    lease = driver.cache.reserve(PROMPT, **options)
    assert lease is not None
    driver.prefill(lease)
    return lease


def launched(lease: Lease, count: int, rows: int | None = None) -> Step:
    step = lease.launch(count, rows=rows)
    assert step is not None
    return step


def taken_slots(driver: Driver) -> int:
    return driver.cache.stats()["taken_slots"]


@pytest.mark.parametrize("accepted", range(1, 5))
def test_the_row_of_the_last_accepted_token_is_the_live_slot(accepted: int) -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver)
    driver.decode(lease, OUTPUT[:1])
    before = taken_slots(driver)
    step = launched(lease, 4)
    assert (step.begin, step.end) == (13, 17)
    assert step.read_slots == [lease.live_slot] and step.begin_max == step.begin_min == 13
    assert len({*step.write_slots, *step.read_slots}) == 5
    plan = driver.apply()
    assert not plan.copy_slots.size and not plan.zero_slots.size  # an index moves, no state does
    lease.commit(OUTPUT[1 : 1 + accepted])
    driver.cache.check()
    assert lease.live_slot == step.write_slots[accepted - 1]
    assert lease.committed == lease.computed == 13 + accepted
    assert taken_slots(driver) == before
    lease.close()
    known = [*PROMPT, *OUTPUT[: 1 + accepted]]
    assert driver.cache.match([*known, 5]).length == len(known)
    assert driver.cache.match([*PROMPT, *OUTPUT]).kv_length == len(known)  # no draft enters the tree (I4)


@pytest.mark.parametrize("accepted", range(1, 9))
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_boundary_inside_the_accepted_run_is_published_from_its_own_row(
    accepted: int, run_ahead: int
) -> None:
    driver = Driver(draft_tokens=7, run_ahead=run_ahead, slabs=40)
    lease = decoding(driver, breakpoints=[13, 15, 16, 20], max_new_tokens=20)
    step = launched(lease, 8)
    driver.apply()
    lease.commit(OUTPUT[:accepted])
    driver.cache.check()
    dump = driver.cache.dump()
    for wanted in (13, 15, 16, 20):
        found = driver.cache.match([*PROMPT, *OUTPUT[: wanted - 12], 5]).length
        assert (found == wanted) == (wanted <= 12 + accepted)
        if wanted <= 12 + accepted:
            assert f"* breakpoint slot {step.write_slots[wanted - 13]} " in dump
    assert driver.cache.stats()["dropped_checkpoints"] == 0


def test_a_boundary_needs_no_memory_that_the_step_does_not_have() -> None:
    driver = Driver(draft_tokens=3, num_pages=8, num_slots=6)
    lease = decoding(driver, breakpoints=[13, 14, 15, 16], max_new_tokens=8)  # two slots: prompt end, live
    step = launched(lease, 4)
    assert taken_slots(driver) == 6  # all there are
    driver.apply()
    lease.commit(OUTPUT[:4])
    driver.cache.check()
    stats = driver.cache.stats()
    assert (stats["published_breakpoint"], stats["dropped_checkpoints"]) == (4, 0)
    following = launched(lease, 1)  # from the last of them, on the slot that was the live one
    assert following.read_slot == step.write_slots[-1] and following.write_slot == lease.live_slot
    assert driver.apply().copy_slots.tolist() == [[following.read_slot, following.write_slot]]


def test_an_engine_that_updates_in_place_verifies_on_one_row_and_replays() -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver)
    driver.decode(lease, OUTPUT[:1])
    live = lease.live_slot
    step = launched(lease, 4, rows=1)
    assert step.write_slots == [step.write_slot] and step.write_slot != live
    assert driver.apply().copy_slots.tolist() == [[live, step.write_slot]]
    lease.commit(())  # two of the four stay: they are read again
    assert (lease.committed, lease.computed, lease.live_slot) == (13, 13, live)
    replay = launched(lease, 2, rows=0)
    assert (replay.begin, replay.end, replay.read_slot, replay.write_slot) == (13, 15, live, live)
    assert not driver.apply().copy_slots.size
    lease.commit(OUTPUT[1:3])
    all_stay = launched(lease, 4, rows=1)
    driver.apply()
    lease.commit(OUTPUT[3:7])  # the row is the state: nothing is read twice
    driver.cache.check()
    assert lease.live_slot == all_stay.write_slot and lease.committed == 19


def test_a_boundary_that_no_row_covers_ends_the_step() -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver, breakpoints=[14, 15], max_new_tokens=8)
    assert launched(lease, 4, rows=1).end == 14
    driver.apply()
    lease.commit(())
    step = launched(lease, 4, rows=2)  # rows at 15 and 16 would leave 14 out
    assert step.end == 14 and len(step.write_slots) == 2
    driver.apply()
    lease.commit(OUTPUT[:2])
    driver.cache.check()
    assert driver.cache.match([*PROMPT, *OUTPUT[:2], 5]).length == 14


def test_a_boundary_that_the_tree_has_already_needs_no_row() -> None:
    driver = Driver(draft_tokens=3)
    leases = [decoding(driver, breakpoints=[14, 16], max_new_tokens=8) for _ in range(2)]
    for lease in leases:
        step = launched(lease, 4)
        driver.apply()
        lease.commit(OUTPUT[:4])
        driver.cache.check()
    stats = driver.cache.stats()
    assert (stats["published_breakpoint"], stats["duplicate_checkpoints"]) == (2, 3)  # 14, 16; prompt end
    assert leases[1].live_slot == step.write_slots[-1]  # 16 is known: its row is just the live slot


def test_no_room_for_rows_is_a_value_and_one_token_still_goes() -> None:
    driver = Driver(draft_tokens=3, num_pages=8, num_slots=4)
    lease = decoding(driver)
    pin = driver.cache.pin(PROMPT)
    assert pin is not None
    before = driver.cache.digest, taken_slots(driver)
    assert lease.launch(4) is None
    assert (driver.cache.digest, taken_slots(driver)) == before
    assert lease.launch(1) is not None
    driver.apply()
    lease.commit(OUTPUT[:1])
    pin.release()
    assert lease.launch(3) is not None  # three rows beside the live slot: the pinned checkpoint has left


def test_rows_of_a_batch() -> None:
    driver = Driver(draft_tokens=3)
    leases = [decoding(driver) for _ in range(3)]
    steps = driver.cache.launch(leases, [4, 1, 3], rows=[None, None, 1])
    assert steps.end.tolist() == [16, 13, 15] and steps.begin_max.tolist() == [12, 12, 12]
    assert (steps.rows[0] >= 0).all() and (steps.rows[1:, 1:] == -1).all()
    assert steps.rows[1, 0] == steps.write_slots[1] and steps.rows[2, 0] == steps.write_slots[2]
    assert steps.candidates[:, 0].tolist() == steps.read_slots.tolist()
    assert (steps.candidates[:, 1:] == -1).all()
    driver.apply()
    flat = np.array([*OUTPUT[:2], OUTPUT[0]], dtype=np.int32)
    with pytest.raises(ValueError, match="counts: none, expected one for each lease"):
        driver.cache.commit(leases, flat)
    with pytest.raises(ValueError, match="tokens: 2 given, expected 0, or 3 to 3 for lease 3"):
        driver.cache.commit(leases, [*flat, 7, 7], [2, 1, 2])
    with pytest.raises(ValueError, match="counts: 2 given, expected one for each of 3 leases"):
        driver.cache.commit(leases, flat, [2, 1])
    driver.cache.commit(leases, flat, [2, 1, 0])
    driver.cache.check()
    assert [lease.committed for lease in leases] == [14, 13, 12]


# ---- overlap


def test_where_the_next_step_begins_is_known_on_the_device_only() -> None:
    driver = Driver(draft_tokens=3, run_ahead=1)
    lease = decoding(driver)
    first = launched(lease, 4)
    driver.apply()
    second = launched(lease, 3)
    assert (second.begin_min, second.begin_max, second.end) == (13, 16, 16)
    assert second.read_slots == first.write_slots
    assert not set(second.write_slots) & set(first.write_slots)  # rows are double-buffered
    assert not driver.apply().copy_slots.size
    lease.commit(OUTPUT[:2])
    driver.cache.check()
    assert lease.live_slot == first.write_slots[1] == second.read_slots[14 - second.begin]
    assert (lease.committed, lease.computed) == (14, 17)
    third = launched(lease, 2)
    assert (third.begin_min, third.begin_max, third.read_slots) == (15, 17, second.write_slots)
    driver.apply()
    lease.commit(OUTPUT[2:5])
    driver.cache.check()
    lease.commit(OUTPUT[5:6])
    lease.close()
    driver.cache.check()
    assert driver.cache.match([*PROMPT, *OUTPUT]).length == 18


@pytest.mark.parametrize("stays", [0, 1, 2])
def test_who_stops_short_of_what_the_device_accepted_drops_the_step_behind(stays: int) -> None:
    driver = Driver(draft_tokens=3, run_ahead=1)
    lease = decoding(driver)
    before = taken_slots(driver)
    launched(lease, 4)
    driver.apply()
    launched(lease, 4)
    driver.apply()
    lease.commit(OUTPUT[:stays])  # the stop token is the last of these; the device went on with more
    driver.cache.check()
    if stays == 0:
        with pytest.raises(ValueError, match="expected 0 for lease 1: nothing stayed of the step before"):
            lease.commit(OUTPUT[:1])
        with pytest.raises(StateError, match="reads what did not stay"):
            lease.launch(1)
    lease.commit(())
    driver.cache.check()
    assert lease.committed == lease.computed == 12 + stays
    assert taken_slots(driver) == before
    lease.close()
    driver.cache.check()
    assert driver.cache.match([*PROMPT, *OUTPUT]).length == 12 + stays


def test_a_single_row_that_did_not_stay_rests_until_the_plan_that_copies_it_is_past() -> None:
    driver = Driver(draft_tokens=3, run_ahead=1)
    lease = decoding(driver)
    first = launched(lease, 4, rows=1)
    driver.apply()
    second = launched(lease, 4, rows=1)  # as if all four stayed
    assert second.begin == second.begin_max == 16 and second.read_slots == [first.write_slot]
    plan = driver.cache.plan()
    assert plan.copy_slots.tolist() == [[first.write_slot, second.write_slot]]
    lease.commit(())  # none stays, while the plan that copies the row is pending
    driver.cache.check()
    others = [driver.cache.reserve(tokens(4, seed)) for seed in range(8)]
    assert first.write_slot not in {each.live_slot for each in others if each is not None}
    driver.cache.applied(plan)
    lease.commit(())
    driver.cache.check()


def test_drafts_behind_a_boundary_read_it_and_leave_the_new_live_slot_alone() -> None:
    driver = Driver(draft_tokens=3, run_ahead=1)
    lease = driver.cache.reserve(PROMPT, breakpoints=[12])
    assert lease is not None
    prompt_end = launched(lease, 12)
    assert prompt_end.end == 4  # the cut before the end
    driver.apply()
    lease.commit()
    prompt_end = launched(lease, 12)
    driver.apply()
    drafts = launched(lease, 4)
    assert drafts.read_slot == prompt_end.write_slot and lease.live_slot not in drafts.write_slots
    driver.apply()
    lease.commit()
    driver.cache.check()
    assert driver.cache.match([*PROMPT, 5]).length == 12
    lease.commit(OUTPUT[:3])
    driver.cache.check()
    assert lease.live_slot == drafts.write_slots[2]


@pytest.mark.parametrize("applied", [False, True])
def test_a_cancelled_verify_step_rests(applied: bool) -> None:
    driver = Driver(draft_tokens=3, run_ahead=1)
    lease, other = decoding(driver), decoding(driver)
    rows = launched(lease, 4).write_slots
    launched(other, 1)
    plan = driver.cache.plan()
    if applied:
        driver.cache.applied(plan)
    lease.close()
    driver.cache.check()
    taken = launched_elsewhere(driver)
    assert not taken & set(rows)  # I10
    if not applied:
        driver.cache.applied(plan)
    other.commit(OUTPUT[:1])
    driver.cache.check()
    assert driver.cache.stats()["resting_leases"] == 0  # nothing is in flight


def launched_elsewhere(driver: Driver) -> set[int]:
    fresh = [driver.cache.reserve(tokens(4, seed)) for seed in range(1, 9)]
    slots = {each.live_slot for each in fresh if each is not None}
    for each in fresh:
        if each is not None:
            each.close()
    return slots


# ---- want


def test_a_boundary_that_shows_only_in_the_tokens() -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver)
    step = launched(lease, 4)
    driver.apply()
    lease.want(14)  # the second token turned out to end a tool call
    lease.commit(OUTPUT[:4])
    driver.cache.check()
    assert driver.cache.match([*PROMPT, *OUTPUT[:2], 5]).length == 14
    assert f"* breakpoint slot {step.write_slots[1]} " in driver.cache.dump()
    lease.want(17)
    driver.decode(lease, OUTPUT[4:6])
    assert driver.cache.match([*PROMPT, *OUTPUT[:5], 5]).length == 17


def test_a_boundary_wanted_at_the_end_of_the_step_in_flight() -> None:
    driver = Driver(run_ahead=1)
    lease = decoding(driver)
    launched(lease, 1)
    driver.apply()
    lease.want(13)  # the token that it reads is known now
    second = launched(lease, 1)
    assert second.read_slot != second.write_slot
    driver.apply()
    lease.commit(OUTPUT[:1])
    driver.cache.check()
    assert driver.cache.match([*PROMPT, *OUTPUT]).length == 13
    with pytest.raises(ValueError, match=r"position: 13, expected one beyond 14"):
        lease.want(13)


@pytest.mark.parametrize("position", [-1, 0, 12, 13, 14])
def test_a_boundary_is_wanted_too_late(position: int) -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver)
    launched(lease, 4, rows=2)  # states after 15 and 16 tokens
    before = driver.cache.digest
    with pytest.raises(ValueError, match=f"position: {position}, expected one beyond 16"):
        lease.want(position)
    assert driver.cache.digest == before
    lease.want(15)
    lease.want(17)


# ---- draft layers: the last entry before a boundary depends on the token behind it


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
def test_a_page_is_whole_one_token_later(length: int) -> None:
    driver = Driver(lookahead=1, slabs=24)
    prompt = tokens(length).tolist()
    lease = driver.cache.reserve(prompt, max_new_tokens=4)
    assert lease is not None
    driver.prefill(lease)
    table = lease.pages.tolist()
    second = driver.cache.reserve([*prompt, 7], max_new_tokens=4)
    assert second is not None and second.start == length
    whole = (length - 1) // 4
    assert second.pages.tolist()[:whole] == table[:whole]
    assert not set(second.pages.tolist()[whole:]) & set(table)
    assert second.launch(1) is not None
    copied = driver.apply().copy_pages.tolist()
    assert copied == [
        [table[whole], second.pages[whole]]
    ]  # at a page edge too: its last entry is provisional
    driver.cache.check()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda lease: lease.launch(4, rows=5), ValueError, "rows: 5 .* expected 0 to 4"),
        (lambda lease: lease.launch(9, rows=5), ValueError, "rows: 5 .* expected 0 to 4"),
        (lambda lease: lease.launch(2, rows=3), ValueError, "rows: 3 .* expected 0 to 2"),
        (lambda lease: lease.launch(2, rows=-1), ValueError, "rows: -1, expected 0 <= rows"),
        (lambda lease: lease.launch(2, rows="2"), TypeError, "rows: '2', expected an integer"),
        (lambda lease: lease.want(1.5), TypeError, "position: 1.5, expected an integer"),
        (lambda lease: lease.want(2**41), ValueError, "position: 2199023255552, expected"),
    ],
)
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    driver = Driver(draft_tokens=3)
    lease = decoding(driver)
    before = driver.cache.dump(), driver.cache.digest, driver.cache.stats()
    with pytest.raises(error, match=message):
        call(lease)
    assert (driver.cache.dump(), driver.cache.digest, driver.cache.stats()) == before


def test_rows_inside_the_prompt_or_without_drafts() -> None:
    driver = Driver(draft_tokens=3)
    lease = driver.cache.reserve(PROMPT)
    assert lease is not None
    with pytest.raises(ValueError, match=r"rows: 1 .* expected 0 inside the prompt"):
        lease.launch(4, rows=1)
    plain = decoding(Driver())
    with pytest.raises(ValueError, match=r"rows: 1 .* expected 0 to 0"):
        plain.launch(1, rows=1)
    assert len(launched(plain, 2).write_slots) == 1  # without drafts all tokens are certain


@pytest.mark.parametrize(("name", "value"), [("draft_tokens", 8), ("draft_tokens", -1), ("lookahead", 2)])
def test_options(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: {value}, expected 0 <= "):
        Driver(**{name: value})


def test_a_boundary_wanted_at_the_open_end_replaces_what_a_spare_one_may_not() -> None:
    driver = Driver(num_pages=200, num_slots=30)
    for seed in range(24):  # prompt ends that nobody comes back to are soon made in free slots only
        driver.turn(tokens(6, seed), [1])
    for wanted in (False, True):
        prompt = tokens(6, 100 + wanted).tolist()
        lease = driver.cache.reserve(prompt)
        assert lease is not None
        assert launched(lease, 6).end == 6 and taken_slots(driver) == 30
        driver.apply()
        if wanted:
            lease.want(6)
        lease.commit()
        driver.cache.check()
        assert driver.cache.match([*prompt, 5]).length == (6 if wanted else 0)
        lease.close(keep="nothing")
