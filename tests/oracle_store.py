"""The oracle's memory: which ids are in use (Arena), and what the tree holds (Store), without a tree.

Owns docs/design.md sections 2 and 6 as the oracle understands them. The tree's shape is a function of its
supports, so none is kept: supports are a dict of checkpoints and a counter of anchors, keyed by (salt, path),
and tree pages are a dict (salt, path down to where the page is whole) -> page id. Knows nothing of leases,
steps and placement.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sortedcontainers import SortedDict

Symbol = Any  # a token id, or (token id, content) where a content key applies
Key = tuple[bytes, tuple[Symbol, ...]]  # (salt, path)
ANY_RANK, RANK_0_ONLY, NO_RANK = 1, 0, -1


@dataclass(eq=False)
class Checkpoint:
    key: Key
    slot: int
    tail: int | None
    kind: str
    tick: int
    superseded: bool = False
    pins: int = 0
    filed: tuple[int, int] | None = None  # where it stands in the order of eviction


class Arena:
    """Section 2: which ids are in use, which pages are dirty, and the canonical choice of the next id."""

    def __init__(self, unified: bool, pages_per_slab: int, num_pages: int, num_slots: int) -> None:
        self.unified, self.per_slab = unified, pages_per_slab
        self.num_pages, self.num_slots = num_pages, num_slots
        self.slots: set[int] = set()
        self.pages: set[int] = set()
        self.dirty = set(range(num_pages))
        self.fill = [0] * -(-num_pages // pages_per_slab)  # used pages of each slab

    def slab_pages(self, slab: int) -> range:
        return range(slab * self.per_slab, min((slab + 1) * self.per_slab, self.num_pages))

    def free_slabs(self) -> list[int]:
        return [s for s, used in enumerate(self.fill) if not used and not (self.unified and s in self.slots)]

    def partly_used(self) -> list[int]:
        return [s for s, used in enumerate(self.fill) if 0 < used < len(self.slab_pages(s))]

    def free_slots(self) -> list[int]:
        return (
            self.free_slabs() if self.unified else [s for s in range(self.num_slots) if s not in self.slots]
        )

    def satisfied(self, slots: int, pages: int) -> bool:
        if not self.unified:
            return len(self.free_slots()) >= slots and self.num_pages - len(self.pages) >= pages
        free = len(self.free_slabs())
        loose = sum(self.per_slab - self.fill[s] for s in self.partly_used())
        return free >= slots and loose + (free - slots) * self.per_slab >= pages

    def could_ever_hold(self, slots: int, pages: int) -> bool:
        return Arena(self.unified, self.per_slab, self.num_pages, self.num_slots).satisfied(slots, pages)

    def take_slot(self) -> int:
        slot = min(self.free_slots())
        self.slots.add(slot)
        if self.unified:
            self.dirty.update(self.slab_pages(slot))
        return slot

    def take_page(self, home: int | None) -> int:
        partly = self.partly_used()
        if home in partly:
            slab = home
        elif partly:
            slab = max(partly, key=lambda s: (self.fill[s], -s))
        else:
            slab = min(self.free_slabs())
        page = min(p for p in self.slab_pages(slab) if p not in self.pages)
        self.pages.add(page)
        self.fill[slab] += 1
        return page

    def free_slot(self, slot: int) -> None:
        self.slots.remove(slot)

    def free_page(self, page: int) -> None:
        self.pages.remove(page)
        self.fill[page // self.per_slab] -= 1


class Store:
    """What the tree holds, and the arena it lies in: one object, so that a deep copy answers "what if"."""

    def __init__(self, arena: Arena, page_size: int, lru: bool, lookahead: int = 0) -> None:
        self.arena, self.page_size, self.lru, self.lookahead = arena, page_size, lru, lookahead
        self.checkpoints: dict[Key, Checkpoint] = {}
        self.anchors: Counter[Key] = Counter()
        self.pages: dict[Key, int] = {}
        self.counts: Counter[int] = Counter()  # page -> 1 for its node, 1 for each tail inside it
        self.held: set[int] = set()  # by the lease that took it, until a node has it or the lease closes
        self.order: SortedDict = SortedDict()  # (rank, tick) -> unpinned checkpoint, the lowest leaves first
        self.learned: Any = None  # oracle_worth.Worths, if that is the policy: told of every change
        self.evicted: Counter[str] = Counter()  # by kind
        self.events: Counter[str] = Counter()  # rare moments, for the tests to count

    def supports(self, salt: bytes) -> Iterator[tuple[Symbol, ...]]:
        for support_salt, path in (*self.checkpoints, *self.anchors):
            if support_salt == salt:
                yield path

    def children(self, key: Key) -> int:
        """How many children the node at `key` has: the different tokens with which known paths go on."""
        salt, path = key
        depth = len(path)
        return len({s[depth] for s in self.supports(salt) if len(s) > depth and s[:depth] == path})

    def nodes(self) -> set[Key]:
        """A node stands where a support ends, and where known paths part (section 3); the root is none."""
        found: set[Key] = set()
        for salt in {key[0] for key in (*self.checkpoints, *self.anchors)}:
            paths = list(set(self.supports(salt)))
            found.update((salt, path) for path in paths)
            for i, a in enumerate(paths):
                found.update((salt, a[: common(a, b)]) for b in paths[:i])
        return {key for key in found if key[1]}

    def whole(self, depth: int) -> int:
        """How many pages are complete at `depth`: all that they depend on is known."""
        return max(depth - self.lookahead, 0) // self.page_size

    def whole_at(self, pages: int) -> int:
        """The depth at which the last of the first `pages` pages becomes whole."""
        return pages * self.page_size + self.lookahead if pages else 0

    def page_keys(self, key: Key) -> list[Key]:
        """Of the pages that are whole at `key`, in order."""
        salt, path = key
        return [(salt, path[: self.whole_at(i + 1)]) for i in range(self.whole(len(path)))]

    def page_number(self, page_key: Key) -> int:
        return self.whole(len(page_key[1])) - 1

    def count(self, page: int) -> None:
        self.counts[page] += 1

    def uncount(self, page: int) -> None:
        self.counts[page] -= 1
        if not self.counts[page]:
            del self.counts[page]
            self.events["tail_evicted_while_held"] += page in self.held
            self.free_unused(page)

    def take(self, home: int | None) -> int:
        page = self.arena.take_page(home)
        self.held.add(page)
        return page

    def join(self, key: Key, page: int) -> None:
        """A lease's page becomes a node's: the node's count replaces the hold."""
        self.events["tail_filled_by_its_writer"] += page in self.counts
        self.pages[key] = page
        self.count(page)
        self.held.remove(page)

    def let_go(self, page: int) -> None:
        self.held.remove(page)
        self.free_unused(page)

    def free_unused(self, page: int) -> None:
        if page not in self.counts and page not in self.held:
            self.arena.free_page(page)

    def prune(self, key: Key) -> None:
        """Frees the pages of `key`'s path that no support needs any more."""
        known = list(self.supports(key[0]))
        for page_key in self.page_keys(key):
            path = page_key[1]
            if page_key in self.pages and not any(s[: len(path)] == path for s in known):
                self.uncount(self.pages.pop(page_key))

    def add_anchor(self, key: Key) -> None:
        self.anchors[key] += 1
        if self.learned is not None:
            self.learned.support(key, 1)

    def drop_anchor(self, key: Key) -> None:
        self.anchors[key] -= 1
        if not self.anchors[key]:
            del self.anchors[key]
            self.prune(key)
        if self.learned is not None:
            self.learned.support(key, -1)

    def refile(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint where its rank and tick belong, or nowhere if it is pinned or gone."""
        if checkpoint.filed is not None:
            del self.order[checkpoint.filed]
            checkpoint.filed = None
        if not checkpoint.pins and checkpoint.key in self.checkpoints:
            checkpoint.filed = (self.rank(checkpoint), checkpoint.tick)
            self.order[checkpoint.filed] = checkpoint
        if self.learned is not None:
            self.learned.revalue(checkpoint)

    def rank(self, checkpoint: Checkpoint) -> int:
        if self.learned is not None:
            return 0  # any boundary that is not spare may replace any checkpoint
        return 1 if self.lru or not checkpoint.superseded else 0

    def in_order(self) -> list[Checkpoint]:
        """The unpinned checkpoints, those that leave first first."""
        found = list(self.order.values())
        return (
            sorted(found, key=lambda c: (self.learned.worth(c), c.tick))
            if self.learned is not None
            else found
        )

    def add(self, checkpoint: Checkpoint, trail: Any) -> None:
        """A checkpoint joins what is known."""
        self.checkpoints[checkpoint.key] = checkpoint
        self.refile(checkpoint)
        if self.learned is not None:
            self.learned.joined(checkpoint, trail)

    def pin(self, checkpoint: Checkpoint | None, by: int) -> None:
        if checkpoint is not None:
            checkpoint.pins += by
            assert checkpoint.pins >= 0
            self.refile(checkpoint)

    def evict(self, checkpoint: Checkpoint, why: str) -> None:
        assert not checkpoint.pins
        if self.learned is not None:
            self.learned.evicted(checkpoint)
        self.arena.free_slot(checkpoint.slot)
        self.remove(checkpoint, why)
        self.evicted[checkpoint.kind] += 1

    def remove(self, checkpoint: Checkpoint, why: str) -> None:
        """Takes a checkpoint out of what is known; its slot is the caller's. `why`: what it leaves for."""
        del self.checkpoints[checkpoint.key]
        if checkpoint.filed is not None:
            del self.order[checkpoint.filed]
            checkpoint.filed = None
        if checkpoint.tail is not None:
            self.uncount(checkpoint.tail)
        self.prune(checkpoint.key)
        if self.learned is not None:
            self.learned.left(checkpoint, why)

    def victim(self, slots: int, limit: int) -> Checkpoint | None:
        within = [c for c in self.in_order() if self.rank(c) <= limit]
        if not self.arena.unified and len(self.arena.free_slots()) >= slots:
            within = [c for c in within if not self.children(c.key)] or within
        return within[0] if within else None

    def make_room(self, slots: int, pages: int, why: str, limit: int | None = None) -> bool:
        if self.arena.satisfied(slots, pages):
            return True
        if limit is None and not self.would_fit(slots, pages):
            return False
        while not self.arena.satisfied(slots, pages):
            victim = self.victim(slots, ANY_RANK if limit is None else limit)
            if victim is None:
                return False
            self.evict(victim, why)
        return True

    def would_fit(self, slots: int, pages: int, spare: int | None = None) -> bool:
        """Whether evicting every unpinned checkpoint, and freeing slot `spare`, would make room."""
        trial = copy.deepcopy(self)
        if spare is not None:
            trial.arena.free_slot(spare)
        for checkpoint in list(trial.order.values()):
            trial.evict(checkpoint, "what if")
        return trial.arena.satisfied(slots, pages)


def common(a: Sequence[Symbol], b: Sequence[Symbol]) -> int:
    if a == b:
        return len(a)
    n = 0
    while n < len(a) and n < len(b) and a[n] == b[n]:
        n += 1
    return n
