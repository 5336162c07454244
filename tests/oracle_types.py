"""What the oracle hands out, and its record of a lease (docs/design.md section 4); no rule is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.oracle_store import Checkpoint, Key, Symbol


class Missed(NamedTuple):
    position: int
    kind: str | None
    cause: str
    requests_ago: int | None
    time_ago: int | None


class Match(NamedTuple):
    length: int
    kv_length: int
    reason: str
    diverged: bool
    missed: Missed | None = None


class Wanted(NamedTuple):
    position: int
    kind: str
    spare: bool = False  # made only where a slot is free


class Step(NamedTuple):
    begin: int
    end: int
    read_slot: int
    write_slot: int
    checkpoints: list[tuple[int, int]]
    begin_max: int
    read_slots: list[int]
    write_slots: list[int]


class Plan(NamedTuple):
    number: int
    copy_slots: list[tuple[int, int]]
    zero_slots: list[int]
    copy_pages: list[tuple[int, int]]
    zero_pages: list[int]


@dataclass(eq=False)
class OpenStep:
    step: Step
    kind: str | None  # of the boundary that is to stand at `end`
    spare: bool  # that one only where a slot is free
    inner: list[tuple[int, str, int]]  # (position, kind, slot)
    plan: Plan  # its bookings, unnumbered
    rows: int = 0  # of a verify step: it writes `step.write_slots`, and `step` moves when its begin is known
    number: int | None = None  # of the plan that carries it
    gone_on: bool = False  # the next step reads its slot and writes another
    void: bool = False  # the step before stayed with no token, so this one cannot stay either
    read_up_to: int = 0  # of a verify step: where its commit ended, 0 if nothing stayed
    passed_on: list[int] = field(default_factory=list)  # rows of the step before that this one may read


@dataclass(eq=False)
class Lease:
    number: int
    page_size: int
    salt: bytes
    tokens: list[Symbol]
    prompt_length: int
    start: int
    match: Match
    pages: list[int]
    own: set[int]  # indices into `pages` that this lease holds: they are no node's
    live_slot: int
    read: Checkpoint | None  # the read pin
    copy_from: int | None  # page to copy into pages[whole(start)] at the first launch
    branches: bool
    ways: int = 0  # how many other tokens followed where the prompt diverged
    resend: bool = False  # all of the prompt was known
    wanted: list[Wanted] = field(default_factory=list)
    home: int | None = None
    committed: int = 0
    computed: int = 0
    boundary: int = 0
    anchored: int = 0
    fresh: bool = True
    extra_passes: int = 0
    open: list[OpenStep] = field(default_factory=list)  # the oldest first
    left_behind: int | None = None  # a slot that turned out to be a duplicate, and that an open step reads
    closed: bool = False
    made: int = 0  # tick of the checkpoint that it left at its boundary
    will_not_return: bool = False  # closed with keep="nothing"
    rests_until: int = 0  # when this plan is applied, at the latest
    trail: Any = None  # oracle_policy.Trail, if a history is kept

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.page_size

    @property
    def slots(self) -> list[int]:
        """All that it holds; -1 once its live slot became a checkpoint at close."""
        left = [self.left_behind] if self.left_behind is not None else []
        written = [opened.step.write_slot for opened in self.open if opened.gone_on]
        inner = [slot for opened in self.open for _, _, slot in opened.inner]
        rows = [s for o in self.open if o.rows for s in (*o.step.write_slots, *o.passed_on)]
        return [self.live_slot, *left, *written, *inner, *rows]

    @property
    def held(self) -> set[int]:
        return {self.pages[i] for i in self.own}

    def key(self, depth: int) -> Key:
        return self.salt, tuple(self.tokens[:depth])


class Pin(NamedTuple):
    length: int
    checkpoint: Checkpoint
