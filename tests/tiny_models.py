"""Tiny random hybrid models that remember, and the reference they are compared with.

Owns: configurations of a few thousand weights (4 layers, 3 recurrent and 1 full, hidden size 64, key and
value heads of unequal size); `run_schedule`, which drives one `DynamicCache` through a schedule of steps
without hybridcache; and forward passes of Qwen3.5 that leave a state after each token. Default initialisation
would make every recurrent layer forget within about one token, and a wrong state would change no logit:
`A_log` is set here so that the states decay slowly, and the weights are large enough for states to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hybridcache._hf_bridge import live_state

VOCAB = 128
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
RECURRENT = [index for index, kind in enumerate(LAYER_TYPES) if kind == "linear_attention"]
PARTS = ("conv", "recurrent")
State = dict[tuple[int, str], torch.Tensor]
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


# Forward passes of Qwen3.5 that leave a state after each token ----------------------------------------------


def states_of(cache: DynamicCache) -> State:
    """A copy of every recurrent layer's state as it is now, in the form of a slot."""
    return {(index, name): live_state(cache, index, name).clone() for index in RECURRENT for name in PARTS}


class LayersOneByOne:
    """One forward pass in which every layer reads its tokens one after the other, as plain decoding does.

    So logits, KV and states are bit for bit those of plain decoding, however many tokens a pass has.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int], cache: DynamicCache) -> tuple[torch.Tensor, list[State]]:
        """Logits `[n, vocab]` and the states after each of the n tokens."""
        after: list[State] = [{} for _ in tokens]
        with self._patched(cache, after):
            ids = torch.tensor([list(tokens)])
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return output.logits[0], after

    @contextmanager
    def _patched(self, cache: DynamicCache, after: list[State]) -> Iterator[None]:
        base = self._model.model
        with ExitStack() as stack:
            for index, layer in enumerate(base.layers):
                stack.enter_context(
                    _forward_as(layer, _tokens_one_by_one(index, layer.forward, cache, after))
                )
            for module in (base.norm, self._model.lm_head):
                stack.enter_context(_forward_as(module, _rows_one_by_one(module.forward)))
            positions = _positions_one_by_one(base.rotary_emb.forward)
            stack.enter_context(_forward_as(base.rotary_emb, positions))
            yield


@contextmanager
def _forward_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _tokens_one_by_one(
    index: int, forward: Callable[..., torch.Tensor], cache: DynamicCache, after: list[State]
) -> Callable[..., torch.Tensor]:
    names = PARTS if index in RECURRENT else ()

    def one_by_one(hidden_states: torch.Tensor, *, position_embeddings: Any, **rest: Any) -> torch.Tensor:
        rest["attention_mask"] = rest["position_ids"] = None
        rows = []
        for row, states in enumerate(after):
            part = slice(row, row + 1)
            angles = tuple(each[:, part] for each in position_embeddings)
            rows.append(forward(hidden_states[:, part], position_embeddings=angles, **rest))
            states.update({(index, name): live_state(cache, index, name).clone() for name in names})
        return torch.cat(rows, dim=1)

    return one_by_one


def _rows_one_by_one(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda states: torch.cat([forward(row) for row in states.split(1, dim=1)], dim=1)


def _positions_one_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    def one_by_one(states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = [forward(states, ids) for ids in position_ids.split(1, dim=-1)]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))

    return one_by_one


@contextmanager
def all_but_the_recurrence_one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Norms, experts and attention of Qwen models round as if each token were alone, so that what a recurrent
    layer is given does not depend on how many tokens a pass has."""
    base: Any = model.model
    heads: Any = model
    with ExitStack() as stack:
        for index, layer in enumerate(base.layers):
            modules = (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
            for module in modules:
                stack.enter_context(_forward_as(module, _rows_one_by_one(module.forward)))
            if index not in RECURRENT:
                attention = layer.self_attn
                stack.enter_context(_forward_as(attention, _queries_one_by_one(attention.forward)))
        for module in (base.norm, heads.lm_head):
            stack.enter_context(_forward_as(module, _rows_one_by_one(module.forward)))
        positions = _positions_one_by_one(base.rotary_emb.forward)
        stack.enter_context(_forward_as(base.rotary_emb, positions))
        yield


def _queries_one_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    def one_by_one(hidden_states: torch.Tensor, *, position_embeddings: Any, **rest: Any) -> Any:
        rest["attention_mask"] = rest["position_ids"] = None
        rows = []
        for row in range(hidden_states.shape[1]):
            part = slice(row, row + 1)
            angles = tuple(each[:, part] for each in position_embeddings)
            rows.append(forward(hidden_states[:, part], position_embeddings=angles, **rest)[0])
        return torch.cat(rows, dim=1), None

    return one_by_one


class KernelsOneByOne:
    """One forward pass over n tokens at once; its recurrence alone goes token by token and keeps each state.

    That is what an engine's kernels do. Matrix products of n rows round differently from those of one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int], cache: DynamicCache) -> tuple[torch.Tensor, list[State]]:
        """Logits `[n, vocab]` and the states after each of the n tokens."""
        ids = torch.tensor([list(tokens)])
        if len(tokens) == 1:
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            return output.logits[0], [states_of(cache)]
        after: list[State] = [{} for _ in tokens]
        for index in RECURRENT:
            _keep_conv(cache.layers[index], index, after)
        with _recurrence_one_by_one(after):
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return output.logits[0], after


@contextmanager
def _recurrence_one_by_one(after: list[State]) -> Iterator[None]:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as code

    chunked = code.torch_chunk_gated_delta_rule
    layers = iter(RECURRENT)  # they call it in the order of the model

    def one_by_one(
        *inputs: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, initial_state: torch.Tensor, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index, outputs, state = next(layers), [], initial_state
        for row, states in enumerate(after):
            *one, one_g, one_beta = (each[:, row : row + 1] for each in (*inputs, g, beta))
            output, state = code.torch_recurrent_gated_delta_rule(
                *one, g=one_g, beta=one_beta, initial_state=state, **rest
            )
            outputs.append(output)
            states[index, "recurrent"] = state[0].clone()
        return torch.cat(outputs, dim=1), state

    code.torch_chunk_gated_delta_rule = one_by_one
    try:
        yield
    finally:
        code.torch_chunk_gated_delta_rule = chunked


def _keep_conv(layer: Any, index: int, after: list[State]) -> None:
    """Each token's conv state is a window of what the layer convolves: its old columns, then one a token."""
    update = layer.update_conv_state

    def recorded(new: torch.Tensor, *args: Any, **rest: Any) -> torch.Tensor:
        columns = update(new, *args, **rest)
        for row, states in enumerate(after):
            end = columns.shape[-1] - len(after) + row + 1
            states[index, "conv"] = columns[0, :, end - layer.conv_kernel_size[0] + 1 : end].clone()
        return columns

    layer.update_conv_state = recorded
