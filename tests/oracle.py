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
from tests.oracle_store import NO_RANK, Arena, Checkpoint, Key, Store, Symbol, common
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
        run_ahead: int = 0,
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
        self.run_ahead = run_ahead
        self.leases: list[Lease] = []
        self.resting: list[Lease] = []
        self.booked: list[OpenStep] = []
        self.leases_made = self.plans = self.done = self.tick = 0  # `done`: the last plan that was applied
        self.counters: Counter[str] = Counter()
        self.events: Counter[str] = Counter()  # rare moments, for the tests to count

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
        known = match.kv_length
        others = [s for s in self.store.supports(salt) if common(s, path) == known < len(s)]
        ways = len({s[known] for s in others}) if known < len(path) else 0
        start: int | None = match.length
        while start is not None and not self._admit(start, path, salt, total_pages):
            retry = start > 0 and not self.leases and not self.resting
            start = self._checkpoint_at_or_below(path, salt, start - 1) if retry else None
        if start is None:
            self.counters["refused_reserves"] += 1
            return None
        self.counters += Counter(reserves=1, tokens_queried=len(path), tokens_hit=start)
        source = self.store.checkpoints[salt, path[:start]] if start else None
        if start < match.length:
            match = match._replace(length=start, reason="no_room")
        lease = self._open(path, len(path), salt, start, source, total_pages, match)
        if source is not None:
            self._restored(source)
            self.placement.used[source.kind] += 1
            self.counters[f"restored_{source.kind}"] += 1
        lease.ways, lease.resend = ways, match.kv_length == len(path)
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
        self.leases_made += 1
        lease = Lease(
            self.leases_made,
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
            page = self.store.take(lease.home)
            lease.home = page // self.arena.per_slab
            lease.pages.append(page)

    def _restored(self, checkpoint: Checkpoint) -> None:
        """Touched, and not superseded any more."""
        self.tick += 1
        checkpoint.tick, checkpoint.superseded = self.tick, False
        self.store.refile(checkpoint)

    # ---- launch, plan, applied

    def may_launch(self, lease: Lease) -> bool:
        collected = all(opened.number is not None for opened in lease.open)
        return not lease.closed and collected and len(lease.open) <= self.run_ahead

    def launch(self, lease: Lease, n: int) -> Step | None:
        assert self.may_launch(lease) and n > 0
        begin = end = lease.computed
        end = begin + n if begin >= lease.prompt_length else min(begin + n, lease.prompt_length)
        total_pages = max(-(-end // self.page_size), len(lease.pages))
        if not self.arena.could_ever_hold(1, total_pages):
            raise ValueError("n")
        if not self._room_for_pages(lease, total_pages - len(lease.pages)):
            self.counters["refused_launches"] += 1
            return None
        places = self.placement.places(lease, begin, end)
        if not self.inner:
            places = [w for w in places if w.position == end or self._could_keep(w.kind)][:1]
        if places and not self.inner and places[0].position < end:
            end = places[0].position
            lease.extra_passes += 1
            self.counters["extra_passes"] += 1
        at_end = next((w for w in places if w.position == end), None)
        at_end = at_end or self.placement.free_boundary(lease, begin, end)
        self.counters["launches"] += 1
        self._grow(lease, total_pages)
        if lease.open and lease.open[-1].kind is not None:
            self._go_on(lease, lease.open[-1])
        inner = [
            (q, kind, slot)
            for q, kind, spare in places
            if q < end and (slot := self._optional_slot(kind, spare)) is not None
        ]
        read = self._read_slot(lease)
        step = Step(begin, end, read, lease.live_slot, [(q, slot) for q, _, slot in inner])
        kind, spare = (at_end.kind, at_end.spare) if at_end else (None, False)
        opened = OpenStep(step, kind, spare, inner, self._book(lease, read))
        lease.open.append(opened)
        self.booked.append(opened)
        lease.fresh, lease.copy_from, lease.computed = False, None, end
        return step

    def _room_for_pages(self, lease: Lease, pages: int) -> bool:
        if self.store.make_room(0, pages):
            return True
        source = lease.read if self.arena.unified and lease.fresh and lease.copy_from is None else None
        if source is None or source.pins > 1 or not self.store.would_fit(0, pages, lease.live_slot):
            return False
        self._take_back(lease, source)
        return self.store.make_room(0, pages)

    def _take_back(self, lease: Lease, source: Checkpoint) -> None:
        """Rather than wait for ever, the lease gives up the checkpoint it reads and goes on in its slot."""
        self._release_read(lease)
        self.store.remove(source)
        self.arena.free_slot(lease.live_slot)
        lease.live_slot, lease.fresh = source.slot, False
        self.counters["dropped_checkpoints"] += 1
        self.events["taken_back"] += 1

    def _go_on(self, lease: Lease, before: OpenStep) -> None:
        """The step before leaves its state for a checkpoint, so the next one writes another slot."""
        slot = self._optional_slot(before.kind, before.spare)
        if slot is None:
            before.kind = None
            self.events["boundary_dropped_ahead"] += 1
            return
        self.events["gone_on"] += 1
        before.gone_on = lease.fresh = True
        lease.live_slot = slot

    def _could_keep(self, kind: str) -> bool:
        return self.arena.satisfied(1, 0) or self.store.victim(1, self.placement.limit(kind)) is not None

    def _optional_slot(self, kind: Any, spare: bool) -> int | None:
        limit = NO_RANK if spare else self.placement.limit(kind)
        if self.store.make_room(1, 0, limit):
            return self.arena.take_slot()
        self.counters["dropped_checkpoints"] += not spare
        self.events["spare_dropped"] += spare
        return None

    def _read_slot(self, lease: Lease) -> int:
        if not lease.fresh:
            return lease.live_slot
        if lease.open:
            return lease.open[-1].step.write_slot
        return lease.read.slot if lease.read else -1

    def _book(self, lease: Lease, read: int) -> Plan:
        plan = Plan(0, [], [], [], [])
        if lease.fresh and read >= 0:
            plan.copy_slots.append((read, lease.live_slot))
        elif lease.fresh:
            plan.zero_slots.append(lease.live_slot)
        cut = lease.start // self.page_size if lease.copy_from is not None else None
        if cut is not None:
            plan.copy_pages.append((lease.copy_from, lease.pages[cut]))
        plan.zero_pages.extend(
            lease.pages[i] for i in sorted(lease.own) if i != cut and lease.pages[i] in self.arena.dirty
        )
        return plan

    def may_plan(self) -> bool:
        return self.plans - self.done <= self.run_ahead

    def plan(self) -> Plan:
        assert self.may_plan()
        self.plans += 1
        plan = Plan(self.plans, [], [], [], [])
        for opened in self.booked:
            opened.number = self.plans
            for whole, part in zip(plan[1:], opened.plan[1:], strict=True):
                whole.extend(part)
        self.booked = []
        self.arena.dirty -= {*plan.zero_pages, *(dst for _, dst in plan.copy_pages)}
        return plan

    def applied(self, plan: Any) -> None:
        if plan.number <= self.done:
            return
        assert plan.number == self.done + 1, "plans are applied in order"
        self.done = plan.number
        self._end_rests()

    # ---- commit

    def commit(self, lease: Lease, tokens: Sequence[int] = ()) -> None:
        opened = lease.open.pop(0)
        assert opened.number is not None and opened.number <= self.done
        lease.tokens.extend(tokens)
        c = lease.committed = opened.step.end
        assert len(lease.tokens) == max(c, lease.prompt_length)
        if lease.left_behind is not None:
            self.arena.free_slot(lease.left_behind)
            lease.left_behind = None
        self._release_read(lease)
        self.counters += Counter(commits=1, tokens_committed=c - opened.step.begin)
        inner, kind = self._to_publish(lease, opened)
        wants_slot = kind is not None and not opened.gone_on
        next_slot = self._optional_slot(kind, opened.spare) if wants_slot else None
        at_c = kind is not None and (opened.gone_on or next_slot is not None)
        deepest = max([lease.boundary, *(q for q, _, _ in inner), c if at_c else 0])
        self._move_anchor(lease, max(c - c % self.page_size, deepest))
        for q, inner_kind, slot in inner:
            self._publish(lease, q, inner_kind, slot)
        if at_c:
            self._read_from(lease, self._publish(lease, c, kind, opened.step.write_slot))
        if next_slot is not None:
            lease.live_slot, lease.fresh = next_slot, True
        self._end_rests()

    def _to_publish(self, lease: Lease, opened: OpenStep) -> tuple[list[tuple[int, str, int]], str | None]:
        """Step 2: the inner checkpoints and the kind at the step's end, less what the tree has already."""
        inner = []
        for q, kind, slot in opened.inner:
            if lease.key(q) in self.store.checkpoints:
                self.arena.free_slot(slot)
            else:
                inner.append((q, kind, slot))
        if opened.kind is None or lease.key(opened.step.end) not in self.store.checkpoints:
            return inner, opened.kind
        if opened.gone_on:
            lease.left_behind = opened.step.write_slot
            self.events["left_behind"] += 1
        return inner, None

    def _move_anchor(self, lease: Lease, depth: int) -> None:
        """Full pages that the tree does not have yet become the tree's; duplicates stay the lease's."""
        self.store.add_anchor(lease.key(depth))
        for page_key in self.store.page_keys(lease.key(depth)):
            index = len(page_key[1]) // self.page_size - 1
            if page_key not in self.store.pages:
                lease.own.remove(index)
                self.store.join(page_key, lease.pages[index])
        self.store.drop_anchor(lease.key(lease.anchored))
        lease.anchored = depth

    def _tail(self, lease: Lease, depth: int) -> int | None:
        """The page that `depth` cuts: the tree's if it is full, else the lease's, which goes on in it."""
        if not depth % self.page_size:
            return None
        page_end = (depth // self.page_size + 1) * self.page_size
        full = page_end <= lease.committed
        return self.store.pages[lease.key(page_end)] if full else lease.pages[depth // self.page_size]

    def _publish(self, lease: Lease, depth: int, kind: Any, slot: int) -> Checkpoint:
        self.tick += 1
        tail = self._tail(lease, depth)
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
        lease.boundary, lease.made = depth, self.tick
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
        lease.closed, lease.will_not_return = True, keep == "nothing"
        self.counters["closes"] += 1
        self.leases.remove(lease)
        past_prompt = keep == "prompt" and lease.committed > lease.prompt_length
        new = not lease.open and lease.committed > lease.boundary
        if new and not discard and keep != "nothing" and not past_prompt:
            self._publish_at_close(lease)
        self.booked = [opened for opened in self.booked if opened not in lease.open]
        carried = [opened.number for opened in lease.open if opened.number is not None]
        if carried:
            lease.rests_until = max(carried) + self.run_ahead
            self.resting.append(lease)
        else:
            self._let_go(lease)
        self._end_rests(closing=lease)
        self._trim()

    def _publish_at_close(self, lease: Lease) -> None:
        if lease.key(lease.committed) in self.store.checkpoints:
            return
        past = lease.committed - lease.prompt_length
        kind = TURN_END if past > 0 else PROMPT_END if past == 0 else CHUNK_END
        self._publish(lease, lease.committed, kind, lease.live_slot)
        lease.live_slot = -1

    def _end_rests(self, closing: Lease | None = None) -> None:
        """Lets go of what rests and need not any more, in the order of ids."""
        idle = self.plans == self.done and not any(lease.open for lease in self.leases)
        ended = [lease for lease in self.resting if idle or lease.rests_until <= self.done]
        for lease in sorted(ended, key=lambda lease: lease.number):
            self.resting.remove(lease)
            self._let_go(lease)
            counted = lease.rests_until <= self.done
            if lease is not closing:
                self.events["rest_ended_by_plan" if counted else "rest_ended_idle"] += 1
        if ended and closing is None:
            self._trim()

    def _let_go(self, lease: Lease) -> None:
        self._release_read(lease)
        self.store.drop_anchor(lease.key(lease.anchored))
        for page in lease.held:
            self.store.let_go(page)
        for slot in lease.slots:
            if slot >= 0:
                self.arena.free_slot(slot)
        last = self.store.checkpoints.get(lease.key(lease.boundary))
        made = last is not None and last.tick == lease.made and last.kind != BREAKPOINT
        if lease.will_not_return and made and not self.store.children(last.key):
            self._supersede(last)

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
        assert not lease.open and not lease.closed
        depth = lease.committed
        source = lease.read if lease.fresh else self.store.checkpoints.get(lease.key(depth))
        publish = not lease.fresh and source is None
        child_pages = len(lease.pages) - depth // self.page_size
        self.store.pin(source, 1)
        room = self.store.make_room(1 + publish, child_pages)
        self.store.pin(source, -1)
        if not room:
            return None
        if publish:
            source = self._publish_for_fork(lease)
        child = self._open(
            lease.tokens, lease.prompt_length, lease.salt, depth, source, len(lease.pages), lease.match
        )
        child.branches = False  # its parent makes the cut
        child.wanted = [w for w in lease.wanted if w.position > depth]
        if source is not None:
            self._restored(source)
        self.counters["forks"] += 1
        return child

    def _publish_for_fork(self, lease: Lease) -> Checkpoint:
        next_slot = self.arena.take_slot()
        self._move_anchor(lease, lease.committed)
        source = self._publish(lease, lease.committed, FORK, lease.live_slot)
        self._read_from(lease, source)
        lease.live_slot, lease.fresh = next_slot, True
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
        self._trim()

    def clear(self, *, salt: bytes | None = None) -> int:
        victims = [c for c in self.store.order.values() if salt is None or c.key[0] == salt]
        for checkpoint in victims:
            self.store.evict(checkpoint)
        return len(victims)

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
                f"open={[(o.number, o.kind, o.gone_on, tuple(o.step)) for o in h.open]}"
            )
        return "\n".join(lines)


def symbols(tokens: Iterable[int], content_keys: Iterable[Any]) -> tuple[Symbol, ...]:
    found: list[Symbol] = [int(t) for t in tokens]
    for position, content in content_keys:
        found[position] = (found[position], content)
    return tuple(found)


def show(key: Key) -> str:
    return f"{key[0]!r}:" + ",".join(str(s) for s in key[1])
