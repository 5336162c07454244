"""Recurrent states advanced from slot to slot: what `copies="indirect"` asks of an engine's kernels. Extra
`gpu`.

Owns what a few tokens do to the states of a gated delta rule layer (Qwen3-Next, Qwen3.5) and to the conv
states before it, read at one slot of a slab and left in another: by one Triton launch on CUDA, by torch
elsewhere. And, for prefill through flash-linear-attention, the gathers and scatters that its functions need,
counted. Knows tensors and slot ids; no layout, no lease, no tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hybridcache._pieces import rounds

__all__ = ["ThroughCopies", "convolve", "convolve_by_torch", "decode", "decode_by_torch"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_MOST_ROWS = 65_535  # of a grid, in its second dimension
_TAPS = 4


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    *,
    chosen: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
    columns: int = 32,
) -> Tensor:
    """Reads `T` tokens of each of `N` sequences, from the state in one slot; leaves those after each token in
    others. Returns the outputs [N, T, HV, V], in v's dtype.

    For each token, in float32: `S = S * exp(g)`; `S = S + k (beta * (v - S'k))'`; the output is `S'q * scale`
    (Gated DeltaNet, Yang et al., arXiv 2412.06464, eq. 10), q and k divided by `sqrt(sum(x * x) + 1e-6)`
    before if `normalise`.

    q, k: [N, T, H, K]; v: [N, T, HV, V], HV a multiple of H: that many value heads in a row share a key head.
    g (the logarithm of the decay) and beta: [N, T, HV]. Floats of 16 or 32 bits; they may be slices of larger
    tensors, if the last dimension is contiguous.
    state: one layer's, [slots, HV, K, V], contiguous within a slot, as `Pools.state` returns it; any stride
    between slots. `scale`: 1 / sqrt(K) by default.
    read_slots: int [N], or [N, C] with `chosen` int [N]: row i begins at `read_slots[i, chosen[i]]`. That is
    how a step in overlap behind a verify step takes the one of `Step.read_slots` that its sequence has come
    to, without the host. -1: the state is zero. Rows may read the same slot (forks).
    write_slots: int [N, T] (or [N], for T = 1), those of a `Step`, one a token: -1 writes nothing. Where a
    step leaves fewer states than it has tokens, they are those after its last tokens and stand at the end,
    behind -1 (`Steps.rows` is padded behind them); where a sequence has fewer tokens than T, -1 follows. A
    row may write the slot that it reads; no slot is written twice, or read by another row. Ids are not
    checked: that would wait for the device.
    columns: how many of a head's V columns one program of the kernel takes, 8 to 128; it decides the order of
    sums, so bits depend on it (and on dtypes, and whether addresses and strides are multiples of 16 bytes),
    but not on N, T, the slots or the other rows. 32 is the fastest where there is much to do; 16 is, by up to
    15 %, where a step has less than 256 heads (N * HV); 8 gives the bits of flash-linear-attention 0.6.0's
    `fused_recurrent_gated_delta_rule`, and takes up to a third longer.

    TypeError for what is no tensor or of a wrong dtype, ValueError for shapes, strides and devices that do
    not fit together. Cost on CUDA: one launch, which reads a state a row and writes one for each id that is
    not -1; no memory but the outputs; it may be captured in a CUDA graph. Elsewhere, and without Triton, see
    `decode_by_torch`.
    """
    _check_state(state, 4)
    count, tokens = _check_inputs(q, k, v, g, beta, state)
    reads, writes = _check_slots(read_slots, write_slots, chosen, count, tokens, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if columns not in (8, 16, 32, 64, 128):
        raise ValueError(f"columns: {columns!r}, expected 8, 16, 32, 64 or 128")
    kernels = _kernels(state.device.type)
    if kernels is None:
        return decode_by_torch(
            q, k, v, g, beta, state, reads, writes, chosen=chosen, scale=scale, normalise=normalise
        )
    done: Tensor = kernels.advance(q, k, v, g, beta, state, reads, chosen, writes, scale, normalise, columns)
    return done


@torch.no_grad()
def decode_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    *,
    chosen: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
) -> Tensor:
    """`decode` with torch's operations, on any device: what the kernel is compared with. Gathers and scatters
    the states, and waits for the ids."""
    held = _gather(state, read_slots, chosen).float()
    writes = write_slots.reshape(q.shape[:2])
    groups = v.shape[2] // q.shape[2]
    queries, keys = (each.float().repeat_interleave(groups, dim=2) for each in (q, k))
    if normalise:
        queries, keys = (
            each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (queries, keys)
        )
    queries = queries * (q.shape[-1] ** -0.5 if scale is None else scale)
    outputs = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for token in range(q.shape[1]):
        key, value = keys[:, token].unsqueeze(-1), v[:, token].float()
        held = held * g[:, token].float().exp()[..., None, None]
        change = (value - (held * key).sum(-2)) * beta[:, token].float().unsqueeze(-1)
        held = held + key * change.unsqueeze(-2)
        outputs[:, token] = (held * queries[:, token].unsqueeze(-1)).sum(-2).to(v.dtype)
        _scatter(state, writes[:, token], held)
    return outputs


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    *,
    chosen: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The causal convolution before the recurrence, its state read and left as `decode` does. Returns [N, T,
    channels] in x's dtype, through SiLU unless `silu=False`.

    x: [N, T, channels], the last dimension contiguous. weight: [channels, 4], bias: [channels] or None, both
    contiguous. state: one layer's, [slots, channels, 3], contiguous within a slot: the last three inputs, the
    oldest first. N: at most 65,535. Sums are in float32 and rounded once. Slots, errors and cost as `decode`;
    -1 reads zeros.
    """
    _check_state(state, 3)
    _check_convolution(x, weight, bias, state)
    reads, writes = _check_slots(read_slots, write_slots, chosen, x.shape[0], x.shape[1], state)
    if len(x) > _MOST_ROWS:
        raise ValueError(f"x: {len(x)} sequences, expected at most {_MOST_ROWS}")
    kernels = _kernels(state.device.type)
    if kernels is None:
        return convolve_by_torch(x, weight, bias, state, reads, writes, chosen=chosen, silu=silu)
    done: Tensor = kernels.convolve(x, weight, bias, state, reads, chosen, writes, silu)
    return done


