"""One request of the transformers adapter, driven step by step: open, prefill, decode, fork, close.

Owns a lease, the token ids that go with it and, between two steps, the model's `DynamicCache`. Pages and
slots are the storage: the cache object may be dropped after any step and rebuilt from them
(`rebuild_every_step` does so), and what a step adds is written back before it is committed.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor
from transformers import DynamicCache

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


class Request:
    """A hold on the cache and the model's view of it. Made by `CachedModel.open`, and by `fork`.

    `match`: what the cache knew of the prompt, how much of it could be resumed, and why not more. `tokens`:
    the prompt and all tokens decoded so far; `last_logits` [vocab] are those after the last token read. As a
    context manager it closes at the end, with `discard` if an exception passes.
    """

    def __init__(self, engine: CachedModel, lease: Lease, tokens: list[int], *, return_logits: bool) -> None:
        self.tokens = tokens
        self.match = lease.match
        self.last_logits: Tensor | None = None
        self.steps: list[StepRecord] = []
        self._engine = engine
        self._lease = lease
        self._return_logits = return_logits
        self._cache: DynamicCache | None = None

    @property
    def lease(self) -> Lease:
        """The lease itself, for its cursors; drive it through this object only."""
        return self._lease

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been read."""
        return self._lease.computed >= self._lease.prompt_length

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
        self.tokens.append(self._engine.check_token(token))
        record = None
        try:
            record = self._step(1)
        finally:
            if record is None:
                self.tokens.pop()
        return record

    def fork(self) -> Request | None:
        """A second request that goes on from here, independent of this one; None: no room now, nothing
        changed.

        Both continue from one checkpoint. The fork's `steps` begin empty, its first step loads its own cache.
        """
        lease = self._lease.fork()
        if lease is None:
            return None
        child = Request(self._engine, lease, list(self.tokens), return_logits=self._return_logits)
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
        if step is None:
            return None
        try:
            logits = self._run(step)
            self._lease.commit(self.tokens[max(step.begin, self._lease.prompt_length) : step.end])
        except BaseException:
            self.close(discard=True)
            self._engine.settle_after_failure()
            raise
        record = StepRecord(step.begin, step.end, logits if self._return_logits else None)
        self.last_logits = logits[-1]
        self.steps.append(record)
        return record

    def _run(self, step: Step) -> Tensor:
        """Apply the plan, run the model over `[begin, end)` and leave KV in the pages, the state in the write
        slot.
        """
        engine = self._engine
        engine.apply_plan()
        pages = self._lease.pages  # anew at every step: a launch may have appended
        cache = self._cache
        if cache is None or engine.rebuild_every_step:
            slot = step.write_slot if engine.copies == "eager" else step.read_slot
            cache = engine.bridge.load(pages, slot, step.begin)
        logits = engine.forward(self.tokens[step.begin : step.end], cache, every_row=self._return_logits)
        engine.bridge.store(cache, pages, step.write_slot, step.begin, step.end)
        self._cache = None if engine.rebuild_every_step else cache
        return logits
