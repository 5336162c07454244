"""The typed face of the core: HybridCache, Lease, Step, Plan, Match, Pin.

Owns the checking of arguments that are not tokens, and the documentation. Every decision is the core's
(csrc/cache.h); no tensor is touched here (hybridcache/pools.py does that, with the Plan). One thread at a
time may call a cache; `stats()` may be read from any.

    lease = cache.reserve(prompt)
    while lease.computed < len(prompt):
        step = lease.launch(chunk)
        plan = cache.plan(); pools.apply(plan); cache.applied(plan)
        ...                                  # forward over step.begin .. step.end
        lease.commit()
    lease.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from hybridcache import _core
from hybridcache._arguments import (
    ContentKeys,
    arena_geometry,
    check_content_keys,
    check_each,
    check_flag,
    check_integer,
    check_integers,
    check_rows,
    check_salt,
    check_time,
    ids_of,
    parts_off,
    set_layout,
    size_arena,
)
from hybridcache._handles import Pin, Transcript
from hybridcache._log import logged
from hybridcache.errors import InvariantError, StateError
from hybridcache.values import EVENTS, Event, Int32, Layout, Match, OperationTime, Plan, Step, Steps

Tokens = Any  # a C-contiguous int32 or int64 buffer, or a list of ints
Keep = Literal["all", "prompt", "nothing"]
Policy = Literal["default", "supersede", "lru", "gdsf", "marconi"]

_KEEP: dict[str, int] = {"all": 0, "prompt": 1, "nothing": 2}
_POLICIES = ("default", "supersede", "lru", "gdsf", "marconi")


class Lease:
    """One request's hold on the cache, from `HybridCache.reserve` or `fork` until `close`.

    0 <= start <= committed <= computed <= capacity, all in tokens. Every use after `close` is a StateError. A
    lease keeps its cache alive.
    """

    __slots__ = ("_cache", "_core", "_id")

    def __init__(self, cache: HybridCache, lease_id: int) -> None:
        self._cache = cache
        self._core = cache._core
        self._id = lease_id

    def __repr__(self) -> str:
        if self.closed:
            return f"<Lease {self._id} closed>"
        return f"<Lease {self._id} start={self.start} committed={self.committed} computed={self.computed}>"

    @property
    def closed(self) -> bool:
        """True after `close`."""
        try:
            self._core.lease(self._id)
        except StateError:
            return True
        return False

    @property
    def start(self) -> int:
        """The position that it resumed from: tokens that it did not have to compute."""
        return self._core.lease(self._id)[0]

    @property
    def committed(self) -> int:
        """Tokens whose ids the cache has been told; full pages of them are in the tree."""
        return self._core.lease(self._id)[1]

    @property
    def computed(self) -> int:
        """The end of the last launched step."""
        return self._core.lease(self._id)[2]

    @property
    def capacity(self) -> int:
        """Tokens that its pages can hold; `launch` takes more pages when it has to."""
        return self._core.lease(self._id)[3]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self._core.lease(self._id)[4]

    @property
    def boundary(self) -> int:
        """The last position that it resumed from or left a checkpoint at; 0 if none."""
        return self._core.lease(self._id)[5]

    @property
    def extra_passes(self) -> int:
        """Steps that ended early for a checkpoint: forward passes that a run without the cache would not
        make."""
        return self._core.lease(self._id)[6]

    @property
    def live_slot(self) -> int:
        """The slot that its kernels write."""
        return self._core.lease(self._id)[7]

    @property
    def match(self) -> Match:
        """What `reserve` found, with `start` as its length; a fork's is its parent's."""
        return Match.of(self._core.lease_match(self._id))

    @property
    def pages(self) -> Int32:
        """The page table: int32[capacity / page_size], a read-only view, no copy. No entry ever changes; what
        `launch` appends shows in the next view. O(1)."""
        return self._core.pages(self._id)

    def launch(self, count: int, *, rows: int | None = None) -> Step | None:
        """Opens a step over at most `count` tokens from `computed` on; None: no room for it now, and nothing
        changed.

        It ends at the end of the prompt, or at the next wanted boundary, at the latest. StateError if more
        than `run_ahead` steps are not committed, or no plan has collected the last one.

        rows: a verify step: all its tokens but the first may be drafts, it leaves the state after each of the
        last `rows` in a slot of its own, and `commit` says how many tokens stay. 0: all tokens are certain.
        None: `count` if the prompt is read, there are 2 to draft_tokens + 1 tokens or the step before is an
        open verify step; else 0. ValueError inside the prompt, or beyond draft_tokens + 1 or `count`.
        O(new pages + rows + log n).
        """
        step = self._core.launch_one(self._id, check_integer("count", count, low=1), check_rows(rows))
        return None if step is None else Step(*step)

    def commit(self, tokens: Tokens = ()) -> None:
        """Tells which ids the open step has read: those beyond the prompt, whose ids are known; so after
        prefill it takes none.

        Never ones that were only sampled. The plan that carries the step must be applied. If a boundary is
        wanted here, the live slot becomes the checkpoint and the lease goes on from it.

        Of a verify step the tokens that stay: as many as there is a row for, or none. A boundary inside them
        is published from its own row. With another step open behind it, none means none of that one either.
        O(new tokens + log n).
        """
        self._core.commit_one(self._id, tokens)

    def want(self, position: int) -> None:
        """Asks for a checkpoint at `position` (a breakpoint), as soon as the tokens show that one is worth
        it: where a tool call ends, before reasoning that the next turn will drop.

        Beyond `computed`; or at it, if the last open step is an ordinary one; or where the oldest open step,
        a verify step, leaves a row. Else ValueError. O(log boundaries wanted).
        """
        self._core.want(self._id, check_integer("position", position, low=-(2**62), high=2**40))

    def fork(self) -> Lease | None:
        """A second lease at `committed`; both continue from one checkpoint. None: no room, and nothing
        changed. No step may be open."""
        child = self._core.fork(self._id)
        return None if child is None else Lease(self._cache, child)

    def close(
        self,
        keep: Keep = "all",
        discard: bool = False,
        now: int | None = None,
        expected_return: int | None = None,
    ) -> None:
        """Ends the lease: finish, cancel and preempt alike.

        keep: how much will come back: "all", "prompt" (the output will not), "nothing". discard: publish
        nothing, since a copy or a forward failed. The state at `committed` joins the tree if it still exists.
        now, expected_return: the caller's clock, and how long until the conversation is back, in one unit of
        its choice (milliseconds): hints to the default policy. O(new pages + log n).
        """
        if not isinstance(keep, str) or (keep != "all" and keep not in _KEEP):
            raise ValueError(f"keep: {keep!r}, expected one of {sorted(_KEEP)}")
        if keep == "all" and discard is False and now is None and expected_return is None:
            return self._core.close(self._id)  # the usual one
        self._core.close(
            self._id,
            _KEEP[keep],
            check_flag("discard", discard),
            check_time("now", now),
            check_time("expected_return", expected_return),
        )

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes if still open; publishes nothing if an exception passes."""
        if error is None and not self.closed:
            self.close()
        elif error is not None:
            with suppress(InvariantError):  # a cache that broke off must not hide why
                if not self.closed:
                    self.close(discard=True)


