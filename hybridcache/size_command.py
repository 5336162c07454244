"""`hybridcache size`: from the arguments of the command line to a `Sizing`, from there to tables and a plot.

Owns the reading of arguments and the look of the output; every number is `sizing`'s. Runs nothing.
ValueError names an argument that is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridcache._command import (
    GB,
    add_json,
    check_targets,
    output,
    read_bytes,
    read_config,
    read_model,
    show_table,
    write,
)
from hybridcache._specs import ITEMSIZE, check_choice
from hybridcache.config import ModelLayout
from hybridcache.sizing import Machine, Sizing, Traffic, advice, size

EXAMPLES = """examples:
  hybridcache size qwen3.5-397b --memory 8x141GB --tp 8 --weights float8_e4m3fn
  hybridcache size qwen3-next-80b --memory 4x80GB --tp 2 --context 32000 --sessions 200
  hybridcache size config.json --memory 24GB --weights 18GB --kv-dtype float8_e4m3fn --plot fits.png
"""
HEIGHTS = (0.25, 0.5, 1, 2, 4)  # contexts of the table, as multiples of the one asked for
STATES = (1, 2, 4, 8)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The arguments."""
    about = "what fits: GPU memory, weights and traffic to slabs, pages, states and conversations"
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "size", help=about, description=about, epilog=EXAMPLES, formatter_class=layout
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a preset's name (such as qwen3.5-397b), or a config.json")
    add("--memory", required=True, metavar="SIZE", help="of the GPUs: 8x141GB, or 80GB for one")
    add("--tp", "--tp-size", dest="tp_size", type=int, metavar="N", help="GPUs of one replica (all)")
    add("--weights", metavar="SIZE", help="of the whole model, 400GB, or a dtype where MODEL is a preset")
    add("--reserve", type=float, default=10, metavar="%", help="of a GPU's memory for the engine (10)")
    add("--page-size", type=int, default=64, metavar="N", help="tokens of a page (64)")
    add("--kv-dtype", default="bfloat16", help="(bfloat16)")
    add("--state-dtype", default="float32", help="of recurrent states; only float32 is exact (float32)")
    add("--conv-dtype", default="bfloat16", help="(bfloat16)")
    add("--context", type=int, default=50_000, metavar="N", help="tokens of a conversation (50000)")
    add("--turn", type=int, default=800, metavar="N", help="tokens that a turn adds (800)")
    add("--states", type=int, default=2, metavar="N", help="checkpoints kept of a conversation (2)")
    add("--sessions", type=int, metavar="N", help="conversations that should stay (as many as fit)")
    add("--running", type=int, default=8, metavar="N", help="requests in a step (8)")
    add("--draft-tokens", type=int, default=0, metavar="N", help="drafts that a step verifies (0)")
    add("--plot", type=Path, metavar="FILE", help="conversations against their length; needs matplotlib")
    add_json(add, "all figures")
    return command


def main(args: argparse.Namespace) -> int:
    """Prints and writes; 0 if what was asked for fits, else 1."""
    sizing = read_sizing(args)
    others = list(alternatives(args, sizing))
    check_targets(args.json, args.plot)
    out = output(args.json)
    print(opening(args.model, sizing), file=out)
    for title, rows in tables(sizing, others):
        print(file=out)
        show_table(rows, out, title=title)
    print("", *(textwrap.fill(each, 110) for each in advice(sizing)), sep="\n", file=out)
    if args.plot:
        drawn = plot(sizing, args.plot)
        print(
            f"\nplot: {args.plot.name}" if drawn else "\nno plot: it needs pip install matplotlib", file=out
        )
    if args.json:
        write(args.json, json.dumps(as_json(args.model, sizing, others), indent=2))
    return 0 if sizing.fits else 1


# --- arguments ---


def read_sizing(args: argparse.Namespace, **changes: Any) -> Sizing:
    """changes: arguments that differ."""
    args = argparse.Namespace(**{**vars(args), **changes})
    gpus, gpu_bytes = read_gpus(args.memory)
    tp_size = gpus if args.tp_size is None else args.tp_size
    if tp_size >= 1 and gpus == 1 and "x" not in args.memory:
        gpus = tp_size  # so many of these
    machine = Machine(
        gpu_bytes, gpus, tp_size, read_weights(args.weights, args.model), reserve=args.reserve / 100
    )
    traffic = Traffic(
        context=args.context,
        turn=args.turn,
        states=args.states,
        running=args.running,
        draft_tokens=args.draft_tokens,
        sessions=args.sessions,
    )
    return size(read_layout(args, tp_size), machine, traffic, whole=read_layout(args, 1))


