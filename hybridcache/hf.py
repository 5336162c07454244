"""The transformers adapter: a hybrid causal LM whose prompts resume from cached prefixes. Extra `hf`,
transformers >= 5.7.

Owns `CachedModel`: a cache, an arena for one model, and the scheduling of generating requests over them. It
drives the library as any engine would, through leases, page tables, slots and plans, and knows nothing of the
tree. Every request runs as a batch of one: padding between a restored state and its suffix would corrupt it,
and batch shapes would change the bits. The model's own cache object holds a second copy of the KV while a
request is open.
"""

from __future__ import annotations

import operator
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ._hf_batch import OnStep, Opener, Options, Result, drive
from ._hf_bridge import (
    Bridge,
    TransformersVersionError,
    UnsupportedModelError,
    check_cache_matches,
    check_transformers_version,
)
from ._hf_cache import sent
from ._hf_drafts import Drafter, PromptLookup
from ._hf_prompts import Tokens, as_integers, each_prompt, one_each, row_of
from ._hf_request import Keep, OutOfRoomError, Request, StepRecord, Verification
from ._hf_sampling import Sampling
from ._hf_split import recurrent_modules, split
from .cache import HybridCache
from .config import ModelLayout
from .pools import Pools
from .values import Plan

__all__ = [
    "CachedModel",
    "Drafter",
    "OutOfRoomError",
    "PromptLookup",
    "Request",
    "Result",
    "Sampling",
    "StepRecord",
    "TransformersVersionError",
    "UnsupportedModelError",
    "Verification",
]


