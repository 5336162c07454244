"""Layers of a transformers cache for the adapter: KV that grows in place, states that live in the arena.

Owns two classes that stand in for transformers' own, layer by layer, in a `DynamicCache`; the model and
transformers see what they would see with those, bit for bit. Touches the tensors it is given, and of
transformers' classes what their subclasses may override; knows no page, no slot and no lease.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """KV of one sequence, with room for more: `update` writes what is new behind what is there.

    transformers' own layer copies all that it holds at every step. `keys` and `values` are views `[1, heads,
    tokens, dim]` of rooms `[capacity, heads, dim]`, laid out as a page is. Cut them shorter (`crop`), and the
    next update goes on from there.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._rooms: tuple[Tensor, Tensor] | None = None

    def take(self, rooms: tuple[Tensor, Tensor], length: int) -> None:
        """Hold `length` tokens, which stand in `rooms`: keys and values, each `[capacity, heads, dim]`."""
        self._rooms = rooms
        self.dtype, self.device = rooms[0].dtype, rooms[0].device
        self.is_initialized = True
        self._show(length)

    def cut(self, length: int) -> None:
        """Forget all tokens beyond `length`."""
        self._show(length)

    def rows(self, begin: int, end: int) -> list[Tensor]:
        """Keys and values of these tokens, `[end - begin, heads, dim]` each: views."""
        return [room[begin:end] for room in self._rooms or ()]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[1, heads, new, dim]`; all there is, as views."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self._rooms is None or end > len(self._rooms[0]):
            self._grow((key_states, value_states), begin, max(end, self._capacity))
        for rows, new in zip(self.rows(begin, end), (key_states, value_states), strict=True):
            rows.copy_(new[0].transpose(0, 1))
        self._show(end)
        return self.keys, self.values

    def _grow(self, like: tuple[Tensor, Tensor], length: int, capacity: int) -> None:
        keys, values = (new.new_empty((with_slack(capacity), new.shape[1], new.shape[3])) for new in like)
        for room, old in zip((keys, values), self.rows(0, length), strict=self._rooms is not None):
            room[:length].copy_(old)
        self.take((keys, values), length)

    def _show(self, length: int) -> None:
        assert self._rooms is not None
        self.keys, self.values = (room[:length].transpose(0, 1).unsqueeze(0) for room in self._rooms)


class SlotLayer(LinearAttentionLayer):
    """The states of one recurrent layer; once attached, the recurrent one is a view of a slot of the arena.

    The model reads it there, and the next one goes to the same slot or to another: what its kernel returns is
    copied there, once, and nothing else is. The conv state is private in any case: the model keeps a column
    more of it than a slot does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot: int | None = None
        self._home: Tensor | None = None

    def take(self, conv: Tensor) -> None:
        """Go on from a conv state `[1, channels, width]`, which is this layer's from now on."""
        self._put("conv_states", conv)
        self._put("conv_kernel_size", conv.shape[-1])
        self._put("is_conv_states_initialized", True)
        self._put("has_previous_state", True)

    def attach(self, slot: int, home: Tensor, read: Tensor) -> None:
        """From now on the recurrent state `[1, heads, K, V]` goes to `home`, which lies in `slot`; if there
        is one yet, it stands in `read`."""
        self.slot, self._home = slot, home
        if held(self.has_previous_state):
            self._keep(read)

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._home is None:
            kept: Tensor = super().update_recurrent_state(recurrent_states, *args, **kwargs)
            return kept
        self._home.copy_(recurrent_states)
        self._keep(self._home)
        return self._home

    def _keep(self, state: Tensor) -> None:
        self._put("recurrent_states", state)
        self._put("is_recurrent_states_initialized", True)

    def _put(self, name: str, value: Any) -> None:
        kept = getattr(self, name, None)
        if isinstance(kept, dict):
            kept[0] = value
        else:  # before transformers had several states in a layer
            setattr(self, name, value)


def held(value: Any) -> Any:
    """A layer's only state, or what is said of it: by number in a dict, in later versions of transformers."""
    return value[0] if isinstance(value, dict) else value


def with_slack(capacity: int) -> int:
    """Up to an eighth more: rooms of a conversation that grows are then of few sizes, so the allocator finds
    the memory of the last one free instead of asking the device for more."""
    step = 1 << max(0, capacity.bit_length() - 4)
    return -(-capacity // step) * step


def sent(values: Any, device: torch.device) -> Tensor:
    """int64 on the device; the host does not wait for what the device has to do before."""
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
