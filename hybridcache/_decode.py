"""The Triton kernels that advance recurrent and conv states from slot to slot, a few tokens at a time.

Owns the kernels and the shapes of their grids, and nothing else: it knows tensors, never layouts, leases or
the tree. `gated_delta` has the arguments checked before, says what is computed, and does the same with torch
where this module cannot be imported. Everything runs on the current stream, and the host never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybridcache._kernels import current

# Channels of one program of the convolution. What a program of `_advance` takes of a head is its caller's
# choice, always with one warp: as measured, see benchmarks/README.md. From so many columns on states leave
# the L2 first; with fewer, whose reads are shorter than its lines, that costs more than it brings.
_CHANNELS = 256
_LEAVES_FIRST = 32


@triton.jit(do_not_specialize=["tokens", "reads_stride", "writes_stride"])  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    q, k, v, g, beta, out, state, reads, chosen, writes, scale, tokens,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    g_row, g_token, beta_row, beta_token, slot_stride, reads_stride, writes_stride,
    HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, NORMALISE: tl.constexpr,  # noqa: N803
    CHOSEN: tl.constexpr, EVICT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Program p advances `COLUMNS` columns of one head of one sequence by all of its tokens."""
    tiles: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    head = (program // tiles % VALUE_HEADS).to(tl.int64)
    row = (program // (tiles * VALUE_HEADS)).to(tl.int64)
    key_head = head // (VALUE_HEADS // HEADS)
    at_k = tl.arange(0, ROWS)
    at_v = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    in_k, in_v = at_k < K, at_v < V
    cells = head * (K * V) + at_k[:, None] * V + at_v[None, :]
    reads += row * reads_stride
    if CHOSEN:
        reads += tl.load(chosen + row)
    source = tl.load(reads).to(tl.int64)
    # The factor stands last, so that the compiler sees multiples of 16 bytes.
    there = (at_k < tl.where(source < 0, 0, K))[:, None] & in_v[None, :]
    held = tl.load(state + source * slot_stride * WIDTH + cells, there, 0.0, eviction_policy=EVICT).to(
        tl.float32
    )
    q += row * q_row + key_head * q_head + at_k
    k += row * k_row + key_head * k_head + at_k
    v += row * v_row + head * v_head + at_v
    g += row * g_row + head
    beta += row * beta_row + head
    out += (row * tokens * VALUE_HEADS + head) * V + at_v
    writes += row * writes_stride
    for _ in tl.range(0, tokens):
        key = tl.load(k, in_k, 0.0).to(tl.float32)
        query = tl.load(q, in_k, 0.0).to(tl.float32)
        value = tl.load(v, in_v, 0.0).to(tl.float32)
        if NORMALISE:
            query = query / tl.sqrt(tl.sum(query * query) + 1e-6)
            key = key / tl.sqrt(tl.sum(key * key) + 1e-6)
        query = query * scale
        strength = tl.load(beta).to(tl.float32)
        held *= tl.exp(tl.load(g).to(tl.float32))
        value = strength * (value - tl.sum(held * key[:, None], 0))
        held += key[:, None] * value
        tl.store(out, tl.sum(held * query[:, None], 0).to(out.dtype.element_ty), in_v)
        target = tl.load(writes).to(tl.int64)
        there = (at_k < tl.where(target < 0, 0, K))[:, None] & in_v[None, :]
        tl.store(
            state + target * slot_stride * WIDTH + cells,
            held.to(state.dtype.element_ty),
            there,
            eviction_policy=EVICT,
        )
        q += q_token
        k += k_token
        v += v_token
        g += g_token
        beta += beta_token
        out += VALUE_HEADS * V
        writes += 1


@triton.jit(do_not_specialize=["tokens", "reads_stride", "writes_stride"])  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    x, weight, bias, out, state, reads, chosen, writes, tokens, channels,
    x_row, x_token, slot_stride, reads_stride, writes_stride,
    CHANNELS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, CHOSEN: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Program (p, row) takes `CHANNELS` channels of one sequence. Four taps: the three inputs before this one
    are the state."""
    at = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(1).to(tl.int64)
    inside = at < channels
    reads += row * reads_stride
    if CHOSEN:
        reads += tl.load(chosen + row)
    source = tl.load(reads).to(tl.int64)
    there = at < tl.where(source < 0, 0, channels)
    held = state + source * slot_stride + at * 3
    first = tl.load(held, there, 0.0).to(tl.float32)
    second = tl.load(held + 1, there, 0.0).to(tl.float32)
    third = tl.load(held + 2, there, 0.0).to(tl.float32)
    taps = weight + at * 4
    tap0, tap1 = tl.load(taps, inside, 0.0).to(tl.float32), tl.load(taps + 1, inside, 0.0).to(tl.float32)
    tap2, tap3 = tl.load(taps + 2, inside, 0.0).to(tl.float32), tl.load(taps + 3, inside, 0.0).to(tl.float32)
    x += row * x_row + at
    out += row * tokens * channels + at
    writes += row * writes_stride
    for _ in tl.range(0, tokens):
        new = tl.load(x, inside, 0.0).to(tl.float32)
        found = first * tap0 + second * tap1 + third * tap2 + new * tap3
        if BIAS:
            found += tl.load(bias + at, inside, 0.0).to(tl.float32)
        if SILU:
            found = found / (1 + tl.exp(-found))
        tl.store(out, found.to(out.dtype.element_ty), inside)
        first, second, third = second, third, new
        target = tl.load(writes).to(tl.int64)
        here = at < tl.where(target < 0, 0, channels)
        left = state + target * slot_stride + at * 3
        tl.store(left, first.to(state.dtype.element_ty), here)
        tl.store(left + 1, second.to(state.dtype.element_ty), here)
        tl.store(left + 2, third.to(state.dtype.element_ty), here)
        x += x_token
        out += channels
        writes += 1


def advance(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    reads: torch.Tensor,
    chosen: torch.Tensor | None,
    writes: torch.Tensor,
    scale: float,
    normalise: bool,
    columns: int,
) -> torch.Tensor:
    """`gated_delta.decode` in one launch; arguments are not checked here, `reads` is [N, C]."""
    count, tokens, heads, dim = q.shape
    value_heads, value_dim = v.shape[2:]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    width = 1 if state.stride(0) % 4 else 4
    programs = count * value_heads * triton.cdiv(value_dim, columns)
    if not programs or not tokens:
        return out
    with current(state.device):
        _advance[(programs,)](
            q, k, v, g, beta, out, state, reads, chosen, writes, scale, tokens,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:2], *beta.stride()[:2],
            state.stride(0) // width, reads.stride(0), writes.stride(0),
            HEADS=heads, VALUE_HEADS=value_heads, K=dim, V=value_dim, ROWS=triton.next_power_of_2(dim),
            COLUMNS=columns, WIDTH=width, NORMALISE=normalise, CHOSEN=chosen is not None,
            EVICT="evict_first" if columns >= _LEAVES_FIRST else "", num_warps=1,
        )  # fmt: skip
    return out


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    reads: torch.Tensor,
    chosen: torch.Tensor | None,
    writes: torch.Tensor,
    silu: bool,
) -> torch.Tensor:
    """`gated_delta.convolve` in one launch; arguments are not checked here, `reads` is [N, C]."""
    count, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    with current(state.device):
        _convolve[(triton.cdiv(channels, _CHANNELS), count)](
            x, weight, bias, out, state, reads, chosen, writes, tokens, channels, *x.stride()[:2],
            state.stride(0), reads.stride(0), writes.stride(0),
            CHANNELS=_CHANNELS, BIAS=bias is not None, SILU=silu, CHOSEN=chosen is not None, num_warps=4,
        )  # fmt: skip
    return out
