"""Calls that a caller must not make: each raises its documented type and changes nothing (I6).

Owns the list of mistakes; of the core it reads `digest`, `dump` and `stats` before and after. The oracle
never sees these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hybridcache.errors import StateError
from tests.harness import Flight, Harness, Pick
from tests.harness_transcripts import Session

Mistake = tuple[str, Callable[[], Any], type[Exception] | tuple[type[Exception], ...]]


def wrong_arguments(h: Harness) -> Iterator[Mistake]:
    core, far = h.core, 2**20
    yield "no token", lambda: core.reserve([]), ValueError
    yield "match of no token", lambda: core.match([]), ValueError
    yield "a negative token", lambda: core.reserve([1, -1]), ValueError
    yield "a token beyond int32", lambda: core.match(np.array([1, 2**31], dtype=np.int64)), ValueError
    yield "no tokens at all", lambda: core.reserve(None), TypeError
    yield "text", lambda: core.reserve(["a"]), TypeError
    yield "fractions", lambda: core.match(np.array([1.5, 2.0])), TypeError
    yield "salt is text", lambda: core.reserve([1], salt="tenant"), TypeError
    yield "a priority out of range", lambda: core.reserve([1], priority=9), ValueError
    yield "negative max_new_tokens", lambda: core.reserve([1], max_new_tokens=-1), ValueError
    yield "max_new_tokens is text", lambda: core.reserve([1], max_new_tokens="1"), TypeError
    yield "more than the arena", lambda: core.reserve([1], max_new_tokens=far), ValueError
    yield "content beyond the prompt", lambda: core.reserve([1], content_keys=[(1, b"x")]), ValueError
    yield "content before the prompt", lambda: core.reserve([1], content_keys=[(-1, b"x")]), ValueError
    yield "content is text", lambda: core.match([1], content_keys=[(0, "x")]), TypeError
    yield "salt of clear is text", lambda: core.clear(salt="tenant"), TypeError
    yield "not a plan", lambda: core.applied(7), TypeError
    yield (
        "fewer counts than leases",
        lambda: core.launch([f.core for f in h.flights] + [None], [1]),
        (ValueError, TypeError),
    )


def wrong_order(h: Harness, flight: Flight) -> Iterator[Mistake]:
    lease, stage = flight.core, flight.stage
    yield "no token at all to launch", lambda: lease.launch(0), ValueError
    yield "launch of a fraction", lambda: lease.launch(1.5), TypeError
    yield "an unknown keep", lambda: lease.close(keep="some"), ValueError
    yield "one lease twice", lambda: h.core.launch([lease, lease], [1, 1]), (ValueError, StateError)
    if flight.may_launch and lease.computed >= lease.prompt_length:
        yield "more than the arena", lambda: lease.launch(2**20), ValueError
    if not flight.may_launch:
        ready = [f.core for f in h.flights if f.may_launch]
        yield "launch too far ahead", lambda: lease.launch(1), StateError
        yield (
            "a batch with one too far ahead",
            lambda: h.core.launch([*ready, lease], [1] * (len(ready) + 1)),
            StateError,
        )
    if stage == "idle":
        yield "commit without a step", lease.commit, StateError
        return
    yield "fork of an open step", lease.fork, StateError
    feed = flight.steps[0].feed
    if stage in ("launched", "collected"):
        yield "commit before the plan was applied", lambda: lease.commit(feed), StateError
    else:
        yield "commit of too many tokens", lambda: lease.commit([*feed, 1]), ValueError
        yield "a batch with one wrong count", lambda: h.core.commit([lease], [*feed, 1, 1]), ValueError
        if feed:
            yield "commit of a negative token", lambda: lease.commit([-1] * len(feed)), ValueError


def wrong_transcript(h: Harness, session: Session) -> Iterator[Mistake]:
    core, t, told = h.core, session.core, session.told
    foreign = type(core)(h.config.layout, **h.config.memory).transcript()
    foreign.extend([1])
    yield "salt beside a transcript", lambda: core.match(t, salt=b"tenant"), ValueError
    yield "content beside a transcript", lambda: core.reserve(t, content_keys=[(0, b"x")]), ValueError
    yield "a transcript of another cache", lambda: core.reserve(foreign), ValueError
    yield "match of a transcript of another cache", lambda: core.match(foreign), ValueError
    yield "truncate beyond the end", lambda: t.truncate(told + 1), ValueError
    yield "truncate to less than nothing", lambda: t.truncate(-1), ValueError
    yield "truncate to a fraction", lambda: t.truncate(0.5), TypeError
    yield "extend by a negative token", lambda: t.extend([1, -1]), ValueError
    yield "extend by text", lambda: t.extend(["a"]), TypeError
    yield (
        "content beyond what is appended",
        lambda: t.extend([1], content_keys=[(told + 1, b"x")]),
        ValueError,
    )
    if told:
        yield (
            "content of an earlier token",
            lambda: t.extend([1], content_keys=[(told - 1, b"x")]),
            ValueError,
        )
        yield "a breakpoint beyond it", lambda: core.reserve(t, breakpoints=[told + 1]), ValueError
        yield (
            "a transcript and more than the arena",
            lambda: core.reserve(t, max_new_tokens=2**20),
            ValueError,
        )
    else:
        yield "match of an empty transcript", lambda: core.match(t), ValueError
        yield "an empty transcript", lambda: core.reserve(t), ValueError


def closed_transcript(h: Harness) -> Iterator[Mistake]:
    ended = h.ended
    yield "closed transcript: extend", lambda: ended.extend([1]), StateError
    yield "closed transcript: truncate", lambda: ended.truncate(0), StateError
    yield "closed transcript: twice", ended.close, StateError
    yield "closed transcript: match", lambda: h.core.match(ended), StateError
    yield "closed transcript: reserve", lambda: h.core.reserve(ended), StateError


def mistakes(h: Harness, pick: Pick) -> list[Mistake]:
    found = list(wrong_arguments(h))
    if h.flights:
        found += wrong_order(h, h.flights[pick(len(h.flights))])
    if h.sessions:
        found += wrong_transcript(h, h.sessions[pick(len(h.sessions))])
    if h.ended is not None:
        found += closed_transcript(h)
    if not h.oracle.may_plan():
        found.append(("plan while 1 + run_ahead are pending", h.core.plan, StateError))
    if len(h.pending) > 1:
        later = h.pending[1][1]
        found.append(("applied before an earlier plan", lambda: h.core.applied(later), StateError))
    if h.closed is not None:
        dead = h.closed
        found += [
            ("closed: launch", lambda: dead.launch(1), StateError),
            ("closed: commit", dead.commit, StateError),
            ("closed: fork", dead.fork, StateError),
            ("closed: twice", dead.close, StateError),
            ("closed: batch", lambda: h.core.launch([dead], [1]), StateError),
        ]
    return found


def bad_call(h: Harness, pick: Pick) -> None:
    """I6: a refused call leaves digest, dump and stats as they were."""
    if h.core is None:
        return
    found = mistakes(h, pick)
    name, call, expected = found[pick(len(found))]
    before = (h.core.digest, h.core.dump(), h.core.stats())
    h.log.append(f"bad call: {name}")
    error = raised(call)
    accepted = expected if isinstance(expected, tuple) else (expected,)
    assert type(error) in accepted and str(error), f"{name}: {error!r}, expected {expected}"
    assert before == (h.core.digest, h.core.dump(), h.core.stats()), f"I6: {name} changed something"
    h.events["bad_calls"] += 1


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
