"""Transcripts in the harness: the same calls on both sides, what must be equal, and what they went through.

A part of Harness (harness.py), which owns all state named below but `sessions` and what a Session remembers.
A Session follows, on the oracle's side, where the nodes of its path stood when it was last asked for: only to
tell the tests which turn of its life was seen (walk_events.py). What a transcript must answer is the oracle's
answer for its list of symbols, whatever happened in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.comparing import Comparing, split
from tests.oracle_store import Store, Symbol, common
from tests.oracle_transcript import Transcript
from tests.oracle_types import Lease

MOST_SESSIONS = 5


@dataclass(eq=False)
class Session:
    """An open transcript: the oracle's, the core's."""

    ours: Transcript
    core: Any
    lease: Lease | None = None  # the last one that was reserved through it, open or closed
    nodes: tuple[int, ...] = ()  # depths of those that its tokens were last seen to match in full
    since: set[str] = field(default_factory=set)  # what happened to it, or to them, since then

    @property
    def told(self) -> int:
        return len(self.ours.symbols)

    @property
    def anchor(self) -> int:
        return self.nodes[-1] if self.nodes else 0

    @property
    def untold(self) -> list[Symbol]:
        """What its lease has committed and it has not been told."""
        lease, known = self.lease, self.ours.symbols
        if lease is None or lease.tokens[: len(known)] != known:
            return []
        return lease.tokens[len(known) : lease.committed]


class TranscriptCalls(Comparing):
    sessions: list[Session]
    ended: Any  # the core's last closed transcript

    def open_transcript(self, salt: bytes) -> Session:
        ours, theirs = self.both(
            f"transcript {salt!r}",
            lambda: self.oracle.transcript(salt=salt),
            lambda: self.core.transcript(salt=salt),
        )
        self.sessions.append(Session(ours, theirs))
        self.events["transcripts"] += 1
        return self.sessions[-1]

    def extend(self, session: Session, path: Sequence[Symbol]) -> None:
        tokens, keys = split(path)
        keys = [(session.told + at, content) for at, content in keys]
        form = (list, np.int32, np.int64)[self.steps % 3]
        given = tokens if form is list else np.array(tokens, dtype=form)
        self.events["transcript_told"] += bool(path) and list(path) == session.untold[: len(path)]
        self.both(
            f"void extend {path}",
            lambda: session.ours.extend(tokens, content_keys=keys),
            lambda: session.core.extend(given, content_keys=keys),
        )

    def truncate(self, session: Session, length: int) -> None:
        lease = session.lease
        if lease is not None and not lease.closed and length < lease.prompt_length:
            self.events["transcript_cut_under_its_lease"] += 1
        self.both(
            f"void truncate {length}",
            lambda: session.ours.truncate(length),
            lambda: session.core.truncate(length),
        )
        if length < session.anchor:
            session.since.add("truncation")
            session.nodes = tuple(depth for depth in session.nodes if depth <= length)

    def match_transcript(self, session: Session) -> None:
        before = self.core and (self.core.digest, self.core.stats())
        ours, theirs = self.both(
            "match of a transcript",
            lambda: self.oracle.match(session.ours),
            lambda: self.core.match(session.core),
        )
        if isinstance(ours, ValueError):
            self.events["transcript_empty_refused"] += 1
        else:
            self.same_match("match of a transcript", ours, theirs)
            self.seen(session, "match")
        assert before == (self.core and (self.core.digest, self.core.stats())), "I9: match changed something"

    def reserve_transcript(
        self, session: Session, breakpoints: list[int], max_new: int, **times: int
    ) -> Lease | None:
        symbols, salt = list(session.ours.symbols), session.ours.salt
        options = {"breakpoints": breakpoints, "max_new_tokens": max_new, **times}
        best = self.oracle.match(session.ours).length if symbols else 0
        ours, theirs = self.both(
            f"reserve of a transcript, {symbols} {options}",
            lambda: self.oracle.reserve(session.ours, **options),
            lambda: self.core.reserve(session.core, **options),
        )
        if not symbols:
            self.events["transcript_empty_refused"] += 1
            return None
        self.reserved(salt, symbols, best, ours, theirs)
        self.seen(session, "reserve")
        if isinstance(ours, Lease):
            session.lease = ours
            self.events["transcript_hit"] += ours.start > 0
            self.events["transcript_hit_with_content"] += any(isinstance(s, tuple) for s in symbols[:best])
            return ours
        return None

    def reserved(self, salt: bytes, path: Sequence[Symbol], best: int, ours: Any, theirs: Any) -> None:
        raise NotImplementedError

    def close_transcript(self, session: Session) -> None:
        self.events["transcript_closed_before_its_lease"] += (
            session.lease is not None and not session.lease.closed
        )
        self.both(
            "void close of a transcript",
            lambda: self.oracle.close_transcript(session.ours),
            lambda: session.core.close(),
        )
        self.sessions.remove(session)
        self.ended = session.core

    # ---- after every action

    def verify_transcripts(self) -> None:
        self.same("open transcripts", len(self.sessions), self.core and self.core.stats()["transcripts"])
        for session in self.sessions:
            if self.core is not None:
                found = session.core.tokens
                assert found.dtype == np.int32 and not session.core.closed
                self.same("tokens", session.ours.tokens, found)
                self.same("length", session.told, len(session.core))
                self.same("salt", session.ours.salt, session.core.salt)
        self.watch()
        if self.steps % 8 == 0:  # seldom, so that much happens to each in between
            for session in [s for s in self.sessions if s.told][self.steps // 8 % 3 :: 3]:
                self.match_transcript(session)

    def seen(self, session: Session, how: str) -> None:
        """The core's memory of this transcript is new now: what it had to cope with is counted."""
        for what in session.since:
            self.events[f"transcript_{how}_after_{what}"] += 1
        session.since.clear()
        session.nodes = nodes_on(self.oracle.store, session.ours.salt, session.ours.symbols)

    def watch(self) -> None:
        """What the last action did to the nodes that each transcript remembers."""
        moved: Counter[Any] = Counter()
        for session in self.sessions:
            if not session.nodes:
                continue
            path, anchor = tuple(session.ours.symbols[: session.anchor]), session.anchor
            now = nodes_on(self.oracle.store, session.ours.salt, path)
            if anchor not in now:
                still = any(common(s, path) == anchor for s in self.oracle.store.supports(session.ours.salt))
                session.since.add("merge" if still else "eviction")
                moved[session.ours.salt, path] += 1
            elif set(now) - set(session.nodes):
                session.since.add("split")
            elif now != session.nodes:
                session.since.add("merge_above")
            session.nodes = now
        self.events["transcripts_moved_together"] += sum(n > 1 for n in moved.values())


def nodes_on(store: Store, salt: bytes, path: Sequence[Symbol]) -> tuple[int, ...]:
    """The depths of the nodes on the way down `path`: where a support ends, and where known paths part."""
    path = tuple(path)
    shared = [(common(s, path), s) for s in store.supports(salt)]
    longest = max((same for same, _ in shared), default=0)
    found = {same for same, s in shared if same == len(s)}
    parting: dict[int, set[Symbol]] = {}
    for same, s in shared:
        if same < len(s):
            parting.setdefault(same, set()).add(s[same])
    found |= {depth for depth, ways in parting.items() if len(ways) + (longest > depth) > 1}
    return tuple(sorted(found - {0}))
