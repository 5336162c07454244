"""Two caches that get the same calls, one through transcripts and one token by token, decide the same (I7).

Owns the traffic: sessions that go on, are cut, branch off each other and forget what was said, with content
and under salts, in a cache so small that something is evicted all the time; and requests without a transcript
among them. Only the first cache is matched at random moments: what that makes it remember must not show.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from hybridcache.cache import HybridCache
from tests.comparing import split

SALTS = (b"", b"tenant")
STEPS = 400


@dataclass
class Session:
    transcript: Any  # of the first cache
    salt: bytes
    path: list[Any]  # symbols, for the second

    @property
    def prompt(self) -> dict[str, Any]:
        tokens, keys = split(self.path)
        return {"tokens": tokens, "salt": self.salt, "content_keys": keys}


@dataclass
class Request:
    pair: tuple[Any, Any]
    session: Session | None
    said: list[int]


class Twins:
    def __init__(self, seed: int, **options: Any) -> None:
        self.rng = random.Random(seed)
        page_size = self.rng.choice((1, 3, 4))
        layout = SimpleNamespace(
            page_size=page_size,
            page_bytes=16 * page_size,
            slot_bytes=32 * page_size,
            lookahead=self.rng.randrange(2),
        )
        options = {"pass_cost": 2, "interior_spacing": 6, **options}
        memory = self.rng.choice((24, 48)) * layout.slot_bytes
        self.told, self.listed = (HybridCache(layout, memory_bytes=memory, **options) for _ in range(2))
        self.sessions: list[Session] = []
        self.requests: list[Request] = []
        self.events: Counter[str] = Counter()
        self.digests: set[int] = set()

    def words(self, most: int) -> list[Any]:
        found: list[Any] = [self.rng.randrange(2) for _ in range(1 + self.rng.randrange(most))]
        if self.rng.random() < 0.2:
            found[self.rng.randrange(len(found))] = (0, self.rng.choice((b"cat", b"dog")))
        return found

    def extend(self, session: Session, path: list[Any]) -> None:
        tokens, keys = split(path)
        before = len(session.path)
        session.transcript.extend(tokens, content_keys=[(before + at, content) for at, content in keys])
        session.path += path

    # ---- what may happen

    def open(self) -> None:
        if len(self.sessions) == 6:
            self.sessions.pop(self.rng.randrange(6)).transcript.close()
        salt = SALTS[self.rng.random() < 0.2]
        earlier = [s.path for s in self.sessions]
        session = Session(self.told.transcript(salt=salt), salt, [])
        self.sessions.append(session)
        if earlier and self.rng.random() < 0.7:
            path = self.rng.choice(earlier)
            self.extend(session, path[: self.rng.randrange(len(path) + 1)])
        self.extend(session, self.words(6))

    def say(self) -> None:
        if self.sessions:
            session = self.rng.choice(self.sessions)
            if len(session.path) < 60:
                self.extend(session, self.words(8))

    def cut(self) -> None:
        if self.sessions:
            session = self.rng.choice(self.sessions)
            length = self.rng.randrange(len(session.path) + 1)
            session.transcript.truncate(length)
            del session.path[length:]

    def ask(self) -> None:
        """A turn, or now and then a request of which no transcript is kept."""
        if not self.sessions or len(self.requests) > 5:
            return
        session = self.rng.choice(self.sessions)
        if not session.path:
            return
        options = {"max_new_tokens": self.rng.randrange(6)}
        options |= {"breakpoints": [len(session.path)]} if self.rng.random() < 0.3 else {}
        told = {"tokens": session.transcript} if self.rng.random() < 0.8 else session.prompt
        pair = [
            outcome(lambda: self.told.reserve(**told, **options)),
            outcome(lambda: self.listed.reserve(**session.prompt, **options)),
        ]
        self.events["refused"] += pair[1] is None
        self.events["too_large"] += isinstance(pair[1], str)
        if pair[0] is None or isinstance(pair[0], str):
            assert pair[0] == pair[1]
            return
        ours, theirs = pair
        assert ours.match == theirs.match and ours.pages.tolist() == theirs.pages.tolist()
        self.events["hit"] += ours.start > 0
        self.requests.append(Request((ours, theirs), session, []))

    def step(self) -> None:
        """All go on, by all of the prompt or by a part of it; then by a token each."""
        for request in self.requests:
            lease = request.pair[0]
            left = lease.prompt_length - lease.computed
            count = 1 if left <= 0 else left if self.rng.random() < 0.6 else 1 + self.rng.randrange(left)
            steps = [each.launch(count) for each in request.pair]
            assert steps[0] == steps[1]
            if steps[0] is None:
                continue
            for cache in (self.told, self.listed):
                cache.applied(cache.plan())
            said = [self.rng.randrange(2)] * max(steps[0].end - max(steps[0].begin, lease.prompt_length), 0)
            for each in request.pair:
                each.commit(said)
            request.said += said

    def finish(self) -> None:
        if self.requests:
            request = self.requests.pop(self.rng.randrange(len(self.requests)))
            close = {"keep": self.rng.choice(("all", "all", "all", "prompt", "nothing"))}
            prompt = request.pair[0].prompt_length
            for each in request.pair:
                each.close(**close)
            session = request.session
            if session in self.sessions and len(session.path) == prompt and self.rng.random() < 0.8:
                self.extend(session, list(request.said))
                self.events["said"] += 1

    def fork(self) -> None:
        if self.requests and len(self.requests) < 6:
            request = self.rng.choice(self.requests)
            pair = [each.fork() for each in request.pair]
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                self.requests.append(Request((pair[0], pair[1]), None, []))

    def clear(self) -> None:
        if self.rng.random() < 0.1:
            salt = self.rng.choice((None, *SALTS))
            assert self.told.clear(salt=salt) == self.listed.clear(salt=salt)
            self.events["cleared"] += 1

    def wonder(self) -> None:
        for session in self.sessions:
            if session.path and self.rng.random() < 0.5:
                found = self.told.match(session.transcript)
                if self.rng.random() < 0.5:
                    assert found == self.listed.match(**session.prompt)

    def run(self, steps: int) -> None:
        weights = {
            self.open: 3,
            self.say: 6,
            self.cut: 2,
            self.ask: 8,
            self.step: 10,
            self.finish: 5,
            self.fork: 1,
            self.clear: 1,
            self.wonder: 2,
        }
        for action in self.rng.choices(list(weights), list(weights.values()), k=steps):
            action()
            self.compare(action.__name__)

    def compare(self, action: str) -> None:
        assert self.told.digest == self.listed.digest, f"{action}\n{self.told.dump()}\n{self.listed.dump()}"
        ours, theirs = self.told.stats(), self.listed.stats()
        assert ours.pop("transcripts") == len(self.sessions) and theirs.pop("transcripts") == 0
        assert ours == theirs, action
        assert apart(self.told.dump()) == apart(self.listed.dump()), action
        self.told.check()
        self.digests.add(self.told.digest)


def outcome(call: Callable[[], Any]) -> Any:
    """What it gives, or the text of its error."""
    try:
        return call()
    except ValueError as error:
        return str(error)


def apart(dump: str) -> list[str]:
    """Without transcripts, and the numbers that stand for (token, content): a transcript takes
    them when it is extended, a lease when it is admitted."""
    return [re.sub(r" -\d+\b", " -", line) for line in dump.splitlines() if not line.startswith("transcript")]


@pytest.mark.parametrize("policy", ["default", "supersede", "lru"])
def test_equal_requests_give_equal_digests_through_transcripts(policy: str) -> None:
    events: Counter[str] = Counter()
    for seed in range(12):
        twins = Twins(seed, policy=policy)
        twins.run(STEPS)
        assert len(twins.digests) > STEPS / 4, "a digest that hardly ever changes proves nothing"
        events += twins.events
        events["evicted"] += sum(n for name, n in twins.told.stats().items() if name.startswith("evicted_"))
    assert all(events[name] > 20 for name in ("hit", "refused", "evicted", "said")), events
    assert events["cleared"] > 5, events
