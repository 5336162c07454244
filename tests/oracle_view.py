"""What the oracle knows, for comparison and for people: check, stats, the tree's shape, a dump.

A part of Oracle (oracle.py); reads its state and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.oracle_placement import Placement
from tests.oracle_store import Arena, Key, Store
from tests.oracle_transcript import Transcript
from tests.oracle_types import Lease

KINDS = ("turn_end", "prompt_end", "chunk_end", "breakpoint", "fork", "cut", "interior")
CAUSES = ("never_made", "reserve", "launch", "fork", "checkpoint", "cap", "clear", "taken_back", "no_room")


class View:
    page_size: int
    arena: Arena
    store: Store
    placement: Placement
    leases: list[Lease]
    resting: list[Lease]
    transcripts: list[Transcript]
    plans: int
    done: int
    counters: Counter[str]

    # ---- what it knows, for comparison and for people

    def check(self) -> None:
        """I1: every id in use has one owner, the tree's pages are counted by nodes and tails; I11: paired."""
        holders = [*self.leases, *self.resting]
        slots = [c.slot for c in self.store.checkpoints.values()] + [s for h in holders for s in h.slots]
        assert sorted(slots) == sorted(self.arena.slots), "I1 slots"
        held = sorted(page for h in holders for page in h.held)
        assert held == sorted(self.store.held), "I1 a page is held by one lease"
        assert not self.store.held & set(self.store.pages.values()), "I1 what a node has no lease holds"
        assert self.store.held | set(self.store.counts) == self.arena.pages, "I1 pages"
        tails = [c.tail for c in self.store.checkpoints.values() if c.tail is not None]
        assert Counter([*self.store.pages.values(), *tails]) == self.store.counts, "I1 counts"
        needed = {k for s in (*self.store.checkpoints, *self.store.anchors) for k in self.store.page_keys(s)}
        assert needed == set(self.store.pages), "I11 the pages of every support, and no other"
        if self.arena.unified:
            assert not {p // self.arena.per_slab for p in self.arena.pages} & self.arena.slots, "I1 roles"

    def stats(self) -> dict[str, int]:
        """Those of the core's statistics that the design defines."""
        evicted = {f"evicted_{kind}": n for kind, n in self.store.evicted.items()}
        checkpoints = list(self.store.checkpoints.values())
        held = {f"held_{kind}": sum(c.kind == kind for c in checkpoints) for kind in KINDS}
        gauges = {
            "open_leases": len(self.leases),
            "transcripts": len(self.transcripts),
            "resting_leases": len(self.resting),
            "tree_pages": len(self.store.counts),
            "checkpoints": len(checkpoints),
            "pinned_checkpoints": sum(c.pins > 0 for c in checkpoints),
            "slabs_with_pages": len({page // self.arena.per_slab for page in self.arena.pages}),
            "taken_pages": len(self.arena.pages),
            "taken_slots": len(self.arena.slots),
            "cached_bytes": self.cached_bytes(),
        }
        missed = {name: self.counters[name] for name in (f"missed_{cause}" for cause in CAUSES)}
        return {**self.counters, **evicted, **missed, **held, **gauges}

    def shape(self) -> list[tuple[Any, ...]]:
        """Every node: salt, begin, depth, pages, checkpoint (kind, slot, tail, tick, superseded, pins)."""
        found, nodes = [], self.store.nodes()
        depths = {len(path) for _, path in nodes}
        for key in nodes:
            salt, path = key
            above = max((d for d in depths if d < len(path) and (salt, path[:d]) in nodes), default=0)
            pages = self.store.whole(len(path)) - self.store.whole(above)
            c = self.store.checkpoints.get(key)
            mark = c and (c.kind, c.slot, -1 if c.tail is None else c.tail, c.tick, c.superseded, c.pins)
            found.append((salt.hex(), above, len(path), pages, mark))
        return sorted(found, key=repr)

    def dump(self) -> str:
        lines = [
            f"arena slots={sorted(self.arena.slots)} pages={sorted(self.arena.pages)} fill={self.arena.fill} "
            f"plans={self.plans} done={self.done}"
        ]
        for c in sorted(self.store.checkpoints.values(), key=lambda c: repr(c.key)):
            lines.append(
                f"checkpoint {show(c.key)} slot={c.slot} tail={c.tail} {c.kind} tick={c.tick} "
                f"superseded={c.superseded} pins={c.pins} children={self.store.children(c.key)}"
            )
        for key, page in sorted(self.store.pages.items(), key=repr):
            lines.append(f"page {page} x{self.store.counts[page]} ends {show(key)}")
        for h in (*self.leases, *self.resting):
            lines.append(
                f"lease {show((h.salt, tuple(h.tokens)))} L={h.prompt_length} start={h.start} "
                f"committed={h.committed} computed={h.computed} boundary={h.boundary} anchored={h.anchored} "
                f"fresh={h.fresh} live={h.live_slot} pages={h.pages} own={sorted(h.own)} wanted={h.wanted} "
                f"copy_from={h.copy_from} left_behind={h.left_behind} rests={h.closed and h.rests_until} "
                f"open={[(o.number, o.kind, o.gone_on, o.rows, o.void, tuple(o.step)) for o in h.open]}"
            )
        return "\n".join(lines)


def show(key: Key) -> str:
    return f"{key[0]!r}:" + ",".join(str(s) for s in key[1])
