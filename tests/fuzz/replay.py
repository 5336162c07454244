"""Replays a fuzzer's input through the Python model: oracle, symbolic memory and core side by side.

Owns the format: what the bytes of an input mean (CONFIG, OPS). tests/fuzz/walk.h decodes the same in C++,
and test_fuzz.py holds the two to one digest. An input starts with HEADER bytes that choose the options; then
come ops, one byte each (modulo 32), with the operands that their docstrings name, a byte each. Past the end
every byte is 0, and no further op begins. An operand counts modulo what there is to choose from, so most
inputs are sequences of valid calls; an op that is not possible now reads its operands and does nothing.

Reserved: header byte 7 (draft_tokens: bits 0-2, lookahead: bit 3), and bits 3-7 of the operand `which` of
launch (rows) and commit (how many tokens stay).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_calls import bad_call
from tests.harness import MAX_IN_FLIGHT, SALTS, Config, Flight, Harness
from tests.test_state_machine import make_core

HEADER = 9
CONTENTS = (b"cat", b"dog")
MOST_PINS, REMEMBERED, TOO_MANY = 3, 12, 2**20


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, count: int) -> list[int]:
        found = self.data[self.at : self.at + count].ljust(count, b"\0")
        self.at += count
        return list(found)


def read_config(header: list[int]) -> Config:
    """Bytes: page_size, shape, first, second, flags, costs, cap, drafts (reserved), finish."""
    page_size, shape, first, second, flags, costs, cap, _, _ = header
    page_size = (1, 2, 3, 4, 7, 16)[page_size % 6]
    fixed, large, per_slab = shape & 1, shape & 2, 1 + (shape >> 2) % 5
    options: dict[str, Any] = {
        "run_ahead": flags & 1,
        "inner_checkpoints": bool(flags & 2),
        "alignment": 4 if flags & 4 else 1,
        "policy": "lru" if flags & 8 else "default",
        "pass_cost": costs % 9,
        "interior_spacing": 2 + costs // 9 % 7,
    }
    if flags & 32:
        options["max_cached_bytes"] = (cap % 6 * per_slab + cap // 6 % 8) * 16 * page_size
    if fixed:
        arena = {"slabs": 0, "pages": 40 + first % 60, "slots": 8 + second % 10}
        arena = arena if large else {"slabs": 0, "pages": 8 + first % 20, "slots": 3 + second % 6}
    else:
        arena = {"slabs": 12 + first % 36 if large else 4 + first % 8}
    return Config(
        page_size,
        per_slab,
        slack=(shape >> 5) % 3,
        vocabulary=3 if flags & 16 else 2,
        eager=bool(flags & 64),
        options=options,
        **arena,
    )


class Replay:
    """One input: its caches (`h`), and the paths that later prompts are made of."""

    def __init__(self, data: bytes) -> None:
        self.input = Reader(data)
        header = self.input.bytes(HEADER)
        self.h = Harness(read_config(header), 0, make_core)
        self.last_calls = header[8]
        self.paths: list[tuple[bytes, list[Any]]] = []

    def run(self) -> Harness:
        """All ops, each verified, then the last calls; fails with both sides printed."""
        op: Callable[[Replay], None] | None = None
        try:
            self.h.verify()
            while self.input.more:
                op = OPS[self.input.bytes(1)[0] % len(OPS)]
                op(self)
                self.h.verify()
            self.finish()
            self.h.verify()
        except Exception as error:
            raise AssertionError(f"{op and op.__name__}: {error!r}\n{self.h.report()}") from error
        return self.h

    def finish(self) -> None:
        """Four of the last calls, two bits of the header's last byte each."""
        for shift in range(0, 8, 2):
            (close_all, apply_all, release_all, clear_all)[self.last_calls >> shift & 3](self)

    # ---- prompts

    def token(self, index: int, seed: int) -> int:
        return (seed * (index + 1) >> 3) % self.h.config.vocabulary

    def fresh(self, length: int, seed: int) -> list[Any]:
        path: list[Any] = [self.token(index, seed) for index in range(length)]
        if seed % 8 == 7 and path:
            path[(seed >> 3) % length] = (0, CONTENTS[seed >> 7])
        return path

    @property
    def room(self) -> int:
        """Tokens that fit beside one slot."""
        arena = self.h.oracle.arena
        return (arena.num_pages - (arena.per_slab if arena.unified else 0)) * self.h.config.page_size

    @property
    def longest(self) -> int:
        return max(2, min(48, 5 * self.h.config.page_size + 6, self.room // 3))

    def path(self) -> tuple[bytes, list[Any]]:
        """Operands how, which, size, seed: a fresh prompt, or an earlier one, extended, cut short, branched
        off, the same, under the other salt, or so long that it fills the arena."""
        how, which, size, seed = self.input.bytes(4)
        recent = self.paths[-REMEMBERED:]
        if how % 8 == 0 or not recent:
            return SALTS[how >> 6 & 1], self.fresh(1 + size % self.longest, seed)
        salt, path = recent[which % len(recent)]
        if how % 8 == 7:
            return salt, path + self.fresh(max(0, min(self.room, 100) - len(path) - size % 4), seed)
        if how % 8 in (1, 2):
            path = path + self.fresh(1 + size % 6, seed)
        elif how % 8 == 3:
            path = path[: 1 + size % len(path)]
        elif how % 8 == 4:
            path = path[: size % len(path)] + self.fresh(1 + (size >> 5), seed)
        elif how % 8 == 6:
            salt = SALTS[salt == SALTS[0]]
        return salt, path[: 2 * self.longest]

    # ---- what may be asked

    def count(self, flight: Flight, byte: int) -> int:
        left = flight.oracle.prompt_length - flight.oracle.computed
        if left > 0:
            return left + (byte >> 1) % 3 if byte & 1 else 1 + (byte >> 1) % left
        return 1 + (byte >> 2) % 4 if byte % 4 == 0 else 1

    def feed(self, seed: int) -> list[int]:
        return [self.token(index, seed) for index in range(8)]

    @property
    def launchable(self) -> list[Flight]:
        return [f for f in self.h.flights if f.may_launch]

    @property
    def committable(self) -> list[Flight]:
        return [f for f in self.h.flights if f.stage in ("applied", "ran")]

    def launch_all(self, flights: list[Flight], size: int, seed: int) -> None:
        counts = [self.count(f, (size + 37 * i) % 256) for i, f in enumerate(flights)]
        ends = [f.oracle.computed + n for f, n in zip(flights, counts, strict=True)]
        if flights and max(ends) <= self.room:  # else a mistake, which would refuse the whole batch
            self.h.launch_batch(flights, counts, self.feed(seed))

    def commit_all(self, flights: list[Flight], batch: bool) -> None:
        """The forwards that they wait for run first, if they did not yet."""
        for flight in flights:
            while flight.stage == "applied":
                self.h.run(flight)
        if flights:
            self.h.commit(flights, batch)

    def close_one(self, flight: Flight, keep: str, discard: bool) -> None:
        known = flight.oracle.tokens[: flight.oracle.committed]
        if known:
            self.paths.append((flight.oracle.salt, list(known)))
        self.h.close(flight, keep, discard)


# ---- the ops, in the words of walk.cpp


def match(r: Replay) -> None:
    """path"""
    r.h.match(*r.path())


def reserve(r: Replay) -> None:
    """path, extras (bits 0-1: how many breakpoints, bit 2: more tokens), breakpoints, more tokens"""
    salt, path = r.path()
    (extras,) = r.input.bytes(1)
    breakpoints = sorted({1 + byte % len(path) for byte in r.input.bytes(extras % 4)})
    max_new = r.input.bytes(1)[0] % 9 if extras & 4 else 0
    if len(r.h.flights) < MAX_IN_FLIGHT:
        r.paths.append((salt, path))
        r.h.reserve(salt, path, breakpoints, max_new)


def launch(r: Replay) -> None:
    """which, size (255: more than fits, beyond the prompt), seed of what it feeds"""
    which, size, seed = r.input.bytes(3)
    if found := r.launchable:
        flight = found[which % 8 % len(found)]
        r.h.launch(flight, TOO_MANY if size == 255 else r.count(flight, size), r.feed(seed))


def launch_batch(r: Replay) -> None:
    """which is the first, size, seed"""
    which, size, seed = r.input.bytes(3)
    if found := r.launchable:
        r.launch_all(found[which % 8 % len(found) :], size, seed)


def plan(r: Replay) -> None:
    if r.h.oracle.may_plan():
        r.h.plan()


def apply(r: Replay) -> None:
    if r.h.pending:
        r.h.apply()


def commit(r: Replay) -> None:
    """which"""
    (which,) = r.input.bytes(1)
    if found := r.committable:
        r.commit_all([found[which % 8 % len(found)]], batch=False)


def commit_batch(r: Replay) -> None:
    """which is the first"""
    (which,) = r.input.bytes(1)
    if found := r.committable:
        r.commit_all(found[which % 8 % len(found) :], batch=True)


def turn(r: Replay) -> None:
    """size, seed: a whole engine step of all"""
    size, seed = r.input.bytes(2)
    apply_all(r)
    r.launch_all(r.launchable, size, seed)
    plan(r)
    apply_all(r)
    r.commit_all(r.committable, batch=True)


def fork(r: Replay) -> None:
    """which"""
    (which,) = r.input.bytes(1)
    found = [f for f in r.h.flights if f.stage == "idle"]
    if found and len(r.h.flights) < MAX_IN_FLIGHT:
        r.h.fork(found[which % len(found)])


def close(r: Replay) -> None:
    """which, how (keep: modulo 3; discard: from 192)"""
    which, how = r.input.bytes(2)
    if r.h.flights:
        keep = ("all", "prompt", "nothing")[how % 3]
        r.close_one(r.h.flights[which % len(r.h.flights)], keep, how >= 192)


def pin(r: Replay) -> None:
    """path"""
    path = r.path()
    if len(r.h.pins) < MOST_PINS:
        r.h.pin(*path)


def release(r: Replay) -> None:
    """which"""
    (which,) = r.input.bytes(1)
    if r.h.pins:
        r.h.release(which % len(r.h.pins))


def rare(r: Replay) -> None:
    """what: clear (of a salt, or all), a plan that was applied, or nothing is to run any more"""
    (what,) = r.input.bytes(1)
    if what % 3 == 0:
        r.h.clear((None, *SALTS)[what // 3 % 3])
    elif what % 3 == 1:
        r.h.apply_stale()
    else:
        close_all(r)
        apply_all(r)


def bad(r: Replay) -> None:
    """who, which: a mistake. It changes nothing, so here it may be another one than in walk.cpp"""
    choices = iter(r.input.bytes(2))
    bad_call(r.h, lambda n: next(choices) % n)


OPS = (
    *(reserve,) * 5,
    *(launch,) * 3,
    *(plan,) * 3,  # one of these is free for `want`
    *(apply,) * 3,
    *(commit,) * 3,
    *(launch_batch,) * 2,
    *(commit_batch,) * 2,
    *(turn,) * 3,
    fork,
    *(close,) * 2,
    match,
    pin,
    release,
    rare,
    bad,
)
assert len(OPS) == 32

# ---- the last calls


def close_all(r: Replay) -> None:
    while r.h.flights:
        r.close_one(r.h.flights[0], "all", discard=False)


def apply_all(r: Replay) -> None:
    while r.h.pending:
        r.h.apply()


def release_all(r: Replay) -> None:
    while r.h.pins:
        r.h.release(len(r.h.pins) - 1)


def clear_all(r: Replay) -> None:
    r.h.clear(None)


def main() -> None:
    """`python -m tests.fuzz.replay FILE...` prints the digest that each file ends at."""
    for name in sys.argv[1:]:
        print(name, Replay(Path(name).read_bytes()).run().core.digest)


if __name__ == "__main__":
    main()