@torch.no_grad()
def convolve_by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    *,
    chosen: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`convolve` with torch's operations, on any device; gathers and scatters, and waits for the ids."""
    count, tokens, _ = x.shape
    writes = write_slots.reshape(count, tokens)
    columns = torch.cat((_gather(state, read_slots, chosen).float(), x.transpose(1, 2).float()), dim=-1)
    rows = []
    for token in range(tokens):
        found = (columns[..., token : token + _TAPS] * weight.float()).sum(-1)
        rows.append(found if bias is None else found + bias.float())
        _scatter(state, writes[:, token], columns[..., token + 1 : token + _TAPS])
    outputs = torch.stack(rows, dim=1) if rows else x.float()
    return (torch.nn.functional.silu(outputs) if silu else outputs).to(x.dtype)


class ThroughCopies:
    """A function of flash-linear-attention's form over the slots of a slab: states are gathered for it, and
    what it returns is scattered; `gathered_bytes` and `scattered_bytes` count what was copied only for that.

        prefill = ThroughCopies(fla.ops.gated_delta_rule.chunk_gated_delta_rule)
        out = prefill(q, k, v, g, beta, state, read_slots, write_slots, cu_seqlens=cu_seqlens)

    `function(q, k, v, g=, beta=, initial_state=, output_final_state=True, use_qk_l2norm_in_kernel=True)`
    returns outputs and final states [N, HV, K, V]; transformers' torch functions do too.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._function = function
        self.gathered_bytes = self.scattered_bytes = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        read_slots: Tensor,
        write_slots: Tensor,
        *,
        inner: Sequence[tuple[int, int, int]] = (),
        **options: Any,
    ) -> Tensor:
        """Outputs; the states after the last tokens are left in `write_slots` [N], each at least 0.
        `read_slots` [N]: -1 begins from zero. `options` go to the function, among them `cu_seqlens` [N + 1],
        if the sequences lie one after the other in the second dimension.

        inner: (sequence, position, slot): after so many tokens of that sequence (at least one, and not all)
        its state is left in that slot, too (`Step.checkpoints`). The scan is cut there and goes on from the
        slot, so who resumes there later gets the same bits. Of several sequences the pieces are packed: the
        function must know `cu_seqlens`, which is read on the host.

        Cost: what the function costs, once more for each cut of the sequence that has most of them; and each
        state read and written twice more (a gathered one that is missing, once), also at cuts. Errors as
        `decode` for what is of this class; the rest is the function's.
        """
        _check_state(state, 4)
        _check_tensor("write_slots", write_slots)
        _check_ids("read_slots", read_slots, (len(write_slots),), state)
        _check_ids("write_slots", write_slots, (len(write_slots),), state)
        if inner:
            return self._in_pieces((q, k, v, g, beta), state, read_slots, write_slots, inner, options)
        initial = state.index_select(0, read_slots.clamp(min=0))
        initial.masked_fill_((read_slots < 0)[:, None, None, None], 0)  # 0 times what is poisoned is no 0
        out, final = self._function(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            **options,
        )
        state.index_copy_(0, write_slots.long(), final.to(state.dtype))
        self.gathered_bytes += initial.numel() * initial.element_size()
        self.scattered_bytes += initial.numel() * initial.element_size()
        return out

    def _in_pieces(
        self,
        inputs: tuple[Tensor, ...],
        state: Tensor,
        read_slots: Tensor,
        write_slots: Tensor,
        inner: Sequence[tuple[int, int, int]],
        options: dict[str, Any],
    ) -> Tensor:
        """The first piece of every sequence, then the second of those that have one, and so on."""
        shape = inputs[0].shape[:2]
        lengths = options.pop("cu_seqlens", None)
        begins = list(range(0, shape.numel() + 1, shape[1])) if lengths is None else lengths.tolist()
        packed = [each.reshape(1, -1, *each.shape[2:]) for each in inputs]
        out = torch.empty(0)
        for pieces in rounds(inner, begins, read_slots.tolist(), write_slots.tolist()):
            parts = [torch.cat([each[:, p.begin : p.end] for p in pieces], dim=1) for each in packed]
            if len(begins) > 2:
                sizes = [0, *accumulate(p.end - p.begin for p in pieces)]
                options["cu_seqlens"] = torch.tensor(sizes, device=state.device)
            reads = torch.tensor([p.read_slot for p in pieces], device=state.device)
            writes = torch.tensor([p.write_slot for p in pieces], device=state.device)
            q, k, v, g, beta = parts
            found = self(q, k, v, g, beta, state, reads, writes, **options)
            if not out.numel():
                out = found.new_empty(1, shape.numel(), *found.shape[2:])
            at = 0
            for p in pieces:
                out[:, p.begin : p.end] = found[:, at : (at := at + p.end - p.begin)]
        return out.reshape(*shape, *out.shape[2:])


@cache
def _kernels(device: str) -> Any:
    """`hybridcache._decode`, on CUDA and where Triton can be imported."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    return import_module("hybridcache._decode")