class HybridCache:
    """The prefix cache of one model (on one tensor-parallel rank).

    layout: page_size (tokens), page_bytes and slot_bytes, such as a ModelLayout; lookahead: 1 where KV at a
        position also depends on the token after it (a draft layer's).
    memory_bytes: one arena that pages and slots share; or num_pages and num_slots: two fixed regions.
    run_ahead: 1 where the engine launches a step before it commits the one before (overlap).
    draft_tokens: most draft tokens in a step, 0 to 7 (speculative decoding, see Lease.launch).
    inner_checkpoints: the engine can leave states at inner positions of one forward (Step.checkpoints), so
        cuts cost no extra pass.
    alignment: paid cuts fall on begin + alignment * k tokens; 64 where a resumed GDN scan must be bitwise
        that of a whole run.
    max_cached_bytes: what may stay when nothing runs; None: all of the arena.
    policy: what leaves first: "default" (what is worth least by what this traffic has shown; docs/policy.md),
        or what researchers compare with: "supersede" (superseded states first, then the least recently used),
        "lru", "gdsf" (uses x tokens saved / bytes, aged), "marconi" (recency + marconi_alpha x tokens saved /
        bytes, both scaled to what is resident; it admits branch-offs and last decoded tokens only).
    without: parts of "default" to switch off, for researchers who want to see what each is worth: "ghosts",
        "flow", "stages", "gaps", "horizon", "forks" (docs/policy.md, section 7).
    events: record what joins and leaves the tree, for `take_events`; of what nobody takes at most
        event_capacity ids (of tokens, pages, slots), None: as many as the arena's tokens, at least 2**20.
    pass_cost: tokens that one more forward pass is worth; cuts that save less are not made.
    interior_spacing: tokens below which no sparse checkpoint is made inside a prompt.
    Errors: ValueError or TypeError that names the argument.

    >>> from types import SimpleNamespace
    >>> cache = HybridCache(SimpleNamespace(page_size=4, page_bytes=64, slot_bytes=128), memory_bytes=4096)
    >>> cache.match([1, 2, 3])
    Match(length=0, kv_length=0, reason='cold', diverged=False, missed=None)
    """

    def __init__(
        self,
        layout: Layout,
        *,
        memory_bytes: int | None = None,
        num_pages: int | None = None,
        num_slots: int | None = None,
        run_ahead: int = 0,
        draft_tokens: int = 0,
        inner_checkpoints: bool = False,
        alignment: int = 1,
        max_cached_bytes: int | None = None,
        policy: Policy = "default",
        marconi_alpha: float = 1.0,
        without: Sequence[str] = (),
        pass_cost: int = 512,
        interior_spacing: int = 1024,
        events: bool = False,
        event_capacity: int | None = None,
    ) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"policy: {policy!r}, expected one of {_POLICIES}")
        options = _core.Options()
        set_layout(options, layout)
        options.run_ahead = check_integer("run_ahead", run_ahead, low=0, high=1)
        options.draft_tokens = check_integer("draft_tokens", draft_tokens, low=0, high=7)
        options.inner_checkpoints = check_flag("inner_checkpoints", inner_checkpoints)
        options.events = check_flag("events", events)
        if event_capacity is not None:
            options.event_capacity = check_integer("event_capacity", event_capacity, low=1)
        options.alignment = check_integer("alignment", alignment, low=1)
        options.pass_cost = check_integer("pass_cost", pass_cost, low=0)
        options.interior_spacing = check_integer("interior_spacing", interior_spacing, low=1)
        options.policy = _POLICIES.index(policy)
        options.marconi_alpha = round(marconi_alpha * 2**16)
        options.without = parts_off(without)
        if max_cached_bytes is not None:
            options.max_cached_bytes = check_integer("max_cached_bytes", max_cached_bytes, low=0)
        size_arena(options, memory_bytes, num_pages, num_slots)
        self._core = _core.Core(options)
        self.geometry = arena_geometry(options, self._core)

    def match(self, tokens: Tokens, *, salt: bytes = b"", content_keys: ContentKeys = ()) -> Match:
        """How far `tokens` are known and could be resumed, and what was missed. Changes nothing (I9). One
        memcmp pass over the tokens, or for a transcript over what is new in it; the default policy adds one
        over what it remembers beyond the hit.

        tokens: int32 or int64 [L], L >= 1, ids in [0, 2**31), or a Transcript, without salt and content_keys
        beside it, which it has. salt: the namespace. content_keys: (position,
        bytes), ascending: what the token at that position stands for, where equal ids may have different
        content (images).
        """
        if isinstance(tokens, Transcript):
            found = self._core.match_transcript(tokens.of(self._core, salt, content_keys))
        else:
            found = self._core.match(tokens, check_salt(salt), check_content_keys(content_keys))
        return Match.of(found)

    def reserve(
        self,
        tokens: Tokens,
        *,
        salt: bytes = b"",
        breakpoints: Sequence[int] = (),
        content_keys: ContentKeys = (),
        max_new_tokens: int = 0,
        now: int | None = None,
        priority: int = 0,
    ) -> Lease | None:
        """Takes a live slot and all pages that the prompt (and max_new_tokens more) needs; None: no room now,
        and nothing changed.

        breakpoints: positions in [1, L + max_new_tokens] at which the caller wants checkpoints, such as the
        ends of chat messages (see also `Lease.want`). Other arguments as for `match`. ValueError if not even
        the empty arena could hold it. now: the caller's clock (see `Lease.close`). priority: in [-8, 8]; each
        step doubles what the default policy thinks the boundaries of this request are worth. One memcmp
        pass, then O(new tokens + pages + log n).
        """
        options = (
            [check_integer("breakpoints", at, low=-(2**62)) for at in check_each("breakpoints", breakpoints)],
            check_integer("max_new_tokens", max_new_tokens, low=0, high=2**40),
            check_time("now", now),
            check_integer("priority", priority, low=-8, high=8),
        )
        if isinstance(tokens, Transcript):
            lease = self._core.reserve_transcript(tokens.of(self._core, salt, content_keys), *options)
        else:
            keys = check_content_keys(content_keys)
            lease = self._core.reserve(tokens, check_salt(salt), keys, *options)
        return logged(None if lease is None else Lease(self, lease), tokens)

    def transcript(self, *, salt: bytes = b"") -> Transcript:
        """A session's tokens, kept by the core: a turn through it costs what is new. O(1)."""
        salt = check_salt(salt)
        return Transcript(self._core, self._core.transcript(salt), salt)

    def launch(
        self, leases: Sequence[Lease], counts: Sequence[int], *, rows: Sequence[int | None] | None = None
    ) -> Steps:
        """`Lease.launch` for a batch: no room is per lease, a caller's mistake refuses the whole batch."""
        return Steps(
            *self._core.launch(
                ids_of(leases, Lease, self._core),
                check_integers("counts", counts, low=1),
                [check_rows(each) for each in check_each("rows", () if rows is None else rows)],
            )
        )

    def commit(
        self, leases: Sequence[Lease], tokens: Tokens = (), counts: Sequence[int] | None = None
    ) -> None:
        """`Lease.commit` for a batch: `tokens` holds each lease's ids, lease after lease. A mistake refuses
        the whole batch.

        counts: how many of the tokens are whose; may be left out where no step is a verify step.
        """
        shares = None if counts is None else check_integers("counts", counts, low=0)
        self._core.commit(ids_of(leases, Lease, self._core), tokens, shares)

    def plan(self) -> Plan:
        """What the steps launched since the last plan need copied and zeroed. Once per engine step;
        StateError while more than `run_ahead` are pending."""
        number, copy_slots, zero_slots, copy_pages, zero_pages = self._core.plan()
        ids = (copy_slots, zero_slots, copy_pages, zero_pages)
        for each in ids:
            each.flags.writeable = False
        return Plan(number, *ids, cache=self._core)

    def applied(self, plan: Plan) -> None:
        """The plan has been executed (on the device's stream). Again, or for an older one: no effect."""
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: {plan!r}, expected a Plan from plan()")
        if plan.cache is not self._core:
            raise ValueError(f"plan: number {plan.number} of another cache, expected one of this cache")
        self._core.applied(plan.number)

    def pin(self, tokens: Tokens, *, salt: bytes = b"", content_keys: ContentKeys = ()) -> Pin | None:
        """Keeps the deepest checkpoint on the path of `tokens` until released; None if there is none."""
        pin = self._core.pin(tokens, check_salt(salt), check_content_keys(content_keys))
        return None if pin is None else Pin(self._core, *pin)

    def clear(self, *, salt: bytes | None = None) -> int:
        """Drops every checkpoint that nobody pins, of one salt or of all; returns how many. Open leases go on
        and may publish later."""
        return self._core.clear(None if salt is None else check_salt(salt))

    def take_events(self) -> list[Event]:
        """What joined and left the tree since the last call, in order; none without `events=True`.
        `hybridcache.events` publishes them. If more than the capacity piled up they begin with `Cleared`, and
        then name all that the tree holds. O(what is in them)."""
        return [EVENTS[which](*fields) for which, *fields in self._core.take_events()]

    def check(self) -> None:
        """Re-derives I1-I12 from scratch, O(n); InvariantError with the tree printed if one does not hold."""
        self._core.check()

    @property
    def digest(self) -> int:
        """A hash of all changes so far: equal on all ranks that made the same calls (I7)."""
        return self._core.digest()

    def stats(self) -> dict[str, int]:
        """Counters and gauges by name; tokens, pages, checkpoints, bytes. May be read from any thread."""
        return dict(self._core.stats())

    def times(self) -> dict[str, OperationTime]:
        """Calls so far, and how long they took in the core, by operation ("launch": of one or of a batch).
        Not in `stats()`, which is equal on all ranks. May be read from any thread."""
        return {name: OperationTime(*each) for name, each in self._core.times().items()}

    def dump(self) -> str:
        """The tree, the leases and the arena as indented text."""
        return self._core.dump()
