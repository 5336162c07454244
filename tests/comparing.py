"""Every comparison of the two caches and of the memory with both: what must be equal, what must hold.

A part of Harness (harness.py), which owns all state named below; nothing here makes a call that changes a
cache but `both`, which makes the same call on both sides.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.harness_types import SALTS, Flight
from tests.oracle import Oracle
from tests.oracle_types import Lease
from tests.symbolic import SymbolicMemory


class Comparing:
    oracle: Oracle
    core: Any
    memory: SymbolicMemory
    rng: random.Random
    flights: list[Flight]
    pending: list[tuple[Any, Any]]
    named: dict[int, dict[tuple[str, int], Any]]
    history: list[tuple[bytes, list[Any]]]
    rejected: list[tuple[bytes, list[Any]]]
    events: Counter[str]
    log: list[str]
    steps: int
    most_in_flight: int

    def both(self, name: str, ours: Callable[[], Any], theirs: Callable[[], Any] | None) -> tuple[Any, Any]:
        """The same call on both sides: both return, or both raise ValueError."""
        self.log.append(name)
        answers = []
        for call in (ours, theirs if self.core is not None else None):
            try:
                answers.append(call() if call else None)
            except ValueError as error:
                answers.append(error)
        if self.core is not None:
            kinds = [type(a).__name__ if isinstance(a, ValueError) else a is None for a in answers]
            assert kinds[0] == kinds[1] or name.startswith("void"), (
                f"{name}: oracle {answers[0]!r}, core {answers[1]!r}"
            )
        return answers[0], answers[1]

    def same(self, what: str, ours: Any, theirs: Any) -> None:
        if self.core is not None:
            theirs = theirs.tolist() if isinstance(theirs, np.ndarray) else theirs
            assert ours == theirs, f"{what}: oracle {ours}, core {theirs}"

    def same_match(self, what: str, ours: Any, theirs: Any) -> None:
        if self.core is not None:
            self.same(what, tuple(ours), tuple(theirs))
            self.events[f"missed_{ours.missed.cause}" if ours.missed else "missed_nothing"] += 1

    def same_step(self, ours: Any, theirs: Any) -> None:
        if self.core is not None and ours is not None:
            found = (theirs.begin, theirs.end, theirs.read_slot, theirs.write_slot)
            rows = (theirs.begin_max, list(theirs.read_slots), list(theirs.write_slots))
            self.same("step", tuple(ours), (*found, [tuple(c) for c in theirs.checkpoints], *rows))

    def same_in_batch(self, steps: Any, i: int, ours: Any) -> None:
        """`ours` beside row `i` of the core's Steps."""
        if self.core is None:
            return
        self.same("ready", ours is not None, bool(steps.ready[i]))
        if ours is None:
            return
        width = self.oracle.draft_tokens + 1
        for name, array in (("candidates", steps.candidates), ("rows", steps.rows)):
            assert array.shape == (len(steps.ready), width) and array.dtype == np.int32, f"{name} of a batch"
        names = ("begin", "end", "read_slots", "write_slots", "begin_max")
        begin, end, read, write, begin_max = (int(getattr(steps, name)[i]) for name in names)
        listed = [(int(q), int(slot)) for index, q, slot in steps.checkpoints if int(index) == i]
        padded = [[*slots, *[-1] * (width - len(slots))] for slots in (ours.read_slots, ours.write_slots)]
        self.same("step of a batch", tuple(ours[:6]), (begin, end, read, write, listed, begin_max))
        self.same("candidates", padded[0], steps.candidates[i].tolist())
        self.same("rows", padded[1], steps.rows[i].tolist())

    def verify(self) -> None:
        """After every action: I1 on both sides, I2, I5, I8, I11 in memory, every observable equal (I7)."""
        self.steps += 1
        self.most_in_flight = max(self.most_in_flight, len(self.flights))
        self.oracle.check()
        self.memory.verify()
        self.check_resting()
        self.check_tables()
        self.verify_transcripts()
        if self.core is None:
            return
        self.core.check()
        for flight in self.flights:
            ours, theirs = flight.oracle, flight.core
            for name in (
                "start",
                "committed",
                "computed",
                "capacity",
                "prompt_length",
                "boundary",
                "closed",
                "extra_passes",
                "live_slot",
                "pages",
            ):
                self.same(name, getattr(ours, name), getattr(theirs, name))
        theirs = self.core.stats()
        for name, ours in self.oracle.stats().items():
            if name in theirs:
                self.same(f"stats {name}", ours, theirs[name])
        dump = self.core.dump()
        self.same("tree", self.oracle.shape(), shape_of(dump))
        if self.oracle.store.learned is not None:
            self.same("worths", self.oracle.store.learned.by_slot(), worths_of(dump))
        self.probe()

    def verify_transcripts(self) -> None:
        raise NotImplementedError

    def probe(self) -> None:
        """I4, I8: the core knows of each path what the oracle knows: nothing only fed or drafted, no other
        salt's."""
        paths = [(f.oracle.salt, f.path) for f in self.flights] + self.history[-2:] + self.rejected
        for _, path in paths[self.steps % 3 :: 3]:
            tokens, keys = split(path)
            for each in SALTS:
                ours = self.oracle.match(tokens, salt=each, content_keys=keys)
                self.same_match(
                    f"probe {each!r} {path}", ours, self.core.match(tokens, salt=each, content_keys=keys)
                )

    def owners(self) -> dict[tuple[str, int], Any]:
        """Who holds each id in use: a checkpoint or a lease; "the tree" for its pages."""
        found: dict[tuple[str, int], Any] = {("page", page): "the tree" for page in self.oracle.store.counts}
        found.update({("slot", c.slot): c for c in self.oracle.store.checkpoints.values()})
        for lease in (*self.oracle.leases, *self.oracle.resting):
            found.update({("slot", slot): lease for slot in lease.slots})
            found.update({("page", page): lease for page in lease.held if ("page", page) not in found})
        return found

    def check_resting(self) -> None:
        """I10: while a plan is pending, every id that it names stays with the owner it had at plan(). A lease
        that has gone on may leave the slot that the plan copies to the tree, in its checkpoint, pinned."""
        now = self.owners() if self.pending else {}
        for ours, _ in self.pending:
            for id_, owner in self.named[ours.number].items():
                kept = now.get(id_) is owner or (isinstance(owner, Lease) and now.get(id_) is owner.read)
                assert kept, f"I10: {id_} changed hands while plan {ours.number}, which names it, is pending"

    def check_tables(self) -> None:
        """A page table never changes under a running request: it only grows."""
        for flight in self.flights:
            for running in flight.steps:
                assert flight.oracle.pages[: len(running.table)] == running.table, "a page table changed"

    def owned(self, flight: Flight) -> Callable[[str, int], bool]:
        """I5: a step writes only slots that its lease alone owns, and pages that it holds: the tree may serve
        what lies in them before (SymbolicMemory.guard)."""

        def alone(space: str, id_: int) -> bool:
            others = [h for h in (*self.oracle.leases, *self.oracle.resting) if h is not flight.oracle]
            store = self.oracle.store
            if space == "page":
                held = id_ in flight.oracle.held and id_ not in store.pages.values()
                return held and not any(id_ in h.pages for h in others)
            slots = {c.slot for c in store.checkpoints.values()} | {s for h in others for s in h.slots}
            return id_ in flight.oracle.slots and id_ not in slots

        return alone


