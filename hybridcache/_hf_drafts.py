"""Drafts of the transformers adapter: who proposes the next tokens, and how many of them greedy decoding
keeps.

Owns the one drafter that needs no second model, and the checks of what any drafter returns. Sees token ids
and logits, never a lease, a page or a slot.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence

from torch import Tensor

Drafter = Callable[[list[int], int], Sequence[int]]


class PromptLookup:
    """A drafter that reads on from the last earlier occurrence of the most recent `ngram` tokens.

    Good where outputs quote their prompts (edits, summaries, code); costs no memory, and one pass over the
    tokens a call. What it finds close to the end it reads on from itself, so a text that repeats itself is
    proposed to go on so. It keeps nothing between calls: one may serve any number of prompts.

    >>> PromptLookup(ngram=2)([1, 2, 3, 4, 1, 2], 3)
    [3, 4, 1]
    """

    def __init__(self, ngram: int = 2) -> None:
        if isinstance(ngram, bool) or not isinstance(ngram, int):
            raise TypeError(f"ngram: {ngram!r}, expected an integer")
        if ngram < 1:
            raise ValueError(f"ngram: {ngram}, expected at least 1")
        self.ngram = ngram

    def __call__(self, tokens: list[int], k: int) -> list[int]:
        """Up to `k` ids that followed; none if the n-gram is new."""
        source = self._find(tokens)
        if source is None:
            return []
        known = list(tokens)
        known.extend(known[source + offset] for offset in range(k))
        return known[len(tokens) :]

    def _find(self, tokens: list[int]) -> int | None:
        """Where the tokens after the last earlier occurrence begin."""
        gram = tokens[-self.ngram :]
        for end in range(len(tokens) - 1, self.ngram - 1, -1):
            if tokens[end - 1] == gram[-1] and tokens[end - self.ngram : end] == gram:
                return end
        return None


def propose(drafter: Drafter, tokens: list[int], k: int, ends: Container[int]) -> list[int]:
    """What `drafter` proposes after `tokens`, up to the first id of `ends`: greedy decoding samples such a
    token, but never reads it.
    """
    returned = drafter(tokens, k)
    try:
        count, drafts = len(returned), [operator.index(token) for token in returned]
    except TypeError:
        raise TypeError(f"drafter: returned {returned!r}, expected a sequence of token ids") from None
    if count > k:
        raise ValueError(f"drafter: returned {count} ids, expected at most {k}")
    stop = next((index for index, token in enumerate(drafts) if token in ends), count)
    return drafts[:stop]


def count_accepted(logits: Tensor, drafts: Sequence[int]) -> int:
    """How many leading `drafts` greedy decoding picks: row i of `logits` `[n, vocab]` is what comes before
    draft i.
    """
    picks = logits[: len(drafts)].argmax(dim=-1).tolist()
    wrong = (index for index, draft in enumerate(drafts) if picks[index] != draft)
    return next(wrong, len(drafts))
