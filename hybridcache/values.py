"""The plain values that cross between the cache, the pools and an engine: Geometry, Match, Step, Steps, Plan;
and what is asked of a Layout.

They own nothing and import neither torch nor the core.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Reason = Literal["cold", "complete", "remainder", "unknown", "no_checkpoint", "no_room"]
Cause = Literal[
    "never_made", "reserve", "launch", "fork", "checkpoint", "cap", "clear", "taken_back", "no_room"
]
_BECAUSE: dict[str, str] = {
    "reserve": "it left {when}to make room for a request",
    "launch": "it left {when}to make room for a running request",
    "fork": "it left {when}to make room for a fork",
    "checkpoint": "it left {when}to make room for another checkpoint",
    "cap": "it left {when}for max_cached_bytes",
    "clear": "it left {when}by clear()",
    "taken_back": "its own request took it back {when}for want of room",
    "no_room": "it was given up, the request would not have fitted beside it",
}


class Layout(Protocol):
    """What the cache needs of a model's layout; `ModelLayout` has it."""

    @property
    def page_size(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...


class Geometry(NamedTuple):
    """Where everything lies in the arena. Bytes, unless a name says otherwise.

    Page `p` lies at `p * page_bytes`, slot `s` at `slot_offset + s * slot_stride`.
    """

    page_size: int  # tokens
    page_bytes: int
    slot_bytes: int
    pages_per_slab: int
    slab_bytes: int
    num_slabs: int  # 0: two fixed regions
    num_pages: int
    num_slots: int
    slot_offset: int
    slot_stride: int
    total_bytes: int


class Missed(NamedTuple):
    """The boundary that would have helped: a state at `position` tokens.

    kind: of the checkpoint that stood there last, such as "turn_end". cause: by what it left: for room that a
        "reserve", a "launch" or a "fork" needed; for another "checkpoint"; "cap": max_cached_bytes; "clear";
        "taken_back" by its own lease, which found no room. "no_room": it was there, and the request could not
        be held beside it (in a lease only). "never_made": the prompt is known as far as `position`, no
        state is there, and none is remembered to have been (a policy without a history, all but the default,
        remembers none); then what follows, and kind, are None.
    requests_ago: how many requests were admitted since. time_ago: the same in the caller's time, None where
        it was not told.
    """

    position: int
    kind: str | None
    cause: Cause
    requests_ago: int | None
    time_ago: int | None

    def explain(self) -> str:
        """As words: "a turn_end at 2,999: it left 12 requests ago to make room for a request"."""
        if self.cause == "never_made":
            return f"a state at {self.position:,}: none is remembered there"
        time = "" if self.time_ago is None else f" ({self.time_ago:,} of the caller's time)"
        requests = "request" if self.requests_ago == 1 else "requests"
        when = f"{self.requests_ago:,} {requests} ago{time} "
        return f"a {self.kind} at {self.position:,}: {_BECAUSE[self.cause].format(when=when)}"


class Match(NamedTuple):
    """How far a prompt is known (I12).

    length: tokens that a request could skip: KV and a state at exactly this position, at most len(tokens) -
        1.
    kv_length: leading tokens that the tree knows.
    reason: why not further. "cold": nothing is known. "complete": nothing more could be skipped. "remainder":
        a checkpoint lies at the very end, but one token must be computed. "unknown": all that is known is
        resumable. "no_checkpoint": KV reaches further than any state. "no_room": in a lease only: the arena
        could not hold the request beside its deepest checkpoint.
    diverged: at kv_length the tree goes on, differently.
    missed: the boundary beyond `length` that would have helped, when it left and by what; None: none is known
        of, or nothing more could be skipped. With policy="default" it knows what has left, KV and all; with
        others only where the tree knows more than it could resume (and "no_room").
    """

    length: int
    kv_length: int
    reason: Reason
    diverged: bool
    missed: Missed | None = None

    @classmethod
    def of(cls, fields: tuple[int, int, Any, bool, tuple[Any, ...] | None]) -> Match:
        """From the core's plain values."""
        length, kv_length, reason, diverged, left = fields
        missed = None if left is None else Missed(*left)
        return cls(length, kv_length, reason, diverged, missed)

    def explain(self) -> str:
        """Why no more could be skipped, in one line of words.

        >>> print(Match(0, 30, "no_checkpoint", True, Missed(30, None, "never_made", None, None)).explain())
        resumes at 0, KV is known to 30 (no_checkpoint); 30 more by a state at 30: none is remembered there
        """
        text = f"resumes at {self.length:,}, KV is known to {self.kv_length:,} ({self.reason})"
        if self.missed is None:
            return text
        return f"{text}; {self.missed.position - self.length:,} more by {self.missed.explain()}"


class Step(NamedTuple):
    """One forward of one lease over tokens [begin, end).

    read_slot: where its state starts: a checkpoint, -1 (from nothing), or write_slot itself. write_slot:
    where to leave it. With `copies="eager"` the plan has copied or zeroed write_slot, and kernels update it
    in place. checkpoints: (position, slot) of states to leave at inner positions (only with
    inner_checkpoints).

    A verify step (speculative decoding) leaves the state after each of its last len(write_slots) tokens in
    `write_slots`, in order; nothing is copied for more than one. Launched behind another one it begins
    anywhere in begin .. begin_max, and reads `read_slots[j]` if it begins at begin + j; it has end - begin
    tokens in any case.
    """

    begin: int
    end: int
    read_slot: int
    write_slot: int
    checkpoints: list[tuple[int, int]]
    begin_max: int
    read_slots: list[int]
    write_slots: list[int]

    @property
    def begin_min(self) -> int:
        """The same as `begin`, for who reads it beside `begin_max`."""
        return self.begin


class Steps(NamedTuple):
    """The steps of a batch, one row a lease; rows with ready[i] False found no room and launched nothing.

    ready bool[n], begin and end int64[n], read_slots and write_slots int32[n], checkpoints [(row, position,
    slot)]; begin_max int64[n], candidates and rows int32[n, draft_tokens + 1]: the read_slots and write_slots
    of each `Step`, padded with -1.
    """

    ready: npt.NDArray[np.bool_]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    read_slots: Int32
    write_slots: Int32
    checkpoints: list[tuple[int, int, int]]
    begin_max: npt.NDArray[np.int64]
    candidates: Int32
    rows: Int32


class Plan(NamedTuple):
    """What to copy and to zero before the launched steps run; plain data, int32 ids.

    copy_slots and copy_pages are [n, 2] (source, destination), zero_slots and zero_pages [n]. No id is a
    destination twice, over copies and zeroes together, and none is both source and destination: the order
    does not matter, and applying it again is harmless.
    """

    number: int
    copy_slots: Int32
    zero_slots: Int32
    copy_pages: Int32
    zero_pages: Int32
    cache: object  # the cache that it comes from, by identity


class OperationTime(NamedTuple):
    """Of one operation: how often it was called, and how long that took in all."""

    calls: int
    nanoseconds: int


class PagesStored(NamedTuple):
    """Pages that joined the tree, in the order of their path; `before` is the one above them, -1: none.

    tokens: theirs, plain ids, page after page. contents: by index in them, what ids of `content_keys` stand
    for. A page id names a page from here until it is removed.
    """

    salt: bytes
    before: int
    pages: list[int]
    tokens: Int32
    contents: dict[int, bytes]


class PagesRemoved(NamedTuple):
    """Pages that left the tree, the deepest first."""

    pages: list[int]


class CheckpointStored(NamedTuple):
    """A state joined the tree: a prompt with this path resumes at `position`.

    tokens: those from the last page edge below `position` on, where page `before` ends (-1: none). Its slot
    names a checkpoint from here until it is removed.
    """

    salt: bytes
    before: int
    slot: int
    position: int
    tokens: Int32
    contents: dict[int, bytes]


class CheckpointRemoved(NamedTuple):
    """A state left the tree."""

    slot: int


class Cleared(NamedTuple):
    """Nothing is left in the tree, of any salt."""


Event = PagesStored | PagesRemoved | CheckpointStored | CheckpointRemoved | Cleared
EVENTS: tuple[type[Event], ...] = (PagesStored, PagesRemoved, CheckpointStored, CheckpointRemoved, Cleared)
