"""One request of the transformers adapter, driven step by step: open, prefill, decode or verify, fork, close.

Owns a lease, the token ids that go with it and, between two steps, the model's `DynamicCache`. Pages and
slots are the storage: the cache object may be dropped after any step and rebuilt from them
(`rebuild_every_step` does so), and what a step adds is written back before it is committed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor
from transformers import DynamicCache

from ._hf_drafts import count_accepted
from .errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .cache import Lease
    from .hf import CachedModel
    from .values import Step

Keep = Literal["all", "prompt", "nothing"]


class OutOfRoomError(RuntimeError):
    """Memory is held by requests that are not ours to finish: there is no room, and waiting would not make
    any.
    """


class StepRecord(NamedTuple):
    """One forward pass: it read tokens `[begin, end)`. `logits` [end - begin, vocab] in the model's dtype, if
    asked for.
    """

    begin: int
    end: int
    logits: Tensor | None


class Verification(NamedTuple):
    """What came of one verify step: of `proposed` drafts that were run through the model the first `accepted`
    stay.

    `records`: the forward passes that read what stays. `void`: before them, one was made in vain.
    """

    records: list[StepRecord]
    proposed: int
    accepted: int
    void: bool


class Request:
    """A hold on the cache and the model's view of it. Made by `CachedModel.open`, and by `fork`.

    `match`: what the cache knew of the prompt, how much of it could be resumed, and why not more.
    `last_logits` [vocab] are those after the last token read. As a context manager it closes at the end, with
    `discard` if an exception passes.
    """

    def __init__(self, engine: CachedModel, lease: Lease, tokens: array[int], *, return_logits: bool) -> None:
        self._tokens = tokens  # as C ints: a list of a long prompt takes milliseconds to make
        self.match = lease.match
        self.last_logits: Tensor | None = None
        self.steps: list[StepRecord] = []
        self._engine = engine
        self._lease = lease
        self._return_logits = return_logits
        self._cache: DynamicCache | None = None
        self._cache_is_ahead = False  # it has read drafts that do not stay

    @property
    def tokens(self) -> list[int]:
        """The prompt and all tokens decoded so far: a copy."""
        return self._tokens.tolist()

    @property
    def token_array(self) -> array[int]:
        """The same as they are kept, for who only reads them."""
        return self._tokens

    @property
    def lease(self) -> Lease:
        """The lease itself, for its cursors; drive it through this object only."""
        return self._lease

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been read."""
        return self._lease.computed >= self._lease.prompt_length

    @property
    def draft_tokens(self) -> int:
        """Most drafts that `verify` takes."""
        return self._engine.draft_tokens

    @property
    def closed(self) -> bool:
        return self._lease.closed

    def prefill(self, count: int | None = None) -> StepRecord | None:
        """Read up to `count` prompt tokens (None: the engine's `prefill_chunk`) in one forward pass.

        A boundary that the cache wants may end the step earlier: call until `prefilled`. None: no room now,
        nothing changed. Raises `StateError` when the prompt has been read, and whatever the model raises: the
        request is then closed, and nothing of the failed step can be served.
        """
        rest = self._lease.prompt_length - self._lease.computed
        if rest <= 0:
            raise StateError(
                f"prefill() after the whole prompt ({self._lease.prompt_length} tokens) was read"
            )
        limit = self._engine.prefill_chunk if count is None else count
        return self._step(rest if limit is None else min(rest, limit))

    def decode(self, token: int) -> StepRecord | None:
        """Read one token after all that was read so far. None: no room now, nothing changed. Raises as
        `prefill`.
        """
        if not self.prefilled:
            raise StateError(
                f"decode() with {self._lease.computed} of {self._lease.prompt_length} prompt tokens read"
            )
        self._tokens.append(self._engine.check_token(token))
        record = None
        try:
            record = self._step(1)
        finally:
            if record is None:
                self._tokens.pop()
        return record

    def verify(self, token: int, drafts: Sequence[int]) -> Verification | None:
        """Read one token and as many of the `drafts` after it as greedy decoding picks, in one forward pass.

        If all are right, that is all. Else the pass is void, and a second one reads what stays: a
        transformers model leaves no state but its last. A breakpoint among the drafts ends the step there,
        and its checkpoint is made. `last_logits` are those after the last token that stays. Without drafts,
        or without room for the state of the drafts, the token alone is read, as by `decode`. None: no room
        now, nothing changed. Raises as `prefill`, and ValueError for more drafts than `draft_tokens`.
        """
        engine = self._engine
        token, drafts = engine.check_token(token), [engine.check_token(draft, "drafts") for draft in drafts]
        if len(drafts) > engine.draft_tokens:
            raise ValueError(
                f"drafts: {len(drafts)} tokens, expected at most {engine.draft_tokens} (draft_tokens)"
            )
        launched = self._lease.launch(1 + len(drafts), rows=1) if drafts and self.prefilled else None
        if launched is None:
            record = self.decode(token)
            return None if record is None else Verification([record], 0, 0, False)
        return self._verify(launched, [token, *drafts])

    def fork(self) -> Request | None:
        """A second request that goes on from here, independent of this one; None: no room now, nothing
        changed.

        Both continue from one checkpoint. The fork's `steps` begin empty, its first step loads its own cache.
        """
        lease = self._lease.fork()
        if lease is None:
            return None
        child = Request(self._engine, lease, self._tokens[:], return_logits=self._return_logits)
        child.last_logits = self.last_logits
        return child

    def close(self, *, keep: Keep = "all", discard: bool = False) -> None:
        """Finish, cancel or preempt: the state so far stays for reuse unless `keep` or `discard` says
        otherwise.
        """
        self._cache = None
        if not self._lease.closed:
            self._lease.close(keep=keep, discard=discard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(discard=error is not None)

    def _step(self, count: int) -> StepRecord | None:
        step = self._lease.launch(count)
        return None if step is None else self._read(step)

    def _read(self, step: Step) -> StepRecord:
        """One forward pass over tokens that all stay."""
        with self._discarded_on_failure():
            logits = self._forward(step, every_row=self._return_logits)
            return self._keep(step, logits)

    def _verify(self, step: Step, tokens: list[int]) -> Verification | None:
        """The verify step: its row holds the state if all it read stays; else what stays is read again."""
        begin, drafts = step.begin, tokens[1 : step.end - step.begin]
        records: list[StepRecord] = []
        self._tokens.extend([tokens[0], *drafts])
        try:
            with self._discarded_on_failure():
                logits = self._forward(step, every_row=True)
                accepted = count_accepted(logits, drafts)
                if accepted == len(drafts):
                    records.append(self._keep(step, logits))
                else:
                    self._lease.commit()
                    self._cache_is_ahead = True
            if accepted < len(drafts):
                self._read_again(1 + accepted, records)
        finally:
            del self._tokens[records[-1].end if records else begin :]
        if not records:
            return None
        return Verification(records, len(drafts), len(self._tokens) - begin - 1, accepted < len(drafts))

    def _read_again(self, count: int, records: list[StepRecord]) -> None:
        """Read the tokens that stay of a void step; a boundary may part them, and a part find no room."""
        end = self._lease.committed + count
        while self._lease.committed < end:
            step = self._lease.launch(end - self._lease.committed, rows=0)
            if step is None:
                break
            records.append(self._read(step))

    def _forward(self, step: Step, *, every_row: bool) -> Tensor:
        """Apply the plan and run the model over `[begin, end)`; what it leaves is in its own cache object."""
        engine, bridge, target = self._engine, self._engine.bridge, step.write_slot
        engine.apply_plan()
        slot = target if engine.copies == "eager" else step.read_slot
        if self._cache is None or engine.rebuild_every_step:
            pages = self._lease.pages
            capacity = len(pages) * engine.layout.page_size
            self._cache = bridge.load(pages, slot, step.begin, capacity=capacity, target=target)
        elif self._cache_is_ahead:
            bridge.rewind(self._cache, slot, target, step.begin)
        else:
            bridge.attach(self._cache, slot, target)
        self._cache_is_ahead = False
        inner = [(position - step.begin, slot) for position, slot in step.checkpoints]
        tokens = self._tokens[step.begin : step.end]
        return engine.forward(tokens, self._cache, every_row=every_row, inner=inner)

    def _keep(self, step: Step, logits: Tensor) -> StepRecord:
        """Leave the KV of all tokens in the pages and the state in the write slot, and commit."""
        engine, lease = self._engine, self._lease
        assert self._cache is not None
        engine.bridge.store(self._cache, lease.pages, step.write_slot, step.begin, step.end)
        if engine.rebuild_every_step:
            self._cache = None
        lease.commit(self._tokens[max(step.begin, lease.prompt_length) : step.end])
        record = StepRecord(step.begin, step.end, logits if self._return_logits else None)
        self.last_logits = logits[-1]
        self.steps.append(record)
        return record

    @contextmanager
    def _discarded_on_failure(self) -> Iterator[None]:
        """Whatever fails inside closes the request, and nothing of the step can be served."""
        try:
            yield
        except BaseException:
            self.close(discard=True)
            self._engine.settle_after_failure()
            raise
