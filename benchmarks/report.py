"""What a run of the control plane's benchmark says: tables, bounds and whether they hold, a plot.

Owns the bounds. Reads rows as Recorder.rows() gives them; measures nothing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.operations import MEMCMP_BESIDE, RESERVE_BESIDE
from benchmarks.tables import drawing, table

Rows = list[dict[str, Any]]
# (peer, its operation, ours): what an engine asks of either at the same moment.
PAIRS = (
    ("sglang", "match", "match"),
    ("sglang", "insert", "commit 832"),
    ("vllm", "hash + look up", "match"),
    ("vllm", "hash + look up, pages of 528", "match"),
    ("vllm", "allocate a turn", "reserve"),
    ("vllm", "decode step", "decode step"),
    ("vllm", "free", "close"),
    ("tokenspeed", "plan on a hit", "match"),
    ("tokenspeed", "plan on a hit", "reserve"),
    ("tokenspeed", "decode plan", "decode step"),
    ("tokenspeed", "finish", "close"),
)
SIZES = {1 << 10: "1K", 1 << 12: "4K", 1 << 14: "16K", 1 << 16: "64K", 1 << 18: "256K", 1 << 20: "1M"}


def size_name(size: int) -> str:
    return SIZES.get(size, f"{size:,}")


def machine() -> dict[str, Any]:
    import numpy

    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "hybridcache": metadata.version("hybrid-prefix-cache"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


# ---------------------------------------------------------------- tables


class Column(NamedTuple):
    title: str
    value: Callable[[dict[str, Any]], str]


def microseconds(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def grid(title: str, rows: Rows, caches: str) -> str:
    """One line an operation, one column a size: median / p99."""
    rows = [row for row in rows if row["caches"] == caches]
    sizes = sorted({row["size"] for row in rows})
    by_key = {(row["operation"], row["size"]): row for row in rows}
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    lines = [["us, median / p99", *map(size_name, sizes)]]
    for operation in operations:
        cells = []
        for size in sizes:
            row = by_key.get((operation, size))
            cells.append(f"{microseconds(row['median_us'])} / {microseconds(row['p99_us'])}" if row else "")
        lines.append([operation, *cells])
    return f"{title}\n{table(lines)}" if operations else ""


def ratios(rows: Rows, peers: dict[str, Any]) -> str:
    """Each peer's operation at each size: its median, and how many times ours that is."""
    sizes = sorted({row["size"] for row in rows})
    lines = [["us, and how many times ours", *map(size_name, sizes)]]
    for peer, theirs, ours in PAIRS:
        found = peers.get(peer, {})
        if "reason" in found:
            continue
        cells = []
        for size in sizes:
            measured = find(found.get("rows", []), theirs, size)
            times = ratio(measured, find(rows, ours, size))
            cells.append("" if times is None else f"{microseconds(measured or 0)} = {times:,.1f} x")
        lines.append([f"{peer} {found.get('version', '')}: {theirs} / our {ours}", *cells])
    for peer, found in peers.items():
        if "reason" in found:
            lines.append([f"{peer}: no figures: {found['reason']}", *[""] * len(sizes)])
    return table(lines)


# ---------------------------------------------------------------- bounds


