"""What callers of the transformers adapter may give as prompts, and as options of each: told apart, brought
to one form.

Sees values only; which ids a model knows is its adapter's to check.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Tokens = Sequence[int] | Tensor


def each_prompt(input_ids: Tokens | Sequence[Tokens]) -> tuple[list[Tokens], bool]:
    """The prompts of a call, and whether it named a single one."""
    several = isinstance(input_ids, (Sequence, np.ndarray)) and len(input_ids) > 0
    if several and isinstance(input_ids[0], (Sequence, Tensor, np.ndarray)):
        return list(cast("Sequence[Tokens]", input_ids)), False
    return [cast("Tokens", input_ids)], True


def one_each(name: str, value: Any, count: int, *, shared: bool) -> list[Any]:
    """`value` for each of `count` prompts: the same for all where it is `shared`, else one per prompt."""
    if shared:
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: {len(value)} values, expected one for all or one for each of {count} prompts"
        )
    return list(value)


def row_of(prompt: Tokens) -> Any:
    """A sequence or an array of at least one item, of whatever kind."""
    if isinstance(prompt, Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or prompt.is_floating_point():
            found = f"a {prompt.dtype} tensor of shape {tuple(prompt.shape)}"
            raise ValueError(f"input_ids: {found}, expected integers in one row")
        return _not_empty(prompt.numpy(force=True))
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise TypeError(f"input_ids: {prompt!r}, expected a sequence of token ids or a tensor")
    return _not_empty(prompt)


def as_integers(row: Any) -> NDArray[Any] | None:
    """All at once; None if an item is no integer, or one that no int32 holds. One by one, the items of a long
    prompt would take as long as a layer of the model."""
    if isinstance(row, np.ndarray):
        return row if row.ndim == 1 and row.dtype.kind in "iu" else None
    try:
        return np.frombuffer(array("i", row if isinstance(row, list) else iter(row)), dtype=np.int32)
    except (TypeError, OverflowError):
        return None


def _not_empty(row: Any) -> Any:
    if len(row) == 0:
        raise ValueError("input_ids: empty, expected at least one token")
    return row
