"""Where the oracle puts checkpoints: docs/design.md section 5, no memory and no ids.

Owns the counts by kind from which "enabled" is learned. Of a lease it reads the cursors and the wanted
boundaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.oracle_store import ANY_RANK, RANK_0_ONLY
from tests.oracle_types import Lease, Wanted

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

    def wanted(self, lease: Lease, breakpoints: Iterable[int], longest: int) -> list[Wanted]:
        start, total, match = lease.start, lease.prompt_length, lease.match
        found = {w: Wanted(w, BREAKPOINT) for w in breakpoints if start < w <= longest}
        saved = match.kv_length - start
        if match.diverged and saved > 0 and saved * lease.ways >= self.pass_cost:
            found.setdefault(match.kv_length, Wanted(match.kv_length, FORK))
        for w in (lease.trail.left, lease.trail.again) if lease.trail is not None else ():
            if start < w < total and w - start >= self.pass_cost:
                found.setdefault(w, Wanted(w, FORK))
        cut = total - CUT_GAP
        if self.inner and start < cut and lease.branches:
            spare = not self.enabled(CUT)
            found.setdefault(cut, Wanted(cut, CUT, spare))
        doubling = [self.interior_spacing << k for k in range(32)]
        interior = [w for w in doubling if start < w < total]
        if self.inner and interior:
            spare = not self.enabled(INTERIOR)
            for w in interior:
                found.setdefault(w, Wanted(w, INTERIOR, spare))
        return sorted(found.values())

    def places(self, lease: Lease, begin: int, end: int) -> list[Wanted]:
        """The effective positions of a step, ascending, the first wanted that falls on each."""
        candidates = list(lease.wanted)
        total, cut = lease.prompt_length, lease.prompt_length - CUT_GAP
        through = begin == lease.start and end == total and cut - begin >= max(self.pass_cost, 1)
        if not self.inner and through and (lease.resend or (lease.branches and self.enabled(CUT))):
            candidates.append(Wanted(cut, CUT))
        effective: dict[int, Wanted] = {}
        for w, kind, spare in candidates:
            e = w if w == end else begin + (w - begin) // self.alignment * self.alignment
            if begin < w <= end and e > begin:
                effective.setdefault(e, Wanted(e, kind, spare))
        return sorted(effective.values())

    def free_boundary(self, lease: Lease, begin: int, c: int) -> Wanted | None:
        """The boundary that costs no pass at the end `c` of the step that is being launched."""
        total = lease.prompt_length
        if c == total:
            return Wanted(c, PROMPT_END, not self.enabled(PROMPT_END))
        ahead = bool(lease.open) and lease.open[-1].kind is not None
        last_boundary = lease.open[-1].step.end if ahead else lease.boundary
        last = total - c <= c - begin
        sparse = c >= self.interior_spacing and c >= 2 * last_boundary
        if c < total and (last or sparse):
            return Wanted(c, CHUNK_END, not self.enabled(CHUNK_END))
        return None

    def limit(self, kind: str) -> int:
        return ANY_RANK if kind in (BREAKPOINT, FORK) else RANK_0_ONLY  # learned: all have rank 0
