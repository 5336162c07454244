"""What a driver may do next: each action draws its arguments with `pick(n) -> 0..n-1` and calls a Harness.

Owns the choice of arguments (prompts that collide, all stages of a step, every `keep`) and no state.
hypothesis and the seeded walk share these functions, so a counterexample of either is a list of the same
calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.harness import MAX_IN_FLIGHT, SALTS, Config, Flight, Ghost, Harness, Pick, draw_config


def fed(h: Harness, pick: Pick, n: int) -> list[int]:
    """`n` tokens out of one choice: hypothesis shrinks one number faster than many."""
    word = pick(h.config.vocabulary**n)
    return [word // h.config.vocabulary**i % h.config.vocabulary for i in range(n)]


def fresh_path(h: Harness, pick: Pick, longest: int) -> list[Any]:
    path: list[Any] = fed(h, pick, 1 + pick(longest))
    if pick(6) == 0:
        path[pick(len(path))] = (0, (b"cat", b"dog")[pick(2)])
    return path


def room(h: Harness) -> int:
    """Tokens that fit beside one slot."""
    arena = h.oracle.arena
    return (arena.num_pages - (arena.per_slab if arena.unified else 0)) * h.config.page_size


def longest_prompt(h: Harness, pick: Pick) -> int:
    """About a third of what the arena holds, so that several fit; sometimes nearly all of it."""
    return max(2, min(48, 5 * h.config.page_size + 6, room(h) if pick(10) == 0 else room(h) // 3))


def some_path(h: Harness, pick: Pick) -> tuple[bytes, list[Any]]:
    """A fresh prompt, or an earlier one: the same, extended, cut short, or branched off."""
    how = pick(6)
    if how == 0 or not h.history:
        return SALTS[pick(8) == 7], fresh_path(h, pick, longest_prompt(h, pick))
    recent = h.history[-12:]
    salt, path = recent[pick(len(recent))]
    if how in (1, 2):
        return salt, path + fresh_path(h, pick, 6)
    if how == 3:
        return salt, path[: 1 + pick(len(path))]
    if how == 4:
        return salt, path[: pick(len(path))] + fresh_path(h, pick, 8)
    return (SALTS[pick(2)] if pick(8) == 0 else salt), path


def at_stage(h: Harness, *stages: str) -> list[Flight]:
    return [f for f in h.flights if f.stage in stages]


def one(found: list[Flight], pick: Pick) -> Flight:
    return found[pick(len(found))]


def ahead(h: Harness) -> list[Flight]:
    return [f for f in h.flights if len(f.steps) > 1]


def launchable(h: Harness) -> list[Flight]:
    return [f for f in h.flights if f.may_launch]


def runnable(h: Harness) -> list[Flight]:
    return [f for f in h.flights if f.next_to_run is not None]


def passing(h: Harness) -> list[Ghost]:
    """What closed requests left on the device, as far as its plan was applied; of each lease the oldest."""
    oldest = {id(g.lease): g for g in reversed(h.ghosts)}.values()
    return [g for g in oldest if (g.running.opened.number or 0) <= h.oracle.done]


def match(h: Harness, pick: Pick) -> None:
    h.match(*some_path(h, pick))


def reserve(h: Harness, pick: Pick) -> None:
    if len(h.flights) < MAX_IN_FLIGHT:
        salt, path = some_path(h, pick)
        path = path[: longest_prompt(h, pick) * 2] if pick(30) else path
        if not h.flights and pick(2) == 0:  # alone, and so large that only giving up its own hit makes room
            path = path + fed(h, pick, max(0, min(room(h), 100) - len(path) - pick(4)))
        breakpoints = sorted({1 + pick(len(path)) for _ in range(pick(4))}) if pick(2) else []
        h.reserve(salt, path, breakpoints, pick(9) if pick(2) else 0)


def count(flight: Flight, pick: Pick) -> int:
    """How many tokens: to the prompt's end and beyond, a chunk, or a decode step."""
    left = flight.oracle.prompt_length - flight.oracle.computed
    if left > 0:
        return left + pick(3) if pick(2) else 1 + pick(left)
    return 1 + pick(4) if pick(4) == 0 else 1


def launch(h: Harness, pick: Pick) -> None:
    if found := launchable(h):
        flight = one(found, pick)
        h.launch(flight, count(flight, pick), fed(h, pick, 8))


def launch_batch(h: Harness, pick: Pick) -> None:
    if found := launchable(h):
        chosen = found[pick(len(found)) :]
        h.launch_batch(chosen, [count(f, pick) for f in chosen], fed(h, pick, 8))


def plan(h: Harness, pick: Pick) -> None:
    if h.oracle.may_plan():
        h.plan()


def apply(h: Harness, pick: Pick) -> None:
    if h.pending:
        h.apply()
    elif pick(4) == 0:
        h.apply_stale()


def run(h: Harness, pick: Pick) -> None:
    ghosts, found = passing(h), runnable(h)
    if ghosts and pick(4) == 0:
        h.run_ghost(ghosts[pick(len(ghosts))])
    elif found:
        h.run(one(found, pick))


