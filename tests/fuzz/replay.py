"""Replays a fuzzer's input through the Python model: oracle, symbolic memory and core side by side.

Owns the format: what the bytes of an input mean (read_config, OPS; operands in decode.py). tests/fuzz/walk.h
decodes the same in C++, and test_fuzz.py holds the two to one digest. An input starts with HEADER bytes that
choose the options; then come ops, one byte each (modulo 40), with the operands that their docstrings name, a
byte each (those on transcripts are in sessions.py). Past the end every byte is 0, and no further op begins.
An operand counts modulo what there is to choose from, so most inputs are sequences of valid calls; an op that
is not possible now reads its operands and does nothing.

The operand `which` chooses a request by bits 0-2; bits 3-7 say how: of a launch the rows (decode.py, rows),
of a commit whether the engine stops short of what the device accepted, and where (kept). How much the device
accepts is said at the launch, by its seed (staying): a step behind runs before the commit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_calls import bad_call
from tests.fuzz import sessions
from tests.fuzz.decode import Decoding, Reader, kept, read_config, staying
from tests.harness import MAX_IN_FLIGHT, SALTS, Flight, Harness
from tests.test_state_machine import make_core

HEADER = 9
MOST_PINS, TOO_MANY = 3, 2**20


class Replay(Decoding):
    """One input, and what its ops have in common."""

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

    def reserve_options(self, length: int) -> tuple[list[int], int]:
        """Operands extras, breakpoints, more tokens (see reserve), for a prompt of `length`."""
        (extras,) = self.input.bytes(1)
        places = self.input.bytes(extras % 4)
        max_new = self.input.bytes(1)[0] % 24 if extras & 4 else 0
        longest = length + max_new
        return sorted({1 + byte % longest for byte in places}) if longest else [], max_new

    def finish(self) -> None:
        """Four of the last calls, two bits of the header's last byte each."""
        for shift in range(0, 8, 2):
            (close_all, apply_all, release_all, clear_all)[self.last_calls >> shift & 3](self)

    def launch_all(self, flights: list[Flight], size: int, seed: int, how: int) -> None:
        """One call. A shape that would be refused gives way to a single token, or (one seed of 16) refuses
        the whole batch."""
        if not flights:
            return
        shapes = []
        for i, flight in enumerate(flights):
            n = self.count(flight, (size + 37 * i) % 256)
            rows = self.rows(flight, n, (how + 5 * i) % 32)
            if seed % 16 != 15 and self.h.oracle.refuses(flight.oracle, n, rows):
                n, rows = 1, None
            shapes.append((n, rows))
        rows = None
        if any(r is not None for _, r in shapes):
            rows = [
                self.default_rows(f, n) if r is None else r for f, (n, r) in zip(flights, shapes, strict=True)
            ]
        self.h.launch_batch(flights, [n for n, _ in shapes], self.feed(seed), rows, staying(seed))

    def default_rows(self, flight: Flight, n: int) -> int:
        try:
            return self.h.oracle.rows_of(flight.oracle, n, None)
        except ValueError:  # more tokens than a verify step may have: all of them is as wrong
            return n

    def commit_all(self, flights: list[Flight], batch: bool, how: int) -> None:
        """The forwards that they wait for run first, if they did not yet; of a void step perhaps never."""
        for flight in flights:
            while flight.stage == "applied" and not (flight.steps[0].void and self.h.rng.random() < 0.5):
                self.h.run(flight)
        if flights:
            self.h.commit(flights, batch, kept(how))

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
    breakpoints, max_new = r.reserve_options(len(path))
    if len(r.h.flights) < MAX_IN_FLIGHT:
        r.paths.append((salt, path))
        r.h.reserve(salt, path, breakpoints, max_new)


def launch(r: Replay) -> None:
    """which, size (255: more than fits, beyond the prompt), seed of what it feeds and of what stays"""
    which, size, seed = r.input.bytes(3)
    if found := r.launchable:
        flight = found[which % 8 % len(found)]
        n = TOO_MANY if size == 255 else r.count(flight, size)
        r.h.launch(flight, n, r.feed(seed), r.rows(flight, n, which >> 3), staying(seed))


def launch_batch(r: Replay) -> None:
    """which is the first, size, seed"""
    which, size, seed = r.input.bytes(3)
    if found := r.launchable:
        r.launch_all(found[which % 8 % len(found) :], size, seed, which >> 3)


def want(r: Replay) -> None:
    """which (from 128: and all that say the same), where"""
    which, where = r.input.bytes(2)
    if r.h.flights:
        flight = r.h.flights[which % 8 % len(r.h.flights)]
        position, known = r.position(flight, where), (flight.oracle.salt, list(flight.oracle.tokens))
        same = [f for f in r.h.flights if (f.oracle.salt, f.oracle.tokens) == known]
        for each in same if which >= 128 else [flight]:
            r.h.want(each, position)


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
        r.commit_all([found[which % 8 % len(found)]], batch=False, how=which >> 3)


def commit_batch(r: Replay) -> None:
    """which is the first"""
    (which,) = r.input.bytes(1)
    if found := r.committable:
        r.commit_all(found[which % 8 % len(found) :], batch=True, how=which >> 3)


def turn(r: Replay) -> None:
    """size, seed: a whole engine step of all"""
    size, seed = r.input.bytes(2)
    apply_all(r)
    r.launch_all(r.launchable, size, seed, 0)
    plan(r)
    apply_all(r)
    r.commit_all(r.committable, batch=True, how=0)


def overlap(r: Replay) -> None:
    """size, seed, how (bits 0-4 of the launch, 3-7 of the commit): the same of an engine that runs ahead"""
    size, seed, how = r.input.bytes(3)
    r.launch_all(r.launchable, size, seed, how % 32)
    plan(r)
    apply_all(r)
    r.commit_all(r.ended, batch=True, how=how >> 3)


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
    who, which = r.input.bytes(2)
    steps = [f for f in r.committable if f.steps[0].verifies]
    if steps and which % 2:
        flight = steps[who % len(steps)]
        opened = flight.steps[0].opened
        wrong = [m for m in range(len(flight.steps[0].feed) + 2) if not r.h.oracle.may_keep(opened, m)]
        r.h.commit_wrong(flight, wrong[which % len(wrong)])
    else:
        choices = iter((who, which))
        bad_call(r.h, lambda n: next(choices, which) % n)


OPS = (
    *(reserve,) * 5,
    *(launch,) * 3,
    *(plan,) * 2,
    want,
    *(apply,) * 3,
    *(commit,) * 3,
    *(launch_batch,) * 2,
    *(commit_batch,) * 2,
    *(turn,) * 2,
    overlap,
    fork,
    *(close,) * 2,
    match,
    pin,
    release,
    rare,
    bad,
    *sessions.OPS,
)
assert len(OPS) == 40

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
