"""One part and one layer of what a model keeps: names, shapes, dtypes, bytes.

The ground that `config` (the layout) and `_hf_config` (the reading of configs) stand on, with the argument
checks that they share. Touches no tensor; the names of dtypes are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element of every dtype that a part may have; the names are torch's."""


@dataclass(frozen=True)
class TensorSpec:
    """One part: what a layer keeps per token (attention) or per slot (recurrent). `dtype`: see `ITEMSIZE`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for size in self.shape:
            check_positive(f"shape of part {self.name!r}", size)
        check_choice("dtype", self.dtype, ITEMSIZE)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one token's, or one slot's, share of this part."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class LayerSpec:
    """One layer that keeps something; `index` is its number in the model, where others may keep nothing.

    Attention parts have the shape of ONE TOKEN: `k`, `v` [heads, dim], or MLA's only `latent` [rank + rope
    dim]. Recurrent parts have the shape of ONE SLOT: `conv` [channels, width - 1] and `recurrent` [value
    heads, K, V] (Mamba-2: `ssm` [heads, head dim, state size]), in transformers' orientation. transformers
    keeps `width` columns of conv state, but the convolution at the next token reads only the last width - 1
    of them: column 0 is dead, and no part of the layout.
    """

    index: int
    kind: Literal["attention", "recurrent"]
    parts: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        check_choice("kind", self.kind, ("attention", "recurrent"))
        check_unique(f"parts of layer {self.index}", [part.name for part in self.parts])
        if not self.parts:
            raise ValueError(f"parts of layer {self.index}: (), expected at least one TensorSpec")


def check_positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {value!r}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: {value}, expected at least 1")
    return value


def check_choice(name: str, value: object, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in tuple(allowed):  # a tuple compares also what cannot be hashed
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(allowed)}")


def check_unique(name: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: {values}, expected no two alike")
