"""Where checkpoints go: each kind of boundary, what it costs, and what is learned of its use."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Driver, tokens


def published(driver: Driver) -> dict[str, int]:
    return {
        k.removeprefix("published_"): v
        for k, v in driver.cache.stats().items()
        if k.startswith("published_") and v
    }


@pytest.mark.parametrize("chunk", [1 << 20, 900, 256, 100])
def test_a_plain_agent_conversation_makes_no_extra_pass_and_computes_only_what_is_new(chunk: int) -> None:
    driver = Driver(page_size=64, pages_per_slab=4, slabs=400, pass_cost=512, interior_spacing=1024)
    prompt = tokens(5000).tolist()
    driver.turn(prompt, [1, 2, 3], chunk=1000)
    assert driver.extra_passes == 0
    for turn in range(1, 15):
        prompt += [1, 2, 3, 4, *tokens(797, seed=turn).tolist()]  # the last sampled token, 4, was never read
        driver.turn(prompt, [1, 2, 3], chunk=chunk)
        assert driver.start == len(prompt) - 798
        assert driver.extra_passes == 0
        assert len(driver.steps) == -(-798 // chunk)


def test_a_fork_is_checkpointed_on_first_sight_and_hit_exactly_by_the_third_sharer() -> None:
    driver = Driver(page_size=16, slabs=300)
    shared = tokens(101).tolist()
    starts = []
    for seed in range(3):
        driver.turn(shared + tokens(50, seed=seed + 1).tolist(), [1], chunk=200)
        starts.append(driver.start)
    assert starts == [0, 0, 101]
    assert published(driver)["fork"] == 1


LONG: dict[str, Any] = {
    "page_size": 64,
    "pages_per_slab": 4,
    "slabs": 2000,
    "pass_cost": 512,
    "interior_spacing": 1024,
}


@pytest.mark.parametrize(
    ("options", "chunk", "first"), [({"inner_checkpoints": True}, 50_000, 1024), ({}, 2048, 2048)]
)
def test_who_leaves_a_long_prompt_resumes_at_half_and_the_third_exactly(
    options: dict[str, Any], chunk: int, first: int
) -> None:
    """Of 50,000 tokens seen once; in chunks, from the first one on: a cut inside of one would cost a pass."""
    prompt = tokens(50_000).tolist()
    driver = Driver(**LONG, **options)
    driver.turn(prompt, [1], chunk=chunk)
    for branch in [first, first + 1, *range(2 * first - 1, 50_000, 1379), 49_990]:
        assert driver.cache.match([*prompt[:branch], 5, 5]).length >= branch / 2
    for branch in (3001, 20_000, 44_444):
        driver.turn([*prompt[:branch], 7, *tokens(600, seed=branch).tolist()], [1], chunk=chunk)
        assert branch / 2 <= driver.start < branch
        driver.turn([*prompt[:branch], 8, *tokens(600, seed=branch + 1).tolist()], [1], chunk=chunk)
        assert driver.start == branch


def test_a_fork_that_saves_less_than_a_pass_is_made_when_enough_have_left_there() -> None:
    driver = Driver(page_size=16, slabs=300, pass_cost=60)
    starts, forks = [], []
    for seed in range(4):
        driver.turn(tokens(50).tolist() + tokens(30, seed=seed + 1).tolist(), [1])
        starts.append(driver.start)
        forks.append(published(driver).get("fork", 0))
    assert forks == [0, 0, 1, 1]  # 50 tokens for one sharer, then for two
    assert starts == [0, 0, 0, 50]


def test_breakpoints_are_exact_and_each_costs_one_pass() -> None:
    driver = Driver(page_size=16, slabs=300)
    prompt = tokens(200).tolist()
    driver.turn(prompt, [1], breakpoints=[33, 150, 200])
    assert (
        driver.extra_passes == 2
    )  # 33 and 150; 200 is free, and with 150 below it the prompt needs no cut before its end
    for at in (33, 150):
        assert driver.cache.match([*prompt[:at], 7, 7]).length == at
    assert published(driver)["breakpoint"] == 3


def test_alignment_moves_paid_cuts_to_the_grid_of_the_run_that_makes_them() -> None:
    driver = Driver(page_size=16, slabs=300, alignment=64)
    prompt = tokens(600).tolist()
    driver.turn(prompt, [1], breakpoints=[30, 150, 600])
    assert [step.end for step in driver.steps] == [128, 600]  # 30 falls on 0
    driver.turn([*prompt, 1, *tokens(300, seed=5).tolist()], [1], breakpoints=[700])
    assert [step.begin for step in driver.steps] == [601, 601 + 64]


def test_an_identical_short_prompt_resumes_before_its_end() -> None:
    driver = Driver(page_size=16, slabs=300)
    prompt = tokens(100).tolist()
    driver.turn(prompt, [1, 2])
    assert driver.extra_passes == 1
    driver.turn(prompt, [1, 2])
    assert (driver.start, driver.extra_passes) == (92, 0)
    driver.turn([*prompt[:98], 5, 6, 7], [1])  # a template that dropped the end of the prompt
    assert driver.start == 92


def test_a_chunked_prompt_resumes_at_its_last_chunk_and_branches_at_half() -> None:
    driver = Driver(page_size=16, slabs=300)
    prompt = tokens(1000).tolist()
    driver.turn(prompt, [1], chunk=64)
    assert driver.extra_passes == 0
    assert driver.cache.match(prompt).length == 960
    for branch in range(128, 1000, 37):
        assert driver.cache.match([*prompt[:branch], 5, 5]).length >= branch / 2


def test_inner_checkpoints_cost_no_pass() -> None:
    driver = Driver(page_size=16, slabs=300, inner_checkpoints=True)
    prompt = tokens(1000).tolist()
    driver.turn(prompt, [1], breakpoints=[333])
    (step,) = driver.steps
    assert [position for position, _ in step.checkpoints] == [8, 16, 32, 64, 128, 256, 333, 512, 992]
    assert len({slot for _, slot in step.checkpoints} | {step.write_slot}) == 10
    assert driver.extra_passes == 0
    assert driver.cache.match(prompt).length == 992
    assert driver.cache.match([*prompt[:340], 5, 5]).length == 333
    for branch in range(16, 1000, 37):
        assert driver.cache.match([*prompt[:branch], 5, 5]).length >= branch / 2


def test_a_kind_that_is_never_used_soon_costs_no_pass_and_one_that_is_used_stays() -> None:
    unused, used = Driver(slabs=4000), Driver(slabs=4000)
    for seed in range(100):
        prompt = tokens(40, seed).tolist()
        unused.turn(prompt, [1])
        used.turn(prompt, [1])
        used.turn(prompt, [2])
    assert published(unused)["cut"] <= 16 + 100 // 16 + 1
    assert published(used)["cut"] == 100
    assert published(unused)["prompt_end"] == 100  # it is free, and there was room


@pytest.mark.parametrize("learned", [True, False])
def test_a_kind_that_is_never_used_soon_evicts_nothing(learned: bool) -> None:
    driver = Driver(num_pages=400, num_slots=4, pass_cost=1000)
    for seed in range(40 if learned else 0):
        driver.turn(tokens(12, seed + 9).tolist(), [1])
        driver.cache.clear()
    prompt = tokens(12).tolist()
    for turn in range(3):
        driver.turn(prompt, [1])
        prompt += [1, *tokens(5, turn + 90).tolist()]
    # The end of the third prompt would have taken the place of the first turn's end, which is superseded.
    assert (driver.cache.match([*prompt[:13], 5, 5]).length == 13) is learned


def test_a_resend_is_evidence_even_when_cuts_have_not_paid_so_far() -> None:
    driver = Driver(page_size=16, slabs=4000)
    for seed in range(60):
        driver.turn(tokens(100, seed + 1).tolist(), [1])
    cuts = published(driver)["cut"]
    starts = []
    for _ in range(4):
        driver.turn(tokens(100).tolist(), [1])
        starts.append(driver.start)
    assert starts == [0, 0, 92, 92]
    assert published(driver)["cut"] == cuts + 1


def test_free_chunk_ends_are_made_while_there_is_room_whatever_was_learned() -> None:
    driver = Driver(page_size=16, slabs=8000)
    for seed in range(40):
        driver.turn(tokens(400, seed).tolist(), [1], chunk=100)
    for seed in range(40):
        assert driver.cache.match(tokens(400, seed)).length == 300


def test_no_pass_is_paid_for_a_state_that_could_not_be_kept() -> None:
    driver = Driver(page_size=4, pages_per_slab=2, slabs=20)
    held = []
    for seed in range(6):
        lease = driver.cache.reserve(tokens(4, seed + 100))
        assert lease is not None
        held.append(lease)
    for seed in range(30):
        driver.turn(tokens(78, seed).tolist(), [1], close={"keep": "nothing"})
    assert driver.cache.stats()["extra_passes"] == 0
    for lease in held:
        lease.close()


def test_superseded_states_leave_first() -> None:
    driver = Driver(page_size=4, pages_per_slab=2, slabs=24, pass_cost=1000)
    conversation = tokens(8).tolist()
    driver.turn(conversation, [1])
    other = tokens(8, seed=5).tolist()
    driver.turn(other, [1])  # used once, older than all that follows
    for turn in range(12):
        conversation += [1, *tokens(7, seed=10 + turn).tolist()]
        driver.turn(conversation, [1])
        assert driver.start == len(conversation) - 7
    assert sum(v for k, v in driver.cache.stats().items() if k.startswith("evicted_")) > 0
    assert driver.cache.match([*other, 1, 2]).length == 9


def test_lru_does_not_know_of_supersession() -> None:
    driver = Driver(page_size=4, pages_per_slab=2, slabs=24, pass_cost=1000, policy="lru")
    conversation, other = tokens(8).tolist(), tokens(8, seed=5).tolist()
    driver.turn(conversation, [1])
    driver.turn(other, [1])
    for turn in range(12):
        conversation += [1, *tokens(7, seed=10 + turn).tolist()]
        driver.turn(conversation, [1])
    assert driver.cache.match([*other, 1, 2]).length < 9


def test_kv_without_a_checkpoint_below_it_leaves_with_its_state(driver: Driver) -> None:
    driver.turn(tokens(40), [1])
    assert driver.cache.stats()["tree_pages"] >= 10
    driver.cache.clear()
    assert driver.cache.stats()["tree_pages"] == 0


@pytest.mark.parametrize(("keep", "length"), [("all", 23), ("prompt", 20), ("nothing", 20)])
def test_keep(driver: Driver, keep: str, length: int) -> None:
    prompt = tokens(20).tolist()
    driver.turn(prompt, [1, 2, 3], close={"keep": keep})
    assert driver.cache.match([*prompt, 1, 2, 3, 4, 5]).length == length


def test_max_cached_bytes_caps_what_stays() -> None:
    driver = Driver(slabs=200, max_cached_bytes=64 * 20)
    for seed in range(10):
        driver.turn(tokens(30, seed), [1])
        assert driver.cache.stats()["cached_bytes"] <= 64 * 20
    assert driver.cache.stats()["checkpoints"] > 0


def test_a_pin_keeps_what_pressure_would_take() -> None:
    driver = Driver(slabs=24)
    system = tokens(20).tolist()
    driver.turn(system)
    with driver.cache.pin([*system, 5]) as pin:
        assert pin.length == 20
        for seed in range(20):
            driver.turn(tokens(40, seed + 1), [1])
        assert driver.cache.match([*system, 5]).length == 20
        driver.cache.check()
    for seed in range(20):
        driver.turn(tokens(40, seed + 50), [1])
    assert driver.cache.match([*system, 5]).length == 0


def test_a_resumed_prompt_that_does_not_fit_beside_its_checkpoint_resumes_higher_or_cold() -> None:
    driver = Driver(page_size=4, pages_per_slab=2, slabs=4, pass_cost=1000, interior_spacing=1000)
    prompt = tokens(9).tolist()
    driver.turn(prompt, [1])
    longest = [*prompt, 1, *tokens(14, seed=1).tolist()]  # with a slot, all that the empty arena can hold
    driver.turn(longest)
    assert driver.start == 0


def test_fork_both_leases_continue_from_one_checkpoint(driver: Driver) -> None:
    lease = driver.cache.reserve(tokens(10), max_new_tokens=6)
    assert lease is not None
    driver.prefill(lease)
    driver.decode(lease, [5])
    child = lease.fork()
    assert child is not None
    assert child.start == child.committed == lease.committed == 11
    assert child.capacity == lease.capacity
    steps = driver.cache.launch([lease, child], [1, 1])
    assert steps.read_slots[0] == steps.read_slots[1]
    assert steps.write_slots[0] != steps.write_slots[1]
    driver.apply()
    driver.cache.commit([lease, child], [6, 7])
    driver.cache.check()
    lease.close(), child.close()
    prefix = [*tokens(10).tolist(), 5]
    assert driver.cache.match([*prefix, 6, 9]).length == driver.cache.match([*prefix, 7, 9]).length == 12


@pytest.mark.parametrize("arena", [{"slabs": 40}, {"num_pages": 60, "num_slots": 12}])
def test_both_arenas_carry_a_conversation(arena: dict[str, int]) -> None:
    driver = Driver(**arena)
    prompt = tokens(30).tolist()
    for turn in range(6):
        driver.turn(prompt, [1, 2])
        assert driver.start == (len(prompt) - 9 if turn else 0)
        prompt += [1, 2, *tokens(9, seed=turn + 1).tolist()]


def test_in_the_fixed_arena_a_lack_of_pages_takes_no_state_whose_kv_others_need() -> None:
    driver = Driver(page_size=4, num_pages=24, num_slots=20, pass_cost=1000, interior_spacing=1000)
    shared = tokens(32).tolist()
    for seed in range(2):
        driver.turn(shared + tokens(8, seed + 1).tolist(), breakpoints=[32])
    assert driver.cache.match([*shared, 5]).length == 32
    driver.turn(tokens(40, seed=9))
    assert driver.cache.match([*shared, 5]).length == 32  # a leaf below it left instead
