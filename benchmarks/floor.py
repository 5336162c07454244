"""What calls are measured against: memcmp of the same tokens; and how cold the CPU's caches are before one.

Owns the buffer that flushes them. Knows nothing of the cache.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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
