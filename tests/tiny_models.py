"""Tiny random hybrid models that remember, and the reference they are compared with.

Owns: configurations of a few thousand weights (4 layers, 3 recurrent and 1 full, hidden size 64, key and
value heads of unequal size), and `run_schedule`, which drives one `DynamicCache` through a schedule of steps
without hybridcache. Default initialisation would make every recurrent layer forget within about one token,
and a wrong state would change no logit: `A_log` is set here so that the states decay slowly, and the weights
are large enough for states to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

VOCAB = 128
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": len(LAYER_TYPES),
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_GATED_DELTA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": LAYER_TYPES,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _qwen3_5() -> PreTrainedModel:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_COMMON, **_GATED_DELTA))


def _qwen3_5_moe() -> PreTrainedModel:
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    common = {key: value for key, value in _COMMON.items() if key != "intermediate_size"}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**common, **_GATED_DELTA, **_EXPERTS))


def _qwen3_next() -> PreTrainedModel:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig(**_COMMON, **_GATED_DELTA, **_EXPERTS))


def _kimi_linear() -> PreTrainedModel:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        **_COMMON,
        moe_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=LAYER_TYPES,
    )
    return KimiLinearForCausalLM(config)


def _nemotron_h() -> PreTrainedModel:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    common = {key: value for key, value in _COMMON.items() if key != "num_hidden_layers"}
    config = NemotronHConfig(
        **common,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_key_value_heads=2,
        head_dim=16,
        ssm_state_size=24,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=16,
    )
    return NemotronHForCausalLM(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_next": _qwen3_next,
    "kimi_linear": _kimi_linear,
    "nemotron_h": _nemotron_h,
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of the named architecture, in `dtype`, in eval mode, whose recurrent states remember."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1e-3, 2e-2).log())
    return model.to(dtype).eval()


def random_tokens(count: int, seed: int) -> list[int]:
    """`count` token ids below VOCAB, equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


@torch.no_grad()
def run_schedule(model: PreTrainedModel, tokens: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """Logits `[ends[-1], vocab]` of one DynamicCache that reads `tokens` in steps ending at `ends` and never
    leaves.
    """
    return continue_schedule(model, DynamicCache(config=model.config), tokens, [0, *ends])


@torch.no_grad()
def continue_schedule(
    model: PreTrainedModel, cache: DynamicCache, tokens: Sequence[int], cuts: Sequence[int]
) -> torch.Tensor:
    """Logits of the steps between `cuts` on a cache that has read `tokens[:cuts[0]]`; the cache goes on in
    place.
    """
    rows = []
    for begin, end in pairwise(cuts):
        ids = torch.tensor([list(tokens[begin:end])])
        rows.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(rows) if rows else torch.empty(0)


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens after `prompt`, decoded plainly on one DynamicCache."""
    tokens, cache, done = list(prompt), DynamicCache(config=model.config), 0
    for _ in range(count):
        logits = continue_schedule(model, cache, tokens, [done, len(tokens)])
        done = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def largest_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest |logit| of the reference."""
    difference = (logits.float() - reference.float()).abs().max()
    return float(difference / reference.float().abs().max())
