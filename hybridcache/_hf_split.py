"""One forward pass that leaves states at inner positions: its recurrent layers read their tokens in pieces.

Owns which modules of a model are its recurrent layers, and how one is called several times within a pass of
the model. Attention and all else see the tokens at once. Sees modules and hidden states; what is done between
two pieces is the caller's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._hf_bridge import UnsupportedModelError

if TYPE_CHECKING:
    from .config import ModelLayout

Forward = Callable[..., Tensor]
Reached = Callable[[int, int], None]


def recurrent_modules(model: nn.Module, layout: ModelLayout) -> dict[int, nn.Module]:
    """The module of each recurrent layer that reads and writes its states. `UnsupportedModelError` if one is
    not found."""
    layers = [spec.index for spec in layout.layers if spec.kind == "recurrent"]
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index: Any = getattr(module, "layer_idx", None)
        if index in layers and "cache_params" in inspect.signature(module.forward).parameters:
            found[index] = module
    if set(found) != set(layers):
        raise UnsupportedModelError(
            f"inner_checkpoints: True, but of the recurrent layers {layers} only {sorted(found)} can be split"
        )
    return found


@contextmanager
def split(modules: dict[int, nn.Module], offsets: Sequence[int], reached: Reached) -> Iterator[None]:
    """Within, each module reads `[1, tokens, hidden]` in pieces that end at `offsets`, ascending, and at the
    end: bit for bit what it would do in as many passes. `reached(layer, number)` is called when it has read
    up to `offsets[number]`; the states in the model's cache are those at that position.
    """
    with ExitStack() as stack:
        for index, module in modules.items():
            stack.enter_context(_forward_as(module, _in_pieces(module.forward, index, offsets, reached)))
        yield


def _in_pieces(forward: Forward, index: int, offsets: Sequence[int], reached: Reached) -> Forward:
    def pieces(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = []
        for number, (begin, end) in enumerate(pairwise((0, *offsets, hidden_states.shape[1]))):
            rows.append(forward(hidden_states[:, begin:end], *args, **kwargs))
            if number < len(offsets):
                reached(index, number)
        return torch.cat(rows, dim=1)

    return pieces


@contextmanager
def _forward_as(module: Any, forward: Forward) -> Iterator[None]:
    """Another `forward` on this one object; hooks that others have put there stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
