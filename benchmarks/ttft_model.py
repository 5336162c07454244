"""The models and the clock of the benchmark of times to first token, and the run that never left.

Owns: a Qwen3.5 of the shape of the published 9B model with random weights, and a tiny one; one timed call
from a device at rest; `NeverLeft`, a plain transformers cache driven by hand, which is what a restored run is
compared with. Knows no `hybridcache` but the shapes of its presets.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hybridcache._hf_config import PRESET_CONFIGS

T = TypeVar("T")

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.15,
}


def config(*, tiny: bool) -> Qwen3_5TextConfig:
    shape = TINY if tiny else {"vocab_size": 248_320, **PRESET_CONFIGS["qwen3.5-9b"]}
    known = set(Qwen3_5TextConfig().to_dict()) - {"model_type"}
    named = {name: value for name, value in shape.items() if name in known}
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    named["layer_types"] = layers * (shape["num_hidden_layers"] // 4)
    return Qwen3_5TextConfig(
        **named, max_position_embeddings=262_144, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def build(device: torch.device, *, tiny: bool, seed: int = 0) -> PreTrainedModel:
    """Random weights, made on the device; float32 if tiny, else bfloat16. The states decay slowly: by default
    they would forget within a token, and a wrong one would show nowhere."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with device:
            model = Qwen3_5ForCausalLM(config(tiny=tiny))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1e-3, 2e-2).log())
    return model.eval()


def versions() -> dict[str, str | None]:
    """Of what computes; and whether FLA's kernels were tuned here or took what a file says."""
    found: dict[str, str | None] = {"FLA_CACHE_MODE": os.environ.get("FLA_CACHE_MODE")}
    for name in ("transformers", "flash-linear-attention", "causal-conv1d"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@contextmanager
def short_steps() -> Iterator[None]:
    """Within, attention is not cuDNN's: that makes a plan for each length it has not met, which takes longer
    than it takes to decode a token. Nobody's first token is timed within."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def timed(device: torch.device, call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its milliseconds; the device is at rest before, and Python collects no garbage
    in it. The call must end with a value on the host."""
    gc.collect()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        found = call()
        return found, (time.perf_counter() - start) * 1e3
    finally:
        gc.enable()


def memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device: torch.device, call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and how many bytes more than before it were taken at once."""
    if device.type != "cuda":
        return call(), 0
    before = memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    found = call()
    return found, torch.cuda.max_memory_allocated(device) - before


class NeverLeft:
    """A plain transformers cache that has read some tokens and is kept: what nobody had to restore."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache | None = None) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [vocab] after the last of these tokens, read in one forward pass."""
        ids = tokens.unsqueeze(0).to(self.model.device)
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]

    def first_token(self, tokens: torch.Tensor, cuts: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Read `tokens[cuts[0]:cuts[-1]]` in passes that end at `cuts`; the next token, and its logits."""
        logits = torch.empty(0)
        for begin, end in pairwise(cuts):
            logits = self.read(tokens[begin:end])
        return int(logits.argmax()), logits

    def copy(self) -> NeverLeft:
        return NeverLeft(self.model, plain_copy(self.model, self.cache))


def states(cache: DynamicCache, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Conv and recurrent state of a layer, as transformers keeps them; None for an attention layer."""
    layer: Any = cache.layers[index]
    if not hasattr(layer, "conv_states"):
        return None
    both = (layer.conv_states, layer.recurrent_states)
    conv, recurrent = (each[0] if isinstance(each, dict) else each for each in both)
    return conv, recurrent


@torch.no_grad()
def plain_copy(model: PreTrainedModel, cache: DynamicCache) -> DynamicCache:
    """A cache of transformers' own layers that holds copies of all that `cache` does."""
    copied = DynamicCache(config=model.config)
    if not cache.get_seq_length():
        return copied
    for index, layer in enumerate(cache.layers):
        kept = states(cache, index)
        if kept is None:
            copied.update(layer.keys, layer.values, index)
        else:
            copied.update_conv_state(kept[0], index)
            copied.update_recurrent_state(kept[1], index)
    return copied


def same(one: DynamicCache, other: DynamicCache, begin: int = 0) -> bool:
    """Whether two caches hold the same bits: all states, and KV from position `begin` on. The oldest column
    of a conv state is no part of it: nothing reads it."""
    for index, (ours, theirs) in enumerate(zip(one.layers, other.layers, strict=True)):
        kept, expected = states(one, index), states(other, index)
        if kept is None or expected is None:
            pairs = [(ours.keys, theirs.keys), (ours.values, theirs.values)]
            if ours.keys.shape != theirs.keys.shape:
                return False
            pairs = [(a[:, :, begin:], b[:, :, begin:]) for a, b in pairs]
        else:
            pairs = [(kept[0][..., 1:], expected[0][..., 1:]), (kept[1], expected[1])]
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True
