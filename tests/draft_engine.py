"""A small engine for a tiny Qwen3.5 whose verify steps leave a state after each token, with overlap if asked.

Owns the loop around one cache: `DraftEngine`. What a step needs to know to run (which tokens stayed, where it
begins) is kept on the "device" side of a `Talk`; the host reads it only when it commits, `run_ahead` steps
later. The forward passes are those of tests/tiny_models.py; tensors move through `Bridge` and `Pools`; the
cache is driven by batches, as an engine would.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache

from hybridcache.hf import CachedModel
from tests.tiny_models import LayersOneByOne, State

Drafter = Callable[[list[int], int], list[int]]  # exactly as many tokens as it is asked for


@dataclass
class Launched:
    """One row of a batch's Steps, and the page table as of this launch."""

    begin: int
    end: int
    begin_max: int
    read_slot: int
    write_slot: int
    candidates: list[int]
    rows: list[int]
    pages: Any
    verifies: bool


@dataclass
class Outcome:
    """What the device found in one step: the ids that it read and that stay, and the one that comes next."""

    launched: Launched
    kept: list[int]
    next: int | None


@dataclass(eq=False)
class Talk:
    """One request. `sequence`: prompt and output, as the host knows it; `read`: what was committed at last.

    `stops`: ids that end it. `read_last`: commit its last token too where a step has read it. `joints`: ids
    behind which a checkpoint is wanted, seen at the commit only.
    """

    lease: Any
    prompt: list[int]
    max_new_tokens: int
    drafter: Drafter
    widths: Iterator[int]
    stops: frozenset[int] = frozenset()
    joints: frozenset[int] = frozenset()
    read_last: bool = False
    device: list[int] = field(default_factory=list)  # known to the device only
    flight: deque[Outcome] = field(default_factory=deque)
    sequence: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of prefill
    wanted: list[int] = field(default_factory=list)  # positions of joints
    passes: int = 0
    accepted: int = 0
    voided: int = 0
    cut_short: bool = False  # it ended in the middle of an accepted run
    narrow: bool = False  # the last verify step found no room
    read: int = 0

    @property
    def done(self) -> bool:
        return self.lease.closed


