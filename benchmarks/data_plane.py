"""What the data plane costs: `python -m benchmarks.data_plane [--quick] [--json FILE] [--plot FILE]`.

Prints the device and its ceilings in this run, then restores, publishes, zeroes, page tails and host copies
of 1 to 64 slots of three models, whole and as one of eight ranks; beside the two layouts that other engines
use. Every operation is checked before it is timed. Nothing is specific to one chip. Exits with 0 also where a
bound fails: it measures, the last table says what holds. benchmarks/README.md explains the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import data_plane_report as report
from benchmarks.gpu_clock import Ceilings, ceilings, describe, l2_bytes, launched_us, replayed_us
from benchmarks.gpu_layouts import LAYOUTS, Ids, PerLayer, SlotMajor, assert_moved
from hybridcache import ModelLayout

MODELS = ("qwen3.5-397b", "qwen3-next-80b", "qwen3.5-9b")
COUNTS = (1, 2, 4, 8, 16, 64)
HOST_COUNTS = (1, 8)
OPERATIONS = ("restore", "publish", "zero", "page tails")
MOST_PLANS = 128


class Case(NamedTuple):
    """One model on one rank, and how many rows of it lie in memory."""

    model: str
    tp_size: int
    layout: ModelLayout
    pages: int
    slots: int
    device: torch.device

    def row(self, operation: str, count: int, layout: str, nbytes: int) -> dict[str, Any]:
        """`nbytes`: what the operation reads and writes."""
        return {
            "model": self.model,
            "tp": self.tp_size,
            "operation": operation,
            "count": count,
            "layout": layout,
            "bytes": nbytes,
        }


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for model in options.models:
        for tp_size in options.tp:
            layout = ModelLayout.preset(model, tp_size=tp_size)
            most, cached = 2 * max(options.counts), 2 * l2_bytes(device)
            pages, slots = (max(most, -(-cached // row)) for row in (layout.page_bytes, layout.slot_bytes))
            while needed_bytes(layout, pages, slots) > free_bytes(device):
                slots //= 2  # a smaller GPU: the counts that fit
            yield Case(model, tp_size, layout, pages, slots, device)


def needed_bytes(layout: ModelLayout, pages: int, slots: int) -> int:
    """Twice the rows: peers gather what they copy, once launched and once more in a graph."""
    return 2 * (pages * layout.page_bytes + slots * layout.slot_bytes)


def free_bytes(device: torch.device) -> int:
    return int(0.95 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 1 << 62


def plans(case: Case, operation: str, count: int) -> list[Ids]:
    """Plans of the same kind with other ids each: as many as it takes to touch more than the L2 holds."""
    layout = case.layout
    touched = moved_bytes(layout, operation, count)
    number = min(MOST_PLANS, max(2, -(-3 * l2_bytes(case.device) // touched)))
    generator = np.random.default_rng(count)
    slots, pages = (generator.permutation(rows).astype(np.int32) for rows in (case.slots, case.pages))
    nothing = np.empty((0, 2), dtype=np.int32)

    def pairs(rows: Any, first: int) -> Any:
        return np.take(rows, np.arange(first, first + 2 * count), mode="wrap").reshape(2, count).T.copy()

    found = []
    for first in range(0, 2 * count * number, 2 * count):
        copy_slots = pairs(slots, first) if operation in ("restore", "publish") else nothing
        copy_pages = pairs(pages, first) if operation in ("publish", "page tails") else nothing
        zeroes = pairs(slots, first)[:, 0] if operation == "zero" else np.empty(0, dtype=np.int32)
        found.append(Ids(copy_slots, zeroes, copy_pages))
    return found


def moved_bytes(layout: ModelLayout, operation: str, count: int) -> int:
    slots = {"restore": 2, "publish": 2, "zero": 1, "page tails": 0}[operation]
    pages = {"restore": 0, "publish": 2, "zero": 0, "page tails": 2}[operation]
    return count * (slots * layout.slot_bytes + pages * layout.page_bytes)


def fits(case: Case, operation: str, count: int, most: int) -> bool:
    uses_slots, uses_pages = operation != "page tails", operation in ("publish", "page tails")
    return (
        count <= most
        and (not uses_slots or 2 * count <= case.slots)
        and (not uses_pages or 2 * count <= case.pages)
    )


def measure_moves(case: Case, kept: Any, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for operation in OPERATIONS:
        for count in counts:
            if not fits(case, operation, count, kept.most):
                continue
            each = plans(case, operation, count)
            launches = [kept.launch(ids) for ids in each]
            assert_moved(kept, each[0], launches[0])
            captures = [kept.capture(ids) for ids in each]
            assert_moved(kept, each[1], captures[1])
            row = case.row(operation, count, kept.name, moved_bytes(case.layout, operation, count))
            row["launched_us"] = launched_us(case.device, launches)
            row["replayed_us"] = replayed_us(case.device, captures)
            yield row


def measure_nothing(case: Case, ours: SlotMajor) -> dict[str, Any]:
    """An empty plan: what a graph with room for 64 pages and 64 slots pays where there is nothing to do."""
    moves = ours.pools.captured(max_pages=64, max_slots=64)
    row = case.row("nothing", 0, ours.name, 0)
    row["launched_us"] = launched_us(case.device, [ours.launch(Ids((), (), ()))] * 8)
    row["replayed_us"] = replayed_us(case.device, [moves.run] * 8)
    return row


def measure_host(case: Case, kept: Any, largest: int) -> Iterator[dict[str, Any]]:
    """Slots to pinned memory and back on a side stream: ours in one piece each, the peers' layer by layer."""
    cuda = case.device.type == "cuda"
    rows = min(largest, case.slots)
    sizes = [part.numel() * part.element_size() for part in kept.slot(0)]
    host = torch.zeros((rows, sum(sizes)), dtype=torch.uint8, pin_memory=cuda)
    side = torch.cuda.Stream(case.device) if cuda else None

    def copy(slots: range, *, down: bool) -> None:
        for slot in slots:
            for theirs, ours in zip(torch.split(host[slot % rows], sizes), kept.slot(slot), strict=True):
                there = theirs.view(ours.dtype).view(ours.shape)
                target, source = (there, ours) if down else (ours, there)
                target.copy_(source, non_blocking=True)

    for operation, down in (("to host", True), ("to device", False)):
        for count in (each for each in HOST_COUNTS if each <= rows):
            batches = [range(first, first + count) for first in range(0, case.slots - count + 1, count)][:8]
            assert_host_copies(kept, host, batches[0], rows, lambda slots, down=down: copy(slots, down=down))
            with torch.cuda.stream(side):
                calls = [lambda slots=slots, down=down: copy(slots, down=down) for slots in batches]
                row = case.row(operation, count, kept.name, count * sum(sizes))
                row["launched_us"], row["replayed_us"] = launched_us(case.device, calls), None
            yield row