def read_layout(args: argparse.Namespace, tp_size: int) -> ModelLayout:
    return read_model(
        args.model,
        page_size=args.page_size,
        kv_dtype=args.kv_dtype,
        state_dtype=args.state_dtype,
        conv_dtype=args.conv_dtype,
        tp_size=tp_size,
    )


def read_gpus(text: str) -> tuple[int, int]:
    """`8x141GB`, or one GPU's size: how many, and bytes of each."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(.+)", text.strip())
    if found is None or found[1] == "0":
        raise ValueError(f"memory: {text!r}, expected GPUs such as 8x141GB")
    return int(found[1] or 1), read_bytes("memory", found[2])


def read_weights(text: str | None, model: str) -> int:
    """Bytes of the whole model. For presets a dtype will do, and bfloat16 is the default."""
    billions = re.search(r"-(\d+)b$", model.lower()) if read_config(model) is None else None
    dtype = text if text in ITEMSIZE else "bfloat16" if text is None else None
    if dtype is None:
        return read_bytes("weights", str(text))
    if billions is None:
        raise ValueError(f"weights: {text!r}, expected their size such as 18GB (a config.json does not say)")
    check_choice("weights", dtype, ITEMSIZE)
    return int(billions[1]) * 10**9 * ITEMSIZE[dtype]


def alternatives(args: argparse.Namespace, sizing: Sizing) -> Iterator[tuple[str, Sizing]]:
    """What else could be done, and what it would come to: one change at a time."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if ITEMSIZE[args.kv_dtype] > 1:
        changes.append(("KV in float8_e4m3fn", {"kv_dtype": "float8_e4m3fn"}))
    if read_config(args.model) is None and (args.weights is None or ITEMSIZE.get(args.weights, 0) > 1):
        changes.append(("weights in float8_e4m3fn", {"weights": "float8_e4m3fn"}))
    machine = sizing.machine
    for tp_size in (machine.tp_size // 2, machine.tp_size * 2):
        if tp_size >= 1 and machine.gpus % tp_size == 0:
            changes.append((f"TP {tp_size}, {_replicas(machine.gpus // tp_size)}", {"tp_size": tp_size}))
    if sizing.padding > 0.02 and args.page_size > 16:
        changes.append(("pages of 16 tokens", {"page_size": 16}))
    for name, change in changes:
        memory = f"{machine.gpus}x{machine.gpu_bytes}B"
        try:
            yield name, read_sizing(args, **{"memory": memory, **change})
        except ValueError:
            continue  # heads that cannot be divided so


# --- output ---


def opening(model: str, sizing: Sizing) -> str:
    machine = sizing.machine
    return (
        f"{Path(model).name} on {machine.gpus} x {machine.gpu_bytes / GB:,.4g} GB, TP {machine.tp_size}: "
        f"{_replicas(machine.replicas)}; pages of {sizing.layout.page_size} tokens"
    )


def tables(sizing: Sizing, others: list[tuple[str, Sizing]]) -> Iterator[tuple[str, list[list[str]]]]:
    """(title, rows) of each table."""
    yield "", memory_table(sizing)
    yield "", units_table(sizing)
    if sizing.num_slabs >= 2:
        yield (
            f"conversations that stay in a replica, {sizing.traffic.running} requests running",
            fits_table(sizing),
        )
    if others:
        yield "what else could be done", others_table(sizing, others)


def memory_table(sizing: Sizing) -> list[list[str]]:
    machine = sizing.machine
    rows = [["memory of a rank", "GB", "%"]]
    for name, count in (
        ("GPU", machine.gpu_bytes),
        ("weights", machine.rank_weight_bytes),
        ("engine", machine.reserve_bytes),
        ("cache", machine.cache_bytes),
    ):
        rows.append([name, f"{count / GB:,.2f}", f"{100 * count / machine.gpu_bytes:.1f}"])
    return rows


def units_table(sizing: Sizing) -> list[list[str]]:
    layout = sizing.layout
    token = layout.page_bytes / layout.page_size
    rows = [["of a rank", "bytes", "tokens of KV", "at most in the cache"]]
    units = [
        ("KV of a token", token, sizing.num_pages * layout.page_size),
        ("page", layout.page_bytes, sizing.num_pages),
        ("state", layout.slot_bytes, sizing.num_slabs),
        ("slab: a state or pages", sizing.slab_bytes, sizing.num_slabs),
    ]
    for name, count, held in units:
        rows.append([name, f"{count:,.0f}", f"{count / token:,.0f}", f"{held:,}"])
    return rows


def fits_table(sizing: Sizing) -> list[list[str]]:
    """A row a length, a column a number of states."""
    rows = [["tokens each", *(f"{n} state{'s' * (n > 1)} each" for n in _state_columns(sizing))]]
    for context in _contexts(sizing):
        fits = [sizing.sessions(context, states) for states in _state_columns(sizing)]
        rows.append([f"{context:,}", *(f"{n:,}" for n in fits)])
    return rows


def others_table(sizing: Sizing, others: list[tuple[str, Sizing]]) -> list[list[str]]:
    traffic = sizing.traffic
    head = f"of {traffic.context:,} tokens, {traffic.states} states"
    rows = [["", "cache of a rank, GB", "a state in tokens of KV", f"in a replica {head}", "in all"]]
    for name, each in (("as asked", sizing), *others):
        fit = each.sessions()
        cells = [f"{max(each.machine.cache_bytes, 0) / GB:,.2f}", f"{each.state_tokens:,.0f}"]
        rows.append([name, *cells, f"{fit:,}", f"{fit * each.machine.replicas:,}"])
    return rows


def _contexts(sizing: Sizing) -> list[int]:
    return sorted({max(round(height * sizing.traffic.context), 1) for height in HEIGHTS})


def _state_columns(sizing: Sizing) -> list[int]:
    return sorted({*STATES, sizing.traffic.states})


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count:,} replicas"


