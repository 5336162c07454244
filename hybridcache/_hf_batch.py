"""How the transformers adapter runs several generating requests over one cache: in turn, waiting where there
is no room.

Owns the requests of one `generate` or `branches` call from the moment they are let in until they are closed;
touches them through `Request` only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._hf_drafts import Drafter, propose
from ._hf_request import Keep, OutOfRoomError, Request, StepRecord, Verification
from ._hf_sampling import Sampling

if TYPE_CHECKING:
    from .values import Match

OnStep = Callable[[int, StepRecord], None]
Opener = Callable[[], "Request | None"]


@dataclass(frozen=True)
class Result:
    """What one request came to.

    `sequence`: prompt and generated ids (all but the last generated one have been read). `match`: what the
    cache knew and why the hit was cut there. `reused` and `computed`: prompt tokens restored and run through
    the model. `extra_passes`: forward passes made only to leave a checkpoint. `seconds_to_first_token` is
    counted from when the request found room (None: nothing was generated). With a drafter, `drafts_proposed`
    tokens were run through the model in `verify_passes` forward passes, and the first ones of each pass that
    greedy decoding picks, `drafts_accepted` in all, stayed; `void_passes` of these passes were made in vain,
    what stayed was read again. `steps` lists all forward passes but those.
    """

    sequence: list[int]
    match: Match
    reused: int
    computed: int
    steps: list[StepRecord]
    extra_passes: int
    seconds_to_first_token: float | None
    verify_passes: int
    void_passes: int
    drafts_proposed: int
    drafts_accepted: int


class Options:
    """What all requests of one call share."""

    def __init__(
        self,
        max_new_tokens: int,
        eos: int | Iterable[int] | None,
        keep: Keep,
        on_step: OnStep | None,
        drafter: Drafter | None,
        sampling: dict[str, Any],
    ) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {max_new_tokens}, expected at least 0")
        if keep not in ("all", "prompt", "nothing"):
            raise ValueError(f"keep: {keep!r}, expected 'all', 'prompt' or 'nothing'")
        self.max_new_tokens = max_new_tokens
        self.eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        self.keep = keep
        self.on_step: OnStep = on_step or (lambda index, record: None)
        self.drafter = drafter
        self.sampling = Sampling(**sampling)
        if drafter is not None and not callable(drafter):
            raise TypeError(f"drafter: {drafter!r}, expected a callable of tokens and a count")
        if drafter is not None and self.sampling.do_sample:
            raise ValueError("drafter: given with do_sample=True, expected greedy sampling")


class Generation:
    """One request on its way: what has been sampled, and whether that is all."""

    def __init__(self, index: int, request: Request, options: Options, started: float) -> None:
        self.index = index
        self.request = request
        self._options = options
        self._started = started
        self._first_token: float | None = None
        self._generated: list[int] = []
        self._verified: list[Verification] = []

    @property
    def done(self) -> bool:
        full = len(self._generated) >= self._options.max_new_tokens
        ended = bool(self._generated) and self._generated[-1] in self._options.eos
        return self.request.prefilled and (full or ended)

    def begin(self) -> None:
        """Read the prompt as far as there is room. A fork has read it already: only its first token is
        sampled.
        """
        self._sample()
        while not self.request.prefilled and self.advance():
            pass

    def advance(self) -> bool:
        """One step, and the next token if the prompt has been read. False: no room now."""
        records = self._step()
        for record in records:
            self._options.on_step(self.index, record)
        if records:
            self._sample()
        return bool(records)

    def finish(self) -> Result:
        """Close the request: its state stays as `keep` says."""
        request, lease = self.request, self.request.lease
        length, reused = lease.prompt_length, min(lease.start, lease.prompt_length)
        result = Result(
            sequence=request.tokens[:length] + self._generated,
            match=request.match,
            reused=reused,
            computed=length - reused,
            steps=request.steps,
            extra_passes=lease.extra_passes,
            seconds_to_first_token=self._first_token,
            verify_passes=sum(each.proposed > 0 for each in self._verified),
            void_passes=sum(each.void for each in self._verified),
            drafts_proposed=sum(each.proposed for each in self._verified),
            drafts_accepted=sum(each.accepted for each in self._verified),
        )
        request.close(keep=self._options.keep)
        return result

    def _step(self) -> list[StepRecord]:
        request = self.request
        if not request.prefilled:
            record = request.prefill()
        elif self._options.drafter is None:
            record = request.decode(self._generated[-1])
        else:
            return self._verify(self._options.drafter)
        return [] if record is None else [record]

    def _verify(self, drafter: Drafter) -> list[StepRecord]:
        """Drafts for all but the last token that is still to come: that one is never read."""
        request, token = self.request, self._generated[-1]
        k = min(request.draft_tokens, self._options.max_new_tokens - len(self._generated) - 1)
        drafts: list[int] = []
        if k > 0:
            drafts = propose(drafter, [*request.tokens, token], k, self._options.eos)
        verified = request.verify(token, drafts)
        if verified is None:
            return []
        self._verified.append(verified)
        self._generated += drafts[: verified.accepted]
        return verified.records

    def _sample(self) -> None:
        logits = self.request.last_logits
        if logits is None or not self.request.prefilled or self.done:
            return
        self._generated.append(self._options.sampling.pick(self.request.token_array, logits))
        if self._first_token is None:
            self._first_token = time.perf_counter() - self._started


def drive(openers: Sequence[Opener], options: Options, started: float | None = None) -> list[Result]:
    """Run requests to their ends, one forward pass each in turn; who finds no room waits for others to
    finish.

    A request reads its prompt before the next one is let in, so that a batch shares what its first prompts
    leave. With nothing running and no room for the first in the queue, the last one gets a chance. If
    anything raises, every request let in so far is closed with `discard`.
    """
    queue = deque(enumerate(openers))
    active: list[Generation] = []
    results: dict[int, Result] = {}
    try:
        while queue or active:
            while queue and _let_in(queue[0], active, options, started):
                queue.popleft()
            if not active and _let_in(queue[-1], active, options, started):
                queue.pop()
            moved = [generation.done or generation.advance() for generation in active]
            if not any(moved):
                stuck = len(queue) + len(active)
                raise OutOfRoomError(f"no room for {stuck} requests, and none of them can finish")
            done = [generation for generation in active if generation.done]
            results.update((generation.index, generation.finish()) for generation in done)
            active[:] = [generation for generation in active if generation not in done]
    except BaseException:
        for generation in active:
            generation.request.close(discard=True)
        raise
    return [results[index] for index in sorted(results)]


def _let_in(
    entry: tuple[int, Opener], active: list[Generation], options: Options, started: float | None
) -> bool:
    index, opener = entry
    clock = time.perf_counter() if started is None else started
    request = opener()
    if request is None:
        return False
    active.append(Generation(index, request, options, clock))
    active[-1].begin()
    return True