class Bound(NamedTuple):
    """One line of what is promised. `measured` None: not measured in this run, so it does not hold either."""

    what: str
    measured: float | None
    bound: float
    unit: str
    most: bool = True  # the bound is an upper one

    @property
    def holds(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.most else self.measured >= self.bound


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def find(rows: Rows, operation: str, size: int, caches: str = "warm") -> float | None:
    for row in rows:
        if (row["operation"], row["size"], row["caches"]) == (operation, size, caches):
            return float(row["median_us"])
    return None


def bounds(rows: Rows, memory: Rows, peers: dict[str, Any]) -> list[Bound]:
    small, middle, large = 1 << 10, 1 << 16, 1 << 20

    def growth(operation: str) -> float | None:
        return ratio(find(rows, operation, large), find(rows, operation, small))

    lines = [
        Bound(
            "reserve of a cached 1M prompt / memcmp of it",
            ratio(find(rows, RESERVE_BESIDE, large), find(rows, MEMCMP_BESIDE, large)),
            3,
            "x",
        ),
        Bound(
            "the same, CPU caches flushed",
            ratio(find(rows, RESERVE_BESIDE, large, "cold"), find(rows, MEMCMP_BESIDE, large, "cold")),
            3,
            "x",
        ),
        Bound("a turn through a transcript, 1M / 1K", growth("transcript: turn"), 2, "x"),
        Bound("commit of 832 tokens, 1M / 1K", growth("commit 832"), 2, "x"),
        Bound("close, 1M / 1K", growth("close"), 2, "x"),
        Bound("decode step, 1M / 1K", growth("decode step"), 2, "x"),
        Bound("a reserve refused beside open leases, 1M / 1K", growth("refused reserve"), 2, "x"),
        Bound("a decode step refused beside them, 1M / 1K", growth("refused launch"), 2, "x"),
        Bound("launch + commit of 256 decoding leases", find(rows, "batch launch + commit", 256), 100, "us"),
    ]
    for each in memory:
        if each["policy"] == "default":
            lines.append(
                Bound(
                    f"one eviction with {each['checkpoints']:,} checkpoints", each.get("eviction_us"), 5, "us"
                )
            )
            lines.append(
                Bound(f"index a cached token, {each['tokens']:,} tokens", each["bytes_per_token"], 8, "bytes")
            )
    return lines + peer_bounds(rows, peers, middle, large)


def peer_bounds(rows: Rows, peers: dict[str, Any], middle: int, large: int) -> list[Bound]:
    promised = [
        ("sglang", "match", "match", middle, 5),
        ("sglang", "match", "match", large, 5),
        ("vllm", "hash + look up", "match", middle, 50),
        ("vllm", "hash + look up", "match", large, 50),
        ("tokenspeed", "plan on a hit", "match", middle, 20),
        ("tokenspeed", "plan on a hit", "match", large, 50),
        ("tokenspeed", "decode plan", "decode step", middle, 10),
        ("tokenspeed", "decode plan", "decode step", large, 100),
    ]
    lines = []
    for peer, theirs, ours, size, factor in promised:
        measured = find(peers.get(peer, {}).get("rows", []), theirs, size)
        what = f"{peer}'s {theirs} / our {ours} at {size_name(size)}"
        lines.append(Bound(what, ratio(measured, find(rows, ours, size)), factor, "x", most=False))
    return lines


def bounds_table(lines: list[Bound]) -> str:
    verdict = {True: "holds", False: "FAILS", None: "not measured"}
    out = [["shown by this run", "measured", "bound", ""]]
    for line in lines:
        measured = "" if line.measured is None else f"{line.measured:,.2f} {line.unit}"
        sign = "<=" if line.most else ">="
        out.append([line.what, measured, f"{sign} {line.bound:g} {line.unit}", verdict[line.holds]])
    return table(out)


# ---------------------------------------------------------------- plot


def plot(rows: Rows, peers: dict[str, Any], path: str) -> bool:
    """Medians over tokens of context, log-log. False where matplotlib is not installed."""
    pyplot = drawing()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 6))
    lines = {f"ours: {each}": (rows, each) for each in OURS}
    for peer, result in peers.items():
        for operation in dict.fromkeys(row["operation"] for row in result.get("rows", [])):
            lines[f"{peer}: {operation}"] = (result["rows"], operation)
    for label, (source, operation) in lines.items():
        points = sorted(
            (row["size"], row["median_us"])
            for row in source
            if row["operation"] == operation and row["caches"] == "warm"
        )
        if points:
            axes.loglog(
                *zip(*points, strict=True),
                "-o" if label.startswith("ours") else "--x",
                label=label,
                markersize=4,
            )
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("microseconds, median")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


OURS = ("memcmp", "match", "reserve", "commit 832", "decode step", "close", "turn", "transcript: turn")