class DraftEngine:
    """A CachedModel whose requests run in a batch, by verify steps of mixed width, `run_ahead` ahead."""

    def __init__(
        self,
        model: Any,
        *,
        draft_tokens: int,
        forward: Any = LayersOneByOne,
        chunk: int = 1000,
        **options: Any,
    ) -> None:
        options = {"num_pages": 160, "num_slots": 60, "page_size": 7, **options}
        self.cached = CachedModel(model, draft_tokens=draft_tokens, **options)
        self.cache = self.cached.cache
        self.talks: list[Talk] = []
        self._run_ahead = options.get("run_ahead", 0)
        self._forward = forward(model)
        self._chunk = chunk

    def open(
        self, prompt: list[int], count: int, drafter: Drafter, *, widths: Iterator[int], **options: Any
    ) -> Talk:
        """Let a request in; `breakpoints` goes to the cache, the other options are those of `Talk`."""
        breakpoints = options.pop("breakpoints", ())
        lease = self.cache.reserve(prompt, breakpoints=breakpoints, max_new_tokens=count)
        assert lease is not None
        talk = Talk(lease, list(prompt), count, drafter, widths, **options)
        talk.device, talk.sequence = list(prompt), list(prompt)
        self.talks.append(talk)
        return talk

    def run(self) -> None:
        """Until all are done."""
        while any(not talk.done for talk in self.talks):
            self.advance()

    def advance(self) -> None:
        """Launch, plan and run one step of each request, then commit those that are `run_ahead` behind."""
        open_talks = [talk for talk in self.talks if not talk.done]
        ready = [talk for talk in open_talks if len(talk.flight) <= self._run_ahead]
        launched = self._launch(ready) or self._launch(ready)  # with no room for rows: one token each
        for talk, step in launched:
            talk.flight.append(self._run(talk, step))
        moved = {talk for talk, _ in launched}
        full = [talk for talk in open_talks if len(talk.flight) > self._run_ahead]
        due = full + [talk for talk in open_talks if talk.flight and talk not in full and talk not in moved]
        assert launched or due, "no room for any step"
        self._commit(due)
        self.cache.check()

    def cancel(self, talk: Talk, **options: Any) -> None:
        """Close with all steps that are in flight."""
        talk.read = talk.lease.committed
        talk.lease.close(**options)

    def _launch(self, talks: list[Talk]) -> list[tuple[Talk, Launched]]:
        counts = [self._count(talk) for talk in talks]
        steps = self.cache.launch([talk.lease for talk in talks], counts)
        self.cached.apply_plan()
        launched = []
        for index, talk in enumerate(talks):
            talk.narrow = not steps.ready[index]
            if steps.ready[index]:
                launched.append((talk, _row(steps, index, talk.lease)))
        return launched

    def _count(self, talk: Talk) -> int:
        rest = talk.lease.prompt_length - talk.lease.computed
        if rest > 0:
            return min(rest, self._chunk)
        return 1 if talk.narrow else next(talk.widths)

    # The device: it knows all tokens, and where a step really begins. ---------------------------------------

    def _run(self, talk: Talk, step: Launched) -> Outcome:
        if step.end <= talk.lease.prompt_length:
            return self._prefill(talk, step)
        begin, count = len(talk.device) - 1, step.end - step.begin
        assert step.begin <= begin <= step.begin_max
        slot = step.candidates[begin - step.begin] if step.verifies else self._source(step)
        cache = self.cached.bridge.load(step.pages, slot, begin)
        drafts = talk.drafter(talk.device, count - 1)
        assert len(drafts) == count - 1
        logits, after = self._forward([talk.device[-1], *drafts], cache)
        self._store(step, cache, begin, after)
        picks = logits.argmax(dim=-1).tolist()
        accepted = 0
        while accepted < len(drafts) and picks[accepted] == drafts[accepted]:
            accepted += 1
        kept = [talk.device[-1], *drafts[:accepted]]
        talk.device += [*drafts[:accepted], picks[accepted]]
        talk.passes += 1
        talk.accepted += accepted
        return Outcome(step, kept, picks[accepted])

    def _prefill(self, talk: Talk, step: Launched) -> Outcome:
        cache = self.cached.bridge.load(step.pages, self._source(step), step.begin)
        logits = self.cached.forward(talk.prompt[step.begin : step.end], cache, every_row=True)
        self.cached.bridge.store(cache, step.pages, step.write_slot, step.begin, step.end)
        talk.ends.append(step.end)
        if step.end < talk.lease.prompt_length:
            return Outcome(step, [], None)
        talk.device.append(int(logits[-1].argmax()))
        return Outcome(step, [], talk.device[-1])

    def _source(self, step: Launched) -> int:
        return step.write_slot if self.cached.copies == "eager" else step.read_slot

    def _store(self, step: Launched, cache: DynamicCache, begin: int, after: list[State]) -> None:
        """KV once, and the state after each token into its row."""
        slots = step.rows if step.verifies else [step.write_slot]
        assert len(slots) == len(after)
        self.cached.bridge.store(cache, step.pages, slots[-1], begin, begin + len(after))
        for slot, states in zip(slots, after, strict=True):
            for spec in self.cached.layout.layers:
                if spec.kind == "recurrent":
                    for part, pool in zip(spec.parts, self.cached.pools.state(spec.index), strict=True):
                        pool[slot].copy_(states[spec.index, part.name])

    # The host: it learns at the commit what the device has found. -------------------------------------------

    def _commit(self, talks: list[Talk]) -> None:
        leases, tokens, counts, stopped = [], [], [], []
        for talk in talks:
            outcome = talk.flight.popleft()
            ids, ended = self._judge(talk, outcome)
            self._want_joints(talk, outcome, ids)
            leases.append(talk.lease)
            tokens += ids
            counts.append(len(ids))
            if ended:
                stopped.append(talk)
        self.cache.commit(leases, tokens, counts)
        for talk in stopped:
            self._finish(talk)

    def _judge(self, talk: Talk, outcome: Outcome) -> tuple[list[int], bool]:
        """The ids to commit, and whether the request ends with what this step has shown."""
        if outcome.next is None:
            return [], False
        seen = [*outcome.kept[1:], outcome.next]
        limit = len(talk.prompt) + talk.max_new_tokens - len(talk.sequence)
        last = next((index for index, token in enumerate(seen) if token in talk.stops), len(seen))
        last = min(last, limit - 1)
        talk.sequence += seen[: last + 1]
        if not outcome.kept:
            return [], last < len(seen)
        talk.cut_short = last < len(seen) - 1
        return outcome.kept[: last + 1 + talk.read_last], last < len(seen)

    def _want_joints(self, talk: Talk, outcome: Outcome, ids: list[int]) -> None:
        if outcome.launched.verifies:
            begin = talk.lease.committed  # where it began is known: all before it is committed
            for offset, token in enumerate(ids, 1):
                if token in talk.joints:
                    talk.lease.want(begin + offset)
                    talk.wanted.append(begin + offset)

    def _finish(self, talk: Talk) -> None:
        """Commit what is in flight: the last token, if it has read just that, else nothing."""
        while talk.flight:
            outcome = talk.flight.popleft()
            agrees = outcome.kept and outcome.kept[0] == talk.sequence[-1]
            reads_last = agrees and talk.lease.committed == len(talk.sequence) - 1
            if not outcome.launched.verifies:
                assert reads_last
                talk.lease.commit(outcome.kept)
            elif reads_last and talk.read_last:
                talk.lease.commit(outcome.kept[:1])
            else:
                talk.lease.commit()
                talk.voided += 1
        talk.read = talk.lease.committed
        talk.lease.close()


def _row(steps: Any, index: int, lease: Any) -> Launched:
    begin, end = int(steps.begin[index]), int(steps.end[index])
    candidates, rows = (
        [slot for slot in row[index].tolist() if slot >= 0] for row in (steps.candidates, steps.rows)
    )
    write_slot = int(steps.write_slots[index])
    return Launched(
        begin,
        end,
        int(steps.begin_max[index]),
        int(steps.read_slots[index]),
        write_slot,
        candidates,
        rows,
        lease.pages,
        write_slot != lease.live_slot,
    )


def mixed_widths(most: int, seed: int) -> Iterator[int]:
    """Step widths of 1 to `most` tokens, for ever."""
    chance = random.Random(seed)
    while True:
        yield chance.randint(1, most)


def wrong_now_and_then(continuation: Sequence[int], seed: int, vocabulary: int) -> Drafter:
    """Knows what comes, and errs in about every fourth token, so that accepted counts vary."""
    chance = random.Random(seed)

    def drafter(tokens: list[int], count: int) -> list[int]:
        drafts = [*continuation[len(tokens) : len(tokens) + count], *[0] * count][:count]
        return [(token + 1) % vocabulary if chance.random() < 0.25 else token for token in drafts]

    return drafter
