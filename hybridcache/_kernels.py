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
        inside = at < words
        chunk += tl.num_programs(0)
        row = chunk // chunks
        move = tl.load(moves + 1 + row, chunk < total, -1)  # known when the bytes have moved
        if target >= 0:
            # The factor of 2 stands last, so that the compiler sees multiples of 16 bytes.
            to = rows + target * stride_vectors * 2 + at
            if source >= 0:
                found = tl.load(
                    rows + source * stride_vectors * 2 + at, inside, eviction_policy="evict_first"
                )
                tl.store(to, found, inside, eviction_policy="evict_first")
            else:
                tl.store(to, tl.zeros([CHUNK], tl.int64), inside, eviction_policy="evict_first")


def move(rows: torch.Tensor, moves: torch.Tensor, first: int, capacity: int) -> None:
    """Copies and zeroes rows, in one launch.

    `rows`: int64 [count, words] on CUDA, contiguous within a row; address, size and stride of a row are
    multiples of 16 bytes. `moves`: int64 [n], contiguous on the same device. From `moves[first]` on, each is
    a pair of int32 in memory: (how many of the `capacity` that follow are looked at, 0), then (source,
    target). A negative source zeroes the target, a negative target writes nothing. Ids are not checked here;
    no target may be named twice or be a source. With a capacity of 0 nothing is launched.
    """
    words, stride = rows.shape[1], rows.stride(0)
    programs = min(capacity * -(-words // _CHUNK), _PROGRAMS * _multiprocessors(rows.device))
    if not programs:
        return
    with current(rows.device):
        _move[(programs,)](rows, moves, first, words // 2, stride // 2, CHUNK=_CHUNK, num_warps=_WARPS)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device. To ask which one that is costs a tenth of setting it. Tensors of
    the CPU have no index: Triton's interpreter takes them as they are."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
