"""Traffic for the learned policy: conversations that go on, branch, are resent and rotate.

`Pair` makes each call to the oracle and to the core and compares what they hold after it: hits, slots,
evictions, and what each checkpoint is worth. `Traffic` draws requests from a seed. The engine here is as
small as can be: plans are applied at once, and a lease has one step open at a time.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hybridcache.cache import HybridCache
from tests.comparing import shape_of, worths_of
from tests.oracle import Oracle
from tests.oracle_policy import History

TOKENS = 1 << 20


class Pair:
    def __init__(
        self, *, page_size: int = 4, page_bytes: int = 64, slot_bytes: int = 192, **options: Any
    ) -> None:
        layout = SimpleNamespace(page_size=page_size, page_bytes=page_bytes, slot_bytes=slot_bytes)
        options = {"pass_cost": 8, "interior_spacing": 32, "policy": "default", **options}
        self.oracle = Oracle(layout, **options)
        self.core = HybridCache(layout, **options)
        self.calls = 0

    @property
    def history(self) -> History:
        return self.oracle.store.learned.history

    def worths(self) -> dict[int, int]:
        """By slot."""
        return self.oracle.store.learned.by_slot()

    def worth(self, path: list[int], salt: bytes = b"") -> int:
        """Both agree: see compare."""
        return self.oracle.store.learned.worth(self.oracle.store.checkpoints[salt, tuple(path)])

    def compare(self, call: str) -> None:
        self.calls += 1
        dump = self.core.dump()
        ours, theirs = self.worths(), worths_of(dump)
        assert ours == theirs, f"worths after {call}: oracle {ours}, core {theirs}\n{dump}"
        found = self.core.stats()
        wrong = {name: (n, found[name]) for name, n in self.oracle.stats().items() if found.get(name, n) != n}
        assert not wrong, f"after {call}: (oracle, core) {wrong}"
        if self.calls % 8 == 0:
            assert self.oracle.shape() == shape_of(dump), call
            self.core.check()

    def reserve(self, path: list[int], *, now: int | None = None, **options: Any) -> tuple[Any, Any] | None:
        ours = self.oracle.reserve(path, now=now, **options)
        theirs = self.core.reserve(path, now=now, **options)
        assert (ours is None) == (theirs is None)
        self.compare(f"reserve of {len(path)} tokens")
        if ours is None:
            return None
        assert ours.start == theirs.start
        return ours, theirs

    def step(self, lease: tuple[Any, Any], count: int, tokens: list[int]) -> bool:
        ours, theirs = self.oracle.launch(lease[0], count), lease[1].launch(count)
        assert (ours is None) == (theirs is None)
        if ours is None:
            self.compare("launch without room")
            return False
        places = [tuple(each) for each in theirs.checkpoints]
        assert tuple(ours[:5]) == (theirs.begin, theirs.end, theirs.read_slot, theirs.write_slot, places)
        self.oracle.applied(self.oracle.plan())
        self.core.applied(self.core.plan())
        fed = tokens[: max(0, ours.end - max(ours.begin, lease[0].prompt_length))]
        self.oracle.commit(lease[0], fed)
        lease[1].commit(fed)
        self.compare(f"step to {ours.end}")
        return True

    def close(self, lease: tuple[Any, Any], **options: Any) -> None:
        self.oracle.close(lease[0], **options)
        lease[1].close(**options)
        self.compare(f"close {options}")

    def fork(self, lease: tuple[Any, Any]) -> tuple[Any, Any] | None:
        ours, theirs = self.oracle.fork(lease[0]), lease[1].fork()
        assert (ours is None) == (theirs is None)
        self.compare("fork")
        return None if ours is None else (ours, theirs)

    def clear(self, salt: bytes | None = None) -> None:
        assert self.oracle.clear(salt=salt) == self.core.clear(salt=salt)
        self.compare("clear")

    def pin(self, path: list[int]) -> tuple[Any, Any]:
        pins = self.oracle.pin(path), self.core.pin(path)
        assert pins[0] is not None and pins[1] is not None
        self.compare("pin")
        return pins

    def release(self, pins: tuple[Any, Any]) -> None:
        self.oracle.release(pins[0])
        pins[1].release()
        self.compare("release")

    def turn(
        self, path: list[int], output: tuple[int, ...] = (), *, chunk: int = TOKENS, **options: Any
    ) -> int:
        """A whole request; returns where it resumed. `close`: how it is closed."""
        close = options.pop("close", {})
        lease = self.reserve(path, **options)
        assert lease is not None
        while lease[0].computed < len(path):
            assert self.step(lease, chunk, [])
        for token in output:
            assert self.step(lease, 1, [token])
        self.close(lease, **close)
        return lease[0].start

    def ask(self, path: list[int], **options: Any) -> None:
        """A request that comes back to `path`, and leaves nothing."""
        lease = self.reserve([*path, 7], **options)
        assert lease is not None
        self.close(lease, discard=True)


@dataclass(eq=False)
class Open:
    lease: tuple[Any, Any]
    conversation: Conversation
    output: int  # tokens to decode yet
    said: list[int]


@dataclass(eq=False)
class Conversation:
    salt: bytes
    path: list[int]
    turns: int = 0
    busy: bool = False


@dataclass
class Traffic:
    seed: int
    conversations: int = 12
    longest: int = 24
    hints: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.pair = Pair(**self.options)
        self.clock = 0
        self.turn_of = 0
        self.open: list[Open] = []
        self.events: Counter[str] = Counter()
        self.shared = [self.fresh(8 + 8 * i) for i in range(3)]
        self.live = [self.begin() for _ in range(self.conversations)]

    def fresh(self, count: int) -> list[int]:
        return [self.rng.randrange(100) for _ in range(count)]

    def begin(self) -> Conversation:
        salt = (b"", b"", b"a", b"b")[self.rng.randrange(4)]
        shared = self.rng.choice([[], *self.shared])
        return Conversation(salt, [*shared, *self.fresh(1 + self.rng.randrange(self.longest))])

    def next_conversation(self) -> Conversation:
        how = self.rng.randrange(10)
        if how < 4:  # those of the first half rotate
            self.turn_of = (self.turn_of + 1) % (len(self.live) // 2)
            return self.live[self.turn_of]
        index = self.rng.randrange(len(self.live))
        old = self.live[index]
        if how == 4:  # it ends, another begins
            self.live[index] = self.begin()
        elif how == 5:  # it branches off
            keep = self.rng.randrange(len(old.path))
            self.live[index] = Conversation(old.salt, [*old.path[:keep], *self.fresh(3)])
        return self.live[index]

    def arrive(self) -> None:
        conversation = self.next_conversation()
        if conversation.busy:
            return
        if len(conversation.path) > 12 * self.longest:
            conversation.path, conversation.turns = self.begin().path, 0
        path, rng = conversation.path, self.rng
        self.clock += rng.randrange(5)
        options: dict[str, Any] = {"salt": conversation.salt}
        if rng.randrange(3) == 0:
            options["breakpoints"] = sorted({1 + rng.randrange(len(path)) for _ in range(2)})
        if self.hints and rng.randrange(4):
            options["now"] = self.clock
        if self.hints and rng.randrange(6) == 0:
            options["priority"] = rng.choice([-8, -2, 1, 3, 8])
        self.events["requests"] += 1
        lease = self.pair.reserve(path, **options)
        if lease is None:
            self.events["no_room"] += 1
            self.finish(self.rng.choice(self.open)) if self.open else self.pair.clear()
            return
        conversation.busy = True
        self.events["hits"] += lease[0].start > 0
        self.open.append(Open(lease, conversation, rng.randrange(6), list(path)))

    def advance(self, open_: Open) -> None:
        rng, ours = self.rng, open_.lease[0]
        left = ours.prompt_length - ours.computed
        if left <= 0 and not open_.output:
            return self.finish(open_)
        said = self.fresh(1 if left <= 0 else 0)
        count = 1 if left <= 0 else left if rng.randrange(2) else 1 + rng.randrange(left)
        if not self.pair.step(open_.lease, count, said):
            return self.finish(open_)
        open_.said += said
        open_.output -= bool(said)
        if rng.randrange(40) == 0 and (child := self.pair.fork(open_.lease)) is not None:
            self.events["forks"] += 1
            self.pair.close(child, keep=rng.choice(["all", "nothing"]))

    def finish(self, open_: Open) -> None:
        rng, conversation = self.rng, open_.conversation
        self.open.remove(open_)
        options: dict[str, Any] = {"keep": rng.choice(["all", "all", "all", "all", "prompt", "nothing"])}
        if self.hints and rng.randrange(3) == 0:
            options["expected_return"] = rng.choice([0, 3, 20, 100, 2000])
        if self.hints and rng.randrange(3) == 0:
            options["now"] = self.clock
        if rng.randrange(12) == 0:
            options["discard"] = True
        self.pair.close(open_.lease, **options)
        conversation.busy, conversation.turns = False, conversation.turns + 1
        if rng.randrange(4):  # else it is resent
            conversation.path = [*open_.said, *self.fresh(1 + rng.randrange(6))]

    def run(self, requests: int) -> None:
        while self.events["requests"] < requests:
            if len(self.open) < 3 and self.rng.randrange(3) == 0:
                self.arrive()
            elif self.open:
                self.advance(self.rng.choice(self.open))
            if self.rng.randrange(20_000) == 0:
                self.pair.clear((None, b"", b"a")[self.rng.randrange(3)])
        self.events += Counter({"evicted": self.pair.oracle.store.evicted.total()})
        self.events += self.pair.history.events
