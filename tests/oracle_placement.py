"""Where the oracle puts checkpoints: docs/design.md section 5, no memory and no ids.

Owns the counts by kind from which "enabled" is learned. Of a lease it reads the cursors and the wanted
boundaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.oracle_store import ANY_RANK, RANK_0_ONLY
from tests.oracle_types import Lease, OpenStep

CUT_GAP = 8
BREAKPOINT, FORK, CUT, INTERIOR = "breakpoint", "fork", "cut", "interior"
TURN_END, PROMPT_END, CHUNK_END = "turn_end", "prompt_end", "chunk_end"


class Placement:
    def __init__(self, inner: bool, alignment: int, pass_cost: int, interior_spacing: int) -> None:
        self.inner, self.alignment, self.interior_spacing = inner, alignment, interior_spacing
        self.pass_cost = 0 if inner else pass_cost
        self.made: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def publication(self, kind: str) -> None:
        self.made[kind] += 1
        if self.made[kind] == 256:
            self.made[kind] //= 2
            self.used[kind] //= 2

    def enabled(self, kind: str) -> bool:
        self.asked[kind] += 1
        return self.made[kind] < 16 or 8 * self.used[kind] >= self.made[kind] or self.asked[kind] % 16 == 0

    def wanted(self, lease: Lease, breakpoints: Iterable[int]) -> list[tuple[int, str]]:
        start, total, match = lease.start, lease.prompt_length, lease.match
        found: dict[int, str] = {w: BREAKPOINT for w in breakpoints if start < w <= total}
        if match.diverged and start < match.kv_length < total and match.kv_length - start >= self.pass_cost:
            found.setdefault(match.kv_length, FORK)
        cut = total - CUT_GAP
        if self.inner and start < cut and lease.branches and self.enabled(CUT):
            found.setdefault(cut, CUT)
        doubling = [self.interior_spacing << k for k in range(32)]
        interior = [w for w in doubling if start < w < total]
        if self.inner and interior and self.enabled(INTERIOR):
            for w in interior:
                found.setdefault(w, INTERIOR)
        return sorted(found.items())

    def places(self, lease: Lease, begin: int, end: int) -> list[tuple[int, str]]:
        """The effective positions of a step, ascending, the first wanted that falls on each."""
        candidates = list(lease.wanted)
        total, cut = lease.prompt_length, lease.prompt_length - CUT_GAP
        through = lease.branches and begin == lease.start and end == total
        if not self.inner and through and cut - begin >= max(self.pass_cost, 1) and self.enabled(CUT):
            candidates.append((cut, CUT))
        effective: dict[int, str] = {}
        for w, kind in candidates:
            e = w if w == end else begin + (w - begin) // self.alignment * self.alignment
            if begin < w <= end and e > begin:
                effective.setdefault(e, kind)
        return sorted(effective.items())

    def boundary_kind(self, lease: Lease, opened: OpenStep) -> str | None:
        begin, c, total = opened.step.begin, opened.step.end, lease.prompt_length
        if opened.kind is not None:
            return opened.kind
        if c == total:
            return PROMPT_END if self.enabled(PROMPT_END) else None
        last = total - c <= c - begin
        sparse = c >= self.interior_spacing and c >= 2 * lease.boundary
        return CHUNK_END if c < total and (last or sparse) and self.enabled(CHUNK_END) else None

    def limit(self, kind: str) -> int:
        return ANY_RANK if kind in (BREAKPOINT, FORK) else RANK_0_ONLY
