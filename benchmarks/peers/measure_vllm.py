"""vLLM's KV cache manager: `python -m benchmarks.peers.measure_vllm` in its environment.

One conversation of 832-token turns on a full-attention and a Mamba group ("align" mode), with the default
hash, no tensors. Timed: hashing the next prompt, looking it up, allocating its turn, one decode step,
freeing. Pages of 64 tokens as everywhere here; and of 528, the least that vLLM itself takes for such a
model, since a page must weigh as much as a state there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.request import Request

from benchmarks.clock import timed
from benchmarks.peers.peer import PAGE, TURN, Add, main

HASH = get_hash_fn_by_name("sha256")
INFLATED = 528
DECODED = 8


class Conversation:
    """Its tokens, and the manager that serves them with pages of `page` tokens."""

    def __init__(self, tokens: list[int], page: int) -> None:
        self.tokens, self.page, self.length = tokens, page, 0
        self.hasher = get_request_block_hasher(page, HASH)
        full = FullAttentionSpec(block_size=page, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
        state = MambaSpec(
            block_size=page,
            shapes=((4, 4),),
            dtypes=(torch.bfloat16,),
            page_size_padded=full.page_size_bytes,
            mamba_cache_mode="align",
        )
        groups = [KVCacheGroupSpec(["attention"], full), KVCacheGroupSpec(["mamba"], state)]
        num_pages = 4 * len(tokens) // page + 64
        config = KVCacheConfig(num_pages, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, len(tokens), scheduler_block_size=page, hash_block_size=page)

    def request(self, length: int, name: str, hasher: Any) -> Request:
        sampling = SamplingParams(max_tokens=64)
        return Request(name, self.tokens[:length], sampling, None, block_hasher=hasher)

    def turn(self, add: Add, new: int = TURN) -> None:
        length, name = self.length + new, f"request at {self.length}"
        bare = self.request(length, name, None)
        self.hasher(bare)  # once before it is timed, as everywhere
        hashing, _ = timed(lambda: self.hasher(bare))
        request = self.request(length, name, self.hasher)
        self.manager.get_computed_blocks(request)
        looking, (pages, hit, _) = timed(lambda: self.manager.get_computed_blocks(request))
        if hit != self.length // self.page * self.page:
            raise RuntimeError(f"vllm: a hit of {hit} tokens, expected {self.length} in whole pages")
        add("hash", hashing)
        add("look up", looking)
        add("hash + look up", hashing + looking)
        aligned = length // self.page * self.page  # its scheduler ends a step where a state can be cached
        add("allocate a turn", self.step(request, aligned - hit, hit, pages))
        request.num_computed_tokens = aligned
        if length > aligned:
            self.step(request, length - aligned)
            request.num_computed_tokens = length
        for token in range(DECODED):
            request.append_output_token_ids(token)
            add("decode step", self.step(request, 1))
            request.num_computed_tokens += 1
        add("free", timed(lambda: self.manager.free(request))[0])
        self.length = length

    def step(self, request: Request, count: int, *found: Any) -> int:
        """Nanoseconds of allocating `count` more tokens."""
        nanoseconds, pages = timed(lambda: self.manager.allocate_slots(request, count, *found))
        if pages is None:
            raise RuntimeError(f"vllm: no room for {count} tokens, expected a pool that is large enough")
        self.manager.new_step_starts()
        return nanoseconds


def make(page: int, suffix: str, tokens: array[int], length: int) -> Callable[[Add], None]:
    init_none_hash(HASH)
    conversation = Conversation(tokens.tolist(), page)
    conversation.turn(lambda *_: None, length)
    return lambda add: conversation.turn(lambda name, nanoseconds: add(name + suffix, nanoseconds))


if __name__ == "__main__":
    inflated = partial(make, INFLATED, f", pages of {INFLATED}")
    main("vllm", "vllm", partial(make, PAGE, ""), inflated)
