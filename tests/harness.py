"""Drives the oracle, the symbolic memory and (when there is one) the core side by side, one action at a time.

Owns the requests in flight and the prompts they draw on; what is compared after each action is in
comparing.py, transcripts are in harness_transcripts.py. It is the engine and its device too: plans are
applied in order, and before a plan is applied the forwards that it may depend on have run; those of closed
requests (Ghost) run or not. The device knows how many tokens of a verify step stay when it runs the step
behind it, the caches not before the commit. An action takes its choices from `pick(n) -> 0..n-1`, so
hypothesis and a plain seeded generator drive the same code.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.comparing import split
from tests.harness_transcripts import Session, TranscriptCalls
from tests.harness_types import MAX_IN_FLIGHT, SALTS, Config, Flight, Ghost, Pick, Running, draw_config
from tests.oracle import Oracle
from tests.symbolic import SymbolicMemory

__all__ = [
    "MAX_IN_FLIGHT",
    "SALTS",
    "Config",
    "Flight",
    "Ghost",
    "Harness",
    "Pick",
    "Running",
    "draw_config",
]


class Harness(TranscriptCalls):
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
        self.sessions: list[Session] = []
        self.ended: Any = None
        self.history: list[tuple[bytes, list[Any]]] = []
        self.ghosts: list[Ghost] = []
        self.pending: list[tuple[Any, Any]] = []  # plans, in order
        self.stale: tuple[Any, Any] | None = None
        self.named: dict[int, dict[tuple[str, int], Any]] = {}  # by a pending plan, with the owner at plan()
        self.events: Counter[str] = Counter()
        self.log: list[str] = []
        self.steps = self.most_in_flight = 0
        self.closed: Any = None  # the core's last closed lease
        self.rejected: list[tuple[bytes, list[Any]]] = []  # drafts that did not stay, the last few

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

    def reserve(
        self, salt: bytes, path: Sequence[Any], breakpoints: list[int], max_new: int, **times: int
    ) -> None:
        """`times`: what the caller's clock says."""
        tokens, keys = split(path)
        options: dict[str, Any] = {"salt": salt, "breakpoints": breakpoints, "content_keys": keys}
        options |= {"max_new_tokens": max_new, **times}
        best = self.oracle.match(tokens, salt=salt, content_keys=keys).length
        ours, theirs = self.both(
            f"reserve {path} {options}",
            lambda: self.oracle.reserve(tokens, **options),
            lambda: self.core.reserve(tokens, **options),
        )
        self.reserved(salt, path, best, ours, theirs)

    def reserved(self, salt: bytes, path: Sequence[Any], best: int, ours: Any, theirs: Any) -> None:
        """`best`: where it was to resume."""
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

    def launch(
        self, flight: Flight, n: int, tokens: Sequence[int], rows: int | None = None, stay: int = 99
    ) -> None:
        """`stay`: how many of a verify step's tokens stay as the device will see, at most."""
        call = (n,) if rows is None else (n, rows)
        ours, theirs = self.both(
            f"launch {call}",
            lambda: self.oracle.launch(flight.oracle, n, rows),
            lambda: flight.core.launch(n) if rows is None else flight.core.launch(n, rows=rows),
        )
        if isinstance(ours, ValueError):
            self.events["launch_refused"] += 1
        else:
            self.same_step(ours, theirs)
            self.launched(flight, ours, tokens, stay)

    def launched(self, flight: Flight, step: Any, tokens: Sequence[int], stay: int = 99) -> None:
        if step is None:
            self.events["no_room_at_launch"] += 1
            return
        before = flight.steps[-1] if flight.steps else None
        path = list(before.path_behind if before else flight.oracle.tokens)
        verify = flight.oracle.open[-1].rows > 0
        begin = before.begin + before.stays if before and before.verifies else step.begin
        n = step.end - step.begin
        feed = list(tokens[: n if verify else max(step.end - max(begin, flight.oracle.prompt_length), 0)])
        least = n - len(step.write_slots) + 1 if verify else n
        stays = max(min(stay, n), least)
        running = Running(
            flight.oracle.open[-1], step, begin, path + feed, feed, list(flight.oracle.pages), stays
        )
        running.fails = verify and stay < least
        running.void = before is not None and before.void
        flight.steps.append(running)
        assert not verify or len(running.path) == running.end
        self.events["inner"] += len(step.checkpoints)
        self.events["launched_ahead"] += len(flight.steps) > 1
        self.events["fails"] += running.fails

    def launch_batch(
        self,
        flights: list[Flight],
        counts: list[int],
        tokens: Sequence[int],
        rows: list[int] | None = None,
        stay: int = 99,
    ) -> None:
        leases, asked = [f.oracle for f in flights], rows or [None] * len(flights)
        self.log.append(f"launch_batch {counts} {rows}")
        for_core = {} if rows is None else {"rows": rows}
        cores = [f.core for f in flights]
        if any(self.oracle.refuses(*call) for call in zip(leases, counts, asked, strict=True)):
            self.refused(lambda: self.core.launch(cores, counts, **for_core))
            self.events["batch_refused"] += 1
            return
        steps = self.core.launch(cores, counts, **for_core) if self.core is not None else None
        for i, (flight, n, r) in enumerate(zip(flights, counts, asked, strict=True)):
            step = self.oracle.launch(flight.oracle, n, r)
            self.same_in_batch(steps, i, step)
            self.launched(flight, step, tokens, stay)

    def refused(self, call: Callable[[], Any], error: str = "ValueError") -> None:
        """I6: the core refuses a mistake, in a batch all of it, and changes nothing."""
        if self.core is not None:
            before = (self.core.digest, self.core.dump(), self.core.stats())
            found = "nothing"
            try:
                call()
            except Exception as raised:
                found = type(raised).__name__
            assert found == error, f"a mistake raised {found}, expected {error}"
            assert before == (self.core.digest, self.core.dump(), self.core.stats()), "I6: changed"

    def want(self, flight: Flight, position: int) -> None:
        ours, _ = self.both(
            f"want {position}",
            lambda: self.oracle.want(flight.oracle, position),
            lambda: flight.core.want(position),
        )
        self.events["want_refused"] += isinstance(ours, ValueError)

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
        running = flight.next_to_run
        assert running is not None
        self.forward(flight.oracle.salt, running, self.owned(flight))

    def forward(self, salt: bytes, running: Running, owned: Callable[[str, int], bool]) -> None:
        self.log.append(f"forward from {running.begin} {tuple(running.step)}")
        path = running.path[: running.end]
        self.memory.forward(salt, path, running.step, running.table, owned, running.begin, running.lost)
        running.ran = True

    def run_ghost(self, ghost: Ghost, really: bool = True) -> None:
        """What a closed request still writes must be nobody's: I10, and I5 in SymbolicMemory."""
        if not really:  # nor do the later ones of this request
            self.ghosts = [other for other in self.ghosts if other.lease is not ghost.lease]
        else:
            self.ghosts.remove(ghost)
            self.events["ghosts"] += 1
            self.events["ghosts_verify"] += ghost.running.verifies
            self.forward(ghost.lease.salt, ghost.running, lambda space, id_: True)

    def kept(self, running: Running, pick: Pick | None) -> int:
        """How many tokens of a step the engine commits: what the device accepted, or it stops short of it."""
        if not running.verifies:
            return len(running.feed)
        if running.void or running.fails:
            return 0
        n = len(running.feed)
        if pick is not None and pick(5) == 0:
            fewer = [0, *range(n - running.opened.rows + 1, running.stays)]
            return fewer[pick(len(fewer))]
        return running.stays

    def commit(
        self, flights: list[Flight], batch: bool, pick: Pick | None = None, keep: int | None = None
    ) -> None:
        """The oldest step of each; `keep` tokens of a verify step."""
        steps = [f.steps.pop(0) for f in flights]
        counts = [self.kept(running, pick) if keep is None else keep for running in steps]
        feeds = [running.feed[:m] for running, m in zip(steps, counts, strict=True)]
        if self.core is not None and batch:
            tokens = np.array([token for feed in feeds for token in feed], dtype=np.int32)
            told = any(s.verifies for s in steps) or self.rng.random() < 0.5
            named = {"counts": counts} if told else {}
            cores = [f.core for f in flights]
            if any(s.verifies for s in steps):
                self.refused(lambda: self.core.commit(cores, tokens))
            self.core.commit(cores, tokens, **named)
        for flight, running, feed in zip(flights, steps, feeds, strict=True):
            self.log.append(f"commit {feed} of {running.feed}")
            if self.core is not None and not batch:
                flight.core.commit(feed)
            self.oracle.commit(flight.oracle, feed)
            self.committed(flight, running, len(feed))

    def committed(self, flight: Flight, running: Running, m: int) -> None:
        """The step behind a verify step is void where it did not begin at what was committed."""
        self.events["committed_behind"] += bool(flight.steps)
        if not running.verifies:
            return
        self.events["void_never_ran"] += not running.ran
        if running.end > running.begin + m:
            self.rejected = [*self.rejected[-2:], (flight.oracle.salt, running.path[: running.end])]
        short = m < running.stays and not (running.void or running.fails)
        self.events["stopped_short"] += short
        if flight.steps and (m == 0 or short):
            behind = flight.steps[0]
            behind.void = True
            behind.lost = m > 0 and not behind.ran and behind.opened.number is not None
            self.events["lost"] += behind.lost

    def commit_wrong(self, flight: Flight, m: int) -> None:
        """As many tokens of a verify step as cannot stay: both refuse."""
        running = flight.steps[0]
        assert running.verifies and not self.oracle.may_keep(running.opened, m)
        feed = [*running.feed, 1, 1][:m]
        ours, _ = self.both(
            f"commit of {m} tokens",
            lambda: self.oracle.commit(flight.oracle, feed),
            lambda: flight.core.commit(feed),
        )
        assert isinstance(ours, ValueError)
        self.refused(lambda: self.core.commit([flight.core], feed, counts=[m]))
        if running.opened.void:
            self.refused(lambda: flight.core.launch(1), "StateError")
        self.events["commit_refused"] += 1

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

    def close(self, flight: Flight, keep: str, discard: bool, **times: int) -> None:
        self.events[f"closed_{flight.stage}"] += 1
        self.events["closed_in_shared_tail"] += bool(flight.oracle.held & self.oracle.store.counts.keys())
        self.events["closed_before_copy"] += flight.oracle.copy_from is not None
        self.events["closed_two_open"] += len(flight.steps) > 1
        known = flight.oracle.tokens[: flight.oracle.committed]
        if known:
            self.history.append((flight.oracle.salt, list(known)))
        self.events["closed_verify"] += any(s.verifies for s in flight.steps)
        self.ghosts += [
            Ghost(flight.oracle, s) for s in flight.steps if flight.stage_of(s) in ("collected", "applied")
        ]
        self.flights.remove(flight)
        self.closed = flight.core
        self.both(
            f"close {keep} {discard} {times}",
            lambda: self.oracle.close(flight.oracle, keep=keep, discard=discard, **times),
            lambda: flight.core.close(keep=keep, discard=discard, **times),
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
        for session in self.sessions:
            session.since |= {"clear"} if session.nodes else set()
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
