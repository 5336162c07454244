"""The bytes of one arena: every layer's KV and state as strided views, and what a Plan copies and zeroes.

Owns one uint8 buffer, on CPU or CUDA, and the ids of plans on their way to it. Reads the layout (what lies in
a page and in a slot), the geometry (where pages and slots lie) and plans. Never decides what to copy, never
sees tokens or the tree, and never imports the core: anything that has Geometry's and Plan's attributes will
do. On CUDA the bytes are moved by `_kernels` where Triton can be imported, otherwise by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from hybridcache._moves import Move, Rows, by_torch, staged
from hybridcache.config import ALIGNMENT, LayerSpec, ModelLayout, Part

if TYPE_CHECKING:
    from hybridcache.values import Geometry, Plan

# The widest integer. ALIGNMENT divides the size, the stride and the offset of every page and slot, so it does
# too.
_WORD = torch.int64


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
            self._pages = Rows("pages", self._pages_of(_WORD, (words[0],), 0))
            self._slots = Rows("slots", self._slots_of(_WORD, (words[1],), 0))
            self._kernels = _kernels(self.device)

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

    def pages(self) -> torch.Tensor:
        """Whole pages, all layers of each: uint8 [num_pages, page_bytes], a view. Cost O(1)."""
        return self._pages.words.view(torch.uint8)

    def slots(self) -> torch.Tensor:
        """Whole slots, as a host tier moves them: uint8 [num_slots, slot_bytes], a view, contiguous within a
        slot. Cost O(1)."""
        return self._slots.words.view(torch.uint8)

    def apply(self, plan: Plan) -> None:
        """Copies and zeroes pages as `plan` says, and slots if `copies == "eager"`, on the current stream.

        Applying a plan again changes nothing, and the order within it does not matter. ValueError, before any
        byte changes, for an id outside the geometry (a plan of another cache), a destination named twice or
        also read. RuntimeError while a CUDA graph is captured: it would repeat this one plan (see
        `captured`). Cost: the bytes moved, O(ids) on the host, which never waits; on CUDA one launch for
        pages and one for slots, none for a kind that is empty, and one transfer of ids if a kind has more
        than eight.
        """
        moves = [move for move in self._checked(plan) if move.size]
        if not moves:  # most decode steps
            return
        _refuse_capture("apply", self.device)
        if self._kernels is None:
            by_torch(moves)
            return
        if all(move.size <= self._kernels.FEW for move in moves):
            for move in moves:
                self._kernels.move_few(move.rows.words, *move.few())
            return
        sizes = [1 + move.size for move in moves]
        ids = staged(moves, sizes).to(self.device, non_blocking=True)
        self._launch([move.rows for move in moves], ids, sizes)

    def captured(self, *, max_pages: int, max_slots: int) -> Captured:
        """Room for plans of at most `max_pages` and `max_slots` moves, to be carried out in a CUDA graph."""
        return Captured(self, max_pages, max_slots)

    def _checked(self, plan: Plan) -> list[Move]:
        """What to do to the pages, and to the slots if they are copied here; verified."""
        moves = [self._pages.check(plan.copy_pages, plan.zero_pages)]
        slots = self._slots.check(plan.copy_slots, plan.zero_slots)
        if self.copies == "eager":
            moves.append(slots)
        return moves

    def _launch(self, rows: Sequence[Rows], ids: torch.Tensor, sizes: Sequence[int]) -> None:
        """Has the kernels do what `staged` wrote for these rows."""
        assert self._kernels is not None
        first = 0
        for each, size in zip(rows, sizes, strict=True):
            self._kernels.move(each.words, ids, first, size - 1)
            first += size

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


class Captured:
    """The moves of one plan at a time, at fixed addresses: a CUDA graph carries out another plan each replay.

        moves = pools.captured(max_pages=64, max_slots=64)
        with torch.cuda.graph(graph):
            moves.run()
            forward()
        ...
        moves.fill(plan)
        graph.replay()

    `max_pages` and `max_slots` bound the copies and zeroes of a plan, together; `max_slots` is not used where
    `copies="indirect"`. On the CPU `run` does what it would do in a graph. ValueError or TypeError for a
    bound that is no integer of at least 0, RuntimeError on CUDA without Triton. Cost: 8 bytes on the device
    for each move.
    """

    def __init__(self, pools: Pools, max_pages: int, max_slots: int) -> None:
        self._pools = pools
        self._bounds = [_check_bound("max_pages", max_pages)]
        slots = _check_bound("max_slots", max_slots)
        if pools.copies == "eager":
            self._bounds.append(slots)
        self._moves: list[Move] = []
        self._sizes = [1 + bound for bound in self._bounds]
        if pools.device.type == "cuda":
            if pools._kernels is None:
                raise RuntimeError("captured: torch alone cannot do this on CUDA, expected Triton beside it")
            with torch.inference_mode(mode=False):
                self._ids = torch.zeros(sum(self._sizes), dtype=torch.int64, device=pools.device)
            self.run()  # moves nothing; kernels are compiled and loaded before any capture

    def fill(self, plan: Plan) -> None:
        """Has the next replays carry out `plan`, until another one is filled in. Never while capturing.

        One transfer on the current stream, which must be the one of the replays; the host does not wait.
        Errors as `Pools.apply`, and ValueError for more moves than there is room for; then nothing changes.
        """
        moves = self._pools._checked(plan)
        for move, bound in zip(moves, self._bounds, strict=True):
            if move.size > bound:
                name = move.rows.name
                found = f"plan.copy_{name}, plan.zero_{name}: {move.size} moves"
                raise ValueError(f"{found}, expected at most the {bound} of max_{name}")
        _refuse_capture("fill", self._pools.device)
        self._moves = moves
        if self._pools._kernels is not None:
            self._ids.copy_(staged(moves, self._sizes), non_blocking=True)

    def run(self) -> None:
        """One launch for pages and one for slots, on the current stream; none for a bound of 0.

        Does what the ids on the device say when it runs; nothing, before the first `fill`.
        """
        pools = self._pools
        if pools._kernels is None:
            by_torch(self._moves)
        else:
            pools._launch((pools._pages, pools._slots)[: len(self._sizes)], self._ids, self._sizes)


def _kernels(device: torch.device) -> ModuleType | None:
    """`hybridcache._kernels`, on CUDA and where Triton can be imported."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module("hybridcache._kernels")


def _refuse_capture(name: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: called while a CUDA graph is captured, expected Captured.run there")


def _check_bound(name: str, bound: Any) -> int:
    if isinstance(bound, bool) or not isinstance(bound, int):
        raise TypeError(f"{name}: {bound!r}, expected an int")
    if bound < 0:
        raise ValueError(f"{name}: {bound}, expected at least 0")
    return bound


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
