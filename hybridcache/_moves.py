"""The ids of one plan, verified, and how torch moves the rows that they name.

Owns the checks of ids, and scratch of the host for them. Knows pages and slots only as rows of words; what a
plan does to one kind of row is a `Move`. `pools` says which rows there are, and whether `_kernels` move them
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_Ids = npt.NDArray[np.int64]

# Rows of at least so many bytes are moved one by one, at the speed of the memory. Smaller ones are gathered
# and scattered: slower, and through memory of its own, but one operation for all.
_LARGE_ROW = {"cpu": 64 << 10, "cuda": 4 << 20}

# How much memory of its own: more rows than this holds are moved in several rounds.
_GATHERED = 64 << 20

# Up to so many ids are checked as Python's integers, more as arrays.
_FEW = 128


class Rows:
    """All pages, or all slots, as rows of words: [count, words], a strided view of the arena."""

    def __init__(self, name: str, words: torch.Tensor) -> None:
        self.name, self.words = name, words
        row_bytes = words.shape[1] * words.element_size()
        self.single = row_bytes >= _LARGE_ROW[words.device.type]
        self.per_round = max(1, _GATHERED // row_bytes)
        # Where in the plan's list of destinations a row stands; stale entries do no harm, so it is never
        # cleared.
        self._rank = np.zeros(words.shape[0], dtype=np.int64)
        nothing = np.empty(0, dtype=np.int64)
        self._nothing = Move(self, nothing, nothing, nothing)

    def check(self, copies: Any, zeroes: Any) -> Move:
        """One plan's ids for these rows, verified. ValueError as `Pools.apply`. Cost O(ids)."""
        if not len(copies) and not len(zeroes):  # most decode steps
            return self._nothing
        pairs = _ids(f"plan.copy_{self.name}", copies, 2)
        zeroed = _ids(f"plan.zero_{self.name}", zeroes, 1)
        sources, targets = pairs[:, 0], pairs[:, 1]
        if not self._clearly_right(sources, targets, zeroed):
            self._check_each(sources, targets, zeroed)
        return Move(self, sources, targets, zeroed)

    def _clearly_right(self, sources: _Ids, targets: _Ids, zeroes: _Ids) -> bool:
        """The same as `_check_each`, ten times faster for the few ids of most plans; False also for many."""
        if len(targets) + len(zeroes) > _FEW:
            return False
        read, every = sources.tolist(), targets.tolist() + zeroes.tolist()
        written = set(every)
        alone = len(written) == len(every) and written.isdisjoint(read)
        every += read
        return alone and min(every) >= 0 and max(every) < len(self._rank)

    def _check_each(self, sources: _Ids, targets: _Ids, zeroes: _Ids) -> None:
        """ValueError that names what is wrong."""
        written = np.concatenate((targets, zeroes))
        count = len(self._rank)
        for ids in (sources, written):
            self._refuse(ids, (ids < 0) | (ids >= count), f"expected ids in [0, {count})")
        order = np.arange(len(written))
        self._rank[written] = order
        self._refuse(written, self._rank[written] != order, "expected no destination twice")
        if len(sources):
            rank = np.minimum(self._rank[sources], len(written) - 1)
            self._refuse(sources, written[rank] == sources, "expected no source that is also a destination")

    def _refuse(self, ids: _Ids, wrong: npt.NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            bad = ids[wrong][:8].tolist()
            raise ValueError(f"plan.copy_{self.name}, plan.zero_{self.name}: {bad}, {expected}")


class Move(NamedTuple):
    """What one plan does to the pages, or to the slots: copies sources[i] to targets[i], zeroes zeroes[i]."""

    rows: Rows
    sources: _Ids
    targets: _Ids
    zeroes: _Ids

    @property
    def size(self) -> int:
        return len(self.targets) + len(self.zeroes)

    def pack(self, pairs: npt.NDArray[np.int32]) -> None:
        """As `_kernels.move` reads it: how many, then (source, target); padded with what writes nothing."""
        copies, size = len(self.targets), self.size
        pairs[0] = size, 0
        pairs[1:] = -1
        pairs[1 : 1 + copies, 0] = self.sources
        pairs[1 : 1 + copies, 1] = self.targets
        pairs[1 + copies : 1 + size, 1] = self.zeroes

    def few(self) -> tuple[list[int], list[int]]:
        """The same as `_kernels.move_few` takes it: sources, -1 for what is zeroed, and targets."""
        zeroes = self.zeroes.tolist()
        return self.sources.tolist() + [-1] * len(zeroes), self.targets.tolist() + zeroes

    def one_by_one(self) -> None:
        """Row by row: no memory besides the rows themselves."""
        words = self.rows.words
        for source, target in zip(self.sources.tolist(), self.targets.tolist(), strict=True):
            words[target].copy_(words[source])
        for zeroed in self.zeroes.tolist():
            words[zeroed].zero_()

    def at_once(self, sources: torch.Tensor, targets: torch.Tensor, zeroes: torch.Tensor) -> None:
        """All rows in one operation per kind, given the ids on the device."""
        words = self.rows.words
        count = self.rows.per_round
        for first in range(0, len(targets), count):
            gathered = words.index_select(0, sources[first : first + count])
            words.index_copy_(0, targets[first : first + count], gathered)
        if len(zeroes):
            words.index_fill_(0, zeroes, 0)


def by_torch(moves: Sequence[Move]) -> None:
    """Carries `moves` out with torch's operations: the plain path, and the oracle of the kernels."""
    for move in moves:
        if move.rows.single:
            move.one_by_one()
    gathered = [move for move in moves if not move.rows.single and move.size]
    ids = iter(_sent([ids for move in gathered for ids in move[1:]], gathered))
    for move in gathered:
        move.at_once(next(ids), next(ids), next(ids))


def _sent(arrays: Sequence[_Ids], moves: Sequence[Move]) -> Sequence[torch.Tensor]:
    """The arrays on the device of `moves`, in one transfer that the host does not wait for."""
    if not moves:
        return ()
    device = moves[0].rows.words.device
    ids = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    return torch.split(ids, [len(array) for array in arrays])


def staged(moves: Sequence[Move], sizes: Sequence[int]) -> torch.Tensor:
    """int64 [sum(sizes)] in pinned memory, sizes[i] pairs for moves[i]. torch gives the memory to another
    only when its transfer is over, so nobody has to wait for that."""
    staged = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    pairs = staged.numpy().view(np.int32).reshape(-1, 2)
    first = 0
    for move, size in zip(moves, sizes, strict=True):
        move.pack(pairs[first : first + size])
        first += size
    return staged


def _ids(name: str, values: Any, columns: int) -> _Ids:
    """`values` as int64, [n, 2] or [n]; an empty one may have any shape."""
    ids = np.asarray(values)
    if ids.size == 0:
        return np.empty((0, 2) if columns == 2 else (0,), dtype=np.int64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: dtype {ids.dtype}, expected integers")
    if ids.shape[1:] != ((2,) if columns == 2 else ()):
        raise ValueError(f"{name}: shape {ids.shape}, expected {'[n, 2]' if columns == 2 else '[n]'}")
    return ids.astype(np.int64)
