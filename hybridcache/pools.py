"""The bytes of one arena: every layer's KV and state as strided views, and what a Plan copies and zeroes.

Owns one uint8 buffer, on CPU or CUDA, and nothing else. Reads the layout (what lies in a page and in a slot),
the geometry (where pages and slots lie) and plans. Never decides what to copy, never sees tokens or the tree,
and never imports the core: anything that has Geometry's and Plan's attributes will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hybridcache.config import ALIGNMENT, LayerSpec, ModelLayout, Part

if TYPE_CHECKING:
    from hybridcache.values import Geometry, Plan

_Ids = npt.NDArray[np.int64]

# The widest integer. ALIGNMENT divides the size, the stride and the offset of every page and slot, so it does
# too.
_WORD = torch.int64

# Rows of at least so many bytes are moved one by one, at the speed of the memory. Smaller ones are gathered
# and scattered: slower, and through memory of its own, but one operation for all.
_LARGE_ROW = {"cpu": 64 << 10, "cuda": 4 << 20}

# How much memory of its own: more rows than this holds are moved in several rounds.
_GATHERED = 64 << 20


class Pools:
    """The tensors behind the page ids and slot ids of one `HybridCache`.

    `layout` and `geometry` must be those of the cache (`cache.geometry`). `buffer`: a contiguous uint8 tensor
    of at least `geometry.total_bytes` on `device`, its first byte aligned to 16; by default the arena is
    allocated here, uninitialised: plans zero what is going to be read. Views cost no memory, and stay valid
    for as long as they live.

    `copies="eager"`: kernels update a slot in place, so a plan's slot copies and zeroes are carried out.
    `copies="indirect"`: kernels read one slot and write another (and mask a missing one), so both are
    skipped.

    Raises ValueError or TypeError where layout, geometry and buffer do not fit together.
    """

    def __init__(
        self,
        layout: ModelLayout,
        geometry: Geometry,
        *,
        device: str | torch.device = "cpu",
        copies: Literal["eager", "indirect"] = "eager",
        buffer: torch.Tensor | None = None,
    ) -> None:
        if copies not in ("eager", "indirect"):
            raise ValueError(f"copies: {copies!r}, expected 'eager' or 'indirect'")
        extent = _check_geometry(layout, geometry)
        # Views made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if buffer is None:
                buffer = torch.empty(geometry.total_bytes, dtype=torch.uint8, device=_device(device))
            else:
                _check_buffer(buffer, geometry.total_bytes, _device(device))
            self.layout, self.geometry, self.copies = layout, geometry, copies
            self.arena, self.device = buffer[:extent], buffer.device
            self._kv = _by_layer(layout, "attention", map(self._page_view, layout.page_parts))
            slot_views = [self._slot_view(part) for part in layout.slot_parts]
            self._state = _by_layer(layout, "recurrent", slot_views)
            self._extra = tuple(slot_views[len(slot_views) - len(layout.extra_state) :])
            words = layout.page_bytes // _WORD.itemsize, layout.slot_bytes // _WORD.itemsize
            self._pages = _Rows("pages", self._pages_of(_WORD, (words[0],), 0))
            self._slots = _Rows("slots", self._slots_of(_WORD, (words[1],), 0))

    def kv(self, layer_index: int) -> tuple[torch.Tensor, ...]:
        """The KV of attention layer `layer_index` (its number in the model): one view a part, in parts order.

        Each [num_pages, page_size, *shape] in the part's dtype, contiguous within a page. ValueError for a
        layer that holds no KV. Cost O(1).
        """
        return _look_up(self._kv, layer_index, "attention")

    def state(self, layer_index: int) -> tuple[torch.Tensor, ...]:
        """The state of recurrent layer `layer_index` (its number in the model): one view a part, in order.

        Each [num_slots, *shape] in the part's dtype, contiguous within a slot. ValueError for a layer that
        holds no state. Cost O(1).
        """
        return _look_up(self._state, layer_index, "recurrent")

    def extra(self) -> tuple[torch.Tensor, ...]:
        """The layout's `extra_state`, in its order: each [num_slots, *shape]. Cost O(1)."""
        return self._extra

    def apply(self, plan: Plan) -> None:
        """Copies and zeroes pages as `plan` says, and slots if `copies == "eager"`, on the current stream.

        Applying a plan again changes nothing, and the order within it does not matter. ValueError, before any
        byte changes, for an id outside the geometry (a plan of another cache), a destination named twice or
        also read. Cost: the bytes moved, O(ids) on the host, on CUDA one transfer of ids; a kind that is
        empty costs nothing.
        """
        moves = [self._pages.check(plan.copy_pages, plan.zero_pages)]
        slots = self._slots.check(plan.copy_slots, plan.zero_slots)
        if self.copies == "eager":
            moves.append(slots)
        for move in moves:
            if move.rows.single:
                move.one_by_one()
        gathered = [move for move in moves if not move.rows.single and len(move.targets) + len(move.zeroes)]
        ids = iter(self._send([ids for move in gathered for ids in move[1:]]))
        for move in gathered:
            move.at_once(next(ids), next(ids), next(ids))

    def _send(self, arrays: Sequence[_Ids]) -> Sequence[torch.Tensor]:
        """The arrays on the device, in one transfer that the host does not wait for."""
        if not arrays:
            return ()
        ids = torch.from_numpy(np.concatenate(arrays))
        if self.device.type == "cuda":
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        return torch.split(ids, [len(array) for array in arrays])

    def _page_view(self, part: Part) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, part.spec.dtype)
        return self._pages_of(dtype, (self.layout.page_size, *part.spec.shape), part.offset)

    def _slot_view(self, part: Part) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, part.spec.dtype)
        return self._slots_of(dtype, part.spec.shape, part.offset)

    def _pages_of(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        at = self.geometry
        return _strided(self.arena, dtype, (at.num_pages, *shape), at.page_bytes, offset)

    def _slots_of(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        at = self.geometry
        return _strided(self.arena, dtype, (at.num_slots, *shape), at.slot_stride, at.slot_offset + offset)


class _Rows:
    """All pages, or all slots, as rows of words: [count, words], a strided view of the arena."""

    def __init__(self, name: str, words: torch.Tensor) -> None:
        self.name, self.words = name, words
        row_bytes = words.shape[1] * words.element_size()
        self.single = row_bytes >= _LARGE_ROW[words.device.type]
        self.per_round = max(1, _GATHERED // row_bytes)
        # Where in the plan's list of destinations a row stands; stale entries do no harm, so it is never
        # cleared.
        self._rank = np.zeros(words.shape[0], dtype=np.int64)
        nothing = np.empty(0, dtype=np.int64)
        self._nothing = _Move(self, nothing, nothing, nothing)

    def check(self, copies: Any, zeroes: Any) -> _Move:
        """One plan's ids for these rows, verified. ValueError as `Pools.apply`. Cost O(ids)."""
        if not len(copies) and not len(zeroes):  # most decode steps
            return self._nothing
        pairs = _ids(f"plan.copy_{self.name}", copies, 2)
        zeroed = _ids(f"plan.zero_{self.name}", zeroes, 1)
        sources, targets = pairs[:, 0], pairs[:, 1]
        written = np.concatenate((targets, zeroed))
        count = len(self._rank)
        for ids in (sources, written):
            self._refuse(ids, (ids < 0) | (ids >= count), f"expected ids in [0, {count})")
        order = np.arange(len(written))
        self._rank[written] = order
        self._refuse(written, self._rank[written] != order, "expected no destination twice")
        if len(sources):
            rank = np.minimum(self._rank[sources], len(written) - 1)
            self._refuse(sources, written[rank] == sources, "expected no source that is also a destination")
        return _Move(self, sources, targets, zeroed)

    def _refuse(self, ids: _Ids, wrong: npt.NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            bad = ids[wrong][:8].tolist()
            raise ValueError(f"plan.copy_{self.name}, plan.zero_{self.name}: {bad}, {expected}")


class _Move(NamedTuple):
    """What one plan does to the pages, or to the slots: copies sources[i] to targets[i], zeroes zeroes[i]."""

    rows: _Rows
    sources: _Ids
    targets: _Ids
    zeroes: _Ids

    def one_by_one(self) -> None:
        """Row by row: no memory besides the rows themselves."""
        words = self.rows.words
        for source, target in zip(self.sources.tolist(), self.targets.tolist(), strict=True):
            words[target].copy_(words[source])
        for zeroed in self.zeroes.tolist():
            words[zeroed].zero_()

    def at_once(self, sources: torch.Tensor, targets: torch.Tensor, zeroes: torch.Tensor) -> None:
        """All rows in one operation per kind, given the ids on the device."""
        words = self.rows.words
        count = self.rows.per_round
        for first in range(0, len(targets), count):
            gathered = words.index_select(0, sources[first : first + count])
            words.index_copy_(0, targets[first : first + count], gathered)
        if len(zeroes):
            words.index_fill_(0, zeroes, 0)


def _ids(name: str, values: Any, columns: int) -> _Ids:
    """`values` as int64, [n, 2] or [n]; an empty one may have any shape."""
    ids = np.asarray(values)
    if ids.size == 0:
        return np.empty((0, 2) if columns == 2 else (0,), dtype=np.int64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: dtype {ids.dtype}, expected integers")
    if ids.shape[1:] != ((2,) if columns == 2 else ()):
        raise ValueError(f"{name}: shape {ids.shape}, expected {'[n, 2]' if columns == 2 else '[n]'}")
    return ids.astype(np.int64)


def _check_geometry(layout: ModelLayout, geometry: Geometry) -> int:
    """The bytes that pages and slots reach to."""
    for name in ("page_size", "page_bytes", "slot_bytes"):
        value, expected = getattr(geometry, name), getattr(layout, name)
        if value != expected:
            raise ValueError(f"geometry.{name}: {value}, expected the layout's {expected}")
    for name in ("slot_offset", "slot_stride"):
        value = getattr(geometry, name)
        if value < 0 or value % ALIGNMENT:
            raise ValueError(f"geometry.{name}: {value}, expected a multiple of {ALIGNMENT}")
    if geometry.slot_stride < geometry.slot_bytes:
        raise ValueError(
            f"geometry.slot_stride: {geometry.slot_stride}, expected at least {geometry.slot_bytes}"
        )
    slots_end = geometry.slot_offset + (geometry.num_slots - 1) * geometry.slot_stride + geometry.slot_bytes
    extent = max(geometry.num_pages * geometry.page_bytes, slots_end if geometry.num_slots else 0)
    if geometry.total_bytes < extent:
        raise ValueError(f"geometry.total_bytes: {geometry.total_bytes}, expected at least {extent}")
    return int(extent)


def _check_buffer(buffer: torch.Tensor, total_bytes: int, device: torch.device) -> None:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        found = f"{buffer.dtype} {tuple(buffer.shape)} with strides {buffer.stride()}"
        raise ValueError(f"buffer: {found}, expected a contiguous uint8 tensor of one dimension")
    if buffer.numel() < total_bytes:
        raise ValueError(f"buffer: {buffer.numel()} bytes, expected at least {total_bytes}")
    if buffer.data_ptr() % ALIGNMENT or buffer.storage_offset() % ALIGNMENT:
        found = f"address {buffer.data_ptr():#x}, storage offset {buffer.storage_offset()}"
        raise ValueError(f"buffer: {found}, expected multiples of {ALIGNMENT}")
    if buffer.device.type != device.type or device.index not in (None, buffer.device.index):
        raise ValueError(f"buffer: on {buffer.device}, expected device {device}")


def _device(device: str | torch.device) -> torch.device:
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r}, expected cpu or cuda")
    return found


def _strided(
    arena: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: int, offset: int
) -> torch.Tensor:
    """Rows that are contiguous, `stride` bytes apart, the first at `offset` bytes; all in 64 bits."""
    typed = arena.view(dtype)
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, 0, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    strides[0] = stride // dtype.itemsize
    return typed.as_strided(shape, strides, typed.storage_offset() + offset // dtype.itemsize)


def _by_layer(layout: ModelLayout, kind: str, views: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """The views of each layer of a kind in parts order; `views` come in memory order."""
    parts = layout.page_parts if kind == "attention" else layout.slot_parts
    found = {(part.layer, part.spec.name): view for part, view in zip(parts, views, strict=True)}

    def of(layer: LayerSpec) -> tuple[torch.Tensor, ...]:
        return tuple(found[layer.index, spec.name] for spec in layer.parts)

    return {layer.index: of(layer) for layer in layout.layers if layer.kind == kind}


def _look_up(
    views: dict[int, tuple[torch.Tensor, ...]], layer_index: int, kind: str
) -> tuple[torch.Tensor, ...]:
    if layer_index not in views:
        raise ValueError(
            f"layer_index: {layer_index!r}, expected the number of one of the {kind} layers {list(views)}"
        )
    return views[layer_index]
