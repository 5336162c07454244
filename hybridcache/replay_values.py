"""The plain values of a replay: its `Settings`, and the `Result` that one cell of the table is.

Own what may be asked for and what every figure means; they run nothing and import nothing of the package.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

HINTS = ("keep", "expected_return", "breakpoints")
IN_FLIGHT = ("free", "charged")
ARRIVALS = ("closed", "open")


@dataclass(frozen=True)
class Settings:
    """How a workload is replayed. ValueError names a field that is wrong.

    in_flight: "free": the arena has room for running requests besides, the budget is `max_cached_bytes`;
        "charged": the budget is the arena, running requests and whole slabs count.
    inner_checkpoints: the engine leaves states inside one forward; else cuts cost passes, which are counted.
    read_all: the whole output counts as read; else all but the last sampled token.
    hints: of HINTS, what the caller tells the cache of what it knows.
    concurrency: requests that run at once; 0: one at a time in file order, without time.
    prefill_rate, decode_rate: tokens a second of one request, with concurrency.
    arrivals: with concurrency. "closed": a request whose prompt holds an earlier one's output arrives when
        that is finished and its user has thought; the thinking is the gap between the two in the trace, less
        what serving the earlier one takes at its ideal hit. So an engine that nothing delays reproduces the
        trace's times, and a delay moves the rest of its conversation. "open": at the trace's times, but never
        before what its prompt holds is finished.
    """

    in_flight: Literal["free", "charged"] = "free"
    inner_checkpoints: bool = True
    read_all: bool = True
    hints: tuple[str, ...] = ()
    concurrency: int = 0
    prefill_rate: float = 10_000.0
    decode_rate: float = 50.0
    arrivals: Literal["closed", "open"] = "closed"

    def __post_init__(self) -> None:
        for name, choices in (("in_flight", IN_FLIGHT), ("arrivals", ARRIVALS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of {choices}")
        for hint in self.hints:
            if hint not in HINTS:
                raise ValueError(f"hints: {hint!r}, expected some of {HINTS}")
        if self.concurrency < 0:
            raise ValueError(f"concurrency: {self.concurrency}, expected at least 0")
        for name in ("prefill_rate", "decode_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected more than 0 tokens a second")


@dataclass
class Result:
    """One cell of the table: a policy at a budget. Tokens, bytes and counts; rates are shares of 1."""

    workload: str
    policy: str
    budget_bytes: int
    settings: dict[str, Any]
    tuned: dict[str, float] = field(default_factory=dict)  # what the policy learned from the first tenth
    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    ideal_tokens: int = 0
    flops: int = 0
    flops_saved: int = 0
    flops_ideal: int = 0  # what a cache without bounds would have saved
    extra_passes: int = 0
    too_large: int = 0  # requests that the arena could not hold even when empty: full misses
    refused: int = 0  # requests that found no room although nothing ran: full misses
    missed_tokens: int = 0  # prompt tokens of both
    waits: int = 0  # with concurrency: requests that had to wait for room or for their turn
    waited_seconds: float = 0.0  # all of them together, in the time of the replay
    ends_at: float = 0.0  # when the last one finished, in that time
    lost: dict[str, int] = field(default_factory=dict)  # prompt tokens not hit, by the reason of the match
    beyond: dict[str, int] = field(default_factory=dict)  # of these, those that the ideal would have hit
    missed_by: dict[str, int] = field(default_factory=dict)  # of lost: by the cause of Match.missed
    published: dict[str, int] = field(default_factory=dict)  # by kind of boundary
    restored: dict[str, int] = field(default_factory=dict)
    evicted: dict[str, int] = field(default_factory=dict)
    evicted_in_flight: int = 0  # of these, while a request ran; the others left at a close
    dropped_checkpoints: int = 0
    duplicate_checkpoints: int = 0
    end: dict[str, int] = field(default_factory=dict)  # checkpoints, pages, bytes that the tree holds
    peak: dict[str, int] = field(default_factory=dict)  # the same, after a close, and what was ever taken
    operations: dict[str, dict[str, float]] = field(default_factory=dict)  # calls, median_us, total_s
    core_seconds: float = 0.0  # all operations together
    seconds: float = 0.0  # of the whole cell

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were not computed."""
        return self.hit_tokens / self.prompt_tokens

    @property
    def ideal_rate(self) -> float:
        """The same of a cache without bounds."""
        return self.ideal_tokens / self.prompt_tokens

    @property
    def beyond_ideal(self) -> int:
        """Tokens that were computed although an earlier request had read them."""
        return self.ideal_tokens - self.hit_tokens

    @property
    def flops_rate(self) -> float:
        """FLOPs of prefill that were saved."""
        return self.flops_saved / self.flops

    def as_json(self) -> dict[str, Any]:
        """All fields and the rates."""
        rates = {
            name: getattr(self, name) for name in ("hit_rate", "ideal_rate", "beyond_ideal", "flops_rate")
        }
        return {**asdict(self), **rates}
