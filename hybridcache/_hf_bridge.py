"""Between the arena and a transformers `DynamicCache`: what goes in, what comes out, which models it works
for.

Owns the translation of pages and slots into the model's own cache object and back, through that object's
public methods. Touches tensors of `Pools` and of one `DynamicCache`; knows no lease, no tree and no plan. Two
shapes differ: transformers keeps `width` conv columns of which the first is dead (a slot keeps `width - 1`),
and it keeps KV as `[1, heads, tokens, dim]` (a page keeps `[page_size, heads, dim]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

    from .config import LayerSpec, ModelLayout
    from .pools import Pools

MINIMUM_TRANSFORMERS = (5, 7)


class UnsupportedModelError(ValueError):
    """The model is not a hybrid that the adapter can restore, or its layout is not what its cache holds."""


class TransformersVersionError(ImportError):
    """transformers is too old: it drops the states when more than one token continues a cache."""


def check_transformers_version(version: str = __version__) -> None:
    """Raise `TransformersVersionError` for a transformers older than 5.7."""
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < MINIMUM_TRANSFORMERS:
        raise TransformersVersionError(
            f"transformers is {version}, expected >= 5.7: older ones drop the recurrent and conv state "
            "when more than one token continues a cache"
        )


def check_cache_matches(config: PreTrainedConfig, layout: ModelLayout) -> None:
    """Raise `UnsupportedModelError` unless the layout names just the layers that the model's cache stores."""
    layers = DynamicCache(config=config).layers
    stored: dict[str, set[int]] = {"attention": set(), "recurrent": set()}
    for index, layer in enumerate(layers):
        if getattr(layer, "is_sliding", False) or getattr(layer, "number_of_states", 1) != 1:
            raise UnsupportedModelError(
                f"layer {index} is a {type(layer).__name__}, expected full attention or one state"
            )
        if hasattr(layer, "recurrent_states"):
            stored["recurrent"].add(index)
        if hasattr(layer, "get_seq_length"):
            stored["attention"].add(index)
    for kind, found in stored.items():
        expected = {spec.index for spec in layout.layers if spec.kind == kind}
        if found != expected or not found:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} has {kind} layers {sorted(found)} in its cache, "
                f"the layout expects {sorted(expected)}, and a hybrid has at least one of each kind"
            )


