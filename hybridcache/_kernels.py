"""The Triton kernel that carries out a plan's copies and zeroes of pages, or of slots, in one launch.

Owns the kernel and the shape of its grid, and nothing else: it knows tensors, never layouts, plans or the
tree. `pools` imports it where the arena is on CUDA; everything here runs on the current stream, and the host
never waits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# How many int64 words one program moves at a time, with how many warps, and how many programs a
# multiprocessor gets at most: as measured, see benchmarks/README.md. A thread has CHUNK / WARPS / 64 loads of
# 16 bytes in flight. More programs than that would only be started to find nothing left to do: a captured
# launch has room for many more rows than most plans move. What is copied is not expected in the L2 again
# before much else has been there, so it leaves first (evict_first).
_CHUNK = 2048
_WARPS = 16
_PROGRAMS = 64


# Up to so many moves are arguments of the launch itself: nothing is sent, which is most of what a small plan
# costs the host.
FEW = 8


@triton.jit
def _carry(rows, source, target, at, inside, stride_vectors):  # type: ignore[no-untyped-def]
    """One chunk of one row. The factor of 2 stands last, so that the compiler sees multiples of 16 bytes."""
    to = rows + target * stride_vectors * 2 + at
    if source >= 0:
        found = tl.load(rows + source * stride_vectors * 2 + at, inside, eviction_policy="evict_first")
        tl.store(to, found, inside, eviction_policy="evict_first")
    else:
        tl.store(to, tl.zeros_like(at).to(tl.int64), inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["moves", "first", "row_vectors", "stride_vectors"])  # type: ignore[untyped-decorator]
def _move(rows, moves, first, row_vectors, stride_vectors, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Program p takes the chunks p, p + programs, ... of all rows that are moved, in the order of `moves`."""
    moves += first
    words = row_vectors * 2
    chunks = tl.cdiv(words, CHUNK)
    chunk = tl.program_id(0)
    row = chunk // chunks
    move = tl.load(moves + 1 + row)  # there is one: the grid is no larger than `moves`
    total = tl.load(moves).to(tl.int32) * chunks
    while chunk < total:
        source = move.to(tl.int32).to(tl.int64)
        target = move >> 32
        at = (chunk - row * chunks) * CHUNK + tl.arange(0, CHUNK)
        chunk += tl.num_programs(0)
        row = chunk // chunks
        move = tl.load(moves + 1 + row, chunk < total, -1)  # known when the bytes have moved
        if target >= 0:
            _carry(rows, source, target, at, at < words, stride_vectors)


_FEW_IDS = [f"{name}{number}" for name in ("source", "target") for number in range(FEW)]


@triton.jit(do_not_specialize=["count", "row_vectors", "stride_vectors", *_FEW_IDS])  # type: ignore[untyped-decorator]
def _move_few(  # type: ignore[no-untyped-def]
    rows, count, row_vectors, stride_vectors,
    source0, source1, source2, source3, source4, source5, source6, source7,
    target0, target1, target2, target3, target4, target5, target6, target7,
    CHUNK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The same for the first `count` of eight moves, which are arguments."""
    words = row_vectors * 2
    chunks = tl.cdiv(words, CHUNK)
    chunk = tl.program_id(0)
    while chunk < count * chunks:
        row = chunk // chunks
        source, target = source0, target0
        source, target = tl.where(row == 1, source1, source), tl.where(row == 1, target1, target)
        source, target = tl.where(row == 2, source2, source), tl.where(row == 2, target2, target)
        source, target = tl.where(row == 3, source3, source), tl.where(row == 3, target3, target)
        source, target = tl.where(row == 4, source4, source), tl.where(row == 4, target4, target)
        source, target = tl.where(row == 5, source5, source), tl.where(row == 5, target5, target)
        source, target = tl.where(row == 6, source6, source), tl.where(row == 6, target6, target)
        source, target = tl.where(row == 7, source7, source), tl.where(row == 7, target7, target)
        at = (chunk - row * chunks) * CHUNK + tl.arange(0, CHUNK)
        _carry(rows, source.to(tl.int64), target.to(tl.int64), at, at < words, stride_vectors)
        chunk += tl.num_programs(0)


def move(rows: torch.Tensor, moves: torch.Tensor, first: int, capacity: int) -> None:
    """Copies and zeroes rows, in one launch.

    `rows`: int64 [count, words] on CUDA, contiguous within a row; address, size and stride of a row are
    multiples of 16 bytes. `moves`: int64 [n], contiguous on the same device. From `moves[first]` on, each is
    a pair of int32 in memory: (how many of the `capacity` that follow are looked at, 0), then (source,
    target). A negative source zeroes the target, a negative target writes nothing. Ids are not checked here;
    no target may be named twice or be a source. With a capacity of 0 nothing is launched.
    """
    words, stride = rows.shape[1], rows.stride(0)
    programs = _programs(rows, capacity)
    if not programs:
        return
    with current(rows.device):
        _move[(programs,)](rows, moves, first, words // 2, stride // 2, CHUNK=_CHUNK, num_warps=_WARPS)


def move_few(rows: torch.Tensor, sources: list[int], targets: list[int]) -> None:
    """The same for 1 to `FEW` moves that the host knows: sources[i] to targets[i], or zeroes there."""
    words, stride, count = rows.shape[1], rows.stride(0), len(targets)
    unused = [-1] * (FEW - count)
    programs = _programs(rows, count)
    if not programs:
        return
    with current(rows.device):
        _move_few[(programs,)](
            rows, count, words // 2, stride // 2, *sources, *unused, *targets, *unused,
            CHUNK=_CHUNK, num_warps=_WARPS,
        )  # fmt: skip


def _programs(rows: torch.Tensor, moves: int) -> int:
    return min(moves * -(-rows.shape[1] // _CHUNK), _PROGRAMS * _multiprocessors(rows.device))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device. To ask which one that is costs a tenth of setting it. Tensors of
    the CPU have no index: Triton's interpreter takes them as they are."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
