"""Hugging Face configs, read: the layers of one rank and the cost of a token; and known models' configs.

Owns the field names of every supported family, how heads are divided among ranks, and the preset table. Reads
plain fields of an object or a dict: transformers is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from hybridcache._specs import LayerSpec, TensorSpec, check_choice, check_positive


class HFModel(NamedTuple):
    """What a config says: the layers that keep something, for one rank, and FLOPs over all ranks."""

    layers: tuple[LayerSpec, ...]
    flops_per_token: int
    flops_per_pair: int


def read(config: object, *, kv_dtype: str, state_dtype: str, conv_dtype: str, tp_size: int) -> HFModel:
    """Reads a config of any supported family. Errors as `ModelLayout.from_hf_config`."""
    fields = _Fields(config)
    model_type = fields.get("model_type")
    check_choice("config.model_type", model_type, _READERS)
    model = _Model(fields, kv_dtype, state_dtype, conv_dtype, check_positive("tp_size", tp_size))
    _READERS[model_type](model)
    return HFModel(tuple(model.layers), 2 * model.macs, 2 * model.pair_macs)


class _Fields:
    """One config, object or dict. Names of a field are tried in turn: hub files and classes differ."""

    def __init__(self, source: object) -> None:
        self._source = source
        inner = self.get("text_config")
        if inner is not None:
            self._source = inner

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            source = self._source
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if value is not None:
                return value
        return default

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"config.{' or '.join(names)}: {value!r}, expected an int of at least 0")
        return value


@dataclass
class _Model:
    """One model while its config is read: the layers as one rank keeps them, the costs as all ranks pay."""

    fields: _Fields
    kv_dtype: str
    state_dtype: str
    conv_dtype: str
    tp_size: int
    layers: list[LayerSpec] = field(default_factory=list)
    macs: int = 0  # multiply-accumulates per token
    pair_macs: int = 0  # and per token and position of its context

    @cached_property
    def hidden(self) -> int:
        return self.fields.number("hidden_size")

    def shard(self, name: str, count: int, *, replicate: bool = False) -> int:
        """One rank's share of `count` heads; with `replicate`, one where ranks outnumber the heads."""
        if count % self.tp_size == 0:
            return count // self.tp_size
        if replicate and self.tp_size % count == 0:
            return 1
        raise ValueError(f"config.{name}: {count}, expected to be divisible by tp_size {self.tp_size}")

    def add_attention(self, index: int, *parts: tuple[str, tuple[int, ...]]) -> None:
        specs = tuple(TensorSpec(name, shape, self.kv_dtype) for name, shape in parts)
        self.layers.append(LayerSpec(index, "attention", specs))

    def add_recurrent(self, index: int, channels: int, width: int, name: str, shape: tuple[int, ...]) -> None:
        conv = TensorSpec("conv", (channels, width - 1), self.conv_dtype)
        self.layers.append(LayerSpec(index, "recurrent", (conv, TensorSpec(name, shape, self.state_dtype))))


