"""SGLang's hybrid radix tree: `python -m benchmarks.peers.measure_sglang` in its environment.

One conversation of 832-token turns, 64-token pages, a full-attention and a Mamba component, with the Rust
tree core that the wheel brings; tiny tensors on the CPU. Timed: match_prefix of the next prompt, insert of
it when the turn ends. Torch serves only as the container of indices there.
"""

from __future__ import annotations

import importlib.machinery
import sys
from array import array
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers  # noqa: F401  (it looks for torchvision when it is first imported)

from benchmarks.clock import timed
from benchmarks.peers.peer import PAGE, TURN, Add, main

# Image processors import torchvision, whose wheels do not load beside a CPU torch. Nothing of it is called.
for name in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".io"):
    module = MagicMock(name=f"torchvision{name}", __path__=[])
    module.__spec__ = importlib.machinery.ModuleSpec(f"torchvision{name}", None)
    sys.modules[f"torchvision{name}"] = module

from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler  # noqa: E402


def make_pools(tokens: int, states: int) -> tuple[Any, Any]:
    """Pools of one small layer of each kind."""
    with envs.SGLANG_MAMBA_SSM_DTYPE.override("bfloat16"):
        shape = Mamba2StateShape.create(
            tp_world_size=1,
            intermediate_size=16,
            n_groups=1,
            num_heads=1,
            head_dim=16,
            state_size=16,
            conv_kernel=4,
        )
        params = Mamba2CacheParams(shape=shape, layers=[0])
    requests = HybridReqToTokenPool(
        size=4,
        mamba_size=states,
        mamba_spec_state_size=4,
        max_context_len=tokens,
        device="cpu",
        enable_memory_saver=False,
        cache_params=params,
        mamba_layer_ids=[0],
        enable_mamba_extra_buffer=True,
        speculative_num_draft_tokens=3,
    )
    kv = HybridLinearKVPool(
        size=tokens,
        dtype=torch.bfloat16,
        page_size=PAGE,
        head_num=1,
        head_dim=8,
        full_attention_layer_ids=[1],
        device="cpu",
        enable_memory_saver=False,
        mamba_pool=requests.mamba_pool,
    )
    allocator = TokenToKVPoolAllocator(
        size=tokens, dtype=torch.bfloat16, device="cpu", kvcache=kv, need_sort=False
    )
    return requests, allocator


class Conversation:
    """Its tokens, and the indices of the KV that the tree has got so far."""

    def __init__(self, tokens: array[int], states: int) -> None:
        arguments = ServerArgs(model_path="dummy", page_size=PAGE)
        arguments._mamba_cache_chunk_size = PAGE  # else it asks the model's config, and there is no model
        set_global_server_args_for_scheduler(arguments)
        self.tokens, self.length = tokens, 0
        self.requests, self.allocator = make_pools(len(tokens) + PAGE, states)
        self.indices = torch.empty(0, dtype=torch.int64)
        self.cache = UnifiedRadixCache(
            params=CacheInitParams(
                req_to_token_pool=self.requests,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                disable=False,
                tree_components=(ComponentType.FULL, ComponentType.MAMBA),
                enable_mamba_extra_buffer=True,
                tree_core_backend="rust",
            )
        )
        core = type(self.cache.tree_core).__name__
        if "Rust" not in core:
            raise RuntimeError(f"sglang: the tree core is {core}, expected the Rust one")

    def key(self, length: int) -> RadixKey:
        return RadixKey(self.tokens[:length])

    def match(self) -> int:
        """Nanoseconds of matching the next prompt, after it was matched once: warm, as ours is."""
        params = MatchPrefixParams(key=self.key(self.length + TURN))
        self.cache.match_prefix(params)
        nanoseconds, found = timed(lambda: self.cache.match_prefix(params))
        if found.device_prefix_len != self.length:
            raise RuntimeError(f"sglang: {found.device_prefix_len} tokens matched, expected {self.length}")
        return nanoseconds

    def insert(self) -> int:
        """Nanoseconds of inserting a turn, its state with it."""
        length = self.length + TURN
        self.indices = torch.cat([self.indices, self.allocator.alloc(TURN)])
        params = InsertParams(
            key=self.key(length),
            value=self.indices,
            mamba_value=self.requests.mamba_allocator.alloc(1),
            prev_prefix_len=self.length,
        )
        nanoseconds, _ = timed(lambda: self.cache.insert(params))
        self.length = length
        return nanoseconds


def make(tokens: array[int], length: int) -> Callable[[Add], None]:
    conversation = Conversation(tokens, len(tokens) // TURN + 8)
    while conversation.length < length:
        conversation.insert()

    def turn(add: Add) -> None:
        add("match", conversation.match())
        add("insert", conversation.insert())

    return turn


if __name__ == "__main__":
    main("sglang", "sglang", make)
