"""The oracle: what `hybridcache` must answer, in plain Python, written from docs/design.md alone.

Owns leases and plans (sections 3 and 4), their steps in oracle_steps.py and oracle_verify.py;
oracle_store.py holds the ids and what the tree knows, oracle_placement.py says where checkpoints go. There is
no radix tree: what one would maintain (children, prune, merge) is asked anew of a dict of supports. It
predicts every id exactly. Only valid calls are made to it, but for five kinds whose ValueError it models: a
size that an empty arena could not hold, rows that a step cannot have, a count of tokens that a verify step
cannot keep, a position that cannot be wanted, an empty transcript.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tests.oracle_placement import BREAKPOINT, CHUNK_END, FORK, PROMPT_END, TURN_END, Placement
from tests.oracle_store import Arena, Checkpoint, Store, Symbol, common
from tests.oracle_transcript import Transcript, Transcripts, asked, symbols
from tests.oracle_types import Lease, Match, Missed, OpenStep, Pin
from tests.oracle_verify import VerifySteps
from tests.oracle_view import View
from tests.oracle_worth import Worths


class Oracle(VerifySteps, Transcripts, View):
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
        policy: str = "supersede",
        pass_cost: int = 512,
        interior_spacing: int = 1024,
        run_ahead: int = 0,
        draft_tokens: int = 0,
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
        lookahead = getattr(layout, "lookahead", 0)
        self.arena, self.store = arena, Store(arena, layout.page_size, policy == "lru", lookahead)
        if policy == "default":
            pages, slots = (arena.num_pages, 0 if arena.unified else arena.num_slots)
            size = (pages + slots * per_slab) * layout.page_bytes
            self.store.learned = Worths(self.store.whole, layout.page_bytes, layout.slot_bytes, size)
        self.placement = Placement(inner_checkpoints, alignment, pass_cost, interior_spacing)
        self.inner, self.max_cached_bytes = inner_checkpoints, max_cached_bytes
        self.run_ahead, self.draft_tokens = run_ahead, draft_tokens
        self.leases: list[Lease] = []
        self.transcripts: list[Transcript] = []
        self.resting: list[Lease] = []
        self.booked: list[OpenStep] = []
        self.leases_made = self.plans = self.done = self.tick = 0  # `done`: the last plan that was applied
        self.counters: Counter[str] = Counter()
        self.events: Counter[str] = Counter()  # rare moments, for the tests to count

    # ---- match

    def match(
        self, tokens: Transcript | Sequence[int], *, salt: bytes = b"", content_keys: Iterable[Any] = ()
    ) -> Match:
        return self._match(*asked(tokens, salt, content_keys))

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
        match = Match(length, kv_length, reason, diverged)
        return match._replace(missed=self._missed(path, salt, match))

    def _missed(self, path: tuple[Symbol, ...], salt: bytes, match: Match) -> Missed | None:
        known = match.kv_length
        if self.store.learned is not None:
            history = self.store.learned.history
            if record := history.deepest_left(salt, path, match.length):
                cause, kind, request, time = record.left
                time_ago = None if time is None else history.time - time
                return Missed(record.depth, kind, cause, history.now - request, time_ago)
            known = max(known, history.known(salt, path))
        known = min(known, len(path) - 1)
        return Missed(known, None, "never_made", None, None) if known > match.length else None

    def _checkpoint_at_or_below(self, path: tuple[Symbol, ...], salt: bytes, depth: int) -> int:
        known = {len(key[1]) for key in self.store.checkpoints if key[0] == salt}
        return max((p for p in known if p <= depth and (salt, path[:p]) in self.store.checkpoints), default=0)

    # ---- reserve

    def reserve(
        self,
        tokens: Transcript | Sequence[int],
        *,
        salt: bytes = b"",
        breakpoints: Iterable[int] = (),
        content_keys: Iterable[Any] = (),
        max_new_tokens: int = 0,
        now: int | None = None,
        priority: int = 0,
    ) -> Lease | None:
        path, salt = asked(tokens, salt, content_keys)
        total_pages = -(-(len(path) + max_new_tokens) // self.page_size)
        if not self.arena.could_ever_hold(1, total_pages):
            raise ValueError("tokens")
        match = self._match(path, salt)
        best = self.store.checkpoints.get((salt, path[: match.length]))
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
        if now is not None and self.store.learned is not None:
            self.store.learned.history.tell(now)
        match = match._replace(missed=self._missed(path, salt, match))  # before it counts as a request
        if start < match.length:
            assert best is not None
            missed = Missed(match.length, best.kind, "no_room", 0, None)
            match = match._replace(length=start, reason="no_room", missed=missed)
        if match.missed is not None:
            self.counters[f"missed_{match.missed.cause}"] += match.missed.position - start
        lease = self._open(path, len(path), salt, start, source, total_pages, match)
        self.store.pin(source, -1)  # of _admit
        if source is not None:
            self._restored(source)
            self.placement.used[source.kind] += 1
            self.counters[f"restored_{source.kind}"] += 1
        lease.ways, lease.resend = ways, match.kv_length == len(path)
        if self.store.learned is not None:
            lease.trail = self.store.learned.history.arrived(salt, path, priority)
            lease.trail.start = start
        lease.wanted = self.placement.wanted(lease, breakpoints, len(path) + max_new_tokens)
        return lease

    def _admit(self, start: int, path: tuple[Symbol, ...], salt: bytes, total_pages: int) -> bool:
        """Makes room for a lease that resumes at `start`, whose checkpoint stays pinned if there is."""
        source = self.store.checkpoints[salt, path[:start]] if start else None
        self.store.pin(source, 1)
        room = self.store.make_room(1, total_pages - self.store.whole(start), "reserve")
        if not room:
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

    # ---- close

    def close(
        self,
        lease: Lease,
        *,
        keep: str = "all",
        discard: bool = False,
        now: int | None = None,
        expected_return: int | None = None,
    ) -> None:
        assert not lease.closed
        history = self.store.learned.history if self.store.learned is not None else None
        if history is not None and now is not None:
            history.tell(now)
        lease.closed, lease.will_not_return = True, keep == "nothing"
        self.counters["closes"] += 1
        self.leases.remove(lease)
        past_prompt = keep == "prompt" and lease.committed > lease.prompt_length
        new = not lease.open and lease.committed > lease.boundary
        if new and not discard and keep != "nothing" and not past_prompt:
            self._publish_at_close(lease)
        if history is not None and keep == "nothing":
            history.dismiss(lease.trail)
        elif history is not None and expected_return is not None:
            history.expect(lease.trail, expected_return)
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
        before, at = lease.anchored, lease.committed
        self._anchor_also(lease, at)
        self._read_from(lease, self._publish(lease, at, kind, lease.live_slot))
        self._anchor_only(lease, [before], at)
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
        if self.store.learned is not None:
            self.store.learned.history.leave(lease.trail)
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
            self.store.evict(self.store.in_order()[0], "cap")

    # ---- fork, pin, clear

    def fork(self, lease: Lease) -> Lease | None:
        assert not lease.open and not lease.closed
        depth = lease.committed
        source = lease.read if lease.fresh else self.store.checkpoints.get(lease.key(depth))
        publish = not lease.fresh and source is None
        child_pages = len(lease.pages) - self.store.whole(depth)
        self.store.pin(source, 1)
        held, room = source, self.store.make_room(1 + publish, child_pages, "fork")
        if not room:
            self.store.pin(held, -1)
            return None
        if publish:
            source = self._publish_for_fork(lease)
        child = self._open(
            lease.tokens, lease.prompt_length, lease.salt, depth, source, len(lease.pages), lease.match
        )
        self.store.pin(held, -1)
        if self.store.learned is not None:
            child.trail = self.store.learned.fork(lease.trail, source)
        child.branches = False  # its parent makes the cut
        child.wanted = [w for w in lease.wanted if w.position > depth]
        if source is not None:
            self._restored(source)
        self.counters["forks"] += 1
        return child

    def _publish_for_fork(self, lease: Lease) -> Checkpoint:
        next_slot, before, at = self.arena.take_slot(), lease.anchored, lease.committed
        self._join_pages(lease, at)
        self._anchor_also(lease, at)
        source = self._publish(lease, at, FORK, lease.live_slot)
        self._read_from(lease, source)
        self._anchor_only(lease, [before], at)
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
        victims = [c for c in self.store.in_order() if salt is None or c.key[0] == salt]
        for checkpoint in victims:
            self.store.evict(checkpoint, "clear")
        return len(victims)