def _grouped_attention(model: _Model, index: int, *, gated: bool) -> None:
    """Attention with KV heads; Qwen's output gate doubles the q projection."""
    fields, hidden = model.fields, model.hidden
    heads = fields.number("num_attention_heads")
    kv_heads = fields.number("num_key_value_heads", default=heads)
    dim = fields.number("head_dim", "attention_head_dim", default=hidden // max(heads, 1))
    model.shard("num_attention_heads", heads)
    shape = (model.shard("num_key_value_heads", kv_heads, replicate=True), dim)
    model.add_attention(index, ("k", shape), ("v", shape))
    model.macs += hidden * dim * ((3 if gated else 2) * heads + 2 * kv_heads)
    model.pair_macs += 2 * heads * dim


def _latent_attention(model: _Model, index: int) -> None:
    """MLA: all ranks keep the one latent of a token, the rope part of the key included."""
    fields, hidden = model.fields, model.hidden
    heads, rank = fields.number("num_attention_heads"), fields.number("kv_lora_rank")
    nope, rope = fields.number("qk_nope_head_dim"), fields.number("qk_rope_head_dim")
    value, q_rank = fields.number("v_head_dim"), fields.number("q_lora_rank", default=0)
    model.shard("num_attention_heads", heads)
    model.add_attention(index, ("latent", (rank + rope,)))
    query = heads * (nope + rope)
    model.macs += hidden * q_rank + q_rank * query if q_rank else hidden * query
    model.macs += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    model.pair_macs += query + heads * value


def _gated_delta(model: _Model, index: int) -> None:
    """Gated Delta Network: q and k heads, then value heads, share one short convolution."""
    fields, hidden = model.fields, model.hidden
    key_heads, value_heads = fields.number("linear_num_key_heads"), fields.number("linear_num_value_heads")
    key, value = fields.number("linear_key_head_dim"), fields.number("linear_value_head_dim")
    width = fields.number("linear_conv_kernel_dim")
    keys = model.shard("linear_num_key_heads", key_heads)
    values = model.shard("linear_num_value_heads", value_heads)
    model.add_recurrent(index, 2 * keys * key + values * value, width, "recurrent", (values, key, value))
    channels, inner = 2 * key_heads * key + value_heads * value, value_heads * value
    model.macs += hidden * (
        channels + 2 * inner + 2 * value_heads
    )  # q, k, v; gate and output; beta and decay
    model.macs += width * channels + 3 * inner * key


def _kimi_delta(model: _Model, index: int) -> None:
    """Kimi Delta Attention: q, k and v each have a short convolution, kept in this order as one `conv`."""
    fields, hidden = model.fields, model.hidden
    linear = _Fields(fields.get("linear_attn_config", default={}))
    heads = linear.number("num_heads", default=fields.get("linear_num_heads"))
    dim = linear.number("head_dim", default=fields.get("linear_head_dim"))
    width = linear.number("short_conv_kernel_size", default=fields.get("linear_conv_kernel_dim"))
    share = model.shard("linear_attn_config.num_heads", heads)
    model.add_recurrent(index, 3 * share * dim, width, "recurrent", (share, dim, dim))
    inner = heads * dim
    model.macs += hidden * (4 * inner + heads)  # q, k, v and output; beta
    model.macs += 2 * (hidden * dim + dim * inner)  # forget gate and output gate, both of rank head_dim
    model.macs += width * 3 * inner + 3 * inner * dim


def _mamba2(model: _Model, index: int) -> None:
    """Mamba-2: x, B and C share one short convolution over d_inner + 2 * n_groups * d_state channels."""
    fields, hidden = model.fields, model.hidden
    heads, dim = fields.number("mamba_num_heads"), fields.number("mamba_head_dim")
    groups, state = fields.number("n_groups", "mamba_n_groups"), fields.number("ssm_state_size")
    width = fields.number("conv_kernel", "mamba_d_conv")
    share = model.shard("mamba_num_heads", heads)
    group_share = model.shard("n_groups", groups, replicate=True)
    model.add_recurrent(index, share * dim + 2 * group_share * state, width, "ssm", (share, dim, state))
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    model.macs += hidden * (2 * inner + channels + heads) + width * channels + 2 * inner * state


def _gated_moe(model: _Model, shared_size: int) -> None:
    """Router, active experts and shared expert, each of gate, up and down."""
    fields, hidden = model.fields, model.hidden
    active = fields.number("num_experts_per_tok", "num_experts_per_token") * fields.number(
        "moe_intermediate_size"
    )
    model.macs += hidden * fields.number("num_experts", "num_local_experts") + 3 * hidden * (
        active + shared_size
    )


def _layer_types(model: _Model, default: Callable[[], list[str]], names: Mapping[str, str]) -> list[str]:
    """What each layer is, by `names`; ValueError for a type not among them (say, sliding attention)."""
    types = model.fields.get("layer_types", "layers_block_type") or default()
    if not types:
        raise ValueError(f"config.layer_types: {types!r}, expected the type of each layer")
    for name in types:
        check_choice("config.layer_types", name, names)
    return [names[name] for name in types]


def _read_qwen(model: _Model) -> None:
    fields, hidden = model.fields, model.hidden

    def by_interval() -> list[str]:
        interval = check_positive(
            "config.full_attention_interval", fields.get("full_attention_interval", default=4)
        )
        numbers = range(1, fields.number("num_hidden_layers") + 1)
        return ["linear_attention" if number % interval else "full_attention" for number in numbers]

    dense = fields.get("mlp_only_layers", default=[])
    sparse_step = check_positive("config.decoder_sparse_step", fields.get("decoder_sparse_step", default=1))
    experts = fields.number("num_experts", default=0)
    for index, kind in enumerate(_layer_types(model, by_interval, _MIXERS)):
        if kind == "attention":
            _grouped_attention(model, index, gated=True)
        else:
            _gated_delta(model, index)
        if experts and index not in dense and (index + 1) % sparse_step == 0:
            _gated_moe(model, fields.number("shared_expert_intermediate_size"))
            model.macs += hidden  # the shared expert's own gate
        else:
            model.macs += 3 * hidden * fields.number("intermediate_size")


def _read_kimi(model: _Model) -> None:
    fields, hidden = model.fields, model.hidden
    count = fields.number("num_hidden_layers")

    def by_lists() -> list[str]:
        full = _Fields(fields.get("linear_attn_config", default={})).get("full_attn_layers")
        if full is None:  # transformers' default
            full = range(5, count + 1, 4)
        return ["full_attention" if number in full else "linear_attention" for number in range(1, count + 1)]

    first_sparse = fields.number("first_k_dense_replace", default=1)
    mlps = fields.get("mlp_layer_types") or ["dense" if i < first_sparse else "sparse" for i in range(count)]
    shared_count = fields.number("n_shared_experts", "num_shared_experts")
    for index, kind in enumerate(_layer_types(model, by_lists, _MIXERS)):
        (_latent_attention if kind == "attention" else _kimi_delta)(model, index)
        if mlps[index] == "sparse":
            _gated_moe(model, shared_count * fields.number("moe_intermediate_size"))
        else:
            model.macs += 3 * hidden * fields.number("intermediate_size")


def _read_nemotron(model: _Model) -> None:
    fields = model.fields

    def by_pattern() -> list[str]:
        return list(fields.get("hybrid_override_pattern", default=""))

    for index, kind in enumerate(_layer_types(model, by_pattern, _NEMOTRON_LAYERS)):
        if kind == "attention":
            _grouped_attention(model, index, gated=False)
        elif kind == "recurrent":
            _mamba2(model, index)
        elif kind == "mlp":
            model.macs += 2 * model.hidden * fields.number("intermediate_size")
        else:
            _nemotron_moe(model)


def _nemotron_moe(model: _Model) -> None:
    """Experts of up and down only, in the latent space if there is one; the shared expert in the full one."""
    fields, hidden = model.fields, model.hidden
    latent = fields.number("moe_latent_size", default=0)
    active = fields.number("num_experts_per_tok") * fields.number("moe_intermediate_size")
    model.macs += hidden * (fields.number("n_routed_experts") + 2 * latent) + 2 * (latent or hidden) * active
    model.macs += 2 * hidden * fields.number("moe_shared_expert_intermediate_size")


_MIXERS = {
    "full_attention": "attention",
    "attention": "attention",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
}
_NEMOTRON_LAYERS = {
    **_MIXERS,
    "mlp": "mlp",
    "moe": "moe",
    "*": "attention",
    "M": "recurrent",
    "-": "mlp",
    "E": "moe",
}

_READERS: dict[str, Callable[[_Model], None]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _read_qwen),
    "kimi_linear": _read_kimi,
    "nemotron_h": _read_nemotron,
}


_QWEN_SHARED: dict[str, Any] = {
    "model_type": "qwen3_next",  # one reader serves all of them
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_QWEN_COLUMNS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size",
)
_QWEN_ROWS = {
    "qwen3.5-397b": (4096, 60, 32, 2, 64, 512, 10, 1024, 1024, 0),
    "qwen3.5-122b": (3072, 48, 32, 2, 64, 256, 8, 1024, 1024, 0),
    "qwen3-next-80b": (2048, 48, 16, 2, 32, 512, 10, 512, 512, 0),
    "qwen3.5-35b": (2048, 40, 16, 2, 32, 256, 8, 512, 512, 0),
    "qwen3.5-27b": (5120, 64, 24, 4, 48, 0, 0, 0, 0, 17408),
    "qwen3.5-9b": (4096, 32, 16, 4, 32, 0, 0, 0, 0, 12288),
}
_KIMI_LINEAR_48B: dict[str, Any] = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 9216,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
}
PRESET_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: {**_QWEN_SHARED, **dict(zip(_QWEN_COLUMNS, row, strict=True))}
        for name, row in _QWEN_ROWS.items()
    },
    "kimi-linear-48b": _KIMI_LINEAR_48B,
}