def commit(h: Harness, pick: Pick) -> None:
    if found := at_stage(h, "ran"):
        h.commit([one(found, pick)], batch=False)


def commit_batch(h: Harness, pick: Pick) -> None:
    if found := at_stage(h, "ran"):
        h.commit(found[pick(len(found)) :], batch=True)


def turn(h: Harness, pick: Pick) -> None:
    """One whole engine step, the usual life: launch all, plan, apply, run, commit all."""
    while h.pending:
        h.apply()
    launch_batch(h, pick)
    device(h, pick)
    commit_batch(h, pick)


def device(h: Harness, pick: Pick) -> None:
    """What an engine enqueues after its launches."""
    plan(h, pick)
    while h.pending:
        h.apply()
    for flight in runnable(h):
        while flight.next_to_run is not None:
            h.run(flight)


def overlap(h: Harness, pick: Pick) -> None:
    """An engine that runs ahead: it launches the next step of all, and commits the ones before behind it."""
    for _ in range(1 + pick(3)):
        if found := launchable(h):
            h.launch_batch(found, [count(f, pick) for f in found], fed(h, pick, 8))
        device(h, pick)
        if behind := [f for f in ahead(h) if f.stage == "ran"]:
            h.commit(behind[pick(len(behind)) :] if pick(4) == 0 else behind, batch=True)


def fork(h: Harness, pick: Pick) -> None:
    found = at_stage(h, "idle")
    if found and len(h.flights) < MAX_IN_FLIGHT:
        h.fork(one(found, pick))


def finish(h: Harness, pick: Pick) -> None:
    if found := at_stage(h, "idle"):
        keep = ("all", "all", "all", "prompt", "nothing")[pick(5)]
        h.close(one(found, pick), keep, discard=pick(8) == 0)


def cancel(h: Harness, pick: Pick) -> None:
    """Closes a request at any stage of its steps, most often while something is under way."""
    two = ahead(h) if pick(2) else []
    if found := two or at_stage(h, "launched", "collected", "applied", "ran") or h.flights:
        h.close(one(found, pick), ("all", "prompt", "nothing")[pick(3)], discard=pick(4) == 0)


def drain(h: Harness, pick: Pick) -> None:
    """Nothing runs for a moment: the next request that needs all of the arena may have it."""
    if pick(3) == 0:
        while h.flights:
            finish(h, pick)
            cancel(h, pick)
        while h.pending:
            h.apply()


def pin(h: Harness, pick: Pick) -> None:
    if len(h.pins) < 3:
        h.pin(*some_path(h, pick))


def release(h: Harness, pick: Pick) -> None:
    if h.pins:
        h.release(pick(len(h.pins)))


def clear(h: Harness, pick: Pick) -> None:
    if pick(4) == 0:
        h.clear((None, *SALTS)[pick(3)])


WEIGHTS: dict[Callable[[Harness, Pick], None], int] = {
    match: 3,
    reserve: 14,
    launch: 10,
    launch_batch: 4,
    plan: 10,
    apply: 10,
    run: 12,
    commit: 10,
    commit_batch: 3,
    turn: 10,
    overlap: 7,
    fork: 4,
    finish: 7,
    cancel: 3,
    drain: 2,
    pin: 1,
    release: 2,
    clear: 1,
}


# Rare moments that a walk has to have seen, several times each, to be worth its time.
WALK_EVENTS = (
    "hit",
    "evicted",
    "no_room",
    "no_room_at_launch",
    "no_room_at_fork",
    "retried",
    "fork_published",
    "tails_copied",
    "slot_to_page",
    "page_to_slot",
    "rested",
    "superseded",
    "inner",
    "dropped_checkpoints",
    "extra_passes",
    "spare_dropped",
    "closed_launched",
    "closed_collected",
    "closed_applied",
    "closed_ran",
    "cleared",
    "pinned",
    "too_large",
    "closed_before_copy",
    "forked_before_copy",
    "closed_in_shared_tail",
    "forked_in_shared_tail",
    "tail_filled_by_its_writer",
    "tail_evicted_while_held",
    "launched_ahead",
    "gone_on",
    "boundary_dropped_ahead",
    "left_behind",
    "taken_back",
    "committed_behind",
    "two_pending",
    "rest_ended_by_plan",
    "rest_ended_idle",
    "closed_two_open",
    "ghosts",
)


def random_walk(
    seed: int,
    steps: int,
    make_core: Callable[[Config], Any] | None = None,
    after: Callable[[Harness], None] | None = None,
    actions: dict[Any, int] = WEIGHTS,
) -> Harness:
    """`steps` actions drawn from `seed`, all verified after each; fails with both sides printed."""
    rng = random.Random(seed)
    h = Harness(draw_config(rng.randrange), seed, make_core)
    chosen = rng.choices(list(actions), list(actions.values()), k=steps)
    for number, action in enumerate(chosen):
        try:
            action(h, rng.randrange)
            h.verify()
            if after is not None:
                after(h)
        except Exception as error:
            raise AssertionError(
                f"seed {seed}, action {number} {action.__name__}: {error!r}\n{h.report()}"
            ) from error
    return h
