"""From bytes to operands: options, prompts, shapes of steps, and what may be asked of which request.

A part of Replay (replay.py), whose docstring describes the format; decode.cpp does the same in C++. Reads the
harness, and changes no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.harness import SALTS, Config, Flight, Harness, Pick

CONTENTS = (b"cat", b"dog")
REMEMBERED = 12  # paths that a prompt may be made of
FED = 12  # tokens: more than any step reads beyond its prompt
ALL = 99  # more than any step has


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, count: int) -> list[int]:
        found = self.data[self.at : self.at + count].ljust(count, b"\0")
        self.at += count
        return list(found)


def read_config(header: list[int]) -> Config:
    """Bytes: page_size, shape, first, second, flags, costs, cap, drafts (bits 0-2: draft_tokens, bit 3:
    lookahead, bits 4-5: for how many pairs of steps there are slots more, modulo 3), finish."""
    page_size, shape, first, second, flags, costs, cap, drafts, _ = header
    page_size = (1, 2, 3, 4, 7, 16)[page_size % 6]
    fixed, large, per_slab = shape & 1, shape & 2, 1 + (shape >> 2) % 5
    options: dict[str, Any] = {
        "run_ahead": flags & 1,
        "draft_tokens": drafts & 7,
        "inner_checkpoints": bool(flags & 2),
        "alignment": 4 if flags & 4 else 1,
        "policy": "lru" if flags & 8 else "supersede",
        "pass_cost": costs % 9,
        "interior_spacing": 2 + costs // 9 % 7,
    }
    if flags & 32:
        options["max_cached_bytes"] = (cap % 6 * per_slab + cap // 6 % 8) * 16 * page_size
    rows = 2 * (drafts & 7) * ((drafts >> 4 & 3) % 3)
    if fixed:
        arena = {"slabs": 0, "pages": 40 + first % 60, "slots": 8 + second % 10}
        arena = arena if large else {"slabs": 0, "pages": 8 + first % 20, "slots": 3 + second % 6}
        arena["slots"] += rows
    else:
        arena = {"slabs": (12 + first % 36 if large else 4 + first % 8) + rows}
    return Config(
        page_size,
        per_slab,
        slack=(shape >> 5) % 3,
        vocabulary=3 if flags & 16 else 2,
        eager=bool(flags & 64),
        lookahead=drafts >> 3 & 1,
        options=options,
        **arena,
    )


def staying(seed: int) -> int:
    """How many tokens of a verify step stay as the device will see, at most: all of them half of the time."""
    return 1 + (seed >> 4) if seed & 8 else ALL


def kept(how: int) -> Pick:
    """What Harness.kept asks of each verify step that may keep something: whether the engine stops short of
    what the device accepted (0: it does), and then where. The next one takes the next `how`."""

    def answers() -> Iterator[int]:
        for each in range(how, how + 32):
            yield each % 4 != 3
            if each % 4 == 3:
                yield each % 32 >> 2

    following = answers()
    return lambda n: next(following) % n


class Decoding:
    input: Reader
    h: Harness
    paths: list[tuple[bytes, list[Any]]]  # those that later prompts are made of

    # ---- prompts

    def token(self, index: int, seed: int) -> int:
        return (seed * (index + 1) >> 3) % self.h.config.vocabulary

    def fresh(self, length: int, seed: int) -> list[Any]:
        path: list[Any] = [self.token(index, seed) for index in range(length)]
        if seed % 8 == 7 and path:
            path[(seed >> 3) % length] = (0, CONTENTS[seed >> 7])
        return path

    def feed(self, seed: int) -> list[int]:
        return [self.token(index, seed) for index in range(FED)]

    @property
    def room(self) -> int:
        """Tokens that fit beside one slot."""
        arena = self.h.oracle.arena
        return (arena.num_pages - (arena.per_slab if arena.unified else 0)) * self.h.config.page_size

    @property
    def longest(self) -> int:
        return max(2, min(48, 5 * self.h.config.page_size + 6, self.room // 3))

    def path(self) -> tuple[bytes, list[Any]]:
        """Operands how, which, size, seed: a fresh prompt, or an earlier one, extended, cut short, branched
        off, the same, under the other salt, or so long that it fills the arena."""
        how, which, size, seed = self.input.bytes(4)
        recent = self.paths[-REMEMBERED:]
        if how % 8 == 0 or not recent:
            return SALTS[how >> 6 & 1], self.fresh(1 + size % self.longest, seed)
        salt, path = recent[which % len(recent)]
        if how % 8 == 7:
            return salt, path + self.fresh(max(0, min(self.room, 100) - len(path) - size % 4), seed)
        if how % 8 in (1, 2):
            path = path + self.fresh(1 + size % 6, seed)
        elif how % 8 == 3:
            path = path[: 1 + size % len(path)]
        elif how % 8 == 4:
            path = path[: size % len(path)] + self.fresh(1 + (size >> 5), seed)
        elif how % 8 == 6:
            salt = SALTS[salt == SALTS[0]]
        return salt, path[: 2 * self.longest]

    # ---- shapes of steps

    def count(self, flight: Flight, byte: int) -> int:
        """A part of the prompt, all of it or more; behind it drafts up to one too many, or a few tokens."""
        left = flight.oracle.prompt_length - flight.oracle.computed
        if left > 0:
            return left + (byte >> 1) % 3 if byte & 1 else 1 + (byte >> 1) % left
        if self.h.oracle.draft_tokens:
            return 1 + byte % (self.h.oracle.draft_tokens + 2)
        return 1 + (byte >> 2) % 4 if byte % 4 == 0 else 1

    def rows(self, flight: Flight, count: int, how: int) -> int | None:
        """The default, all, one, or any number up to one too many; where none may be, the default or one."""
        lease = flight.oracle
        if not self.h.oracle.draft_tokens or lease.computed < lease.prompt_length:
            return 1 if how == 31 else None
        return (None, count, 1, (how >> 2) % (count + 2))[how % 4]

    def position(self, flight: Flight, where: int) -> int:
        """Anywhere about the open steps, the open end, just ahead, or in the oldest step (none: far off)."""
        lease, by = flight.oracle, where >> 2
        if where % 4 == 0:
            return lease.committed + by % (lease.computed - lease.committed + 8)
        if where % 4 == 1:
            return lease.computed
        if where % 4 == 2:
            return lease.computed + 1 + by % 3
        if not lease.open:
            return lease.computed + 1 + by
        oldest = lease.open[0].step
        return oldest.end - by % (oldest.end - oldest.begin)

    # ---- what may be asked

    @property
    def launchable(self) -> list[Flight]:
        """Nor does an engine go on behind a step of which it knows that nothing stays."""
        return [f for f in self.h.flights if f.may_launch and not (f.steps and f.steps[-1].void)]

    @property
    def committable(self) -> list[Flight]:
        return [f for f in self.h.flights if f.stage in ("applied", "ran")]

    @property
    def ended(self) -> list[Flight]:
        """Those that an engine which runs ahead commits now: the step behind is launched, or need not be."""
        ahead = self.h.oracle.run_ahead
        return [f for f in self.committable if len(f.steps) > ahead or f.steps[0].void]
