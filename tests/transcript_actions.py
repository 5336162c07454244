"""What a driver may do with transcripts, beside the actions of actions.py, which it shares the prompts with.

Owns the choice of arguments, and no state: sessions that are told late, or partly, or something else than
what their leases committed; that go on along paths which the cache knows; that are cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import actions
from tests.harness import MAX_IN_FLIGHT, SALTS, Harness, Pick
from tests.harness_transcripts import MOST_SESSIONS, Session
from tests.oracle_store import Symbol


def open_transcript(h: Harness, pick: Pick) -> None:
    if len(h.sessions) >= MOST_SESSIONS:
        h.close_transcript(h.sessions[pick(len(h.sessions))])
    else:
        salt, path = actions.some_path(h, pick)
        session = h.open_transcript(SALTS[pick(2)] if pick(6) == 0 else salt)
        if pick(5):
            add(h, session, path)


def one(h: Harness, pick: Pick) -> Session:
    """Seldom an empty one. Opens one where none is."""
    found = [s for s in h.sessions if s.told] if pick(8) else h.sessions
    return found[pick(len(found))] if found else h.open_transcript(b"")


def add(h: Harness, session: Session, path: list[Symbol]) -> None:
    """As much as a prompt may be long; the longest now and then is more than the arena holds."""
    most = min(80, actions.room(h) + 2) - session.told
    h.extend(session, path[: max(most, 0)])


def known_path_on(h: Harness, session: Session, pick: Pick) -> list[Symbol]:
    """How an earlier prompt goes on behind what the session says; none: how an open request does."""
    told = session.ours.symbols
    known = [path for _, path in h.history[-30:]] + [f.path for f in h.flights]
    found = [path[len(told) :] for path in known if path[: len(told)] == told and len(path) > len(told)]
    return found[pick(len(found))] if found else []


def part(path: list[Any], pick: Pick) -> list[Any]:
    return path if not path or pick(3) else path[: pick(len(path) + 1)]


def extend(h: Harness, pick: Pick) -> None:
    session, how = one(h, pick), pick(8)
    if how < 3:
        add(h, session, part(session.untold, pick))  # often nothing
    elif how == 3:
        add(h, session, part(known_path_on(h, session, pick), pick))
    elif how == 4:
        add(h, session, content_path(h, pick))
    else:
        add(h, session, actions.fed(h, pick, 1 + pick(7)))


def content_path(h: Harness, pick: Pick) -> list[Symbol]:
    """Up to two images in it: other requests have the same token with another, or without one."""
    path: list[Symbol] = actions.fed(h, pick, 1 + pick(6))
    for at in {pick(len(path)) for _ in range(1 + pick(2))}:
        path[at] = (0, (b"cat", b"dog")[pick(2)])
    return path


def truncate(h: Harness, pick: Pick) -> None:
    session = one(h, pick)
    lengths = (session.told - pick(4), session.anchor - pick(4), pick(session.told + 1), 0)
    h.truncate(session, max(lengths[pick(4) if pick(3) else pick(3)], 0))


def regret(h: Harness, pick: Pick) -> None:
    """A turn said again, differently: cut below what the core remembers, other tokens, asked at once."""
    session = one(h, pick)
    h.truncate(session, pick(session.told + 1))
    add(h, session, actions.fed(h, pick, 1 + pick(5)))
    ask(h, session, pick)


def match_transcript(h: Harness, pick: Pick) -> None:
    h.match_transcript(one(h, pick))


def reserve_transcript(h: Harness, pick: Pick) -> None:
    """One that something happened to, most of the time."""
    changed = [s for s in h.sessions if s.since]
    ask(h, changed[pick(len(changed))] if changed and pick(3) else one(h, pick), pick)


def ask(h: Harness, session: Session, pick: Pick) -> None:
    if len(h.flights) >= MAX_IN_FLIGHT:
        return
    max_new = pick(9) if pick(2) else 0
    longest = session.told + max_new
    breakpoints = sorted({1 + pick(longest) for _ in range(pick(3))}) if longest and pick(2) else []
    h.reserve_transcript(session, breakpoints, max_new, **actions.clock(h, pick), **actions.priority(h, pick))


def session_turn(h: Harness, pick: Pick) -> None:
    """The usual life: the answer is told, the user says something, and the session asks for its turn."""
    session = one(h, pick)
    if session.told > 60:
        h.truncate(session, pick(20))
    add(h, session, session.untold)
    add(h, session, content_path(h, pick) if pick(5) == 0 else actions.fed(h, pick, 1 + pick(5)))
    ask(h, session, pick)
    for _ in range(pick(4)):
        actions.turn(h, pick)
    add(h, session, session.untold)


def close_transcript(h: Harness, pick: Pick) -> None:
    if h.sessions:
        h.close_transcript(h.sessions[pick(len(h.sessions))])


WEIGHTS: dict[Callable[[Harness, Pick], None], int] = {
    open_transcript: 5,
    extend: 6,
    truncate: 2,
    regret: 2,
    match_transcript: 2,
    reserve_transcript: 6,
    session_turn: 5,
    close_transcript: 1,
}