NODE = re.compile(
    r"\s+\[(\d+), (\d+)\) tokens .* pages (\d+)(?: pins \d+)?"
    r"(?: \* (\w+) slot (\d+)(?: tail (\d+))? tick (\d+)( superseded)?(?: worth (\d+))?(?: pinned (\d+))?)?"
)


def shape_of(dump: str) -> list[tuple[Any, ...]]:
    """The core's tree as Oracle.shape gives it."""
    found, salt = [], ""
    for line in dump.splitlines():
        if line.startswith("salt "):
            salt = line[len("salt '") : -1]
        elif node := NODE.fullmatch(line):
            begin, depth, pages, kind, slot, tail, tick, superseded, _, pins = node.groups()
            mark = kind and (kind, int(slot), int(tail or -1), int(tick), bool(superseded), int(pins or 0))
            found.append((salt, int(begin), int(depth), int(pages), mark))
        else:
            assert not line.startswith(" "), f"unknown line in the dump: {line}"
    return sorted(found, key=repr)


def worths_of(dump: str) -> dict[int, int]:
    """What the core believes each unpinned checkpoint to be worth, by its slot."""
    nodes = [node.groups() for line in dump.splitlines() if (node := NODE.fullmatch(line))]
    return {int(slot): int(worth) for *_, slot, _, _, _, worth, _ in nodes if worth}


def split(path: Sequence[Any]) -> tuple[list[int], list[tuple[int, bytes]]]:
    """Symbols back into what a caller passes: token ids, and content keys where a symbol carries content."""
    tokens = [s[0] if isinstance(s, tuple) else s for s in path]
    return tokens, [(i, s[1]) for i, s in enumerate(path) if isinstance(s, tuple)]
