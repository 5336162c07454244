"""What a decode step's recurrent update costs: `python -m benchmarks.decode [--tiny] [--json FILE] [--plot
FILE]`.

All recurrent layers of a model, one token or five (four drafts) of 1 to 64 sequences: `gated_delta.decode`,
which reads and writes the slots, beside flash-linear-attention's functions with the gathers and scatters that
they need. Everything is compared before it is timed. Exits with 0 also where a bound fails: it measures, the
last table says what holds. benchmarks/README.md explains the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import decode_report as report
from benchmarks.data_plane import free_bytes
from benchmarks.gpu_clock import Ceilings, ceilings, describe, l2_bytes, launched_us, replayed_us
from benchmarks.ttft_model import versions
from hybridcache import Geometry, LayerSpec, ModelLayout, Pools, TensorSpec
from hybridcache.gated_delta import ThroughCopies, convolve, decode

MODELS = ("qwen3.5-397b", "qwen3.5-9b")
SEQUENCES = (1, 4, 16, 64)
TOKENS = (1, 5)  # decoding; verifying four drafts
PREFILL = 832
KEY_HEADS = 16  # of every published Qwen3-Next and Qwen3.5
MOST_STEPS = 16
LAUNCHED_STEPS = 2  # the host takes as long for any of them


class Rules(NamedTuple):
    """Who provides the functions that ours is compared with."""

    name: str
    recurrent: Callable[..., Any]
    chunk: Callable[..., Any]


class Case(NamedTuple):
    """One model on one rank, and the slots of one arena."""

    model: str
    tp: int
    key_heads: int
    pools: Pools
    layers: tuple[int, ...]
    device: torch.device

    def states(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        conv, recurrent = self.pools.state(layer)
        return conv, recurrent

    def row(self, operation: str, sequences: int, tokens: int, form: str, **values: Any) -> dict[str, Any]:
        key = {"model": self.model, "tp": self.tp, "operation": operation, "layers": len(self.layers)}
        return {**key, "sequences": sequences, "tokens": tokens, "form": form, **values}


def rules(device: torch.device) -> Rules:
    if device.type == "cuda":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        return Rules("fla", fused_recurrent_gated_delta_rule, chunk_gated_delta_rule)
    from transformers.models.qwen3_5 import modeling_qwen3_5 as code

    return Rules("transformers", code.torch_recurrent_gated_delta_rule, code.torch_chunk_gated_delta_rule)


def tiny_layout() -> ModelLayout:
    state = (TensorSpec("conv", (96, 3), "bfloat16"), TensorSpec("recurrent", (4, 16, 8), "float32"))
    kv = (TensorSpec("k", (1, 8), "bfloat16"), TensorSpec("v", (1, 8), "bfloat16"))
    kinds = [("recurrent", state), ("recurrent", state), ("attention", kv)]
    return ModelLayout(4, tuple(LayerSpec(i, kind, parts) for i, (kind, parts) in enumerate(kinds)))


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """An arena of slots alone: as many as the largest step names, fewer where the GPU is smaller."""
    for model in options.models:
        for tp in options.tp:
            layout = tiny_layout() if options.tiny else ModelLayout.preset(model, tp_size=tp)
            recurrent = tuple(spec.index for spec in layout.layers if spec.kind == "recurrent")
            wanted = max(options.sequences) * (1 + max(options.tokens))
            wanted = max(wanted, -(-6 * l2_bytes(device) // layout.slot_bytes))
            slots = min(wanted, free_bytes(device) // layout.slot_bytes)
            sizes = layout.page_size, layout.page_bytes, layout.slot_bytes
            geometry = Geometry(*sizes, 1, 0, 0, 0, slots, 0, layout.slot_bytes, slots * layout.slot_bytes)
            pools = Pools(layout, geometry, device=device, copies="indirect")
            for layer in recurrent:
                for part in pools.state(layer):
                    part.normal_()
            yield Case(model, tp, 2 if options.tiny else KEY_HEADS // tp, pools, recurrent, device)
            del pools
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


class Inputs:
    """What one layer is given: slices of one projection, as a model makes them. All layers get the same: they
    come from the kernel before, not from memory."""

    def __init__(self, case: Case, sequences: int, tokens: int, dtype: torch.dtype) -> None:
        conv, state = case.states(case.layers[0])
        heads, dim, value_dim = state.shape[1:]
        generator = torch.Generator(device=case.device).manual_seed(7)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=case.device).to(dtype)

        keys = case.key_heads * dim
        self.mixed = normal(sequences, tokens, conv.shape[1])
        q, k, v = self.mixed.split([keys, keys, heads * value_dim], dim=-1)
        self.q, self.k = (each.unflatten(-1, (case.key_heads, dim)) for each in (q, k))
        self.v = v.unflatten(-1, (heads, value_dim))
        self.g = -normal(sequences, tokens, heads).float().abs() * 0.1
        self.beta = normal(sequences, tokens, heads).sigmoid()
        self.weight, self.bias = normal(conv.shape[1], 4), None

    def rule(self, tokens: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        return tuple(each[:, tokens] for each in (self.q, self.k, self.v, self.g, self.beta))


def ids(case: Case, sequences: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Slots that are read [N] and written [N, T] by several steps, others in each: more than the L2 holds."""
    slots = case.pools.geometry.num_slots
    touched = step_bytes(case, sequences, tokens)
    steps = min(MOST_STEPS, max(2, -(-3 * l2_bytes(case.device) // touched)))
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(sequences))
    width = sequences * (1 + tokens)
    found = []
    for step in range(steps):
        named = order[torch.arange(step * width, (step + 1) * width) % slots].to(case.device)
        found.append((named[:sequences].contiguous(), named[sequences:].reshape(sequences, tokens)))
    return found


def step_bytes(case: Case, sequences: int, tokens: int) -> int:
    """Of the recurrent states of all layers: read once, written once for each token."""
    state = case.states(case.layers[0])[1][0]
    return len(case.layers) * sequences * (1 + tokens) * state.numel() * state.element_size()


Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def forms(rule: Rules, inputs: Inputs, tokens: int) -> dict[str, tuple[Layer, ThroughCopies]]:
    """One layer of a step, ours and theirs: given the layer's states, the slots to read and to write."""
    through = ThroughCopies(rule.recurrent)
    each = [
        tuple(part.contiguous() for part in inputs.rule(slice(token, token + 1))) for token in range(tokens)
    ]

    def ours(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> Any:
        return decode(*inputs.rule(), state, reads, writes)

    def theirs(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> Any:
        """It returns the last state only, so each token is a call of its own that goes on from the last.
        Its inputs are contiguous already: it would copy them."""
        rows = []
        for token, part in enumerate(each):
            target = writes[:, token].contiguous()
            rows.append(through(*part, state, reads, target))
            reads = target
        return torch.cat(rows, dim=1) if tokens > 1 else rows[0]

    return {"ours": (ours, ThroughCopies(rule.recurrent)), rule.name: (theirs, through)}


def compare(case: Case, mine: Layer, theirs: Layer, slots: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Both give the same and leave the same, up to rounding; whether they do to the bit."""
    _, state = case.states(case.layers[-1])
    reads, writes = slots
    out, left = mine(state, reads, writes), state[writes.flatten()].clone()
    state[writes.flatten()] = float("nan")
    expected = theirs(state, reads, writes)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(left, state[writes.flatten()], rtol=1e-3, atol=1e-4)
    return torch.equal(out, expected) and torch.equal(left, state[writes.flatten()])


def measure_steps(
    case: Case, rule: Rules, sequences: int, tokens: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    inputs, each = Inputs(case, sequences, tokens, dtype), ids(case, sequences, tokens)
    both = forms(rule, inputs, tokens)
    compare(case, both["ours"][0], both[rule.name][0], each[0])
    equal = compare(
        case,
        lambda state, reads, writes: decode(*inputs.rule(), state, reads, writes, columns=8),
        both[rule.name][0],
        each[0],
    )
    nbytes = step_bytes(case, sequences, tokens)
    for name, (layer, copies) in both.items():
        copies.gathered_bytes = copies.scattered_bytes = 0
        calls = [step_of(case, layer, slots) for slots in each]
        calls[0]()
        row = case.row("verify" if tokens > 1 else "decode", sequences, tokens, name, bytes=nbytes)
        row |= {"gathered_bytes": copies.gathered_bytes, "scattered_bytes": copies.scattered_bytes}
        row["launched_us"], row["replayed_us"] = timed(case, calls)
        row["equal"] = equal
        yield row


def step_of(case: Case, layer: Layer, slots: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
    states = [case.states(index)[1] for index in case.layers]

    def step() -> None:
        for state in states:
            layer(state, *slots)

    return step


def timed(case: Case, calls: list[Callable[[], Any]]) -> tuple[float, float | None]:
    return launched_us(case.device, calls[:LAUNCHED_STEPS]), replayed_us(case.device, calls)


def measure_convolution(case: Case, sequences: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The convolution before it, one token: the slots' columns in place, and by torch's functions."""
    inputs, each = Inputs(case, sequences, 1, dtype), ids(case, sequences, 1)
    states = [case.states(index)[0] for index in case.layers]
    weight = inputs.weight.unsqueeze(1)
    x = inputs.mixed.transpose(1, 2)

    def ours(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> torch.Tensor:
        return convolve(inputs.mixed, inputs.weight, None, state, reads, writes)

    def plain(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> torch.Tensor:
        columns = torch.cat((state.index_select(0, reads).to(dtype), x), dim=-1)
        state.index_copy_(0, writes[:, 0], columns[..., 1:].to(state.dtype))
        found = torch.nn.functional.conv1d(columns, weight, groups=len(weight))
        return torch.nn.functional.silu(found).transpose(1, 2)

    found = [form(states[0], *each[0]) for form in (ours, plain)]
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    state = states[0][0]
    nbytes = len(states) * sequences * 2 * state.numel() * state.element_size()
    for name, form in (("ours", ours), ("torch", plain)):
        calls = [
            lambda form=form, slots=slots: [form(state, *slots) for state in states]  # type: ignore[misc]
            for slots in each
        ]
        row = case.row("convolve", sequences, 1, name, bytes=nbytes, equal=torch.equal(*found))
        copied = nbytes // 2 if name == "torch" else 0
        row |= {"gathered_bytes": copied, "scattered_bytes": copied}
        row["launched_us"], row["replayed_us"] = timed(case, calls)
        yield row


def measure_prefill(case: Case, rule: Rules, tokens: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One prompt's suffix through the chunked function, and what the gather and the scatter add to it."""
    inputs, each = Inputs(case, 1, tokens, dtype), ids(case, 1, 1)[:2]
    through = ThroughCopies(rule.chunk)
    q, k, v, g, beta = (part.contiguous() for part in inputs.rule())
    alone = torch.zeros_like(case.states(case.layers[0])[1][:1])

    def copied(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> Any:
        return through(q, k, v, g, beta, state, reads, writes[:, 0])

    def without(state: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> Any:
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return rule.chunk(q, k, v, g=g, beta=beta, initial_state=alone, **options)

    for name, layer in ((rule.name, copied), (f"{rule.name}, no slots", without)):
        through.gathered_bytes = through.scattered_bytes = 0
        calls = [step_of(case, layer, slots) for slots in each]
        calls[0]()
        row = case.row("prefill", 1, tokens, name, bytes=step_bytes(case, 1, 1), equal=True)
        row |= {"gathered_bytes": through.gathered_bytes, "scattered_bytes": through.scattered_bytes}
        row["launched_us"], row["replayed_us"] = launched_us(case.device, calls), None
        yield row


def measure(case: Case, rule: Rules, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = torch.float32 if options.tiny else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        for sequences in options.sequences:
            if sequences * (1 + tokens) <= case.pools.geometry.num_slots:
                rows += measure_steps(case, rule, sequences, tokens, dtype)
    for sequences in options.sequences:
        rows += measure_convolution(case, sequences, dtype)
    rows += measure_prefill(case, rule, 40 if options.tiny else PREFILL, dtype)
    return rows


def with_rates(rows: list[dict[str, Any]], limits: Ceilings) -> None:
    """Adds bytes a second of states read and written, and the fraction of the copy ceiling."""
    for row in rows:
        rate = row["bytes"] / (row["replayed_us"] or row["launched_us"]) * 1e6
        row["tb_s"], row["fraction"] = rate / 1e12, rate / limits.copy


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny states, few sequences: seconds on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, if matplotlib is installed")
    options = parser.parse_args(argv)
    options.models, options.tp, options.sequences, options.tokens = MODELS, (1, 8), SEQUENCES, TOKENS
    options.ceiling_bytes = 4 << 30
    if options.tiny:
        options.models, options.tp, options.sequences, options.device = ("tiny",), (1,), (1, 3), "cpu"
        options.ceiling_bytes = 16 << 20
    return options


def save(result: dict[str, Any], path: str | None) -> None:
    """After each model: a machine that is taken away leaves what it has measured."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    device = torch.device(options.device)
    rule = rules(device)
    about = {**describe(device), **versions()}
    limits = ceilings(device, options.ceiling_bytes)
    print(report.heading(about, limits, options.ceiling_bytes), flush=True)
    result: dict[str, Any] = {"machine": about, "ceilings": limits._asdict(), "rows": [], "bounds": []}
    rows: list[dict[str, Any]] = result["rows"]
    for case in cases(options, device):
        found = measure(case, rule, options)
        with_rates(found, limits)
        rows += found
        print(report.tables(found), flush=True)
        save(result, options.json)
        del case
    result["bounds"] = report.bounds(rows)
    print(report.bounds_table(result["bounds"]), flush=True)
    save(result, options.json)
    if options.plot and not report.plot(rows, about, options.plot):
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
