"""What a checkpoint is worth to the oracle: docs/policy.md sections 1 and 4.

Owns worths, shares and the price, and of each checkpoint where its node begins and whether it is a leaf,
which it keeps in step with the supports that it is told of. A share depends on the moment at which it was
given, so the order of calls here is that of the core's. Asks oracle_policy.py for index and flow. A trial
copy of the store ("what if all left") learns nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.oracle_policy import History, Record, Trail
from tests.oracle_store import Checkpoint, Key, Symbol, common


class Valued:
    """Of one checkpoint: its record, its worth (None while it is pinned), and the shape of its node."""

    def __init__(self, checkpoint: Checkpoint, record: Record) -> None:
        self.checkpoint, self.record = checkpoint, record
        self.path = checkpoint.key[1]
        self.worth: int | None = None
        self.begin, self.leaf = 0, True

    def shape(self, supports: list[tuple[Symbol, ...]]) -> tuple[int, bool]:
        """Where the node begins: as deep as any other path goes along without going on here."""
        shared = [(common(each, self.path), len(each)) for each in supports]
        begin = max((same for same, _ in shared if same < len(self.path)), default=0)
        return begin, not any(same == len(self.path) < depth for same, depth in shared)


class Worths:
    def __init__(
        self, whole: Callable[[int], int], page_bytes: int, slot_bytes: int, arena_bytes: int
    ) -> None:
        """`whole`: how many pages are complete at a depth."""
        self.whole, self.page_bytes, self.slot_bytes = whole, page_bytes, slot_bytes
        self.history = History(max(1 << 16, arena_bytes // 4096), self.revalue)
        self.price = 0
        self.supports: Counter[Key] = Counter()
        self.valued: dict[Key, Valued] = {}

    def __deepcopy__(self, memo: Any) -> None:
        return None

    # ---- section 1

    def bytes_of(self, valued: Valued) -> int:
        pages = self.whole(len(valued.path)) - self.whole(valued.begin)
        return self.slot_bytes + (pages * self.page_bytes if valued.leaf else 0)

    def worth_of(self, valued: Valued) -> int:
        salt, path = valued.checkpoint.key
        known = {len(key[1]) for key in self.valued if key[0] == salt}
        above = max((d for d in known if d < len(path) and (salt, path[:d]) in self.valued), default=0)
        rate = valued.record.index + valued.record.flow
        return 1 + rate * (len(path) - above) * (1 << 20) // self.bytes_of(valued)

    def worth(self, checkpoint: Checkpoint) -> int:
        found = self.valued[checkpoint.key].worth
        assert found is not None, "a pinned checkpoint has no worth"
        return found

    def by_slot(self) -> dict[int, int]:
        return {v.checkpoint.slot: v.worth for v in self.valued.values() if v.worth is not None}

    def revalue(self, checkpoint: Checkpoint) -> None:
        """Its index, its flow, its shape, its pins or what is above it may have changed."""
        valued = self.valued.get(checkpoint.key)
        if valued is None:
            return
        valued.worth = None
        if checkpoint.pins:
            return self.history.give(valued.record, 0)
        valued.worth = self.worth_of(valued)
        self.share(valued)

    def share(self, valued: Valued) -> None:
        """Section 4: of an announced return, for the case that it leaves first; given anew only when it is
        off by an eighth."""
        record, worth, price = valued.record, valued.worth, 2 * self.price
        assert worth is not None
        ratio = 256 if worth <= price else (price << 8) // worth
        rate = record.index + record.flow if record.hint == "returns" else 0
        given = rate * ratio >> 8
        if abs(given - record.given) > (given + record.given) // 16:
            self.history.give(record, given)

    # ---- what changes it

    def support(self, key: Key, by: int) -> None:
        """A support came or went: at most one checkpoint has another shape now."""
        self.supports[key] += by
        if self.supports[key] not in (0, 1) or (by < 0 and self.supports[key]):
            return
        if not self.supports[key]:
            del self.supports[key]
        near = [v for v in self.valued.values() if v.checkpoint.key[0] == key[0] and v.checkpoint.key != key]
        paths = [path for salt, path in self.supports if salt == key[0]]
        for valued in near:
            same = common(key[1], valued.path)
            if same < len(valued.path) and same < valued.begin:
                continue  # others go along further
            shape = valued.shape(paths)
            if shape != (valued.begin, valued.leaf):
                valued.begin, valued.leaf = shape
                self.revalue(valued.checkpoint)

    def joined(self, checkpoint: Checkpoint, trail: Trail) -> None:
        """A checkpoint was published; its node is there."""
        key = checkpoint.key
        assert self.supports[key]
        valued = Valued(checkpoint, self.history.at(trail, key, checkpoint.kind))
        valued.begin, valued.leaf = valued.shape([path for salt, path in self.supports if salt == key[0]])
        self.supports[key] += 1
        self.valued[key] = valued
        self.history.resident(valued.record, checkpoint)
        self.revalue(checkpoint)
        self.revalue_below(key)

    def evicted(self, checkpoint: Checkpoint) -> None:
        """Section 4: the price follows what leaves."""
        valued = self.valued[checkpoint.key]
        assert valued.worth is not None
        size = self.bytes_of(valued)
        change = (valued.worth - self.price) * size
        step = abs(change) // (size + 32 * self.slot_bytes)
        self.price += step if change > 0 else -step

    def fork(self, parent: Trail, source: Checkpoint | None) -> Trail:
        return self.history.follow(parent, self.valued[source.key].record if source is not None else None)

    def left(self, checkpoint: Checkpoint, why: str) -> None:
        """It is a ghost now; its support goes last."""
        record = self.valued[checkpoint.key].record
        self.history.remember_leaving(record, checkpoint.kind, why)
        record.checkpoint = None
        self.history.give(record, record.index + record.flow)
        del self.valued[checkpoint.key]
        self.revalue_below(checkpoint.key)
        self.support(checkpoint.key, -1)

    def revalue_below(self, key: Key) -> None:
        """Of the next checkpoints below: they save more or less than before."""
        salt, path = key
        below = [
            k
            for k in self.valued
            if k[0] == salt and len(k[1]) > len(path) and common(k[1], path) == len(path)
        ]
        nearest = [k for k in below if not any(common(o[1], k[1]) == len(o[1]) < len(k[1]) for o in below)]
        for each in sorted(nearest, key=lambda k: branching(k[1]), reverse=True):
            if self.valued[each].worth is not None:
                self.revalue(self.valued[each].checkpoint)


def branching(path: tuple[Symbol, ...]) -> tuple[tuple[int, Any], ...]:
    """The order of paths: tokens with content come before all others."""
    return tuple((0, s) if isinstance(s, tuple) else (1, s) for s in path)
