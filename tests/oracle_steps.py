"""The oracle's ordinary steps and plans: launch, plan, applied, commit (docs/design.md section 4).

A part of Oracle (oracle.py), which owns the leases and all state named below; verify steps are in
oracle_verify.py. Valid calls only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.oracle_placement import BREAKPOINT, Placement
from tests.oracle_store import NO_RANK, Arena, Checkpoint, Store
from tests.oracle_types import Lease, OpenStep, Plan, Step


class OrdinarySteps:
    page_size: int
    run_ahead: int
    inner: bool
    arena: Arena
    store: Store
    placement: Placement
    leases: list[Lease]
    booked: list[OpenStep]
    plans: int
    done: int
    tick: int
    counters: Counter[str]
    events: Counter[str]

    # ---- launch, plan, applied

    def may_launch(self, lease: Lease) -> bool:
        collected = all(opened.number is not None and not opened.void for opened in lease.open)
        return not lease.closed and collected and len(lease.open) <= self.run_ahead

    def _launch_ordinary(self, lease: Lease, n: int) -> Step | None:
        begin = end = lease.computed
        end = begin + n if begin >= lease.prompt_length else min(begin + n, lease.prompt_length)
        if not self.arena.could_ever_hold(1, self._pages_up_to(lease, end)):
            raise ValueError("n")
        places = self.placement.places(lease, begin, end)
        if not self.inner:
            places = [w for w in places if w.position == end or self._could_keep(w.kind)][:1]
        shortened = bool(places) and not self.inner and places[0].position < end
        end = places[0].position if shortened else end
        total_pages = self._pages_up_to(lease, end)
        if not self._room_for_pages(lease, total_pages - len(lease.pages)):
            self.counters["refused_launches"] += 1
            return None
        lease.extra_passes += shortened
        self.counters["extra_passes"] += shortened
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
        live = lease.live_slot
        step = Step(begin, end, read, live, [(q, slot) for q, _, slot in inner], begin, [read], [live])
        kind, spare = (at_end.kind, at_end.spare) if at_end else (None, False)
        state = (read, live) if lease.fresh else None
        self._opened(lease, OpenStep(step, kind, spare, inner, self._book(lease, state)), end)
        lease.fresh = False
        return step

    def _opened(self, lease: Lease, opened: OpenStep, computed: int) -> None:
        lease.open.append(opened)
        self.booked.append(opened)
        lease.copy_from, lease.computed = None, computed

    def _pages_up_to(self, lease: Lease, end: int) -> int:
        return max(-(-end // self.page_size), len(lease.pages))

    def _room_for_pages(self, lease: Lease, pages: int) -> bool:
        if self.store.make_room(0, pages, "launch"):
            return True
        source = lease.read if self.arena.unified and lease.fresh and lease.copy_from is None else None
        if source is None or source.pins > 1 or not self.store.would_fit(0, pages, lease.live_slot):
            return False
        self._take_back(lease, source)
        return self.store.make_room(0, pages, "launch")

    def _take_back(self, lease: Lease, source: Checkpoint) -> None:
        """Rather than wait for ever, the lease gives up the checkpoint it reads and goes on in its slot."""
        lease.read, source.pins = None, 0  # at no moment may it leave: it is worth nothing
        self.store.remove(source, "taken_back")
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
        if self.store.make_room(1, 0, "checkpoint", limit):
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

    def _book(self, lease: Lease, state: tuple[int, int] | None) -> Plan:
        """`state`: the slot to read (-1: nothing) and the slot that is to hold its state."""
        plan = Plan(0, [], [], [], [])
        if state is not None and state[0] >= 0:
            plan.copy_slots.append(state)
        elif state is not None:
            plan.zero_slots.append(state[1])
        cut = self.store.whole(lease.start) if lease.copy_from is not None else None
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

    def _commit_ordinary(self, lease: Lease, opened: OpenStep, tokens: Sequence[int]) -> None:
        lease.open.pop(0)
        c = opened.step.end
        self._read_up_to(lease, opened, c, tokens)
        assert len(lease.tokens) == max(c, lease.prompt_length)
        inner, kind = self._to_publish(lease, opened)
        wants_slot = kind is not None and not opened.gone_on
        next_slot = self._optional_slot(kind, opened.spare) if wants_slot else None
        if kind is not None and (opened.gone_on or next_slot is not None):
            inner.append((c, kind, opened.step.write_slot))
        self._publish_all(lease, inner)
        if next_slot is not None:
            lease.live_slot, lease.fresh = next_slot, True
        self._end_rests()

    def _read_up_to(self, lease: Lease, opened: OpenStep, c: int, tokens: Sequence[int]) -> None:
        """Step 1 of a commit."""
        lease.tokens.extend(tokens)
        lease.committed = c
        if lease.left_behind is not None:
            self.arena.free_slot(lease.left_behind)
            lease.left_behind = None
        self._release_read(lease)
        self.counters += Counter(commits=1, tokens_committed=c - opened.step.begin)

    def _publish_all(self, lease: Lease, places: list[tuple[int, str, int]]) -> None:
        """Steps 4 to 6; a checkpoint at `committed` is what the lease reads next."""
        deepest = max([lease.boundary, *(q for q, _, _ in places)])
        whole = self.store.whole_at(self.store.whole(lease.committed))
        anchored, passed = max(whole, deepest), [lease.anchored]
        self._join_pages(lease, anchored)
        for q, kind, slot in places:
            passed.append(self._anchor_also(lease, q))
            checkpoint = self._publish(lease, q, kind, slot)
            if q == lease.committed:
                self._read_from(lease, checkpoint)
        self._anchor_also(lease, anchored)
        self._anchor_only(lease, passed, anchored)

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
            self._leave_behind(lease, opened.step.write_slot)
        return inner, None

    def _leave_behind(self, lease: Lease, slot: int) -> None:
        """A duplicate's slot is what the step behind reads: a verify step leaves it alone, so it stays."""
        if lease.open[0].rows:
            self.arena.free_slot(lease.live_slot)
            lease.live_slot, lease.fresh = slot, False
            self.events["left_behind_before_verify"] += 1
        else:
            lease.left_behind = slot
            self.events["left_behind"] += 1

    def _join_pages(self, lease: Lease, depth: int) -> None:
        """Full pages that the tree does not have yet become the tree's; duplicates stay the lease's."""
        for page_key in self.store.page_keys(lease.key(depth)):
            index = self.store.page_number(page_key)
            if page_key not in self.store.pages:
                lease.own.remove(index)
                self.store.join(page_key, lease.pages[index])

    def _anchor_also(self, lease: Lease, depth: int) -> int:
        self.store.add_anchor(lease.key(depth))
        return depth

    def _anchor_only(self, lease: Lease, passed: Sequence[int], depth: int) -> None:
        for each in reversed(passed):
            self.store.drop_anchor(lease.key(each))
        lease.anchored = depth

    def _tail(self, lease: Lease, depth: int) -> int | None:
        """Of the page that is not whole at `depth`: the tree's if it is by now, else the lease's, which goes
        on in it."""
        number = self.store.whole(depth)
        if depth == number * self.page_size:
            return None
        whole_at = self.store.whole_at(number + 1)
        if whole_at <= lease.committed:
            return self.store.pages[lease.key(whole_at)]
        self.events["full_tail"] += depth == (number + 1) * self.page_size
        return lease.pages[number]

    def _publish(self, lease: Lease, depth: int, kind: Any, slot: int) -> Checkpoint:
        self.tick += 1
        tail = self._tail(lease, depth)
        checkpoint = Checkpoint(lease.key(depth), slot, tail, kind, self.tick)
        self.store.add(checkpoint, lease.trail)
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
