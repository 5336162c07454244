"""The oracle: what `hybridcache` must answer, in plain Python, written from docs/design.md alone.

Owns leases and plans (sections 3 and 4); oracle_store.py holds the ids and what the tree knows,
oracle_placement.py says where checkpoints go. There is no radix tree: what one would maintain (children,
prune, merge) is asked anew of a dict of supports. It predicts every id exactly. Only valid calls are made to
it: of the errors it models one, the ValueError for a size that an empty arena could not hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tests.oracle_placement import BREAKPOINT, CHUNK_END, FORK, PROMPT_END, TURN_END, Placement
from tests.oracle_store import Arena, Checkpoint, Key, Store, Symbol, common
from tests.oracle_types import Lease, Match, OpenStep, Pin, Plan, Step


class Oracle:
    def __init__(
        self,
        layout: Any,
        *,
        memory_bytes: int | None = None,
        num_pages: int | None = None,
        num_slots: int | None = None,
        inner_checkpoints: bool = False,
        alignment: int = 1,
        max_cached_bytes: int | None = None,
        policy: str = "default",
        pass_cost: int = 512,
        interior_spacing: int = 1024,
    ) -> None:
        self.page_size, self.page_bytes, self.slot_bytes = (
            layout.page_size,
            layout.page_bytes,
            layout.slot_bytes,
        )
        per_slab = -(-layout.slot_bytes // layout.page_bytes)
        if memory_bytes is not None:
            slabs = memory_bytes // (per_slab * layout.page_bytes)
            arena = Arena(True, per_slab, slabs * per_slab, slabs)
        else:
            assert num_pages is not None and num_slots is not None
            arena = Arena(False, per_slab, num_pages, num_slots)
        self.arena, self.store = arena, Store(arena, layout.page_size, policy == "lru")
        self.placement = Placement(inner_checkpoints, alignment, pass_cost, interior_spacing)
        self.inner, self.max_cached_bytes = inner_checkpoints, max_cached_bytes
        self.leases: list[Lease] = []
        self.resting: list[Lease] = []
        self.booked: list[OpenStep] = []
        self.pending: int | None = None
        self.plans = self.tick = 0
        self.counters: Counter[str] = Counter()

    # ---- match

    def match(self, tokens: Sequence[int], *, salt: bytes = b"", content_keys: Iterable[Any] = ()) -> Match:
        return self._match(symbols(tokens, content_keys), salt)

    def _match(self, path: tuple[Symbol, ...], salt: bytes) -> Match:
        shared = [(common(s, path), len(s)) for s in self.store.supports(salt)]
        kv_length = max((same for same, _ in shared), default=0)
        total = len(path)
        length = self._checkpoint_at_or_below(path, salt, min(kv_length, total - 1))
        diverged = kv_length < total and any(same == kv_length < depth for same, depth in shared)
        if kv_length == 0:
            reason = "cold"
        elif length == total - 1:
            reason = "complete"
        elif kv_length == total and (salt, path) in self.store.checkpoints:
            reason = "remainder"
        else:
            reason = "unknown" if length == kv_length else "no_checkpoint"
        return Match(length, kv_length, reason, diverged)

    def _checkpoint_at_or_below(self, path: tuple[Symbol, ...], salt: bytes, depth: int) -> int:
        return next((p for p in range(depth, 0, -1) if (salt, path[:p]) in self.store.checkpoints), 0)

    # ---- reserve

    def reserve(
        self,
        tokens: Sequence[int],
        *,
        salt: bytes = b"",
        breakpoints: Iterable[int] = (),
        content_keys: Iterable[Any] = (),
        max_new_tokens: int = 0,
    ) -> Lease | None:
        path = symbols(tokens, content_keys)
        total_pages = -(-(len(path) + max_new_tokens) // self.page_size)
        if not self.arena.could_ever_hold(1, total_pages):
            raise ValueError("tokens")
        match = self._match(path, salt)
        start: int | None = match.length
        while start is not None and not self._admit(start, path, salt, total_pages):
            retry = start > 0 and not self.leases and not self.resting
            start = self._checkpoint_at_or_below(path, salt, start - 1) if retry else None
        if start is None:
            self.counters["refused_reserves"] += 1
            return None
        self.counters += Counter(reserves=1, tokens_queried=len(path), tokens_hit=start)
        source = self.store.checkpoints[salt, path[:start]] if start else None
        lease = self._open(path, len(path), salt, start, source, total_pages, match._replace(length=start))
        if source is not None:
            self._restored(source)
            self.placement.used[source.kind] += 1
            self.counters[f"restored_{source.kind}"] += 1
        lease.wanted = self.placement.wanted(lease, breakpoints)
        return lease

    def _admit(self, start: int, path: tuple[Symbol, ...], salt: bytes, total_pages: int) -> bool:
        """Makes room for a lease that resumes at `start`, whose checkpoint and path must stay."""
        source = self.store.checkpoints[salt, path[:start]] if start else None
        self.store.pin(source, 1)
        room = self.store.make_room(1, total_pages - start // self.page_size)
        self.store.pin(source, -1)
        return room

    def _open(
        self,
        path: Iterable[Symbol],
        prompt: int,
        salt: bytes,
        start: int,
        source: Checkpoint | None,
        total_pages: int,
        match: Match,
    ) -> Lease:
        tokens = list(path)
        shared = [self.store.pages[k] for k in self.store.page_keys((salt, tuple(tokens[:start])))]
        branches = source is None or source.kind not in (TURN_END, PROMPT_END)
        lease = Lease(
            self.page_size,
            salt,
            tokens,
            prompt,
            start,
            match,
            shared,
            set(),
            self.arena.take_slot(),
            source,
            source.tail if source else None,
            branches,
        )
        lease.committed = lease.computed = lease.boundary = lease.anchored = start
        self.store.pin(source, 1)
        self.store.add_anchor(lease.key(start))
        self._grow(lease, total_pages)
        self.leases.append(lease)
        return lease

    def _grow(self, lease: Lease, total_pages: int) -> None:
        while len(lease.pages) < total_pages:
            lease.own.add(len(lease.pages))
            lease.pages.append(self._take_page(lease))

    def _take_page(self, lease: Lease) -> int:
        page = self.arena.take_page(lease.home)
        lease.home = page // self.arena.per_slab
        return page

    def _restored(self, checkpoint: Checkpoint) -> None:
        """Touched, and not superseded any more."""
        self.tick += 1
        checkpoint.tick, checkpoint.superseded = self.tick, False
        self.store.refile(checkpoint)

    # ---- launch, plan, applied

    def launch(self, lease: Lease, n: int) -> Step | None:
        assert lease.open is None and not lease.closed and n > 0
        begin = end = lease.computed
        end = begin + n if begin >= lease.prompt_length else min(begin + n, lease.prompt_length)
        total_pages = max(-(-end // self.page_size), len(lease.pages))
        if not self.arena.could_ever_hold(1, total_pages):
            raise ValueError("n")
        if not self.store.make_room(0, total_pages - len(lease.pages)):
            self.counters["refused_launches"] += 1
            return None
        places = self.placement.places(lease, begin, end)
        if places and not self.inner and places[0][0] < end:
            end = places[0][0]
            lease.extra_passes += 1
            self.counters["extra_passes"] += 1
        self.counters["launches"] += 1
        self._grow(lease, total_pages)
        inner = [
            (q, kind, slot) for q, kind in places if q < end and (slot := self._inner_slot(kind)) is not None
        ]
        read = lease.live_slot if not lease.fresh else lease.read.slot if lease.read else -1
        step = Step(begin, end, read, lease.live_slot, [(q, slot) for q, _, slot in inner])
        lease.open = OpenStep(step, dict(places).get(end), inner, self._book(lease, read))
        self.booked.append(lease.open)
        lease.fresh, lease.copy_from, lease.computed = False, None, end
        return step

    def _inner_slot(self, kind: str) -> int | None:
        if self.store.make_room(1, 0, self.placement.limit(kind)):
            return self.arena.take_slot()
        self.counters["dropped_checkpoints"] += 1
        return None

    def _book(self, lease: Lease, read: int) -> Plan:
        plan = Plan(0, [], [], [], [])
        if lease.fresh and lease.read:
            plan.copy_slots.append((read, lease.live_slot))
        elif lease.fresh:
            plan.zero_slots.append(lease.live_slot)
        cut = lease.committed // self.page_size if lease.copy_from is not None else None
        if cut is not None:
            plan.copy_pages.append((lease.copy_from, lease.pages[cut]))
        plan.zero_pages.extend(
            lease.pages[i] for i in sorted(lease.own) if i != cut and lease.pages[i] in self.arena.dirty
        )
        return plan

    def plan(self) -> Plan:
        assert self.pending is None
        self.plans += 1
        self.pending = self.plans
        plan = Plan(self.plans, [], [], [], [])
        for opened in self.booked:
            opened.number = self.plans
            for whole, part in zip(plan[1:], opened.plan[1:], strict=True):
                whole.extend(part)
        self.booked = []
        self.arena.dirty -= {*plan.zero_pages, *(dst for _, dst in plan.copy_pages)}
        return plan

    def applied(self, plan: Any) -> None:
        if plan.number != self.pending:
            return
        self.pending = None
        resting, self.resting = self.resting, []
        for lease in resting:
            self._let_go(lease)
        if resting:
            self._trim()

    # ---- commit

    def commit(self, lease: Lease, tokens: Sequence[int] = ()) -> None:
        opened = lease.open
        assert opened is not None and opened.number is not None and opened.number != self.pending
        lease.tokens.extend(tokens)
        c = lease.committed = opened.step.end
        assert len(lease.tokens) == max(c, lease.prompt_length)
        self._release_read(lease)
        lease.open = None
        self.counters += Counter(commits=1, tokens_committed=c - opened.step.begin)
        inner, kind = self._to_publish(lease, opened)
        inner, kind, spare_page, spare_slot = self._acquire(lease, inner, kind)
        deepest = max([lease.boundary, *(q for q, _, _ in inner), c if kind else 0])
        self._move_anchor(lease, max(c - c % self.page_size, deepest))
        partial = lease.pages[c // self.page_size] if c % self.page_size else None
        if spare_page is not None:
            lease.pages[c // self.page_size], lease.copy_from = spare_page, partial
        for q, inner_kind, slot in inner:
            tail = None
            if q % self.page_size:
                page_end = (q // self.page_size + 1) * self.page_size
                tail = self.store.pages[lease.key(page_end)] if page_end <= c else partial
            checkpoint = self._publish(lease, q, inner_kind, slot, tail)
            if tail is not None and tail == lease.copy_from and not kind:
                self._read_from(lease, checkpoint)
        if kind:
            checkpoint = self._publish(lease, c, kind, lease.live_slot, partial)
            self._read_from(lease, checkpoint)
            lease.live_slot, lease.fresh = spare_slot, True

    def _to_publish(self, lease: Lease, opened: OpenStep) -> tuple[list[tuple[int, str, int]], str | None]:
        inner = []
        for q, kind, slot in opened.inner:
            if lease.key(q) in self.store.checkpoints:
                self.arena.free_slot(slot)
            else:
                inner.append((q, kind, slot))
        kind_at_c = self.placement.boundary_kind(lease, opened)
        return inner, None if lease.key(opened.step.end) in self.store.checkpoints else kind_at_c

    def _acquire(self, lease: Lease, inner: list[tuple[int, str, int]], kind: str | None) -> Any:
        """Step 3: (inner positions that stay, kind at c or None, replacement page, next live slot)."""
        c, page = lease.committed, None
        cut = [x for x in inner if x[0] % self.page_size and x[0] > c - c % self.page_size]
        if cut and self.store.make_room(0, 1, self.placement.limit(cut[0][1])):
            page = self._take_page(lease)
        elif cut:
            for dropped in cut:
                self.arena.free_slot(dropped[2])
                inner.remove(dropped)
            self.counters["dropped_checkpoints"] += len(cut)
        if kind is None:
            return inner, None, page, None
        pages = 1 if c % self.page_size and page is None else 0
        if not self.store.make_room(1, pages, self.placement.limit(kind)):
            self.counters["dropped_checkpoints"] += 1
            return inner, None, page, None
        slot = self.arena.take_slot()
        return inner, kind, self._take_page(lease) if pages else page, slot

    def _move_anchor(self, lease: Lease, depth: int) -> None:
        """Full pages that the tree does not have yet become the tree's; duplicates stay the lease's."""
        self.store.add_anchor(lease.key(depth))
        for page_key in self.store.page_keys(lease.key(depth)):
            index = len(page_key[1]) // self.page_size - 1
            if page_key not in self.store.pages:
                lease.own.remove(index)
                self.store.pages[page_key] = lease.pages[index]
                self.store.count(lease.pages[index])
        self.store.drop_anchor(lease.key(lease.anchored))
        lease.anchored = depth

    def _publish(self, lease: Lease, depth: int, kind: str, slot: int, tail: int | None) -> Checkpoint:
        self.tick += 1
        checkpoint = Checkpoint(lease.key(depth), slot, tail, kind, self.tick)
        self.store.checkpoints[checkpoint.key] = checkpoint
        self.store.refile(checkpoint)
        if tail is not None:
            self.store.count(tail)
        self.placement.publication(kind)
        self.counters[f"published_{kind}"] += 1
        previous = self.store.checkpoints.get(lease.key(lease.boundary)) if lease.boundary else None
        if previous and previous.kind != BREAKPOINT and self.store.children(previous.key) == 1:
            self._supersede(previous)
        lease.boundary = depth
        return checkpoint

    def _supersede(self, checkpoint: Checkpoint) -> None:
        self.counters["superseded"] += not checkpoint.superseded
        checkpoint.superseded = True
        self.store.refile(checkpoint)

    def _read_from(self, lease: Lease, checkpoint: Checkpoint) -> None:
        self._release_read(lease)
        lease.read = checkpoint
        self.store.pin(checkpoint, 1)

    def _release_read(self, lease: Lease) -> None:
        self.store.pin(lease.read, -1)
        lease.read = None

    # ---- close

    def close(self, lease: Lease, *, keep: str = "all", discard: bool = False) -> None:
        assert not lease.closed
        lease.closed = True
        self.counters["closes"] += 1
        self.leases.remove(lease)
        past_prompt = keep == "prompt" and lease.committed > lease.prompt_length
        new = lease.open is None and lease.committed > lease.boundary
        if new and not discard and keep != "nothing" and not past_prompt:
            self._publish_at_close(lease)
        if lease.open is not None and lease.open.number is not None and lease.open.number == self.pending:
            self.resting.append(lease)
        else:
            self.booked = [opened for opened in self.booked if opened is not lease.open]
            self._let_go(lease)
        last = self.store.checkpoints.get(lease.key(lease.boundary)) if lease.boundary else None
        if keep == "nothing" and last and last.kind != BREAKPOINT and not self.store.children(last.key):
            self._supersede(last)
        self._trim()

    def _publish_at_close(self, lease: Lease) -> None:
        if lease.key(lease.committed) in self.store.checkpoints:
            return
        past = lease.committed - lease.prompt_length
        kind = TURN_END if past > 0 else PROMPT_END if past == 0 else CHUNK_END
        self._publish(lease, lease.committed, kind, lease.live_slot, self._give_partial(lease))
        lease.live_slot = -1

    def _give_partial(self, lease: Lease) -> int | None:
        """The page with the KV that `committed` cuts: a copy that is due has not been made yet."""
        if not lease.committed % self.page_size:
            return None
        if lease.copy_from is not None:
            return lease.copy_from
        index = lease.committed // self.page_size
        lease.own.remove(index)
        return lease.pages[index]

    def _let_go(self, lease: Lease) -> None:
        self._release_read(lease)
        self.store.drop_anchor(lease.key(lease.anchored))
        for index in lease.own:
            self.arena.free_page(lease.pages[index])
        slots = [slot for _, _, slot in lease.open.inner] if lease.open else []
        for slot in [lease.live_slot, *slots]:
            if slot >= 0:
                self.arena.free_slot(slot)

    def cached_bytes(self) -> int:
        return len(self.store.checkpoints) * self.slot_bytes + len(self.store.counts) * self.page_bytes

    def _trim(self) -> None:
        while (
            self.max_cached_bytes is not None
            and self.store.order
            and self.cached_bytes() > self.max_cached_bytes
        ):
            self.store.evict(self.store.order.peekitem(0)[1])

    # ---- fork, pin, clear

    def fork(self, lease: Lease) -> Lease | None:
        assert lease.open is None and not lease.closed
        depth = lease.committed
        source = lease.read if lease.fresh else self.store.checkpoints.get(lease.key(depth))
        publish = not lease.fresh and source is None
        replacement = int(publish and depth % self.page_size != 0 and lease.copy_from is None)
        child_pages = len(lease.pages) - depth // self.page_size
        self.store.pin(source, 1)
        room = self.store.make_room(1 + publish, child_pages + replacement)
        self.store.pin(source, -1)
        if not room:
            return None
        if publish:
            source = self._publish_for_fork(lease, replacement)
        child = self._open(
            lease.tokens, lease.prompt_length, lease.salt, depth, source, len(lease.pages), lease.match
        )
        child.branches = False  # its parent makes the cut
        child.wanted = [(w, kind) for w, kind in lease.wanted if w > depth]
        if source is not None:
            self._restored(source)
        self.counters["forks"] += 1
        return child

    def _publish_for_fork(self, lease: Lease, replacement: int) -> Checkpoint:
        depth, spare_slot = lease.committed, self.arena.take_slot()
        spare_page = self._take_page(lease) if replacement else None
        self._move_anchor(lease, depth)
        tail = self._give_partial(lease)
        source = self._publish(lease, depth, FORK, lease.live_slot, tail)
        self._read_from(lease, source)
        lease.live_slot, lease.fresh = spare_slot, True
        if spare_page is not None:
            index = depth // self.page_size
            lease.own.add(index)
            lease.pages[index], lease.copy_from = spare_page, tail
        return source

    def pin(
        self, tokens: Sequence[int], *, salt: bytes = b"", content_keys: Iterable[Any] = ()
    ) -> Pin | None:
        path = symbols(tokens, content_keys)
        depth = self._checkpoint_at_or_below(path, salt, len(path))
        if not depth:
            return None
        checkpoint = self.store.checkpoints[salt, path[:depth]]
        self.store.pin(checkpoint, 1)
        return Pin(depth, checkpoint)

    def release(self, pin: Pin) -> None:
        self.store.pin(pin.checkpoint, -1)

    def clear(self, *, salt: bytes | None = None) -> int:
        victims = [c for c in self.store.order.values() if salt is None or c.key[0] == salt]
        for checkpoint in victims:
            self.store.evict(checkpoint)
        return len(victims)

    # ---- what it knows, for comparison and for people

    def check(self) -> None:
        """I1: every id in use has one owner, the tree's pages are counted by nodes and tails; I11: paired."""
        holders = [*self.leases, *self.resting]
        slots = [c.slot for c in self.store.checkpoints.values()] + [h.live_slot for h in holders]
        slots += [slot for h in holders if h.open for _, _, slot in h.open.inner]
        assert sorted(slots) == sorted(self.arena.slots), "I1 slots"
        pages = [h.pages[i] for h in holders for i in h.own] + list(self.store.counts)
        assert sorted(pages) == sorted(self.arena.pages), "I1 pages"
        tails = [c.tail for c in self.store.checkpoints.values() if c.tail is not None]
        assert Counter([*self.store.pages.values(), *tails]) == self.store.counts, "I1 counts"
        needed = {k for s in (*self.store.checkpoints, *self.store.anchors) for k in self.store.page_keys(s)}
        assert needed == set(self.store.pages), "I11 the pages of every support, and no other"
        if self.arena.unified:
            assert not {p // self.arena.per_slab for p in self.arena.pages} & self.arena.slots, "I1 roles"

    def stats(self) -> dict[str, int]:
        """Those of the core's statistics that the design defines."""
        evicted = {f"evicted_{kind}": n for kind, n in self.store.evicted.items()}
        gauges = {
            "open_leases": len(self.leases),
            "resting_leases": len(self.resting),
            "tree_pages": len(self.store.counts),
            "checkpoints": len(self.store.checkpoints),
            "taken_pages": len(self.arena.pages),
            "taken_slots": len(self.arena.slots),
            "cached_bytes": self.cached_bytes(),
        }
        return {**self.counters, **evicted, **gauges}

    def shape(self) -> list[tuple[Any, ...]]:
        """Every node: salt, begin, depth, pages, checkpoint (kind, slot, tail, tick, superseded, pins)."""
        found, nodes = [], self.store.nodes()
        for key in nodes:
            salt, path = key
            above = max((d for d in range(1, len(path)) if (salt, path[:d]) in nodes), default=0)
            pages = len(path) // self.page_size - above // self.page_size
            c = self.store.checkpoints.get(key)
            mark = c and (c.kind, c.slot, -1 if c.tail is None else c.tail, c.tick, c.superseded, c.pins)
            found.append((salt.hex(), above, len(path), pages, mark))
        return sorted(found, key=repr)

    def dump(self) -> str:
        lines = [
            f"arena slots={sorted(self.arena.slots)} pages={sorted(self.arena.pages)} fill={self.arena.fill}"
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
                f"copy_from={h.copy_from} step={h.open and h.open.step} rests={h.closed}"
            )
        return "\n".join(lines)


def symbols(tokens: Iterable[int], content_keys: Iterable[Any]) -> tuple[Symbol, ...]:
    found: list[Symbol] = [int(t) for t in tokens]
    for position, content in content_keys:
        found[position] = (found[position], content)
    return tuple(found)


def show(key: Key) -> str:
    return f"{key[0]!r}:" + ",".join(str(s) for s in key[1])