class CachedModel:
    """A hybrid causal LM with a prefix cache of `memory_bytes` (or `num_pages` and `num_slots`) on the
    model's device.

    `prefill_chunk`: most prompt tokens in one forward pass (None: no limit). `copies`: see `Pools`.
    `state_dtype`: what recurrent states are kept in; only "float32" restores them exactly.
    `rebuild_every_step` drops the model's cache object at each step and reloads it from pages and slot:
    slower, same bits, and half the KV memory between steps. `draft_tokens`: most drafts in one verify step (0
    to 7), for `generate(drafter=...)`. Other options go to `HybridCache`. With `inner_checkpoints` a boundary
    inside a step costs no second pass: the recurrent layers read the step in pieces, and their states in
    between are kept.

    Raises `UnsupportedModelError` if the model is not a supported hybrid, is spread over devices or in
    training mode, `TransformersVersionError` if transformers is too old.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        memory_bytes: int | None = None,
        num_pages: int | None = None,
        num_slots: int | None = None,
        page_size: int = 64,
        copies: Literal["eager", "indirect"] = "eager",
        prefill_chunk: int | None = None,
        state_dtype: str = "float32",
        rebuild_every_step: bool = False,
        draft_tokens: int = 0,
        **cache_options: Any,
    ) -> None:
        check_transformers_version()
        _check_model(model)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: {prefill_chunk}, expected at least 1 or None")
        if state_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"state_dtype: {state_dtype!r}, expected float32, bfloat16 or float16")
        config = model.config.get_text_config(decoder=True)
        dtype = str(model.dtype).removeprefix("torch.")
        self.model = model
        self.layout = _layout(
            config, page_size=page_size, kv_dtype=dtype, conv_dtype=dtype, state_dtype=state_dtype
        )
        check_cache_matches(config, self.layout)
        self.cache = HybridCache(
            self.layout,
            memory_bytes=memory_bytes,
            num_pages=num_pages,
            num_slots=num_slots,
            draft_tokens=draft_tokens,
            **cache_options,
        )
        self.pools = Pools(self.layout, self.cache.geometry, device=model.device, copies=copies)
        self.bridge = Bridge(config, self.layout, self.pools, model.device)
        inner = cache_options.get("inner_checkpoints", False)
        self._recurrent = recurrent_modules(model, self.layout) if inner else {}
        self.copies = copies
        self.prefill_chunk = prefill_chunk
        self.rebuild_every_step = rebuild_every_step
        self.draft_tokens = draft_tokens
        self._vocab_size = int(config.vocab_size)
        self._pending: Plan | None = None

    def open(
        self,
        input_ids: Tokens,
        *,
        max_new_tokens: int = 0,
        salt: bytes = b"",
        breakpoints: Sequence[int] = (),
        return_logits: bool = False,
    ) -> Request | None:
        """Match a prompt and hold room for it and `max_new_tokens` more; None: no room now, nothing changed.

        The lower-level door: the caller drives `Request.prefill`, `decode` or `verify`, `fork` and `close`.
        `breakpoints`: positions where a checkpoint is wanted, up to the last new token. `return_logits` keeps
        every row of logits in the steps, else only the last is made.
        """
        return self._open(
            self._tokens(input_ids),
            salt=salt,
            breakpoints=breakpoints,
            max_new_tokens=max_new_tokens,
            return_logits=return_logits,
        )

    @overload
    def generate(self, input_ids: Tokens, *, max_new_tokens: int, **options: Any) -> Result: ...
    @overload
    def generate(
        self, input_ids: Sequence[Tokens], *, max_new_tokens: int, **options: Any
    ) -> list[Result]: ...
    def generate(
        self,
        input_ids: Tokens | Sequence[Tokens],
        *,
        max_new_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        salt: bytes | Sequence[bytes] = b"",
        breakpoints: Sequence[int] | Sequence[Sequence[int]] = (),
        keep: Keep = "all",
        return_logits: bool = False,
        on_step: OnStep | None = None,
        drafter: Drafter | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Continue one prompt (list of ids, 1-D tensor, 2-D tensor of one row: gives a `Result`) or a list of
        prompts (gives a list of `Result`), each from the longest prefix of it that the cache can resume.

        `salt` and `breakpoints` hold for all prompts, or give one per prompt. `eos_token_id` ends a sequence
        (and stays in it). `sampling`: the fields of `Sampling`, greedy by default. `on_step(index, record)`
        is called after each forward pass that `Result.steps` lists. `drafter(tokens, k)` proposes up to `k`
        ids that may come next (`PromptLookup` does so from the tokens alone): what greedy decoding would pick
        too is read in one forward pass, the tokens stay those of greedy decoding. A batch larger than the
        arena completes too: requests without room wait for others to finish. If anything raises, all requests
        of this call are closed and publish nothing more; `OutOfRoomError` if none can go on.
        """
        prompts, single = each_prompt(input_ids)
        salts = one_each("salt", salt, len(prompts), shared=isinstance(salt, bytes))
        flat = all(isinstance(cut, (int, np.integer)) for cut in breakpoints)
        cuts = one_each("breakpoints", breakpoints, len(prompts), shared=flat)
        options = self._options(max_new_tokens, eos_token_id, keep, on_step, drafter, sampling)
        checked = [self._tokens(prompt) for prompt in prompts]  # a bad one refuses all, before anything runs
        waiting = [
            partial(
                self._open,
                tokens,
                max_new_tokens=max_new_tokens,
                salt=prompt_salt,
                breakpoints=prompt_cuts,
                return_logits=return_logits,
            )
            for tokens, prompt_salt, prompt_cuts in zip(checked, salts, cuts, strict=True)
        ]
        results = drive(waiting, options)
        return results[0] if single else results

    def branches(
        self,
        input_ids: Tokens,
        n: int,
        *,
        max_new_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        salt: bytes = b"",
        breakpoints: Sequence[int] = (),
        keep: Keep = "all",
        return_logits: bool = False,
        on_step: OnStep | None = None,
        drafter: Drafter | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """`n` independent continuations of one prompt, which is read once and forked `n - 1` times at its
        end.

        Options as in `generate`. Result 0 is the request that read the prompt; the others reuse all of it.
        Branches that find no room for their fork wait for others to finish; in an arena too small for any
        fork, they run one after the other and open the prompt anew.
        """
        if n < 1:
            raise ValueError(f"n: {n}, expected at least 1")
        options = self._options(max_new_tokens, eos_token_id, keep, on_step, drafter, sampling)
        open_prompt = partial(
            self._open,
            self._tokens(input_ids),
            max_new_tokens=max_new_tokens,
            salt=salt,
            breakpoints=breakpoints,
            return_logits=return_logits,
        )
        started = time.perf_counter()
        root = open_prompt()
        if root is None:
            raise OutOfRoomError("no room for the prompt, and no request of this call holds any")
        try:
            while not root.prefilled:
                _run_or_raise(root, options)
            results = drive(_branch_openers(root, n, open_prompt), options, started=started)
        except BaseException:
            root.close(discard=True)
            raise
        return [results[-1], *results[:-1]]

    def check_token(self, token: int, name: str = "token") -> int:
        """`token` as an int; TypeError if it is none, ValueError for an id outside the vocabulary."""
        try:
            token = operator.index(token)
        except TypeError:
            raise TypeError(f"{name}: {token!r}, expected an integer") from None
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"{name}: {token}, expected 0 <= token < {self._vocab_size} (the vocabulary)")
        return token

    def apply_plan(self) -> None:
        """Carry out what has been booked. A plan that failed half-way is applied again first: that is
        harmless.
        """
        if self._pending is not None:
            self._apply_pending(self._pending)
        self._pending = self.cache.plan()
        self._apply_pending(self._pending)

    def settle_after_failure(self) -> None:
        """Try once more to apply a plan that failed, so that nothing rests on it; else the next step tries
        again.
        """
        if self._pending is not None:
            with suppress(Exception):  # the first failure is already on its way to the caller
                self._apply_pending(self._pending)

    @torch.no_grad()
    def forward(
        self,
        tokens: Sequence[int],
        cache: DynamicCache,
        *,
        every_row: bool,
        inner: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Logits [len(tokens) or 1, vocab] of one row of tokens on `cache`, which goes on in place.

        `inner`: (offset, slot), ascending; the states after `offset` of these tokens are left in `slot`.
        """
        if self.model.training:
            raise UnsupportedModelError("model: in training mode, expected model.eval()")
        ids: Any = sent(tokens, self.model.device).unsqueeze(0)  # transformers asks for a LongTensor
        offsets, slots = [offset for offset, _ in inner], [slot for _, slot in inner]

        def keep(layer: int, number: int) -> None:
            self.bridge.keep_states(cache, layer, slots[number])

        with split(self._recurrent, offsets, keep) if inner else nullcontext():
            output = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=0 if every_row else 1
            )
        logits: Tensor = output.logits[0]
        return logits

    def _open(
        self,
        tokens: NDArray[np.int32],
        *,
        max_new_tokens: int,
        salt: bytes,
        breakpoints: Sequence[int],
        return_logits: bool,
    ) -> Request | None:
        lease = self.cache.reserve(tokens, salt=salt, breakpoints=breakpoints, max_new_tokens=max_new_tokens)
        return (
            None
            if lease is None
            else Request(self, lease, array("i", tokens.tobytes()), return_logits=return_logits)
        )

    def _options(self, *options: Any) -> Options:
        checked = Options(*options)
        if checked.drafter is not None and not self.draft_tokens:
            raise ValueError("drafter: given with draft_tokens=0, expected CachedModel(..., draft_tokens=k)")
        return checked

    def _apply_pending(self, plan: Plan) -> None:
        self.pools.apply(plan)
        self.cache.applied(plan)
        self._pending = None

    def _tokens(self, prompt: Tokens) -> NDArray[np.int32]:
        row = row_of(prompt)
        tokens = as_integers(row)
        if tokens is None or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            for token in row:
                self.check_token(token)  # says which one is wrong
            raise TypeError(f"input_ids: a {type(prompt).__name__}, expected a sequence of token ids")
        return tokens.astype(np.int32)


def _branch_openers(root: Request, n: int, open_prompt: Opener) -> list[Opener]:
    """The forks, and `root` itself last: they start where it stands. Once it has gone on, they cannot."""
    waiting = [root]

    def branch() -> Request | None:
        return root.fork() if waiting else open_prompt()

    return [*[branch] * (n - 1), waiting.pop]


def _run_or_raise(request: Request, options: Options) -> None:
    record = request.prefill()
    if record is None:
        raise OutOfRoomError("no room for the prompt's next step, and no request of this call can finish")
    options.on_step(0, record)


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: a {type(model).__name__}, expected a transformers PreTrainedModel")
    if model.training:
        raise UnsupportedModelError(
            "model: in training mode, expected model.eval() (dropout would change what is cached)"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"model: on {sorted(map(str, devices))}, expected all weights on one device"
        )


def _layout(config: Any, **options: Any) -> ModelLayout:
    try:
        ModelLayout.from_hf_config(config)
    except ValueError as error:
        raise UnsupportedModelError(f"model: {error}") from error
    return ModelLayout.from_hf_config(config, **options)
