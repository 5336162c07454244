"""What the harness is built with and keeps book of: the drawn configuration, requests in flight, their steps.

Owns no comparison and makes no call: of the oracle it reads the stage of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.oracle import Oracle
from tests.oracle_types import Lease, OpenStep, Step

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
    lookahead: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> SimpleNamespace:
        page_bytes = 16 * self.page_size
        slot_bytes = self.pages_per_slab * page_bytes - 16 * min(self.slack, self.page_size - 1)
        named = {"lookahead": self.lookahead} if self.lookahead else {}  # without one it is 0
        return SimpleNamespace(
            page_size=self.page_size, page_bytes=page_bytes, slot_bytes=slot_bytes, **named
        )

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
        "policy": ("default", "default", "supersede", "lru")[pick(4)],
        "pass_cost": pick(9),
        "interior_spacing": 2 + pick(7),
        "run_ahead": pick(2),
        "draft_tokens": 1 + pick(7) if pick(3) else 0,
    }
    slots, pages, slabs = (
        (3 + pick(6), 8 + pick(20), 4 + pick(8)) if pick(2) else (8 + pick(10), 40 + pick(60), 12 + pick(36))
    )
    rows = 2 * options["draft_tokens"] * pick(3)  # room for the rows of some
    slots, slabs = slots + rows, slabs + rows
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
        lookahead=pick(2),
        options=options,
        **shape,
    )


@dataclass(eq=False)
class Running:
    """One open step as the device has it: how many of its tokens stay is known there, and here, before any
    commit says so."""

    opened: OpenStep
    step: Step  # as launched
    begin: int  # where it really begins
    path: list[Any]  # down to its last token
    feed: list[Any]  # what it reads beyond the prompt
    table: list[int]  # its request's page table as launched
    stays: int  # of its tokens, so the next step begins at `begin + stays`
    fails: bool = False  # too few stay: no row has their state
    void: bool = False  # the engine knows that nobody wants what it read
    lost: bool = False  # and the slot that it reads may be another's by now
    ran: bool = False

    @property
    def verifies(self) -> bool:
        return self.opened.rows > 0

    @property
    def end(self) -> int:
        return self.begin + self.step.end - self.step.begin

    @property
    def path_behind(self) -> list[Any]:
        """What the step behind it goes on from."""
        return self.path[: self.begin + self.stays] if self.verifies else self.path


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
        return self.steps[-1].path if self.steps else list(self.oracle.tokens)


@dataclass(eq=False)
class Ghost:
    """A step of a request that was closed under it: its forward may be on the device all the same."""

    lease: Lease
    running: Running