def as_json(model: str, sizing: Sizing, others: list[tuple[str, Sizing]]) -> dict[str, Any]:
    """All figures."""
    described = {
        "model": Path(model).name,
        "machine": asdict(sizing.machine),
        "traffic": asdict(sizing.traffic),
        **figures(sizing),
        "fits_table": [
            {"context": context, "states": states, "sessions": sizing.sessions(context, states)}
            for context in _contexts(sizing)
            for states in _state_columns(sizing)
        ],
        "advice": advice(sizing),
    }
    described["alternatives"] = [{"change": name, **figures(each)} for name, each in others]
    return described


def figures(sizing: Sizing) -> dict[str, Any]:
    layout, machine = sizing.layout, sizing.machine
    return {
        "replicas": machine.replicas,
        "cache_bytes": machine.cache_bytes,
        "memory_bytes": sizing.memory_bytes,
        "kv_bytes_per_token": layout.kv_bytes_per_token,
        "page_bytes": layout.page_bytes,
        "slot_bytes": layout.slot_bytes,
        "slab_bytes": sizing.slab_bytes,
        "pages_per_slab": sizing.pages_per_slab,
        "num_slabs": sizing.num_slabs,
        "num_pages": sizing.num_pages,
        "state_tokens": sizing.state_tokens,
        "kv_copies": sizing.kv_copies,
        "state_share": sizing.state_share,
        "turn_saved": sizing.turn_saved,
        "running_slabs": sizing.running_slabs,
        "sessions": sizing.sessions(),
        "fits": sizing.fits,
    }


def plot(sizing: Sizing, path: Path) -> bool:
    """Draws conversations against their length, a line a number of states; False: no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    traffic = sizing.traffic
    contexts = [round(traffic.context * 2 ** (step / 4)) or 1 for step in range(-16, 17)]
    for states in _state_columns(sizing):
        points = [(each, sizing.sessions(each, states)) for each in contexts]
        shown = [(each, count) for each, count in points if count]
        if shown:
            axes.plot(*zip(*shown, strict=True), label=f"{states} state{'s' * (states > 1)} each")
    if traffic.sessions or sizing.sessions():
        axes.plot([traffic.context], [traffic.sessions or sizing.sessions()], "k*", ms=12, label="asked for")
    axes.axvline(sizing.state_tokens, color="tab:gray", linestyle=":", label="a state in tokens of KV")
    axes.set(xscale="log", yscale="log", xlabel="tokens of a conversation", ylabel="conversations that stay")
    axes.set_title(f"{sizing.memory_bytes / GB:,.1f} GB on each of {sizing.machine.tp_size} ranks")
    axes.legend(loc="best")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    return True
