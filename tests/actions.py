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
    """Nor does an engine go on behind a step of which it knows that nothing stays."""
    return [f for f in h.flights if f.may_launch and not (f.steps and f.steps[-1].void)]


def decoding(h: Harness) -> list[Flight]:
    return [f for f in h.flights if f.oracle.computed >= f.oracle.prompt_length]


def committable(h: Harness) -> list[Flight]:
    """What ran, and what need not run any more."""
    return at_stage(h, "ran") + [f for f in at_stage(h, "applied") if f.steps[0].void]


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
        max_new = pick((9, 9, 30)[pick(3)]) if pick(2) else 0
        longest = len(path) + max_new
        above = len(path) if max_new and pick(3) == 0 else 0  # in the answer only
        breakpoints = sorted({above + 1 + pick(longest - above) for _ in range(pick(4))}) if pick(2) else []
        h.reserve(salt, path, breakpoints, max_new, **clock(h, pick), **priority(h, pick))


def clock(h: Harness, pick: Pick) -> dict[str, int]:
    """What the learned policy hears of time, now and then; it never goes back."""
    learns = h.oracle.store.learned is not None
    return {"now": 3 * h.steps + pick(3)} if learns and pick(2) else {}


def priority(h: Harness, pick: Pick) -> dict[str, int]:
    learns = h.oracle.store.learned is not None
    return {"priority": (-8, -1, 1, 8)[pick(4)]} if learns and pick(4) == 0 else {}


def hints(h: Harness, pick: Pick) -> dict[str, int]:
    learns = h.oracle.store.learned is not None
    again = {"expected_return": (0, 5, 40, 400, 10**9)[pick(5)]} if learns and pick(2) else {}
    return {**clock(h, pick), **again}


def count(flight: Flight, pick: Pick) -> int:
    """How many tokens: to the prompt's end and beyond, a chunk, or a decode step."""
    left = flight.oracle.prompt_length - flight.oracle.computed
    if left > 0:
        return left + pick(3) if pick(2) else 1 + pick(left)
    return 1 + pick(4) if pick(4) == 0 else 1


def shape(h: Harness, flight: Flight, pick: Pick) -> tuple[int, int | None]:
    """How many tokens, with how many rows: all, one, some, none, as it comes, and now and then too many."""
    lease, k = flight.oracle, h.oracle.draft_tokens
    if lease.computed < lease.prompt_length or not k:
        return count(flight, pick), 1 if pick(20) == 0 else None
    n = 1 + pick(k + 1) + (pick(3) if pick(6) == 0 else 0)
    before = lease.open[-1].rows if lease.open else 0
    if before > 1 and pick(4):
        n = min(n, k + 1)
        return n, (None, n)[pick(2)]
    return n, (None, None, None, n, 1, 1, 1, 1 + pick(n), 1 + pick(n), 0, n + 1, k + 2)[pick(12)]


def drafted(h: Harness, pick: Pick) -> list[int]:
    """What decode steps read: requests often say the same, so that their boundaries are duplicates."""
    return fed(h, pick, 12) if pick(3) else [0] * 12


def staying(n: int, pick: Pick) -> int:
    """How many of `n` drafted tokens the device accepts; all of them half of the time."""
    return n if pick(2) else 1 + pick(n)


def launch(h: Harness, pick: Pick) -> None:
    if found := launchable(h):
        flight = one(found, pick)
        n, rows = shape(h, flight, pick)
        h.launch(flight, n, drafted(h, pick), rows, staying(n, pick))


def launch_batch(h: Harness, pick: Pick) -> None:
    if found := launchable(h):
        launch_all(h, found[pick(len(found)) :], pick)


def launch_all(h: Harness, chosen: list[Flight], pick: Pick) -> None:
    """One call; a shape that would be refused gives way to a single token, or refuses the whole batch."""
    shapes = [shape(h, f, pick) for f in chosen]
    if pick(12):
        shapes = [
            (1, None) if h.oracle.refuses(f.oracle, *s) else s for f, s in zip(chosen, shapes, strict=True)
        ]
    rows = None
    if any(r is not None for _, r in shapes):
        rows = [
            r if r is not None else h.oracle.rows_of(f.oracle, n, r)
            for f, (n, r) in zip(chosen, shapes, strict=True)
            if r is not None or not h.oracle.refuses(f.oracle, n, r)
        ]
    if rows is None or len(rows) == len(chosen):
        h.launch_batch(chosen, [n for n, _ in shapes], drafted(h, pick), rows, staying(8, pick))


