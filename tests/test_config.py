"""ModelLayout: byte tables, the layout inside pages and slots, transformers' configs, the cost model."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import subprocess
import sys

import pytest

from hybridcache import config as config_module
from hybridcache.config import ALIGNMENT, ITEMSIZE, PRESETS, LayerSpec, ModelLayout, TensorSpec

# name: recurrent layers, full layers, state [heads, K, V], conv channels, state bytes, KV bytes per token,
# tokens of KV that weigh as much as one state, KV bytes per token and rank with TP 8
TABLE = {
    "qwen3.5-397b": (45, 15, (64, 128, 128), 12288, 192_061_440, 30720, 6252, 15360),
    "qwen3.5-122b": (36, 12, (64, 128, 128), 12288, 153_649_152, 24576, 6252, 12288),
    "qwen3-next-80b": (36, 12, (32, 128, 128), 8192, 77_266_944, 24576, 3144, 12288),
    "qwen3.5-35b": (30, 10, (32, 128, 128), 8192, 64_389_120, 20480, 3144, 10240),
    "qwen3.5-27b": (48, 16, (48, 128, 128), 10240, 153_944_064, 65536, 2349, 16384),
    "qwen3.5-9b": (24, 8, (32, 128, 128), 8192, 51_511_296, 32768, 1572, 8192),
    "kimi-linear-48b": (20, 7, (32, 128, 128), 12288, 43_417_600, 8064, 5384, 8064),
}


def layers_of(layout: ModelLayout, kind: str) -> list[LayerSpec]:
    return [layer for layer in layout.layers if layer.kind == kind]


def parts_of(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for part in layer.parts}


# The models ----------------------------------------------------------------------------------------


def test_the_table_covers_every_preset() -> None:
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_shapes_and_bytes_of_every_model(name: str) -> None:
    recurrent, full, state, channels, state_bytes, kv_bytes, kv_tokens, _ = TABLE[name]
    layout = ModelLayout.preset(name)
    assert len(layers_of(layout, "recurrent")) == recurrent
    assert len(layers_of(layout, "attention")) == full
    assert sorted(layer.index for layer in layout.layers) == list(range(recurrent + full))
    for layer in layers_of(layout, "recurrent"):
        assert parts_of(layer) == {"conv": (channels, 3), "recurrent": state}
        assert [part.dtype for part in layer.parts] == ["bfloat16", "float32"]
    assert layout.state_bytes == state_bytes
    assert layout.kv_bytes_per_token == kv_bytes
    assert layout.state_bytes // layout.kv_bytes_per_token == kv_tokens


@pytest.mark.parametrize("name", TABLE)
def test_bytes_of_every_model_with_tp_8(name: str) -> None:
    _, _, state, channels, state_bytes, _, _, kv_bytes = TABLE[name]
    layout = ModelLayout.preset(name, tp_size=8)
    assert layout.state_bytes * 8 == state_bytes
    assert layout.kv_bytes_per_token == kv_bytes
    for layer in layers_of(layout, "recurrent"):
        assert parts_of(layer) == {"conv": (channels // 8, 3), "recurrent": (state[0] // 8, *state[1:])}


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TABLE)
def test_real_models_need_no_padding(name: str, tp_size: int, page_size: int) -> None:
    layout = ModelLayout.preset(name, tp_size=tp_size, page_size=page_size)
    assert layout.slot_bytes == layout.state_bytes
    assert layout.page_bytes == page_size * layout.kv_bytes_per_token


def test_kv_heads_are_replicated_and_the_latent_always() -> None:
    def kv(name: str, tp_size: int) -> dict[str, tuple[int, ...]]:
        return parts_of(layers_of(ModelLayout.preset(name, tp_size=tp_size), "attention")[0])

    assert kv("qwen3.5-397b", 1) == {"k": (2, 256), "v": (2, 256)}
    assert [kv("qwen3.5-27b", tp_size)["k"] for tp_size in (1, 2, 4, 8)] == [
        (4, 256),
        (2, 256),
        (1, 256),
        (1, 256),
    ]
    assert kv("kimi-linear-48b", 1) == kv("kimi-linear-48b", 8) == {"latent": (576,)}


def test_attention_layers_lie_where_the_models_have_them() -> None:
    full = [layer.index for layer in layers_of(ModelLayout.preset("qwen3.5-9b"), "attention")]
    assert full == [3, 7, 11, 15, 19, 23, 27, 31]
    full = [layer.index for layer in layers_of(ModelLayout.preset("kimi-linear-48b"), "attention")]
    assert full == [3, 7, 11, 15, 19, 23, 26]


def test_dtypes_are_the_callers() -> None:
    layout = ModelLayout.preset(
        "qwen3.5-9b", kv_dtype="float8_e4m3fn", state_dtype="bfloat16", conv_dtype="float32"
    )
    assert layout.kv_bytes_per_token == 32768 // 2
    assert layout.state_bytes == 24 * (32 * 128 * 128 * 2 + 8192 * 3 * 4)
    assert {spec.dtype for layer in layout.layers for spec in layer.parts} == {
        "float8_e4m3fn",
        "bfloat16",
        "float32",
    }


# What may not be divided ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tp_size", "named"),
    [
        ({"num_attention_heads": 12}, 8, "num_attention_heads: 12"),
        ({"num_key_value_heads": 3}, 2, "num_key_value_heads: 3"),
        ({"num_key_value_heads": 6}, 8, "num_key_value_heads: 6"),
        (
            {"linear_num_key_heads": 4},
            8,
            "linear_num_key_heads: 4",
        ),  # no replication: each v head needs its own
        ({"linear_num_value_heads": 12}, 8, "linear_num_value_heads: 12"),
    ],
)
def test_indivisible_heads_are_named(change: dict[str, int], tp_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*tp_size {tp_size}"):
        ModelLayout.from_hf_config(QWEN | change, tp_size=tp_size)


QWEN = {
    "model_type": "qwen3_next",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "intermediate_size": 128,
}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_type": "llama"}, ValueError, "config.model_type: 'llama'"),
        ({"model_type": None}, ValueError, "config.model_type: None"),
        ({"hidden_size": None}, ValueError, "config.hidden_size: None"),
        ({"hidden_size": "64"}, ValueError, "config.hidden_size: '64'"),
        ({"linear_key_head_dim": None}, ValueError, "config.linear_key_head_dim: None"),
        ({"linear_conv_kernel_dim": 1}, ValueError, "part 'conv': 0"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            ValueError,
            "layer_types: 'sliding_attention'",
        ),
        ({"layer_types": ["full_attention"]}, ValueError, "both 'attention' and 'recurrent'"),
        ({"full_attention_interval": 0}, ValueError, "full_attention_interval: 0"),
    ],
)
def test_a_bad_config_is_named(change: dict[str, object], error: type[Exception], match: str) -> None:
    ModelLayout.from_hf_config(QWEN)
    with pytest.raises(error, match=match):
        ModelLayout.from_hf_config(QWEN | change)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tp_size": 0}, ValueError, "tp_size: 0"),
        ({"tp_size": True}, TypeError, "tp_size: True"),
        ({"page_size": 0}, ValueError, "page_size: 0"),
        ({"page_size": 16.0}, TypeError, "page_size: 16.0"),
        ({"kv_dtype": "bf16"}, ValueError, "dtype: 'bf16', expected one of float64"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ModelLayout.from_hf_config(QWEN, **options)
    with pytest.raises(error, match=match):
        ModelLayout.preset("qwen3.5-9b", **options)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name: 'gpt', expected one of qwen3.5-397b, .*kimi-linear-48b"):
        ModelLayout.preset("gpt")


# The layout inside pages and slots -----------------------------------------------------------------


def attention(index: int, *parts: tuple[str, tuple[int, ...], str]) -> LayerSpec:
    return LayerSpec(index, "attention", tuple(TensorSpec(*part) for part in parts))


def recurrent(index: int, *parts: tuple[str, tuple[int, ...], str]) -> LayerSpec:
    return LayerSpec(index, "recurrent", tuple(TensorSpec(*part) for part in parts))


ODD = ModelLayout(
    page_size=3,
    layers=(
        recurrent(0, ("conv", (5, 3), "bfloat16"), ("recurrent", (2, 3, 5), "float32")),
        attention(1, ("k", (1, 5), "bfloat16"), ("v", (1, 7), "float8_e4m3fn")),
        recurrent(2, ("conv", (5, 3), "bfloat16"), ("recurrent", (1, 3, 5), "float32")),
        attention(4, ("latent", (9,), "float32")),
    ),
    extra_state=(TensorSpec("hidden", (7,), "float16"),),
)


def test_odd_sizes_are_padded_so_that_every_part_is_aligned() -> None:
    # pages: k 30 -> 32, v 21 -> 32, latent 108 -> 112
    assert [(part.layer, part.spec.name, part.offset, part.nbytes) for part in ODD.page_parts] == [
        (1, "k", 0, 30),
        (1, "v", 32, 21),
        (4, "latent", 64, 108),
    ]
    assert ODD.page_bytes == 176
    assert ODD.kv_bytes_per_token == 10 + 7 + 36
    # slots: all recurrent parts, then all conv parts, then the extra state
    assert [(part.layer, part.spec.name, part.offset, part.nbytes) for part in ODD.slot_parts] == [
        (0, "recurrent", 0, 120),
        (2, "recurrent", 128, 60),
        (0, "conv", 192, 30),
        (2, "conv", 224, 30),
        (-1, "hidden", 256, 14),
    ]
    assert ODD.slot_bytes == 272
    assert ODD.state_bytes == 120 + 60 + 30 + 30 + 14


@pytest.mark.parametrize("layout", [ODD, ModelLayout.preset("qwen3.5-9b"), ModelLayout.from_hf_config(QWEN)])
def test_parts_are_aligned_disjoint_and_inside(layout: ModelLayout) -> None:
    for parts, size in ((layout.page_parts, layout.page_bytes), (layout.slot_parts, layout.slot_bytes)):
        end = 0
        for part in parts:
            assert part.offset % ALIGNMENT == part.offset % part.spec.itemsize == 0
            assert end <= part.offset < end + ALIGNMENT
            end = part.offset + part.nbytes
        assert end <= size < end + ALIGNMENT and size % ALIGNMENT == 0


def test_extra_state_is_added_to_a_layout() -> None:
    plain = ModelLayout.preset("qwen3.5-9b")
    hidden = TensorSpec("hidden", (4096,), "bfloat16")
    more = dataclasses.replace(plain, extra_state=(hidden,))
    assert more.state_bytes == more.slot_bytes == plain.slot_bytes + 8192
    assert more.slot_parts[:-1] == plain.slot_parts
    assert more.slot_parts[-1] == (-1, hidden, plain.slot_bytes, 8192)
    assert more.flops(0, 100) == plain.flops(0, 100)


def test_lists_are_taken_and_layouts_can_be_keys() -> None:
    spec = TensorSpec("k", [2, 3], "float32")
    assert (
        spec.shape == (2, 3) and spec.nbytes == 24 and hash(spec) == hash(TensorSpec("k", (2, 3), "float32"))
    )
    assert hash(ModelLayout.preset("qwen3.5-9b")) == hash(ModelLayout.preset("qwen3.5-9b"))


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: TensorSpec("k", (2, 0), "float32"), ValueError, "part 'k': 0"),
        (lambda: TensorSpec("k", (2, 1.0), "float32"), TypeError, "part 'k': 1.0"),
        (lambda: TensorSpec("k", (2,), "float"), ValueError, "dtype: 'float'"),
        (lambda: attention(0), ValueError, "parts of layer 0"),
        (
            lambda: attention(0, ("k", (1,), "int8"), ("k", (1,), "int8")),
            ValueError,
            "parts of layer 0.*alike",
        ),
        (lambda: LayerSpec(0, "mlp", ODD.layers[0].parts), ValueError, "kind: 'mlp'"),
        (lambda: dataclasses.replace(ODD, page_size=0), ValueError, "page_size: 0"),
        (lambda: dataclasses.replace(ODD, layers=ODD.layers * 2), ValueError, "layers: .*alike"),
        (
            lambda: dataclasses.replace(ODD, layers=ODD.layers[:1]),
            ValueError,
            "both 'attention' and 'recurrent'",
        ),
        (
            lambda: dataclasses.replace(ODD, extra_state=ODD.extra_state * 2),
            ValueError,
            "extra_state: .*alike",
        ),
        (lambda: dataclasses.replace(ODD, flops_per_pair=3), ValueError, "flops_per_pair: 3"),
        (lambda: ODD.flops(3, 2), ValueError, "begin, end: 3, 2"),
        (lambda: ODD.flops(-1, 2), ValueError, "begin, end: -1, 2"),
    ],
)
def test_bad_specs_are_named(build: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build()


# The cost model ------------------------------------------------------------------------------------


def test_flops_of_the_largest_model() -> None:
    layout = ModelLayout.preset("qwen3.5-397b")
    assert round(layout.flops_per_token / 1e9, 1) == 30.9
    assert layout.flops_per_pair == 15 * 4 * 32 * 256  # q.k and p.v of 32 heads in 15 layers: 0.4915 MF
    assert round(layout.flops_per_pair / 1e6, 4) == 0.4915
    assert layout.flops(10, 13) == 3 * layout.flops_per_token + layout.flops_per_pair * (169 - 100) // 2


def test_flops_of_the_long_conversation() -> None:
    """50K first turn, 800 more a turn, 15 turns: what a resume at exactly the right position saves."""
    layout = ModelLayout.preset("qwen3.5-397b")
    assert round(100 * (1 - layout.flops(50_000, 50_800) / layout.flops(0, 50_800)), 2) == 97.98
    ends = [50_000 + 800 * turn for turn in range(15)]
    assert round(sum(layout.flops(0, end) for end in ends) / layout.flops(0, ends[-1]), 1) == 13.2


@pytest.mark.parametrize("name", PRESETS)
def test_flops_are_additive_and_the_same_for_every_rank(name: str) -> None:
    layout = ModelLayout.preset(name)
    assert layout.flops(7, 100) + layout.flops(100, 4321) == layout.flops(7, 4321)
    assert layout.flops(5, 5) == 0
    assert ModelLayout.preset(name, tp_size=8, page_size=16, kv_dtype="float32").flops(
        3, 999
    ) == layout.flops(3, 999)


@pytest.mark.parametrize(
    ("name", "active_billions"),
    [
        ("qwen3.5-397b", 17),
        ("qwen3.5-122b", 10),
        ("qwen3-next-80b", 3),
        ("qwen3.5-35b", 3),
        ("kimi-linear-48b", 3),
    ],
)
def test_active_parameters_agree_with_the_names(name: str, active_billions: int) -> None:
    # The names count embeddings and lm_head (0.6 to 2 billion), flops do not: within two billion below.
    half = ModelLayout.preset(name).flops_per_token / 2e9
    assert active_billions - 2 <= half <= active_billions + 0.5


def test_a_layout_by_hand_counts_tokens() -> None:
    assert ODD.flops(10, 25) == 15


# Transformers' own classes -------------------------------------------------------------------------

TINY_GDN = {key: value for key, value in QWEN.items() if key != "model_type"} | {"vocab_size": 97}
TINY_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
TINY_KIMI = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "num_experts": 6,
    "num_experts_per_token": 2,
    "num_shared_experts": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_attn_config": {
        "full_attn_layers": [3],
        "kda_layers": [1, 2, 4],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
TINY_NEMOTRON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "hybrid_override_pattern": "M-*EM",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 128,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 24,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}
FAMILIES = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", TINY_GDN | TINY_MOE | {"mlp_only_layers": [1]}),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", TINY_GDN),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", TINY_GDN | TINY_MOE),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", TINY_KIMI),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", TINY_NEMOTRON),
    "nemotron_h latent": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        TINY_NEMOTRON | {"moe_latent_size": 32},
    ),
}


def hf_config(family: str) -> object:
    transformers = pytest.importorskip("transformers")
    class_name, _, fields = FAMILIES[family]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    return getattr(transformers, class_name)(**fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_object_dict_and_hub_file_give_one_layout(family: str) -> None:
    config = hf_config(family)
    layout = ModelLayout.from_hf_config(config)
    assert ModelLayout.from_hf_config(config.to_dict()) == layout
    assert ModelLayout.from_hf_config({"model_type": config.model_type, **FAMILIES[family][2]}) == layout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_has_the_shapes_that_transformers_keeps(family: str) -> None:
    """Run a tiny model with K != V and compare with what it left in its cache."""
    config = hf_config(family)
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family][1])(config).eval()
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(5).unsqueeze(0), past_key_values=cache, use_cache=True)
    layout = ModelLayout.from_hf_config(config)
    assert layers_of(layout, "attention") and layers_of(layout, "recurrent")
    for layer in layout.layers:
        kept, parts = cache.layers[layer.index], parts_of(layer)
        if layer.kind == "recurrent":
            state = parts.get("recurrent") or parts["ssm"]
            assert tuple(kept.recurrent_states[0].shape[1:]) == state
            channels, columns = kept.conv_states[0].shape[1:]
            assert parts["conv"] == (channels, columns - 1)
        elif "latent" in parts:  # transformers keeps the two halves of the latent apart, each as one head
            assert parts["latent"] == (kept.keys.shape[-1] + kept.values.shape[-1],)
        else:
            assert [
                (kept.keys.shape[1], kept.keys.shape[3]),
                (kept.values.shape[1], kept.values.shape[3]),
            ] == [
                parts["k"],
                parts["v"],
            ]


def active_weights(model: object, active: int, experts: int) -> int:
    """Elements of all matrices that one token meets, embedding and lm_head aside."""
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "embed" in name or "lm_head" in name or name.endswith("A_log"):
            continue
        total += weight.numel() * active // experts if ".experts." in name else weight.numel()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_per_token_are_the_active_weights_and_the_state_update(family: str) -> None:
    config = hf_config(family)
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[family][1])(config)
    layout = ModelLayout.from_hf_config(config)
    states = [part for layer in layers_of(layout, "recurrent") for part in layer.parts if part.name != "conv"]
    update = sum((2 if part.name == "ssm" else 3) * math.prod(part.shape) for part in states)
    assert layout.flops_per_token == 2 * (active_weights(model, 2, 6) + update)


def test_flops_per_pair_of_every_family() -> None:
    def per_pair(family: str) -> int:
        return ModelLayout.from_hf_config(hf_config(family)).flops_per_pair

    assert per_pair("qwen3_next") == 4 * 8 * 16
    assert per_pair("kimi_linear") == 2 * 4 * (16 + 8 + 24)
    assert per_pair("nemotron_h") == 4 * 4 * 24


@pytest.mark.parametrize(
    ("outer", "inner"), [("Qwen3_5Config", "qwen3_5_text"), ("Qwen3_5MoeConfig", "qwen3_5_moe_text")]
)
def test_the_top_level_config_is_read_through_its_text_config(outer: str, inner: str) -> None:
    transformers = pytest.importorskip("transformers")
    text = hf_config(inner)
    whole = getattr(transformers, outer)(text_config=text.to_dict())
    layout = ModelLayout.from_hf_config(text, tp_size=2)
    assert ModelLayout.from_hf_config(whole, tp_size=2) == layout
    assert ModelLayout.from_hf_config(whole.to_dict(), tp_size=2) == layout


def test_the_presets_are_the_defaults_of_transformers_where_it_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    assert ModelLayout.from_hf_config(transformers.Qwen3NextConfig()) == ModelLayout.preset("qwen3-next-80b")
    assert ModelLayout.from_hf_config(transformers.Qwen3_5MoeTextConfig()) == ModelLayout.preset(
        "qwen3.5-35b"
    )
    assert ModelLayout.from_hf_config(transformers.Qwen3_5TextConfig()) == ModelLayout.preset("qwen3.5-9b")
    kimi = transformers.KimiLinearConfig(
        linear_attn_config={
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "kda_layers": [number for number in range(1, 28) if number % 4 and number != 27],
        }
    )
    assert ModelLayout.from_hf_config(kimi) == ModelLayout.preset("kimi-linear-48b")


def test_kimi_without_layer_lists_is_what_transformers_makes_of_it() -> None:
    transformers = pytest.importorskip("transformers")
    plain = {key: value for key, value in TINY_KIMI.items() if key != "linear_attn_config"} | {
        "num_hidden_layers": 10
    }
    config = transformers.KimiLinearConfig(**plain, linear_head_dim=16, linear_num_heads=4)
    hub = plain | {"model_type": "kimi_linear", "linear_head_dim": 16, "linear_num_heads": 4}
    hub["linear_conv_kernel_dim"] = 4
    assert ModelLayout.from_hf_config(hub) == ModelLayout.from_hf_config(config)
    assert [layer.index for layer in layers_of(ModelLayout.from_hf_config(hub), "attention")] == [4, 8]


def test_mamba2_conv_channels_and_groups_across_ranks() -> None:
    hub = TINY_NEMOTRON | {"model_type": "nemotron_h"}

    def parts(tp_size: int) -> dict[str, tuple[int, ...]]:
        return parts_of(ModelLayout.from_hf_config(hub, tp_size=tp_size).layers[0])

    assert parts(1) == {"conv": (8 * 24 + 2 * 2 * 16, 3), "ssm": (8, 24, 16)}
    assert parts(2) == {"conv": (4 * 24 + 2 * 1 * 16, 3), "ssm": (4, 24, 16)}
    assert parts(4) == {"conv": (2 * 24 + 2 * 1 * 16, 3), "ssm": (2, 24, 16)}  # two ranks share a group
    with pytest.raises(ValueError, match=r"n_groups: 3.*tp_size 2"):
        ModelLayout.from_hf_config(hub | {"n_groups": 3}, tp_size=2)
    with pytest.raises(ValueError, match=r"mamba_num_heads: 8.*tp_size 16"):
        ModelLayout.from_hf_config(hub | {"num_attention_heads": 16}, tp_size=16)
    assert [layer.index for layer in ModelLayout.from_hf_config(hub).layers] == [
        0,
        2,
        4,
    ]  # mlp and moe hold nothing
    with pytest.raises(ValueError, match="layer_types: 'X'"):
        ModelLayout.from_hf_config(hub | {"hybrid_override_pattern": "MX*"})
    with pytest.raises(ValueError, match="layer_types: "):
        ModelLayout.from_hf_config(hub | {"hybrid_override_pattern": ""})


# Imports -------------------------------------------------------------------------------------------


def test_layouts_need_neither_torch_nor_transformers() -> None:
    code = """
import sys
sys.modules.update(torch=None, transformers=None)
from hybridcache.config import ModelLayout
print(ModelLayout.preset("qwen3.5-397b", tp_size=8).slot_bytes)
"""
    root = pathlib.Path(config_module.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "24007680"


def test_item_sizes_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    assert {name: getattr(torch, name).itemsize for name in ITEMSIZE} == ITEMSIZE
