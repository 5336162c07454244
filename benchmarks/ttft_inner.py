"""What a checkpoint inside a prompt costs: a second forward pass, or one whose recurrence is split there.

Two prompts: the next turn of a conversation, with a breakpoint in its middle, and a first-time prompt, which
is cut a little before its end (and, with inner checkpoints, sparsely inside). Measures nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.ttft_model import NeverLeft, timed
from benchmarks.ttft_talk import Profile, first_token
from hybridcache.hf import CachedModel

RUNS = 5
LONG_RUNS = 2
NO_INTERIOR = 1 << 30

Prompts = Callable[[int, int], torch.Tensor]


def random_prompts(vocabulary: int) -> Prompts:
    def prompt(length: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (length,), generator=generator)

    return prompt


def engine_for(model: PreTrainedModel, profile: Profile, **options: Any) -> CachedModel:
    pages = 2 * (profile.prompt_length(2) // 64 + 2)
    return CachedModel(model, num_pages=pages, num_slots=4 * RUNS + 20, **options)


def runs(
    engine: CachedModel, prompts: Iterator[torch.Tensor], number: int, cuts: Sequence[int] = ()
) -> dict[str, Any]:
    """Median milliseconds to the first token of several prompts of a kind; the first one warms up."""
    forward, took, passes = engine.forward, [], []

    def counting(*args: Any, inner: Sequence[Any] = (), **options: Any) -> torch.Tensor:
        split.append(len(inner))
        return forward(*args, inner=inner, **options)

    split: list[int] = []
    engine.forward = counting  # type: ignore[method-assign]
    for _ in range(number + 1):
        prompt = next(prompts)
        (request, _), milliseconds = timed(
            engine.model.device, lambda prompt=prompt: first_token(engine, prompt, 1, breakpoints=cuts)
        )
        took.append(milliseconds)
        passes.append(len(request.steps))
        request.close(discard=True)
    engine.forward = forward  # type: ignore[method-assign]
    return {
        "ms": statistics.median(took[1:]),
        "runs_ms": took[1:],
        "passes": max(passes),
        "inner": max(split),
    }


def next_turn(model: PreTrainedModel, profile: Profile, prompts: Prompts) -> tuple[dict[str, Any], list[Any]]:
    """A turn upon a long prefix. Beside the times: logits of who resumes at the breakpoint, by either way."""
    found, resumed = {}, []
    prefix = prompts(profile.first, 1)
    added = profile.added - profile.generated + 1
    cut = profile.first + (added // 2) // 64 * 64 if added >= 128 else profile.first + added // 2
    for name, inner, cuts in (
        ("no checkpoint", False, ()),
        ("second pass", False, (cut,)),
        ("inner checkpoint", True, (cut,)),
    ):
        engine = engine_for(model, profile, inner_checkpoints=inner)
        engine.generate(prefix, max_new_tokens=0)
        turns = (torch.cat((prefix, prompts(added, seed))) for seed in count(100))
        found[name] = runs(engine, turns, RUNS, cuts)
        if cuts:
            read = torch.cat((prefix, prompts(added, 100)))[:cut]  # by the first of these turns
            request, _ = first_token(engine, torch.cat((read, prompts(70, 7))), 1)
            assert request.lease.start == cut, request.match
            resumed.append(request.last_logits)
            request.close(discard=True)
        del engine
    return found, resumed


def first_prompt(model: PreTrainedModel, profile: Profile, prompts: Prompts) -> dict[str, Any]:
    """A prompt that nobody has seen: as one plain pass, and with the checkpoints that the cache makes."""
    found: dict[str, Any] = {}
    fresh = (prompts(profile.first, seed) for seed in count(200))
    took = []
    for _ in range(LONG_RUNS + 1):
        prompt = next(fresh)
        _, milliseconds = timed(
            model.device, lambda prompt=prompt: NeverLeft(model).first_token(prompt, [0, len(prompt)])[0]
        )
        took.append(milliseconds)
    found["no checkpoint"] = {
        "ms": statistics.median(took[1:]),
        "runs_ms": took[1:],
        "passes": 1,
        "inner": 0,
    }
    for name, options in (
        ("second pass", {}),
        ("inner checkpoint", {"inner_checkpoints": True, "interior_spacing": NO_INTERIOR}),
        ("inner checkpoints, sparse ones too", {"inner_checkpoints": True}),
    ):
        found[name] = runs(engine_for(model, profile, **options), fresh, LONG_RUNS)
    return found


def yardstick(model: PreTrainedModel, profile: Profile, prompts: Prompts) -> float:
    """By how much a plain run changes if it reads the same tokens in one pass less: rounding, no more."""
    prompt, cut = prompts(profile.first + profile.added, 300), profile.first + profile.added // 2
    left = NeverLeft(model)
    left.read(prompt[: profile.first])
    in_two = left.copy().first_token(prompt, [profile.first, cut, len(prompt)])[1]
    return difference(left.first_token(prompt, [profile.first, len(prompt)])[1], in_two)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest one, of the largest number."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def measure_inner(model: PreTrainedModel, profile: Profile) -> dict[str, Any]:
    prompts = random_prompts(model.config.vocab_size)
    turn, (second_pass, inner) = next_turn(model, profile, prompts)
    return {
        "next turn": turn,
        "first prompt": first_prompt(model, profile, prompts),
        "resumed_equal": torch.equal(second_pass, inner),
        "resumed_difference": difference(inner, second_pass),
        "yardstick": yardstick(model, profile, prompts),
    }
