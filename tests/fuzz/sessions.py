"""The ops on transcripts, as in sessions.cpp: what their operands mean, a byte each. A part of replay.py.

`which` chooses among the open ones. A transcript is told what others have computed, or something else, so
its path leaves what the tree knows anywhere; it is asked when the nodes that it remembers may have gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.fuzz.decode import REMEMBERED
from tests.harness import MAX_IN_FLIGHT
from tests.harness_transcripts import MOST_SESSIONS, Session

if TYPE_CHECKING:
    from tests.fuzz.replay import Replay

MOST_TOLD = 100


def chosen(r: Replay, which: int) -> Session | None:
    return r.h.sessions[which % len(r.h.sessions)] if r.h.sessions else None


def tell(r: Replay, session: Session, more: list[Any]) -> None:
    r.h.extend(session, more[: max(0, MOST_TOLD - session.told)])


def open_session(r: Replay) -> None:
    """path: its salt, and what it is told first"""
    salt, path = r.path()
    if len(r.h.sessions) < MOST_SESSIONS:
        tell(r, r.h.open_transcript(salt), path)


def extend_session(r: Replay) -> None:
    """which, how (modulo 4; 0: fresh tokens; else how the newest of the paths that begin as it does goes on,
    3: some of that), size, seed"""
    which, how, size, seed = r.input.bytes(4)
    if session := chosen(r, which):
        more, told = r.fresh(1 + size % 6, seed), session.ours.symbols
        known = [path for salt, path in r.paths[-REMEMBERED:] if salt == session.ours.salt]
        known = [path[len(told) :] for path in known if path[: len(told)] == told and len(path) > len(told)]
        if known and how % 4:
            more = known[-1][: 1 + size % len(known[-1])] if how % 4 == 3 else known[-1]
        tell(r, session, more)


def truncate_session(r: Replay) -> None:
    """which, where (odd: anywhere; even: by up to 3)"""
    which, where = r.input.bytes(2)
    if session := chosen(r, which):
        by = where >> 1
        r.h.truncate(session, by % (session.told + 1) if where & 1 else max(session.told - by % 4, 0))


def match_session(r: Replay) -> None:
    """which"""
    if session := chosen(r, *r.input.bytes(1)):
        r.h.match_transcript(session)


def reserve_session(r: Replay) -> None:
    """which, then as reserve behind its path"""
    session = chosen(r, *r.input.bytes(1))
    breakpoints, max_new = r.reserve_options(session.told if session else 0)
    if session and len(r.h.flights) < MAX_IN_FLIGHT:
        if session.told:
            r.paths.append((session.ours.salt, list(session.ours.symbols)))
        r.h.reserve_transcript(session, breakpoints, max_new)


def close_session(r: Replay) -> None:
    """which"""
    if session := chosen(r, *r.input.bytes(1)):
        r.h.close_transcript(session)


OPS = (
    open_session,
    *(extend_session,) * 2,
    truncate_session,
    match_session,
    *(reserve_session,) * 2,
    close_session,
)