def assert_host_copies(kept: Any, host: torch.Tensor, slots: range, rows: int, call: Any) -> None:
    call(slots)
    for slot in slots:
        found = torch.cat([part.reshape(-1).view(torch.uint8) for part in kept.slot(slot)]).cpu()
        if not torch.equal(found, host[slot % rows]):
            raise AssertionError(f"{kept.name}: slot {slot} differs from its copy on the host")


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for layout in LAYOUTS:
        kept = layout(case.layout, case.pages, case.slots, case.device)
        rows += measure_moves(case, kept, options.counts)
        if isinstance(kept, SlotMajor):
            rows.append(measure_nothing(case, kept))
        if layout in (SlotMajor, PerLayer):
            rows += measure_host(case, kept, largest=8)
        del kept
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def with_rates(rows: list[dict[str, Any]], limits: Ceilings) -> None:
    """Adds bytes a second and the fraction of the ceiling, of the replay where there is one."""
    ceiling = {"zero": limits.fill, "to host": limits.to_host, "to device": limits.to_device}
    for row in rows:
        rate = row["bytes"] / (row["replayed_us"] or row["launched_us"]) * 1e6
        row["tb_s"] = rate / 1e12
        row["fraction"] = rate / ceiling.get(row["operation"], limits.copy)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_plane", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small model, few counts: a minute on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=None, metavar="NAME", help="presets of ModelLayout")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, if matplotlib is installed")
    options = parser.parse_args(argv)
    options.counts, options.tp, options.ceiling_bytes = COUNTS, (1, 8), 4 << 30
    if options.quick:
        options.counts, options.tp, options.ceiling_bytes = (1, 4), (8,), 64 << 20
    options.models = options.models or (MODELS[2:] if options.quick else MODELS)
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    device = torch.device(options.device)
    about = describe(device)
    limits = ceilings(device, options.ceiling_bytes)
    print(report.heading(about, limits, options.ceiling_bytes), flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases(options, device):
        found = measure(case, options)
        with_rates(found, limits)
        rows += found
        print(report.tables(found), flush=True)
    bounds = report.bounds(rows)
    print(report.bounds_table(bounds), flush=True)
    if options.json:
        result = {"machine": about, "ceilings": limits._asdict(), "rows": rows, "bounds": bounds}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot and not report.plot(rows, about, options.plot):
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