def verify(h: Harness, pick: Pick) -> None:
    """A step of drafts, where one can be."""
    if found := [f for f in launchable(h) if f in decoding(h) and h.oracle.draft_tokens]:
        flight = one(found, pick)
        n, rows = shape(h, flight, pick)
        h.launch(flight, n, drafted(h, pick), rows, staying(n, pick))


def want(h: Harness, pick: Pick) -> None:
    """Any position about the open steps: rows, open ends, just ahead, and what nobody can keep any more."""
    if h.flights:
        flight = one(decoding(h) if pick(2) and decoding(h) else h.flights, pick)
        lease = flight.oracle
        anywhere = lease.committed + pick(lease.computed - lease.committed + 8)
        position = (anywhere, lease.computed, lease.computed + 1 + pick(3))[pick(3)]
        for same in [f for f in h.flights if f.oracle.key(99) == lease.key(99)]:  # forks say the same
            h.want(same, position)


def commit_wrong(h: Harness, pick: Pick) -> None:
    found = [f for f in at_stage(h, "ran", "applied") if f.steps[0].verifies]
    if found:
        flight = one(found, pick)
        opened = flight.steps[0].opened
        wrong = [m for m in range(len(flight.steps[0].feed) + 2) if not h.oracle.may_keep(opened, m)]
        h.commit_wrong(flight, wrong[pick(len(wrong))])


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
    if found := committable(h):
        end_steps(h, [one(found, pick)], False, pick)


def commit_batch(h: Harness, pick: Pick) -> None:
    if found := committable(h):
        end_steps(h, found[pick(len(found)) :], True, pick)


def end_steps(h: Harness, flights: list[Flight], batch: bool, pick: Pick) -> None:
    """Commits; of a step that must be void the engine may first try to keep something all the same."""
    for flight in flights:
        if flight.steps[0].opened.void and pick(2):
            h.commit_wrong(flight, len(flight.steps[0].feed))
    h.commit(flights, batch, pick)


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
    late = pick(4) == 0  # the host commits while the second step of a request has not run yet
    for flight in runnable(h):
        while (due := flight.next_to_run) is not None:
            if late and (due.void or due is not flight.steps[0]):
                break
            h.run(flight)


def overlap(h: Harness, pick: Pick) -> None:
    """An engine that runs ahead: it launches the next step of all, and commits the ones before behind it."""
    for _ in range(1 + pick(3)):
        if found := launchable(h):
            launch_all(h, found, pick)
        device(h, pick)
        if pick(3) == 0:
            want(h, pick)
        if behind := [f for f in committable(h) if len(f.steps) > 1 or f.steps[0].void]:
            end_steps(h, behind[pick(len(behind)) :] if pick(4) == 0 else behind, True, pick)


def fork(h: Harness, pick: Pick) -> None:
    found = at_stage(h, "idle")
    if found and len(h.flights) < MAX_IN_FLIGHT:
        h.fork(one(found, pick))


def finish(h: Harness, pick: Pick) -> None:
    if found := at_stage(h, "idle"):
        keep = ("all", "all", "all", "prompt", "nothing")[pick(5)]
        h.close(one(found, pick), keep, discard=pick(8) == 0, **hints(h, pick))


def cancel(h: Harness, pick: Pick) -> None:
    """Closes a request at any stage of its steps, most often while something is under way."""
    two = ahead(h) if pick(2) else []
    if found := two or at_stage(h, "launched", "collected", "applied", "ran") or h.flights:
        keep = ("all", "prompt", "nothing")[pick(3)]
        h.close(one(found, pick), keep, discard=pick(4) == 0, **hints(h, pick))


def drain(h: Harness, pick: Pick) -> None:
    """Nothing runs for a moment: the next request that needs all of the arena may have it."""
    if pick(3) == 0:
        while h.flights:
            finish(h, pick)
            cancel(h, pick)
        while h.pending:
            h.apply()


def burst(h: Harness, pick: Pick) -> None:
    """Prompts that never come back: the ends of prompts are soon spare."""
    for number in range(2 + pick(5)):
        if len(h.flights) < MAX_IN_FLIGHT:
            h.reserve(b"", [100 + 8 * h.steps + number, *fed(h, pick, 2)], [], 0)
            turn(h, pick)
            finish(h, pick)


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
    verify: 8,
    want: 6,
    commit_wrong: 1,
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
    burst: 2,
    pin: 1,
    release: 2,
    clear: 1,
}


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
