"""Drives the oracle, the symbolic memory and (when there is one) the core side by side, one action at a time.

Owns the requests in flight, the prompts they draw on, and every comparison between the two caches: after each
action ids, page tables, plans, matches and statistics must be equal, and the memory must hold what both
believe. It is the engine and its device too: plans are applied in order, and before a plan is applied the
forwards that it may depend on have run; those of closed requests (Ghost) run or not. An action takes its
choices from `pick(n) -> 0..n-1`, so hypothesis and a plain seeded generator drive the same code.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.oracle import Oracle
from tests.oracle_types import Lease, OpenStep
from tests.symbolic import SymbolicMemory

Pick = Callable[[int], int]
SALTS = (b"", b"tenant")
MAX_IN_FLIGHT = 8


@dataclass(frozen=True)
class Config:
    page_size: int
    pages_per_slab: int
    slabs: int  # unified; in the fixed mode `pages` and `slots` count instead
    pages: int = 0
    slots: int = 0
    slack: int = 0  # slot bytes short of whole pages
    vocabulary: int = 2
    eager: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> SimpleNamespace:
        page_bytes = 16 * self.page_size
        slot_bytes = self.pages_per_slab * page_bytes - 16 * min(self.slack, self.page_size - 1)
        return SimpleNamespace(page_size=self.page_size, page_bytes=page_bytes, slot_bytes=slot_bytes)

    @property
    def memory(self) -> dict[str, int]:
        if self.pages:
            return {"num_pages": self.pages, "num_slots": self.slots}
        return {"memory_bytes": self.slabs * self.pages_per_slab * self.layout.page_bytes}


def draw_config(pick: Pick) -> Config:
    page_size = (1, 2, 3, 4, 7, 16)[pick(6)]
    per_slab = 1 + pick(5)
    options: dict[str, Any] = {
        "inner_checkpoints": bool(pick(2)),
        "alignment": (1, 4)[pick(2)],
        "policy": ("default", "default", "default", "lru")[pick(4)],
        "pass_cost": pick(9),
        "interior_spacing": 2 + pick(7),
        "run_ahead": pick(2),
    }
    slots, pages, slabs = (
        (3 + pick(6), 8 + pick(20), 4 + pick(8)) if pick(2) else (8 + pick(10), 40 + pick(60), 12 + pick(36))
    )
    if pick(3) == 0:
        page_bytes = 16 * page_size
        options["max_cached_bytes"] = (pick(6)) * (per_slab * page_bytes) + pick(8) * page_bytes
    shape = {"slabs": 0, "pages": pages, "slots": slots} if pick(3) == 0 else {"slabs": slabs}
    return Config(
        page_size,
        per_slab,
        slack=pick(3),
        vocabulary=2 + pick(2),
        eager=bool(pick(2)),
        options=options,
        **shape,
    )


@dataclass(eq=False)
class Running:
    """One open step: the tokens that it feeds beyond the prompt, and its request's page table as launched."""

    opened: OpenStep
    feed: list[int]
    table: list[int]
    ran: bool = False


@dataclass(eq=False)
class Flight:
    """One request: the oracle's lease, the core's, and its open steps, the oldest first."""

    side: Oracle
    oracle: Lease
    core: Any
    steps: list[Running] = field(default_factory=list)

    def stage_of(self, running: Running) -> str:
        number = running.opened.number
        if number is None:
            return "launched"
        if number > self.side.done:
            return "collected"
        return "ran" if running.ran else "applied"

    @property
    def stage(self) -> str:
        """Of the oldest open step."""
        return self.stage_of(self.steps[0]) if self.steps else "idle"

    @property
    def may_launch(self) -> bool:
        return self.side.may_launch(self.oracle)

    @property
    def next_to_run(self) -> Running | None:
        waiting = [s for s in self.steps if not s.ran]
        return waiting[0] if waiting and self.stage_of(waiting[0]) == "applied" else None

    @property
    def path(self) -> list[Any]:
        """Every token that was read or is being read."""
        return [*self.oracle.tokens, *(token for running in self.steps for token in running.feed)]


@dataclass(eq=False)
class Ghost:
    """A step of a request that was closed under it: its forward may be on the device all the same."""

    lease: Lease
    running: Running
    path: list[Any]


