"""What the oracle hands out, and its record of a lease (docs/design.md section 4); no rule is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tests.oracle_store import Checkpoint, Key, Symbol


class Match(NamedTuple):
    length: int
    kv_length: int
    reason: str
    diverged: bool


class Step(NamedTuple):
    begin: int
    end: int
    read_slot: int
    write_slot: int
    checkpoints: list[tuple[int, int]]


class Plan(NamedTuple):
    number: int
    copy_slots: list[tuple[int, int]]
    zero_slots: list[int]
    copy_pages: list[tuple[int, int]]
    zero_pages: list[int]


@dataclass(eq=False)
class OpenStep:
    step: Step
    kind: str | None  # what launch remembered for `end`
    inner: list[tuple[int, str, int]]  # (position, kind, slot)
    plan: Plan  # its bookings, unnumbered
    number: int | None = None  # of the plan that carries it


@dataclass(eq=False)
class Lease:
    page_size: int
    salt: bytes
    tokens: list[Symbol]
    prompt_length: int
    start: int
    match: Match
    pages: list[int]
    own: set[int]  # indices into `pages` that are this lease's, not the tree's
    live_slot: int
    read: Checkpoint | None  # the read pin
    copy_from: int | None  # page to copy into pages[committed // page_size] at the next launch
    branches: bool
    wanted: list[tuple[int, str]] = field(default_factory=list)
    home: int | None = None
    committed: int = 0
    computed: int = 0
    boundary: int = 0
    anchored: int = 0
    fresh: bool = True
    extra_passes: int = 0
    open: OpenStep | None = None
    closed: bool = False

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.page_size

    def key(self, depth: int) -> Key:
        return self.salt, tuple(self.tokens[:depth])


class Pin(NamedTuple):
    length: int
    checkpoint: Checkpoint
