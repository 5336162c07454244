"""The oracle's history: docs/policy.md sections 2, 3 and 5 in plain Python, exact to the integer.

Owns records, their spells, and what was learned of reuse. There is no radix tree of tokens: a record is found
by its (salt, path), and each knows the records next above and below it. What indices and flows are worth is
oracle_worth.py's; `revalue` is how it is told. Knows nothing of slots and pages. Where the page leaves
rounding or a moment open, it does what the core does.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.oracle_store import Key, Symbol, common

BUCKETS, ONE, INDEX_BITS = 56, 1 << 32, 28
LOOKS = 64  # at records, for a new one
PRIOR = ONE * 3 // 100
RARER = {"prompt_end": 4, "chunk_end": 8, "cut": 8, "interior": 16}
USES, WEIGHT = (2, 2, 8, 8), (16, 16, 40, 40)
TURNS, GAP_UNIT, GAP_MEMORY, FARTHEST = 14, 8, 7, 4096
Class = tuple[str, int, int]  # kind, stage, gap: its prefixes are the coarser classes


def first_age(bucket: int) -> int:
    """0 .. 7, then four an octave: 8, 10, 12, 14, 16, 20, ..."""
    octave, quarter = divmod(bucket - 8, 4)
    return bucket if bucket < 8 else (4 + quarter) << (octave + 1)


WIDTHS = [first_age(b + 1) - first_age(b) for b in range(BUCKETS)]


def quarters(bucket: int, age: int) -> int:
    """Of the bucket, that are behind at this age."""
    return min((age - first_age(bucket)) * 4 // WIDTHS[bucket], 3)


def half_octave(value: int) -> int:
    """0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, ..."""
    bits = value.bit_length()
    return value if value < 2 else 2 * bits - 2 + (value >> (bits - 2) & 1)


def best_rate(hazards: list[int], bucket: int, behind: int) -> int:
    """The index: over every horizon, the most uses for each request that the boundary is held."""
    gone = hazards[bucket] // 4 * behind
    alive, used, held, best = ONE - gone, 0, 0, 0
    for b in range(bucket, BUCKETS):
        first = b == bucket
        ends = hazards[b] - gone if first else (alive * (hazards[b] >> 8)) >> 24
        used += ends
        held += (alive - ends // 2) * (WIDTHS[b] * (4 - behind) // 4 if first else WIDTHS[b])
        alive -= ends
        best = max(best, (used << INDEX_BITS) // held)
        if alive < ONE // 1024:
            break
    return best


class Hazards:
    """Counts for each class, where () is the class of all."""

    def __init__(self) -> None:
        self.at_risk: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * BUCKETS)  # halves
        self.events: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * BUCKETS)
        # When they were computed, hazards, and the indices asked for since.
        self.known: dict[Class, tuple[int, list[int], dict[tuple[int, int], int]]] = {}

    def half(self, which: Class, bucket: int) -> None:
        for level in range(4):
            self.at_risk[which[:level]][bucket] += 1

    def moved(self, before: Class, after: Class, bucket: int) -> None:
        """A spell goes on in another class: it counts only where they differ."""
        for level in range(4):
            if before[:level] != after[:level]:
                self.at_risk[before[:level]][bucket] += 1
                self.at_risk[after[:level]][bucket] += 1

    def used(self, which: Class, bucket: int) -> None:
        self.half(which, bucket)
        for level in range(4):
            self.events[which[:level]][bucket] += 1

    def index(self, which: Class, bucket: int, age: int, now: int) -> int:
        if which not in self.known or now - self.known[which][0] >= min(max(now // 64, 1), 16):
            self.known[which] = (now, self.learn(which), {})
        _, hazards, indices = self.known[which]
        at = bucket, quarters(bucket, age)
        if at not in indices:
            indices[at] = best_rate(hazards, *at)
        return indices[at]

    def next_look(self, which: Class, bucket: int, age: int, now: int) -> int:
        """The age of the next bucket, or of the next quarter where the index more than doubles in it."""
        here, after = (self.index(which, b, first_age(b), now) for b in (bucket, bucket + 1))
        behind = quarters(bucket, age) + 1 if after > 2 * here else 4
        return first_age(bucket) + -(-behind * WIDTHS[bucket] // 4)

    def learn(self, which: Class) -> list[int]:
        h = [PRIOR] * BUCKETS
        for level in range(4):
            at_risk, events = self.at_risk[which[:level]], self.events[which[:level]]
            rarer = RARER.get(which[0], 1) if level == 1 else 1
            seen = USES[level] * ONE // rarer + sum(events) * ONE
            expected = USES[level] * ONE + sum(n * (each // 2) for n, each in zip(at_risk, h, strict=True))
            scale = (seen >> 8) * 256 // max(expected >> 16, 1)
            for b in range(BUCKETS):
                scaled = min((h[b] * scale) >> 16, ONE)
                spells = at_risk[b] + WEIGHT[level]
                h[b] = min((events[b] * 2 * ONE + scaled * WEIGHT[level]) // spells, ONE)
        return h


class Left(NamedTuple):
    cause: str
    kind: str  # of the checkpoint
    request: int
    time: int | None  # the caller's, if it had told any


@dataclass(eq=False)
class Record:
    key: Key
    born: int  # in the order of making; 0: the root of a salt
    kind: str
    turns: int = 0
    gap: int = 0
    uses: int = 0
    priority: int = 0  # of the request that made it, or came back to it last
    passed: bool = False
    leases: int = 0  # that stand here
    checkpoint: Any = None  # None: a ghost
    hint: str | None = None  # "returns", "silent"
    returns: int = 0
    opened: int = 0
    order: int = 0  # of its spell among all
    bucket: int = 0
    due: int | None = None  # the request at which its index is looked up again
    turn: int = 0  # among those of one request: in the order in which that was decided
    which: Class = ("", 0, 0)
    index: int = 0
    given: int = 0
    left: Left | None = None  # how its last checkpoint left; None: none ever did
    above: Record | None = None
    below: list[Record] = field(default_factory=list)

    @property
    def path(self) -> tuple[Symbol, ...]:
        return self.key[1]

    @property
    def depth(self) -> int:
        return len(self.key[1])

    @property
    def flow(self) -> int:
        return sum(each.given for each in self.below)

    def classify(self) -> Class:
        fresh = TURNS if self.passed else min(half_octave(self.turns), TURNS - 1)
        stage = TURNS + min(self.uses.bit_length(), 5) if self.uses else fresh
        return (self.kind, stage, min((self.gap // GAP_UNIT).bit_length(), 12))


@dataclass(eq=False)
class Trail:
    """What a lease remembers of its path."""

    last: Record
    start: int
    left: int = 0
    again: int = 0
    turns: int = 0
    gap: int = 0
    priority: int = 0


class History:
    def __init__(self, most_tokens: int, revalue: Callable[[Any], None]) -> None:
        self.most_tokens, self.revalue = most_tokens, revalue
        self.hazards = Hazards()
        self.records: dict[Key, Record] = {}  # without roots, in the order of making
        self.roots: dict[bytes, Record] = {}
        self.depths: dict[bytes, Counter[int]] = defaultdict(Counter)  # at which a salt has records
        self.now = self.born = self.spells = self.decided = self.tokens = 0
        self.first_time, self.time, self.first_request = -1, 0, 0
        self.followed: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    # ---- requests

    def arrived(self, salt: bytes, path: tuple[Symbol, ...], priority: int = 0) -> Trail:
        self.now += 1
        self.pass_time()
        known = path[:-1]  # a hit leaves one token
        exit_ = self.deepest(salt, known)
        trail = Trail(exit_, 0, priority=priority)
        exit_.leases += 1
        trail.left = self.leaves(exit_, known)
        if not exit_.depth:
            return trail
        above = exit_.above
        while above is not None and above.depth and not above.passed:
            self.goes_on(above)
            above = above.above
        trail.turns, trail.gap = exit_.turns + 1, GAP_UNIT * (self.now - exit_.opened)
        self.followed[exit_.kind] += not exit_.uses
        exit_.due = None
        self.hazards.used(exit_.which, exit_.bucket)
        self.events["uses"] += 1
        exit_.priority = priority
        seen = min(exit_.uses, GAP_MEMORY)
        exit_.uses, exit_.gap = exit_.uses + 1, (exit_.gap * seen + trail.gap) // (seen + 1)
        self.open_spell(exit_)
        if exit_.checkpoint is None and exit_.uses >= 2:
            trail.again = exit_.depth
        return trail

    def deepest(self, salt: bytes, path: tuple[Symbol, ...]) -> Record:
        depths = sorted((d for d in self.depths[salt] if d <= len(path)), reverse=True)
        found = (self.records.get((salt, path[:depth])) for depth in depths)
        return next((r for r in found if r), None) or self.root(salt)

    def root(self, salt: bytes) -> Record:
        return self.roots.setdefault(salt, Record((salt, ()), 0, "root"))

    def leaves(self, exit_: Record, known: tuple[Symbol, ...]) -> int:
        """Where the prompt goes another way than all that is remembered, 0 if it does not."""
        if exit_.depth == len(known):
            return 0
        along = max((common(each.path, known) for each in exit_.below), default=0)
        if along > exit_.depth:
            return along if along < len(known) else 0
        return exit_.depth if exit_.below else 0

    def goes_on(self, record: Record) -> None:
        """Its conversation has gone on without it."""
        record.passed = True
        if record.uses:
            return
        before, record.which = record.which, record.classify()
        self.hazards.moved(before, record.which, record.bucket)
        self.look_up(record)

    def follow(self, parent: Trail, start: Record | None) -> Trail:
        """The trail of a fork."""
        record = start or self.root(parent.last.key[0])
        record.leases += 1
        return Trail(record, record.depth, turns=parent.turns, gap=parent.gap, priority=parent.priority)

    def leave(self, trail: Trail) -> None:
        trail.last.leases -= 1
        self.forget_root(trail.last)

    # ---- records

    def at(self, trail: Trail, key: Key, kind: str) -> Record:
        """The record of a boundary; made if there is none."""
        record = self.records.get(key)
        if record is None:
            above = self.deepest(*key)
            along = [each for each in above.below if common(each.path, key[1]) > above.depth]
            fork = common(along[0].path, key[1]) if along else len(key[1])
            if fork < len(key[1]):
                self.make(trail, (key[0], key[1][:fork]), "fork")
            record = self.make(trail, key, kind)
        if record.depth > trail.last.depth:
            trail.last.leases -= 1
            trail.last = record
            record.leases += 1
        record.leases += 1  # it may be a ghost above the trail's end, and stays
        self.forget_oldest()
        record.leases -= 1
        return record

    def make(self, trail: Trail, key: Key, kind: str) -> Record:
        above = self.deepest(*key)
        self.born += 1
        record = Record(key, self.born, kind, trail.turns, trail.gap, priority=trail.priority, above=above)
        record.below = [each for each in above.below if common(each.path, key[1]) == len(key[1])]
        above.below = [each for each in above.below if each not in record.below] + [record]
        for each in record.below:
            each.above = record
        record.given = record.flow
        self.tokens += 0 if record.below else record.depth - above.depth
        self.records[key] = record
        self.depths[key[0]][record.depth] += 1
        record.passed = bool(record.below)
        self.open_spell(record)
        self.events["parted"] += record.passed
        return record

    def forget_oldest(self) -> None:
        """Of the oldest spells, and no more than LOOKS of them."""
        if self.tokens <= self.most_tokens:
            return
        for record in heapq.nsmallest(LOOKS, self.records.values(), key=lambda r: r.order):
            if self.tokens <= self.most_tokens:
                return
            if record.checkpoint is None and not record.leases and len(record.below) < 2:
                self.forget(record)

    def forget(self, record: Record) -> None:
        above = record.above
        assert above is not None
        record.given -= record.index
        self.flows_up(record, -record.index)
        above.below = [each for each in above.below if each is not record] + record.below
        for each in record.below:
            each.above = above
        self.tokens -= 0 if record.below else record.depth - above.depth
        del self.records[record.key]
        self.depths[record.key[0]] -= Counter([record.depth])
        self.events["forgotten"] += 1
        self.forget_root(above)

    def forget_root(self, record: Record) -> None:
        """Once nothing is remembered under its salt."""
        if not record.depth and not record.below and not record.leases:
            self.roots.pop(record.key[0], None)

    # ---- what a hit has missed

    def remember_leaving(self, record: Record, kind: str, why: str) -> None:
        record.left = Left(why, kind, self.now, self.time if self.first_time >= 0 else None)

    def deepest_left(self, salt: bytes, path: tuple[Symbol, ...], beyond: int) -> Record | None:
        """Of the boundaries beyond a position, those of the whole path aside, that a checkpoint has left."""
        depths = sorted((d for d in self.depths[salt] if beyond < d < len(path)), reverse=True)
        found = (self.records.get((salt, path[:depth])) for depth in depths)
        return next((record for record in found if record and record.left), None)

    def known(self, salt: bytes, path: tuple[Symbol, ...]) -> int:
        """How far it is remembered."""
        exit_ = self.deepest(salt, path)
        return max((common(each.path, path) for each in exit_.below), default=exit_.depth)

    # ---- spells

    def open_spell(self, record: Record) -> None:
        self.spells += 1
        record.opened, record.order, record.bucket, record.hint = self.now, self.spells, 0, None
        record.which = record.classify()
        self.hazards.half(record.which, 0)
        self.schedule(record)
        self.look_up(record)

    def schedule(self, record: Record) -> None:
        times = []
        if record.bucket < BUCKETS - 1:
            age = self.now - record.opened
            look = first_age(record.bucket + 1)
            if record.checkpoint is not None:
                look = self.hazards.next_look(record.which, record.bucket, age, self.now)
            times.append(record.opened + look)
        if record.hint == "returns":
            times.append(self.now + max(1, self.requests_until(record.returns) // 8))
        record.due = min(*times, self.now + FARTHEST) if times else None
        self.decided += 1
        record.turn = self.decided

    def resident(self, record: Record, checkpoint: Any) -> None:
        record.checkpoint = checkpoint
        self.schedule(record)

    def pass_time(self) -> None:
        due = [r for r in self.records.values() if r.due == self.now]
        for record in sorted(due, key=lambda r: r.turn):
            if record.bucket < BUCKETS - 1 and self.now >= record.opened + first_age(record.bucket + 1):
                self.hazards.half(record.which, record.bucket)
                record.bucket += 1
                self.hazards.half(record.which, record.bucket)
            if record.hint == "returns" and self.time > record.returns:
                record.hint = None
                self.events["did_not_return"] += 1
            self.schedule(record)
            self.look_up(record)

    def look_up(self, record: Record) -> None:
        if record.hint == "silent":
            index = 0
        elif record.hint == "returns":
            index = (1 << INDEX_BITS) // self.requests_until(record.returns)
        else:
            index = self.hazards.index(record.which, record.bucket, self.now - record.opened, self.now)
        index = index << record.priority if record.priority >= 0 else index >> -record.priority
        change, record.index = index - record.index, index
        if record.checkpoint is not None:
            self.revalue(record.checkpoint)
        else:
            record.given += change
            self.flows_up(record, change)

    # ---- flow

    def flows_up(self, record: Record, change: int) -> None:
        """What `record` gives has changed: so has what the ghosts above it give, up to the next resident."""
        above = record.above
        while change and above is not None:
            if above.checkpoint is not None:
                return self.revalue(above.checkpoint)
            above.given += change
            above = above.above

    def give(self, record: Record, given: int) -> None:
        change, record.given = given - record.given, given
        self.flows_up(record, change)

    # ---- hints

    def tell(self, time: int) -> None:
        if self.first_time < 0:
            self.first_time, self.first_request = time, self.now
        self.time = max(self.time, time)

    def requests_until(self, time: int) -> int:
        units, elapsed = max(time - self.time, 0), max(self.time - self.first_time, 1)
        return min(max(units * max(self.now - self.first_request, 1) // elapsed, 1), 1 << 30)

    def made(self, trail: Trail) -> list[Record]:
        """The boundaries of a request, the deepest first, up to the first that somebody came back to."""
        found: list[Record] = []
        record: Record | None = trail.last
        while record is not None and record.depth > trail.start and not record.uses:
            found.append(record)
            record = record.above
        return found

    def dismiss(self, trail: Trail) -> None:
        for record in self.made(trail):
            self.hinted(record, "silent")

    def expect(self, trail: Trail, units: int) -> None:
        made = self.made(trail)
        best = max(made, key=lambda r: self.followed[r.kind], default=None)
        for record in made:
            record.returns = self.time + units
            self.hinted(record, "returns" if record is best else "silent")

    def hinted(self, record: Record, hint: str) -> None:
        record.hint = hint
        self.schedule(record)
        self.look_up(record)
        self.events[hint] += 1
