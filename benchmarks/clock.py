"""How the control plane is timed, one call at a time, and how its samples are kept.

Knows nothing of the cache and imports only the standard library: the peers are timed with it, in environments
of their own.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple


def timed(call: Callable[[], Any]) -> tuple[int, Any]:
    """Nanoseconds that the call took, and its result: the smaller of wall time and the thread's CPU time.

    Both clocks cost something, the CPU clock half a microsecond more; and on a shared machine the wall clock
    also counts what other processes took. The smaller of the two is closest to what the call itself did.
    """
    cpu = time.thread_time_ns()
    wall = time.perf_counter_ns()
    result = call()
    wall = time.perf_counter_ns() - wall
    cpu = time.thread_time_ns() - cpu
    return min(wall, cpu), result


def quantile(ordered: list[int], share: float) -> int:
    """The smallest sample that at least `share` of all are not above."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Key(NamedTuple):
    operation: str
    size: int  # tokens of context; or leases, or checkpoints resident
    caches: str  # "warm" or "cold"


class Recorder:
    """Samples by operation, size and state of the CPU caches."""

    def __init__(self) -> None:
        self.samples: dict[Key, list[int]] = defaultdict(list)

    def add(self, operation: str, size: int, caches: str, nanoseconds: int) -> None:
        self.samples[Key(operation, size, caches)].append(nanoseconds)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for key, samples in self.samples.items():
            ordered = sorted(samples)
            median, p99 = quantile(ordered, 0.5) / 1000, quantile(ordered, 0.99) / 1000
            rows.append({**key._asdict(), "n": len(ordered), "median_us": median, "p99_us": p99})
        return rows

    def median_us(self, operation: str, size: int, caches: str = "warm") -> float | None:
        samples = self.samples.get(Key(operation, size, caches))
        return quantile(sorted(samples), 0.5) / 1000 if samples else None
