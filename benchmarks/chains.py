"""Conversations without tensors: chains of turns of 832 tokens on the Qwen3.5-397B layout.

Owns the tokens of each conversation and drives a cache as an engine would (reserve, launch, plan, commit,
close). Nothing here is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridcache import HybridCache, Lease, ModelLayout

TURN = 832  # tokens that a turn adds: 768 of prompt and 64 generated, on average
VOCABULARY = 248_320

Tokens = np.ndarray[Any, np.dtype[np.int32]]


def layout() -> ModelLayout:
    return ModelLayout.preset("qwen3.5-397b")


def make_cache(*, tokens: int, checkpoints: int, slack: int = 256, **options: Any) -> HybridCache:
    """A unified arena in which so much has room, and `slack` slabs more."""
    model = layout()
    pages_per_slab = -(-model.slot_bytes // model.page_bytes)
    slabs = checkpoints + -(-tokens // (model.page_size * pages_per_slab)) + slack
    return HybridCache(model, memory_bytes=slabs * pages_per_slab * model.page_bytes, **options)


class Chain:
    """One conversation: its tokens up to `length` are cached, those beyond are what later turns will say."""

    def __init__(self, length: int, room: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.tokens: Tokens = random.integers(0, VOCABULARY, length + room, dtype=np.int32)
        self.target = length
        self.length = 0

    def prompt(self, new: int = TURN) -> Tokens:
        return self.tokens[: self.length + new]

    def first_turn(self) -> int:
        """So many tokens that whole turns lead from there to the target."""
        return self.target - (max(self.target // TURN, 1) - 1) * TURN

    def build(self, cache: HybridCache) -> None:
        take_turn(cache, self, self.first_turn())
        while self.length < self.target:
            take_turn(cache, self)


def apply(cache: HybridCache) -> None:
    cache.applied(cache.plan())


def prefill(cache: HybridCache, lease: Lease, length: int) -> None:
    while (done := lease.computed) < length:
        if lease.launch(length - done) is None:
            raise RuntimeError(f"launch: no room for lease {lease!r}, expected an arena that is large enough")
        apply(cache)
        lease.commit()


def reserve(cache: HybridCache, tokens: Any, **options: Any) -> Lease:
    lease = cache.reserve(tokens, **options)
    if lease is None:
        raise RuntimeError(
            f"reserve: no room for {len(tokens)} tokens, expected an arena that is large enough"
        )
    return lease


def take_turn(cache: HybridCache, chain: Chain, new: int = TURN) -> None:
    """A turn that generates nothing: leaves one checkpoint."""
    prompt = chain.prompt(new)
    lease = reserve(cache, prompt)
    prefill(cache, lease, len(prompt))
    lease.close()
    chain.length += new


def make_chains(cache: HybridCache, length: int, count: int, room: int, seed: int = 0) -> list[Chain]:
    chains = [Chain(length, room, seed=hash((seed, length, each)) & 0xFFFFFFFF) for each in range(count)]
    for chain in chains:
        chain.build(cache)
    return chains
