"""One model's pages and slots, kept in three ways: ours, and the two that other engines use.

Owns the tensors, and how each way of keeping them carries out a plan. Every one is given the same plans; the
peers are spared what it costs to check the ids and to bring them to the device. Nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridcache import Geometry, ModelLayout, Pools
from hybridcache.config import Part


class Ids(NamedTuple):
    """A plan as `Pools.apply` takes it."""

    copy_slots: Any
    zero_slots: Any
    copy_pages: Any
    zero_pages: Any = ()


class SlotMajor:
    """Ours: all layers of one slot are contiguous, `Pools.apply` moves them in one launch."""

    name = "ours"
    most = 1 << 30  # slots or pages at a time

    def __init__(self, layout: ModelLayout, pages: int, slots: int, device: torch.device) -> None:
        offset = pages * layout.page_bytes
        sizes = layout.page_size, layout.page_bytes, layout.slot_bytes
        total = offset + slots * layout.slot_bytes
        geometry = Geometry(*sizes, 1, 0, 0, pages, slots, offset, layout.slot_bytes, total)
        self.pools = Pools(layout, geometry, device=device)
        fill_with_noise(self.pools.arena)

    def launch(self, ids: Ids) -> Callable[[], Any]:
        """What an engine calls: ids are checked, sent, and the rows moved."""
        return lambda: self.pools.apply(ids)

    def capture(self, ids: Ids) -> Callable[[], Any]:
        """What it captures into a graph, with the ids filled in."""
        pages, slots = len(ids.copy_pages), len(ids.copy_slots) + len(ids.zero_slots)
        moves = self.pools.captured(max_pages=pages, max_slots=slots)
        moves.fill(ids)
        return moves.run

    def slot(self, slot: int) -> list[torch.Tensor]:
        return [self.pools.slots()[slot]]

    def page(self, page: int) -> list[torch.Tensor]:
        return [self.pools.pages()[page]]


class PerLayer:
    """A tensor for each part of each layer [slots or pages, ...]: an indexed copy each."""

    name = "per layer"
    most = 1 << 30
    axis = 0

    def __init__(self, layout: ModelLayout, pages: int, slots: int, device: torch.device) -> None:
        page_shape = (layout.page_size,)
        self.states = [self._tensor(part, slots, (), device) for part in self._grouped(layout.slot_parts)]
        self.kv = [self._tensor(part, pages, page_shape, device) for part in self._grouped(layout.page_parts)]
        for tensor in (*self.states, *self.kv):
            fill_with_noise(tensor)

    def _grouped(self, parts: Sequence[Part]) -> list[tuple[Part, int]]:
        return [(part, 1) for part in parts]

    def _tensor(
        self, part: tuple[Part, int], rows: int, row: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        spec = part[0].spec
        return torch.empty((rows, *row, *spec.shape), dtype=getattr(torch, spec.dtype), device=device)

    def launch(self, ids: Ids) -> Callable[[], Any]:
        device = self.states[0].device
        states, pages = (_columns(pairs, device) for pairs in (ids.copy_slots, ids.copy_pages))
        zeroes = torch.tensor(np.asarray(ids.zero_slots, dtype=np.int64), device=device)

        def move() -> None:
            for tensors, pairs in ((self.states, states), (self.kv, pages)):
                for tensor in tensors if pairs else ():
                    self.copy(tensor, *pairs)
            for tensor in self.states if len(zeroes) else ():
                self.zero(tensor, zeroes)

        return move

    capture = launch

    def copy(self, tensor: torch.Tensor, sources: Any, targets: Any) -> None:
        tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def zero(self, tensor: torch.Tensor, targets: Any) -> None:
        tensor.index_fill_(0, targets, 0)

    def slot(self, slot: int) -> list[torch.Tensor]:
        return [tensor.select(self.axis, slot) for tensor in self.states]

    def page(self, page: int) -> list[torch.Tensor]:
        return [tensor.select(self.axis, page) for tensor in self.kv]


class LayerMajor(PerLayer):
    """A tensor for each kind of part [layers, slots or pages, ...], moved by advanced indexing."""

    name = "layer-major"
    axis = 1

    def _grouped(self, parts: Sequence[Part]) -> list[tuple[Part, int]]:
        kinds: dict[Any, list[Part]] = {}
        for part in parts:
            kinds.setdefault((part.spec.name, part.spec.shape, part.spec.dtype), []).append(part)
        return [(same[0], len(same)) for same in kinds.values()]

    def _tensor(
        self, part: tuple[Part, int], rows: int, row: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        spec, layers = part[0].spec, part[1]
        return torch.empty((layers, rows, *row, *spec.shape), dtype=getattr(torch, spec.dtype), device=device)

    def copy(self, tensor: torch.Tensor, sources: Any, targets: Any) -> None:
        tensor[:, targets] = tensor[:, sources]

    def zero(self, tensor: torch.Tensor, targets: Any) -> None:
        tensor.index_fill_(1, targets, 0)


class PerLayerPlain(PerLayer):
    """As PerLayer, row by row through plain copies: the least that a layer costs, for a few rows."""

    name = "per layer, plain"
    most = 2

    def launch(self, ids: Ids) -> Callable[[], Any]:
        pairs = [(self.states, *pair) for pair in np.asarray(ids.copy_slots).tolist()]
        pairs += [(self.kv, *pair) for pair in np.asarray(ids.copy_pages).tolist()]
        zeroes = np.asarray(ids.zero_slots).tolist()

        def move() -> None:
            for tensors, source, target in pairs:
                for tensor in tensors:
                    tensor[target].copy_(tensor[source])
            for target in zeroes:
                for tensor in self.states:
                    tensor[target].zero_()

        return move

    capture = launch


LAYOUTS: tuple[type[SlotMajor] | type[PerLayer], ...] = (SlotMajor, PerLayer, LayerMajor, PerLayerPlain)


def _columns(pairs: Any, device: torch.device) -> Sequence[torch.Tensor]:
    if not len(pairs):
        return ()
    ids = torch.tensor(np.asarray(pairs, dtype=np.int64), device=device)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bits are compared, not numbers: noise holds NaNs."""
    flat = tensor.reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # the stride of one element may be anything


def fill_with_noise(tensor: torch.Tensor) -> None:
    words = tensor.view(-1).view(torch.int32) if tensor.numel() else tensor
    words.random_()


def assert_moved(kept: Any, ids: Ids, call: Callable[[], Any]) -> None:
    """Runs `call` and compares every row that `ids` names, and one that it does not."""
    named = [int(each) for each in np.asarray(ids.copy_slots).reshape(-1)] + [
        int(each) for each in ids.zero_slots
    ]
    others = [slot for slot in range(max(named, default=0)) if slot not in set(named)][:1]
    sources = {int(source) for source, _ in ids.copy_slots}
    watched = [(kept.slot, slot) for slot in sorted(sources)[:1] + others]
    before = [[as_bytes(part).clone() for part in row(number)] for row, number in watched]
    call()
    for (row, number), parts in zip(watched, before, strict=True):
        if not _same(row(number), parts):
            raise AssertionError(f"{kept.name}: slot {number} changed, expected it to stay")
    for row, copies in ((kept.slot, ids.copy_slots), (kept.page, ids.copy_pages)):
        for source, target in copies:
            if not _same(row(int(target)), row(int(source))):
                raise AssertionError(f"{kept.name}: {target} differs from its source {source}")
    for slot in ids.zero_slots:
        if any(bool(as_bytes(part).any()) for part in kept.slot(int(slot))):
            raise AssertionError(f"{kept.name}: slot {slot} holds something, expected zeroes")


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(one, other, strict=True))