def _gather(state: Tensor, read_slots: Tensor, chosen: Tensor | None) -> Tensor:
    reads = read_slots if read_slots.dim() == 2 else read_slots.unsqueeze(1)
    column = torch.zeros_like(reads[:, 0]) if chosen is None else chosen
    slots = reads.gather(1, column.long().unsqueeze(1)).squeeze(1)
    held = state.index_select(0, slots.clamp(min=0))
    held[slots < 0] = 0
    return held


def _scatter(state: Tensor, slots: Tensor, held: Tensor) -> None:
    there = slots >= 0
    state.index_copy_(0, slots[there].long(), held[there].to(state.dtype))


def _check_state(state: Tensor, dimensions: int) -> None:
    _check_floats("state", state)
    wanted = "[slots, heads, K, V]" if dimensions == 4 else "[slots, channels, 3]"
    if state.dim() != dimensions or (dimensions == 3 and state.shape[2] != _TAPS - 1):
        raise ValueError(f"state: shape {tuple(state.shape)}, expected {wanted}")
    inner = 1
    for axis in range(dimensions - 1, 0, -1):
        if state.stride(axis) != inner and state.shape[axis] > 1:
            raise ValueError(f"state: strides {state.stride()}, expected it contiguous within a slot")
        inner *= state.shape[axis]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[int, int]:
    """N and T, if all fits together."""
    _check_floats("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [N, T, heads, K]")
    count, tokens, heads, _ = q.shape
    value_heads, dim, value_dim = state.shape[1:]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"q: {heads} heads, expected a divisor of the state's {value_heads}")
    wanted = {
        "q": (q, (count, tokens, heads, dim)),
        "k": (k, (count, tokens, heads, dim)),
        "v": (v, (count, tokens, value_heads, value_dim)),
        "g": (g, (count, tokens, value_heads)),
        "beta": (beta, (count, tokens, value_heads)),
    }
    for name, (tensor, shape) in wanted.items():
        _check_shape(name, tensor, shape, state)
    return count, tokens


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> None:
    channels = state.shape[1]
    _check_floats("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected [N, T, channels]")
    _check_shape("x", x, (*x.shape[:2], channels), state)
    _check_shape("weight", weight, (channels, _TAPS), state)
    if bias is not None:
        _check_shape("bias", bias, (channels,), state)
    if not weight.is_contiguous():
        raise ValueError(f"weight: strides {weight.stride()}, expected it contiguous")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], state: Tensor) -> None:
    _check_floats(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: strides {tensor.stride()}, expected the last dimension contiguous")
    _check_device(name, tensor, state)


def _check_slots(
    read_slots: Tensor, write_slots: Tensor, chosen: Tensor | None, count: int, tokens: int, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The ids as [N, C] and [N, T]."""
    flat = isinstance(write_slots, Tensor) and write_slots.dim() == 1 and tokens == 1
    _check_ids("write_slots", write_slots, (count,) if flat else (count, tokens), state)
    if chosen is None:
        _check_ids("read_slots", read_slots, (count,), state)
    else:
        _check_ids("chosen", chosen, (count,), state)
        columns = read_slots.shape[-1] if isinstance(read_slots, Tensor) and read_slots.dim() == 2 else 1
        _check_ids("read_slots", read_slots, (count, max(1, columns)), state)
    return read_slots.reshape(count, -1 if count else 1), write_slots.reshape(count, tokens)


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], state: Tensor) -> None:
    _check_tensor(name, ids)
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: dtype {ids.dtype}, expected int32 or int64")
    if ids.shape != shape:
        raise ValueError(f"{name}: shape {tuple(ids.shape)}, expected {shape}")
    if not ids.is_contiguous():
        raise ValueError(f"{name}: strides {ids.stride()}, expected it contiguous")
    _check_device(name, ids, state)


def _check_floats(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected float32, bfloat16 or float16")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}, expected a tensor")


def _check_device(name: str, tensor: Tensor, state: Tensor) -> None:
    if tensor.device != state.device:
        raise ValueError(f"{name}: on {tensor.device}, expected the state's {state.device}")
