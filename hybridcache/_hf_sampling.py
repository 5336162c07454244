"""How the transformers adapter picks a token from logits: greedy, or by transformers' own warpers.

Owns no state but the caller's generator, which each draw advances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """`do_sample=False` picks the largest logit (lowest id among equals); else draws after temperature, top_k
    and top_p.

    `generator` must live on the model's device. Bad values raise what transformers' warpers raise
    (`ValueError`).
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None
    _warpers: LogitsProcessorList = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        warpers = LogitsProcessorList()
        if self.do_sample and self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.do_sample and self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.do_sample and self.top_p != 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        object.__setattr__(self, "_warpers", warpers)

    def pick(self, tokens: Sequence[int], logits: Tensor) -> int:
        """The next token id after `tokens`, given `logits` of shape `[vocab]`."""
        if not self.do_sample:
            return int(logits.argmax())
        ids: Any = torch.tensor([list(tokens)], device=logits.device)  # transformers asks for a LongTensor
        scores = self._warpers(ids, logits.float().unsqueeze(0))
        chosen = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
        return int(chosen)
