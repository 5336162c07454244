"""Overlap: an engine that launches a step before it commits the one before."""

from __future__ import annotations

import pytest

from hybridcache.errors import StateError
from tests.conftest import Driver, tokens


@pytest.fixture
def ahead() -> Driver:
    return Driver(run_ahead=1)


def test_a_boundary_that_the_next_step_starts_from_is_left_alone(ahead: Driver) -> None:
    prompt = tokens(12)
    lease = ahead.cache.reserve(prompt, max_new_tokens=8)
    assert lease is not None
    first = lease.launch(12)
    ahead.apply()
    second = lease.launch(12)  # before the first is committed
    assert first is not None and second is not None
    assert first.end == 4  # the cut before the end of the prompt
    assert second.read_slot == first.write_slot != second.write_slot
    plan = ahead.apply()
    assert plan.copy_slots.tolist() == [[first.write_slot, second.write_slot]]
    lease.commit()
    ahead.cache.check()
    assert ahead.cache.match([*prompt[:4], 9]).length == 4
    third = lease.launch(1)
    ahead.apply()
    lease.commit()  # the prompt's end, from which the third step has gone on
    assert third is not None and third.read_slot == second.write_slot != third.write_slot
    lease.commit([7])
    lease.close()
    ahead.cache.check()
    assert [ahead.cache.match([*prompt, 7, 8]).length, ahead.cache.match([*prompt, 8]).length] == [13, 12]


def test_decode_in_overlap_moves_no_state_and_ends_at_the_token_that_was_read_last(ahead: Driver) -> None:
    prompt = tokens(12).tolist()
    lease = ahead.cache.reserve(prompt)
    assert lease is not None
    ahead.prefill(lease)
    assert lease.launch(1) is not None
    ahead.apply()
    for token in range(20):
        step = lease.launch(1)
        plan = ahead.apply()
        assert step is not None and step.read_slot == step.write_slot
        assert not plan.copy_slots.size and not plan.zero_slots.size
        lease.commit([token])
        ahead.cache.check()
    lease.commit([20])  # the stop token: the step in flight has read it
    lease.close()
    assert ahead.cache.match([*prompt, *range(21), 5]).length == len(prompt) + 21


def test_a_cancelled_lease_rests_until_the_step_in_flight_is_past(ahead: Driver) -> None:
    other = ahead.cache.reserve(tokens(8, seed=1))
    lease = ahead.cache.reserve(tokens(9))
    assert lease is not None and other is not None
    lease.launch(9), other.launch(8)
    ahead.apply()
    taken = ahead.cache.stats()["taken_pages"]
    lease.close()
    stats = ahead.cache.stats()
    assert (stats["resting_leases"], stats["taken_pages"]) == (1, taken)
    other.launch(1)
    plan = ahead.cache.plan()
    assert ahead.cache.stats()["resting_leases"] == 1
    ahead.cache.applied(plan)  # the engine has the results of the plan before
    assert ahead.cache.stats()["resting_leases"] == 0
    ahead.cache.check()


def test_an_idle_engine_ends_all_resting(ahead: Driver) -> None:
    other = ahead.cache.reserve(tokens(8, seed=1))
    lease = ahead.cache.reserve(tokens(9))
    assert lease is not None and other is not None
    lease.launch(9), other.launch(8)
    ahead.apply()
    lease.close()
    assert ahead.cache.stats()["resting_leases"] == 1
    other.commit()
    assert ahead.cache.stats()["resting_leases"] == 0
    other.close()
    ahead.cache.clear()
    assert ahead.cache.stats()["taken_pages"] == ahead.cache.stats()["taken_slots"] == 0


def test_the_order_of_calls(ahead: Driver) -> None:
    lease = ahead.cache.reserve(tokens(40))
    assert lease is not None
    lease.launch(4)
    with pytest.raises(StateError, match="no plan has collected the last step"):
        lease.launch(4)
    one = ahead.cache.plan()
    lease.launch(4)
    two = ahead.cache.plan()
    with pytest.raises(StateError, match="has 2 steps that are not committed, expected at most 1"):
        lease.launch(4)
    with pytest.raises(StateError, match="plan: number 1 is pending"):
        ahead.cache.plan()
    with pytest.raises(StateError, match="number 2, expected 1 first: plans are applied in order"):
        ahead.cache.applied(two)
    ahead.cache.applied(one)
    lease.commit()
    with pytest.raises(StateError, match="the plan 2 of lease 1 is not applied"):
        lease.commit()
    ahead.cache.applied(two)
    ahead.cache.applied(one)
    lease.commit()
    assert lease.committed == 8


def test_a_duplicate_that_the_next_step_reads_is_left_behind_until_that_step_is_committed(
    ahead: Driver,
) -> None:
    prompt = tokens(12).tolist()
    lease = ahead.cache.reserve(prompt, max_new_tokens=4)
    assert lease is not None
    lease.launch(4)
    ahead.apply()
    lease.commit()
    step = lease.launch(8)
    ahead.apply()
    rival = Driver.turn(ahead, prompt)  # another request publishes the end of the same prompt first
    assert rival.closed
    after = lease.launch(1)
    assert step is not None and after is not None and after.read_slot == step.write_slot
    ahead.apply()
    lease.commit()
    ahead.cache.check()
    assert ahead.cache.stats()["duplicate_checkpoints"] >= 1
    slots = ahead.cache.stats()["taken_slots"]
    lease.commit([5])
    assert ahead.cache.stats()["taken_slots"] == slots - 1
    lease.close()
    ahead.cache.check()