class Bridge:
    """Loads a `DynamicCache` from pages and a slot, and stores into them what a step has added."""

    def __init__(
        self, config: PreTrainedConfig, layout: ModelLayout, pools: Pools, device: torch.device
    ) -> None:
        self._config = config
        self._pools = pools
        self._device = device
        self._page_size = layout.page_size
        self._attention = [spec for spec in layout.layers if spec.kind == "attention"]
        self._recurrent = [spec for spec in layout.layers if spec.kind == "recurrent"]
        # A slot may be wider than what the model keeps a state in; learned at the first store.
        self._live_dtypes: dict[tuple[int, str], torch.dtype] = {}
        self._latent_widths: dict[int, int] = {}

    def fresh(self) -> DynamicCache:
        """A cache that has read nothing."""
        return DynamicCache(config=self._config)

    def load(self, pages: NDArray[np.int32], slot: int, length: int) -> DynamicCache:
        """A cache that has read `length` tokens: their KV from `pages`, the states at `length` from `slot`.

        Copies (`length` tokens of KV and one state): the arena is not aliased. O(length).
        """
        cache = self.fresh()
        if length == 0:
            return cache
        table = self._table(pages)[: -(-length // self._page_size)]
        for spec in self._attention:
            keys, values = self._read_kv(spec, table, length)
            cache.update(keys, values, spec.index)
        for spec in self._recurrent:
            self._load_states(cache, spec, slot)
        return cache

    def rewind(self, cache: DynamicCache, slot: int, length: int) -> None:
        """Make a cache that has read on from `length` forget that: the states at `length` come from `slot`.

        The same bits as `load`, without copying KV. O(one state).
        """
        for spec in self._attention:
            layer: Any = cache.layers[spec.index]
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        for spec in self._recurrent:
            for part, pool in zip(spec.parts, self._pools.state(spec.index), strict=True):
                live_state(cache, spec.index, part.name).copy_(pool[slot])

    def store(self, cache: DynamicCache, pages: NDArray[np.int32], slot: int, begin: int, end: int) -> None:
        """Write the KV of tokens `[begin, end)` into `pages` and the states at `end` into `slot`. O(end -
        begin).
        """
        positions = torch.arange(begin, end, device=self._device)
        where = (self._table(pages)[positions // self._page_size], positions % self._page_size)
        for spec in self._attention:
            self._write_kv(cache, spec, where, begin, end)
        for spec in self._recurrent:
            self._store_states(cache, spec, slot)

    def _table(self, pages: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(pages.astype(np.int64)).to(self._device)  # pages is a read-only view

    def _read_kv(self, spec: LayerSpec, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        rows = [part.index_select(0, table).flatten(0, 1)[:length] for part in self._pools.kv(spec.index)]
        if len(rows) == 1:  # MLA: one latent a token, which the model's cache keeps as a pair with one head
            width = self._latent_widths[spec.index]
            rows = [half.unsqueeze(1) for half in (rows[0][:, :width], rows[0][:, width:])]
        keys, values = (row.transpose(0, 1).unsqueeze(0).contiguous() for row in rows)
        return keys, values

    def _write_kv(
        self, cache: DynamicCache, spec: LayerSpec, where: tuple[Tensor, Tensor], begin: int, end: int
    ) -> None:
        layer: Any = cache.layers[spec.index]
        if layer.keys.shape[-2] != end:
            raise UnsupportedModelError(
                f"layer {spec.index} holds {layer.keys.shape[-2]} tokens of KV, expected {end}"
            )
        new = [part[0, :, begin:end].transpose(0, 1) for part in (layer.keys, layer.values)]
        parts = self._pools.kv(spec.index)
        if len(parts) == 1:
            self._latent_widths[spec.index] = new[0].shape[-1]
            new = [torch.cat(new, dim=-1).squeeze(1)]
        for part, rows in zip(parts, new, strict=True):
            _check_shape(spec, rows.shape[1:], part.shape[2:])
            part[where] = rows

    def _load_states(self, cache: DynamicCache, spec: LayerSpec, slot: int) -> None:
        for part, pool in zip(spec.parts, self._pools.state(spec.index), strict=True):
            dtype = self._live_dtypes.get((spec.index, part.name), pool.dtype)
            live = pool[slot].unsqueeze(0).to(dtype, copy=True)
            if part.name == "conv":
                cache.update_conv_state(torch.nn.functional.pad(live, (1, 0)), spec.index)
            else:
                cache.update_recurrent_state(live, spec.index)

    def _store_states(self, cache: DynamicCache, spec: LayerSpec, slot: int) -> None:
        for part, pool in zip(spec.parts, self._pools.state(spec.index), strict=True):
            live = live_state(cache, spec.index, part.name)
            _check_shape(spec, live.shape, pool.shape[1:])
            self._live_dtypes[spec.index, part.name] = live.dtype
            pool[slot].copy_(live)


def live_state(cache: DynamicCache, layer_index: int, name: str) -> Tensor:
    """The state part `name` that the model's cache holds: conv `[channels, width - 1]`, else `[heads, K, V]`;
    a view.
    """
    layer: Any = cache.layers[layer_index]
    states = layer.conv_states if name == "conv" else layer.recurrent_states
    state: Tensor = (states[0] if isinstance(states, dict) else states)[0]
    return state[..., 1:] if name == "conv" else state


def _check_shape(spec: LayerSpec, found: torch.Size, expected: torch.Size) -> None:
    """`copy_` would broadcast a wrong shape silently."""
    if found != expected:
        raise UnsupportedModelError(
            f"layer {spec.index} ({spec.kind}) keeps {tuple(found)}, the layout expects {tuple(expected)}"
        )
