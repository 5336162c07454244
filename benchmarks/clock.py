"""How the control plane is timed: one call at a time, warm or with flushed CPU caches, beside a memcmp.

Owns the clocks, the samples and the buffer that flushes. Knows nothing of the cache.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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


def last_level_cache_bytes(default: int = 1 << 26) -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=default)


class Caches:
    """`settle()` before each timed call: empties the caches of the CPU if cold."""

    def __init__(self, name: str) -> None:
        self.name = name
        size = 4 * last_level_cache_bytes() if name == "cold" else 0
        self._lines = np.zeros(size, dtype=np.uint8)[::64]

    def settle(self) -> None:
        if self.name == "cold":
            np.add(self._lines, 1, out=self._lines)


class Memcmp:
    """memcmp of the first tokens of an array with a copy of it: the floor below which no comparison goes."""

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self._ours, self._theirs = tokens, tokens.copy()
        self._pointers = (self._ours.ctypes.data, self._theirs.ctypes.data)

    def run(self, count: int) -> None:
        """ctypes included: `run(0)` shows what that costs."""
        if _memcmp(*self._pointers, count * self._ours.itemsize) != 0:
            raise AssertionError("memcmp: the copy differs, expected equal tokens")