class Harness:
    def __init__(
        self, config: Config, seed: int = 0, make_core: Callable[[Config], Any] | None = None
    ) -> None:
        self.config = config
        self.oracle = Oracle(config.layout, **config.memory, **config.options)
        self.core = make_core(config) if make_core else None
        arena = self.oracle.arena
        self.memory = SymbolicMemory(
            page_size=config.page_size,
            num_pages=arena.num_pages,
            num_slots=arena.num_slots,
            pages_per_slab=arena.per_slab,
            unified=arena.unified,
            eager=config.eager,
            store=self.oracle.store,
        )
        # only for what must not matter: the order inside a plan, the moment of a forward
        self.rng = random.Random(seed)
        self.flights: list[Flight] = []
        self.pins: list[tuple[Any, Any]] = []
        self.history: list[tuple[bytes, list[Any]]] = []
        self.ghosts: list[Ghost] = []
        self.pending: list[tuple[Any, Any]] = []  # plans, in order
        self.stale: tuple[Any, Any] | None = None
        self.named: dict[int, dict[tuple[str, int], Any]] = {}  # by a pending plan, with the owner at plan()
        self.events: Counter[str] = Counter()
        self.log: list[str] = []
        self.steps = self.most_in_flight = 0
        self.closed: Any = None  # the core's last closed lease

    # ---- comparing

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
            self.same(what, tuple(ours), (theirs.length, theirs.kv_length, theirs.reason, theirs.diverged))

    def same_step(self, ours: Any, theirs: Any) -> None:
        if self.core is not None and ours is not None:
            found = (theirs.begin, theirs.end, theirs.read_slot, theirs.write_slot)
            self.same("step", tuple(ours), (*found, [tuple(c) for c in theirs.checkpoints]))

    def verify(self) -> None:
        """After every action: I1 on both sides, I2, I5, I8, I11 in memory, every observable equal (I7)."""
        self.steps += 1
        self.most_in_flight = max(self.most_in_flight, len(self.flights))
        self.oracle.check()
        self.memory.verify()
        self.check_resting()
        self.check_tables()
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
        self.same("tree", self.oracle.shape(), shape_of(self.core.dump()))
        self.probe()

    def probe(self) -> None:
        """I4, I8: the core knows of each path what the oracle knows: nothing only fed, no other salt's."""
        paths = [(f.oracle.salt, f.path) for f in self.flights] + self.history[-2:]
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

    # ---- actions

    def match(self, salt: bytes, path: Sequence[Any]) -> None:
        tokens, keys = split(path)
        before = self.core.digest if self.core is not None else None
        ours, theirs = self.both(
            "match",
            lambda: self.oracle.match(tokens, salt=salt, content_keys=keys),
            lambda: self.core.match(tokens, salt=salt, content_keys=keys),
        )
        self.same_match("I12 match", ours, theirs)
        assert ours.length <= len(tokens) - 1, "I3"
        if self.core is not None:
            assert self.core.digest == before, "I9: match changed the digest"

    def reserve(self, salt: bytes, path: Sequence[Any], breakpoints: list[int], max_new: int) -> None:
        tokens, keys = split(path)
        options = {"salt": salt, "breakpoints": breakpoints, "content_keys": keys, "max_new_tokens": max_new}
        best = self.oracle.match(tokens, salt=salt, content_keys=keys).length
        ours, theirs = self.both(
            f"reserve {path} {options}",
            lambda: self.oracle.reserve(tokens, **options),
            lambda: self.core.reserve(tokens, **options),
        )
        self.history.append((salt, list(path)))
        if isinstance(ours, ValueError):
            self.events["too_large"] += 1
        elif ours is None:
            self.events["no_room"] += 1
        else:
            self.events["reserved"] += 1
            self.events["hit"] += ours.start > 0
            self.events["retried"] += ours.start < best
            self.flights.append(Flight(self.oracle, ours, theirs))
            self.same_match("match at reserve", ours.match, theirs and theirs.match)

    def launch(self, flight: Flight, n: int, tokens: Sequence[int]) -> None:
        ours, theirs = self.both(
            f"launch {n}", lambda: self.oracle.launch(flight.oracle, n), lambda: flight.core.launch(n)
        )
        if not isinstance(ours, ValueError):
            self.same_step(ours, theirs)
            self.launched(flight, ours, tokens)

    def launched(self, flight: Flight, step: Any, tokens: Sequence[int]) -> None:
        if step is None:
            self.events["no_room_at_launch"] += 1
            return
        decoded = step.end - max(step.begin, flight.oracle.prompt_length)
        feed = list(tokens[: max(decoded, 0)])
        flight.steps.append(Running(flight.oracle.open[-1], feed, list(flight.oracle.pages)))
        self.events["inner"] += len(step.checkpoints)
        self.events["launched_ahead"] += len(flight.steps) > 1

    def launch_batch(self, flights: list[Flight], counts: list[int], tokens: Sequence[int]) -> None:
        ends = [flight.oracle.computed + n for flight, n in zip(flights, counts, strict=True)]
        if not all(self.oracle.arena.could_ever_hold(1, -(-end // self.config.page_size)) for end in ends):
            return  # a size that can never fit is a mistake, which would refuse the whole batch
        self.log.append(f"launch_batch {counts}")
        steps = self.core.launch([f.core for f in flights], counts) if self.core is not None else None
        listed: dict[int, list[tuple[int, int]]] = {}
        for index, position, slot in steps.checkpoints if steps is not None else ():
            listed.setdefault(int(index), []).append((int(position), int(slot)))
        for i, (flight, n) in enumerate(zip(flights, counts, strict=True)):
            step = self.oracle.launch(flight.oracle, n)
            self.same("ready", step is not None, steps is not None and bool(steps.ready[i]))
            if step is not None and steps is not None:
                found = (steps.begin[i], steps.end[i], steps.read_slots[i], steps.write_slots[i])
                self.same("step of a batch", tuple(step), (*(int(x) for x in found), listed.get(i, [])))
            self.launched(flight, step, tokens)

    def plan(self) -> None:
        ours, theirs = self.both("plan", self.oracle.plan, lambda: self.core.plan())
        self.pending.append((ours, theirs))
        self.events["two_pending"] += len(self.pending) > 1
        owners = self.owners()
        for _, dst in ours.copy_pages:
            taker = owners["page", dst]
            assert taker.committed == taker.start, "a page is copied only after a restore or a fork"
        slots = {s for pair in ours.copy_slots for s in pair} | set(ours.zero_slots)
        pages = {p for pair in ours.copy_pages for p in pair} | set(ours.zero_pages)
        ids = [("slot", s) for s in slots] + [("page", p) for p in pages]
        self.named[ours.number] = {id_: owners[id_] for id_ in ids}
        if theirs is not None:
            for name in ("number", "zero_slots", "zero_pages"):
                self.same(name, getattr(ours, name), getattr(theirs, name))
            for name in ("copy_slots", "copy_pages"):
                self.same(name, [list(pair) for pair in getattr(ours, name)], getattr(theirs, name))

    def apply(self) -> None:
        """Of the oldest pending plan, behind what the device has to do before it."""
        ours, theirs = self.pending.pop(0)
        self.catch_up(ours.number)
        self.memory.apply(theirs if theirs is not None else ours, self.rng)
        self.both("void applied", lambda: self.oracle.applied(ours), lambda: self.core.applied(theirs))
        del self.named[ours.number]
        self.stale = (ours, theirs)

    def catch_up(self, number: int) -> None:
        """Stream order: a step runs before the plan that carries its lease's next one; others may be late,
        but what closed requests left behind runs now or never."""
        for flight in self.flights:
            due = any(running.opened.number == number for running in flight.steps)
            while flight.next_to_run is not None and (due or self.rng.random() < 0.5):
                self.run(flight)
        while passing := [g for g in self.ghosts if (g.running.opened.number or 0) < number]:
            self.run_ghost(passing[0], really=self.rng.random() < 0.7)

    def apply_stale(self) -> None:
        """`applied` of an older plan does nothing."""
        if self.stale is not None:
            ours, theirs = self.stale
            self.both(
                "void applied stale", lambda: self.oracle.applied(ours), lambda: self.core.applied(theirs)
            )

    def run(self, flight: Flight) -> None:
        ours, running = flight.oracle, flight.next_to_run
        assert running is not None
        step = running.opened.step
        self.log.append(f"forward {step}")
        self.memory.forward(ours.salt, flight.path[: step.end], step, running.table, self.owned(flight))
        running.ran = True

    def run_ghost(self, ghost: Ghost, really: bool = True) -> None:
        """What a closed request still writes must be nobody's: I10, and I5 in SymbolicMemory."""
        step = ghost.running.opened.step
        if not really:  # nor do the later ones of this request
            self.ghosts = [other for other in self.ghosts if other.lease is not ghost.lease]
        else:
            self.ghosts.remove(ghost)
            self.events["ghosts"] += 1
            self.log.append(f"forward of a closed request {step}")
            path = ghost.path[: step.end]
            self.memory.forward(ghost.lease.salt, path, step, ghost.running.table, lambda space, id_: True)

    def commit(self, flights: list[Flight], batch: bool) -> None:
        """The oldest step of each."""
        feeds = [f.steps.pop(0).feed for f in flights]
        if self.core is not None and batch:
            tokens = [token for feed in feeds for token in feed]
            self.core.commit([f.core for f in flights], np.array(tokens, dtype=np.int32))
        for flight, feed in zip(flights, feeds, strict=True):
            self.log.append(f"commit {feed}")
            if self.core is not None and not batch:
                flight.core.commit(feed)
            self.oracle.commit(flight.oracle, feed)
            self.events["committed_behind"] += bool(flight.steps)

    def fork(self, flight: Flight) -> None:
        published = self.oracle.counters["published_fork"]
        self.events["forked_in_shared_tail"] += bool(flight.oracle.held & self.oracle.store.counts.keys())
        self.events["forked_before_copy"] += flight.oracle.copy_from is not None
        ours, theirs = self.both("fork", lambda: self.oracle.fork(flight.oracle), lambda: flight.core.fork())
        self.events["fork_published"] += self.oracle.counters["published_fork"] - published
        if ours is None:
            self.events["no_room_at_fork"] += 1
        else:
            self.events["forked"] += 1
            self.flights.append(Flight(self.oracle, ours, theirs))

    def close(self, flight: Flight, keep: str, discard: bool) -> None:
        self.events[f"closed_{flight.stage}"] += 1
        self.events["closed_in_shared_tail"] += bool(flight.oracle.held & self.oracle.store.counts.keys())
        self.events["closed_before_copy"] += flight.oracle.copy_from is not None
        self.events["closed_two_open"] += len(flight.steps) > 1
        known = flight.oracle.tokens[: flight.oracle.committed]
        if known:
            self.history.append((flight.oracle.salt, list(known)))
        path = flight.path
        self.ghosts += [
            Ghost(flight.oracle, s, path)
            for s in flight.steps
            if flight.stage_of(s) in ("collected", "applied")
        ]
        self.flights.remove(flight)
        self.closed = flight.core
        self.both(
            f"close {keep} {discard}",
            lambda: self.oracle.close(flight.oracle, keep=keep, discard=discard),
            lambda: flight.core.close(keep=keep, discard=discard),
        )

    def pin(self, salt: bytes, path: Sequence[Any]) -> None:
        tokens, keys = split(path)
        ours, theirs = self.both(
            "pin",
            lambda: self.oracle.pin(tokens, salt=salt, content_keys=keys),
            lambda: self.core.pin(tokens, salt=salt, content_keys=keys),
        )
        if ours is not None:
            self.events["pinned"] += 1
            self.same("pin", ours.length, theirs and theirs.length)
            self.pins.append((ours, theirs))

    def release(self, index: int) -> None:
        ours, theirs = self.pins.pop(index)
        self.both("void release", lambda: self.oracle.release(ours), lambda: theirs.release())

    def clear(self, salt: bytes | None) -> None:
        ours, theirs = self.both(
            "clear", lambda: self.oracle.clear(salt=salt), lambda: self.core.clear(salt=salt)
        )
        self.same("cleared", ours, theirs)
        self.events["cleared"] += 1

    def report(self) -> str:
        text = (
            f"{self.config}\nlast calls:\n"
            + "\n".join(self.log[-25:])
            + "\n--- oracle\n"
            + self.oracle.dump()
        )
        return text + ("\n--- core\n" + self.core.dump() if self.core is not None else "")

    def total_events(self) -> Counter[str]:
        found = self.events + self.memory.events + self.oracle.counters
        found += self.oracle.events + self.oracle.store.events
        found["rested"] = found["rest_ended_by_plan"] + found["rest_ended_idle"]
        found["evicted"] = self.oracle.store.evicted.total()
        return found


NODE = re.compile(
    r"\s+\[(\d+), (\d+)\) tokens .* pages (\d+)(?: pins \d+)?"
    r"(?: \* (\w+) slot (\d+)(?: tail (\d+))? tick (\d+)( superseded)?(?: pinned (\d+))?)?"
)


def shape_of(dump: str) -> list[tuple[Any, ...]]:
    """The core's tree as Oracle.shape gives it."""
    found, salt = [], ""
    for line in dump.splitlines():
        if line.startswith("salt "):
            salt = line[len("salt '") : -1]
        elif node := NODE.fullmatch(line):
            begin, depth, pages, kind, slot, tail, tick, superseded, pins = node.groups()
            mark = kind and (kind, int(slot), int(tail or -1), int(tick), bool(superseded), int(pins or 0))
            found.append((salt, int(begin), int(depth), int(pages), mark))
        else:
            assert not line.startswith(" "), f"unknown line in the dump: {line}"
    return sorted(found, key=repr)


def split(path: Sequence[Any]) -> tuple[list[int], list[tuple[int, bytes]]]:
    """Symbols back into what a caller passes: token ids, and content keys where a symbol carries content."""
    tokens = [s[0] if isinstance(s, tuple) else s for s in path]
    return tokens, [(i, s[1]) for i, s in enumerate(path) if isinstance(s, tuple)]
