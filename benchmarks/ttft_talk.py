"""Conversations of the benchmark of times to first token, and how a turn of one runs through the cache.

Owns the profiles and what is said; drives `hybridcache.hf` by its lower-level door, just as `generate` does.
Measures nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.ttft_model import NeverLeft, short_steps
from hybridcache.hf import CachedModel, Request


class Profile(NamedTuple):
    first: int
    added: int
    generated: int
    turns: int

    def prompt_length(self, turn: int) -> int:
        return self.first + turn * self.added


ARTICLE = Profile(first=50_000, added=800, generated=64, turns=15)
TINY = Profile(first=200, added=40, generated=6, turns=4)


class Talk:
    """One conversation: what was said, how much of it a model has read, and who would never have left."""

    def __init__(self, number: int, profile: Profile, vocabulary: int) -> None:
        self.number, self.profile = number, profile
        self._generator = torch.Generator().manual_seed(1000 + number)
        self._vocabulary = vocabulary
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.read = 0
        self.never_left: NeverLeft | None = None

    def prompt(self, turn: int) -> torch.Tensor:
        """All that was said, and what the user adds: random ids, on the host, as a tokenizer leaves them."""
        count = self.profile.prompt_length(turn) - len(self.tokens)
        return torch.cat((self.tokens, self._random(count)))

    def instead_of(self, prompt: torch.Tensor) -> torch.Tensor:
        """A prompt of the same length that goes on otherwise from where the conversation stands."""
        return torch.cat((self.tokens, self._random(len(prompt) - len(self.tokens))))

    def _random(self, count: int) -> torch.Tensor:
        return torch.randint(self._vocabulary, (count,), generator=self._generator)


def first_token(
    engine: CachedModel, prompt: torch.Tensor, generated: int, **options: Any
) -> tuple[Request, int]:
    """What `generate` does up to its first token, the request still open. `options`: those of `open`."""
    request = engine.open(prompt, max_new_tokens=generated, **options)
    if request is None:
        raise RuntimeError("no room for a prompt, expected an arena that holds all conversations")
    while not request.prefilled:
        request.prefill()
    assert request.last_logits is not None
    return request, int(request.last_logits.argmax())


def go_on(request: Request, token: int, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy decoding to `count` tokens, of which `token` is the first; the last one is not read."""
    generated, rows = [token], []
    with short_steps():
        while len(generated) < count:
            request.decode(generated[-1])
            assert request.last_logits is not None
            rows.append(request.last_logits)
            generated.append(int(rows[-1].argmax()))
    return generated, rows
