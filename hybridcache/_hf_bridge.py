"""Between the arena and a transformers `DynamicCache`: what goes in, what comes out, which models it works
for.

Owns the translation of pages and slots into the model's own cache object and back, through that object's
public methods. Touches tensors of `Pools` and of one `DynamicCache`; knows no lease, no tree and no plan. Two
shapes differ: transformers keeps `width` conv columns of which the first is dead (a slot keeps `width - 1`),
and it keeps KV as `[1, heads, tokens, dim]` (a page keeps `[page_size, heads, dim]`).
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, __version__
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ._hf_cache import RoomyLayer, SlotLayer, held, sent, with_slack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

    from .config import LayerSpec, ModelLayout, TensorSpec
    from .pools import Pools

MINIMUM_TRANSFORMERS = (5, 7)
UPDATED_IN_PLACE = ("ssm",)
"""State parts that a layer may update where it reads them; others it reads, and hands its cache a new one."""


SLOTS_KEPT = 64
"""Slots of which the views are kept."""


class StatePart(NamedTuple):
    """A part of a recurrent layer's state in one slot."""

    spec: LayerSpec
    part: TensorSpec
    kept: Tensor


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
        known = type(layer) in (DynamicLayer, LinearAttentionLayer)  # the bridge puts its own in their place
        keeps = hasattr(layer, "recurrent_states") or hasattr(layer, "get_seq_length")
        if getattr(layer, "number_of_states", 1) != 1 or keeps != known:
            raise UnsupportedModelError(
                f"layer {index} is a {type(layer).__name__}, expected full attention or one state"
            )
        if known:
            stored["attention" if isinstance(layer, DynamicLayer) else "recurrent"].add(index)
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
        self._empty = DynamicCache(config=config)
        self._pools = pools
        self._device = device
        self._page_size = layout.page_size
        self._attention = [spec for spec in layout.layers if spec.kind == "attention"]
        self._recurrent = [spec for spec in layout.layers if spec.kind == "recurrent"]
        self._slots: dict[int, list[StatePart]] = {}
        # A slot may be wider than what the model keeps a state in; learned at the first store.
        self._live_dtypes: dict[tuple[int, str], torch.dtype] = {}
        self._latent_widths: dict[int, int] = {}

    def fresh(self, capacity: int = 0) -> DynamicCache:
        """A cache that has read nothing, with room for `capacity` tokens without growing."""
        cache = copy(self._empty)
        cache.layers = list(cache.layers)
        for spec in self._attention:
            cache.layers[spec.index] = RoomyLayer(capacity)
        for spec in self._recurrent:
            cache.layers[spec.index] = SlotLayer()
        return cache

    def load(
        self,
        pages: NDArray[np.int32],
        slot: int,
        length: int,
        *,
        capacity: int = 0,
        target: int | None = None,
    ) -> DynamicCache:
        """A cache that has read `length` tokens: their KV from `pages`, the states at `length` from `slot`.

        KV is copied, and by default the states too: the arena is not aliased. `target`: the slot that the
        next step of this cache is going to write into (see `attach`). `capacity`: as `fresh`. O(length).
        """
        cache = self.fresh(max(capacity, length))
        if length:
            self._read_kv(cache, pages, length, max(capacity, length))
            self._make_states(cache, slot, in_place=target is not None)
        if target is not None:
            self.attach(cache, slot, target)
        if length:
            self._read_states(cache, slot)
        return cache

    def attach(self, cache: DynamicCache, slot: int, target: int) -> None:
        """The next step reads the recurrent states in `slot` (-1: there are none yet), and leaves them in
        `target`, which may be the same.

        `slot` holds what the cache does. Layers that may update what they read (Mamba-2's, in decoding) find
        a copy in `target`. Where a slot keeps a state in another dtype than the model does, the cache keeps
        its own, and `store` copies it.
        """
        homes = self._states(target)
        reads = homes if slot in (-1, target) else self._states(slot)
        for (spec, part, home), (_, _, read) in zip(homes, reads, strict=True):
            if self._lives_in_slot(spec, part, home):
                if part.name in UPDATED_IN_PLACE and read is not home:
                    read = home.copy_(read)
                _layer(cache, spec).attach(target, home.unsqueeze(0), read.unsqueeze(0))

    def rewind(self, cache: DynamicCache, slot: int, target: int, length: int) -> None:
        """Make a cache that has read on from `length` forget that: the states at `length` come from `slot`,
        the next ones go to `target`.

        The same bits as `load`, without copying KV. O(one state).
        """
        for spec in self._attention:
            _layer(cache, spec).cut(length)
        self.attach(cache, slot, target)
        self._read_states(cache, slot)

    def store(self, cache: DynamicCache, pages: NDArray[np.int32], slot: int, begin: int, end: int) -> None:
        """Write the KV of tokens `[begin, end)` into `pages` and the states at `end` into `slot`. O(end -
        begin).
        """
        where = self._places(pages, begin, end)
        for spec in self._attention:
            self._write_kv(cache, spec, where, begin, end)
        lives, targets = [], []
        for spec, part, kept in self._states(slot):
            if part.name == "conv" or _layer(cache, spec).slot != slot:
                lives.append(self._checked_state(cache, spec, part))
                targets.append(kept)
        torch._foreach_copy_(targets, lives)

    def keep_states(self, cache: DynamicCache, layer_index: int, slot: int) -> None:
        """Copy the states of one recurrent layer, as they are now, into `slot`."""
        for spec, part, kept in self._states(slot):
            if spec.index == layer_index:
                kept.copy_(live_state(cache, layer_index, part.name))

    def _read_kv(self, cache: DynamicCache, pages: NDArray[np.int32], length: int, capacity: int) -> None:
        """Whole pages, one after the other, into rooms of the same form."""
        table = sent(pages[: -(-length // self._page_size)], self._device)
        count, held_tokens = len(table), len(table) * self._page_size
        size = with_slack(max(capacity, held_tokens))
        for spec in self._attention:
            rooms = []
            for part in self._pools.kv(spec.index):
                rooms.append(part.new_empty((size, *part.shape[2:])))
                gathered = rooms[-1][:held_tokens].view(count, *part.shape[1:])
                torch.index_select(part, 0, table, out=gathered)
            if len(rooms) == 1:  # MLA: one latent a token, which the cache keeps as a pair with one head
                width = self._latent_widths[spec.index]
                halves = rooms[0][:, :width], rooms[0][:, width:]
                rooms = [half.unsqueeze(1).contiguous() for half in halves]
            _layer(cache, spec).take((rooms[0], rooms[1]), length)

    def _places(self, pages: NDArray[np.int32], begin: int, end: int) -> tuple[Any, ...]:
        """The page and the place in it of each position; slices for one token, which are cheaper."""
        if end - begin == 1:
            number, place = divmod(begin, self._page_size)
            return int(pages[number]), slice(place, place + 1)
        positions = np.arange(begin, end)
        both = np.stack((pages[positions // self._page_size], positions % self._page_size))
        return sent(both, self._device).unbind(0)

    def _write_kv(
        self, cache: DynamicCache, spec: LayerSpec, where: tuple[Any, ...], begin: int, end: int
    ) -> None:
        layer = _layer(cache, spec)
        if layer.get_seq_length() != end:
            raise UnsupportedModelError(
                f"layer {spec.index} holds {layer.get_seq_length()} tokens of KV, expected {end}"
            )
        new = layer.rows(begin, end)
        parts = self._pools.kv(spec.index)
        if len(parts) == 1:
            self._latent_widths[spec.index] = new[0].shape[-1]
            new = [torch.cat(new, dim=-1).squeeze(1)]
        for part, rows in zip(parts, new, strict=True):
            _check_shape(spec, rows.shape[1:], part.shape[2:])
            part[where] = rows

    def _states(self, slot: int) -> list[StatePart]:
        """All parts of the state in `slot`: views, kept for the next time, since they take long to make."""
        found = self._slots.pop(slot, None)
        if found is None:
            if len(self._slots) == SLOTS_KEPT:
                del self._slots[next(iter(self._slots))]
            found = [
                StatePart(spec, part, pool[slot])
                for spec in self._recurrent
                for part, pool in zip(spec.parts, self._pools.state(spec.index), strict=True)
            ]
        self._slots[slot] = found  # the last used is the last to go
        return found

    def _lives_in_slot(self, spec: LayerSpec, part: TensorSpec, kept: Tensor) -> bool:
        """Whether the model can update this part of a state where it lies."""
        return part.name != "conv" and self._live_dtypes.get((spec.index, part.name)) == kept.dtype

    def _make_states(self, cache: DynamicCache, slot: int, *, in_place: bool) -> None:
        """Memory for the states of a cache that has read something, but for those that live in a slot."""
        convs: dict[tuple[torch.dtype, torch.Size], list[LayerSpec]] = {}
        for spec, part, kept in self._states(slot):
            dtype = self._live_dtypes.get((spec.index, part.name), kept.dtype)
            if part.name == "conv":
                convs.setdefault((dtype, kept.shape), []).append(spec)
            elif not in_place or not self._lives_in_slot(spec, part, kept):
                _layer(cache, spec).update_recurrent_state(kept.unsqueeze(0).to(dtype))
        for (dtype, (channels, width)), specs in convs.items():  # one tensor for all that are alike
            shape = len(specs), 1, channels, width + 1
            for spec, conv in zip(specs, torch.zeros(shape, dtype=dtype, device=self._device), strict=True):
                _layer(cache, spec).take(conv)

    def _read_states(self, cache: DynamicCache, slot: int) -> None:
        """Copy what the cache keeps for itself."""
        lives, sources = [], []
        for spec, part, kept in self._states(slot):
            if part.name == "conv" or _layer(cache, spec).slot is None:
                lives.append(live_state(cache, spec.index, part.name))
                sources.append(kept)
        torch._foreach_copy_(lives, sources)

    def _checked_state(self, cache: DynamicCache, spec: LayerSpec, part: TensorSpec) -> Tensor:
        """The state part that the cache holds; the first time, its dtype is learned."""
        live = live_state(cache, spec.index, part.name)
        if (spec.index, part.name) not in self._live_dtypes:
            _check_shape(spec, live.shape, torch.Size(part.shape))
            self._live_dtypes[spec.index, part.name] = live.dtype
        return live


def live_state(cache: DynamicCache, layer_index: int, name: str) -> Tensor:
    """The state part `name` that the model's cache holds: conv `[channels, width - 1]`, else `[heads, K, V]`;
    a view.
    """
    layer: Any = cache.layers[layer_index]
    state: Tensor = held(layer.conv_states if name == "conv" else layer.recurrent_states)[0]
    return state[..., 1:] if name == "conv" else state


def _layer(cache: DynamicCache, spec: LayerSpec) -> Any:
    return cache.layers[spec.index]


def _check_shape(spec: LayerSpec, found: torch.Size, expected: torch.Size) -> None:
    """`copy_` would broadcast a wrong shape silently."""
    if found != expected:
        raise UnsupportedModelError(
            f"layer {spec.index} ({spec.kind}) keeps {tuple(found)}, the layout expects {tuple(expected)}"
        )
