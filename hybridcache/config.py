"""What one rank of a model keeps: shape, dtype and place of every part of its KV and of its recurrent state.

Owns the layout inside one page and inside one slot, the reading of Hugging Face configs into it, and the cost
model `flops(begin, end)`. Touches no tensor and no id: it imports neither torch nor transformers. `pools`
turns the offsets given here into views; the core is only told `page_size`, `page_bytes` and `slot_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hybridcache._hf_config import PRESET_CONFIGS, read
from hybridcache._specs import ITEMSIZE, LayerSpec, TensorSpec, check_choice, check_positive, check_unique

__all__ = ["ALIGNMENT", "ITEMSIZE", "PRESETS", "LayerSpec", "ModelLayout", "Part", "TensorSpec"]

ALIGNMENT = 16
"""Bytes: every part of a page or slot starts, and every page and slot ends, on a multiple of this."""

PRESETS = tuple(PRESET_CONFIGS)
"""The names that `ModelLayout.preset` knows."""


class Part(NamedTuple):
    """Where one part lies: `layer` is the model's layer number (-1: extra state), `offset` in bytes from the
    start of the page or slot, `nbytes` of the whole part (in a page: of all its tokens)."""

    layer: int
    spec: TensorSpec
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ModelLayout:
    """All layers of one model as one tensor-parallel rank keeps them.

    A page holds `page_size` tokens: layer by layer, part by part, each part [page_size, *shape] contiguous. A
    slot holds the recurrent parts of all layers, then those named `conv`, then `extra_state` (such as the
    last hidden state that a draft layer needs). `flops_per_token` and `flops_per_pair` are the F0 and c of
    `flops`; by their defaults a layout that was written by hand counts tokens. `lookahead` is 1 where KV at a
    position also depends on the token after it, as a draft layer's does: the last entry before a boundary is
    provisional then, and written again by who goes on from there.

    Raises ValueError or TypeError on bad arguments; a layout needs at least one layer of each kind.
    """

    page_size: int
    layers: tuple[LayerSpec, ...]
    extra_state: tuple[TensorSpec, ...] = ()
    flops_per_token: int = 1
    flops_per_pair: int = 0
    lookahead: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "extra_state", tuple(self.extra_state))
        check_positive("page_size", self.page_size)
        check_unique("layers", [layer.index for layer in self.layers])
        check_unique("extra_state", [spec.name for spec in self.extra_state])
        kinds = {layer.kind for layer in self.layers}
        if len(kinds) != 2:
            raise ValueError(f"layers: kinds {sorted(kinds)}, expected both 'attention' and 'recurrent'")
        if self.lookahead not in (0, 1):
            raise ValueError(f"lookahead: {self.lookahead!r}, expected 0 or 1")
        if self.flops_per_pair % 2:
            raise ValueError(f"flops_per_pair: {self.flops_per_pair}, expected an even number (2 per MAC)")

    @cached_property
    def page_parts(self) -> tuple[Part, ...]:
        """The parts of a page in memory order."""
        attention = (layer for layer in self.layers if layer.kind == "attention")
        return _place([(layer.index, spec, self.page_size) for layer in attention for spec in layer.parts])

    @cached_property
    def slot_parts(self) -> tuple[Part, ...]:
        """The parts of a slot in memory order."""
        recurrent = [layer for layer in self.layers if layer.kind == "recurrent"]
        parts = [(layer.index, spec, 1) for layer in recurrent for spec in layer.parts]
        parts.sort(key=lambda part: part[1].name == "conv")  # stable: conv parts move behind all others
        return _place(parts + [(-1, spec, 1) for spec in self.extra_state])

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV per token over all attention layers, exact."""
        return sum(part.spec.nbytes for part in self.page_parts)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one state over all recurrent layers, `extra_state` included, exact."""
        return sum(part.nbytes for part in self.slot_parts)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page: `page_size * kv_bytes_per_token`, padded where alignment needs it."""
        return _end(self.page_parts)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot: `state_bytes`, with padding where parts need it to be aligned."""
        return _end(self.slot_parts)

    def flops(self, begin: int, end: int) -> int:
        """FLOPs of computing tokens [begin, end) of one sequence from the state at `begin`, over all ranks.

        `F0 * (end - begin) + c * (end**2 - begin**2) / 2`, at 2 FLOPs per multiply-accumulate. F0: every
        matrix that one token meets (with MoE: router, active and shared experts; no embedding, no lm_head),
        the short convolution and the state update. c: full attention, q.k and p.v, per token and position of
        its context. The state update is 3 MACs per state element for the delta rules (read by k, rank-1
        write, read by q) and 2 for Mamba-2; a decay is a scaling and counts nothing. MLA counts in its
        expanded form, as prefill computes it. The matrices are those of transformers' modeling files. Exact,
        additive over adjoining ranges, O(1).
        """
        if not 0 <= begin <= end:
            raise ValueError(f"begin, end: {begin}, {end}, expected 0 <= begin <= end")
        return self.flops_per_token * (end - begin) + self.flops_per_pair * (end * end - begin * begin) // 2

    @classmethod
    def from_hf_config(
        cls,
        config: object,
        *,
        page_size: int = 64,
        kv_dtype: str = "bfloat16",
        state_dtype: str = "float32",
        conv_dtype: str = "bfloat16",
        tp_size: int = 1,
    ) -> ModelLayout:
        """The layout of one of `tp_size` ranks of the model that `config` describes.

        `config`: a transformers config object or a dict of the same fields (a parsed config.json) of
        Qwen3-Next, Qwen3.5 (dense or MoE; the top-level config or its `text_config`), Kimi-Linear or
        Nemotron-H. Heads are divided among the ranks; KV heads and Mamba-2 groups are replicated where ranks
        outnumber them, MLA's latent always. ValueError names a field that is missing, unknown or not
        divisible by `tp_size`.
        """
        model = read(
            config, kv_dtype=kv_dtype, state_dtype=state_dtype, conv_dtype=conv_dtype, tp_size=tp_size
        )
        return cls(page_size, model.layers, (), model.flops_per_token, model.flops_per_pair)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        page_size: int = 64,
        kv_dtype: str = "bfloat16",
        state_dtype: str = "float32",
        conv_dtype: str = "bfloat16",
        tp_size: int = 1,
    ) -> ModelLayout:
        """The layout of a published model by name, one of `PRESETS`; otherwise as `from_hf_config`."""
        check_choice("name", name, PRESET_CONFIGS)
        return cls.from_hf_config(
            PRESET_CONFIGS[name],
            page_size=page_size,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
            conv_dtype=conv_dtype,
            tp_size=tp_size,
        )


def _place(parts: list[tuple[int, TensorSpec, int]]) -> tuple[Part, ...]:
    """Lays (layer, spec, repeats) one after the other, each on the next multiple of ALIGNMENT."""
    placed: list[Part] = []
    for layer, spec, repeats in parts:
        placed.append(Part(layer, spec, _end(placed), repeats * spec.nbytes))
    return tuple(placed)


def _end(parts: list[Part] | tuple[Part, ...]) -> int:
    end = parts[-1].offset + parts[-1].nbytes if parts else 0
    return -(-end // ALIGNMENT) * ALIGNMENT
