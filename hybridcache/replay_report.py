"""How replays are shown: tables, JSON, and a plot of hit rate against budget.

Owns the wording and the layout of the output. Reads `Result`s, runs nothing. matplotlib is optional: without
it `plot` draws nothing and says so.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridcache._command import GB, aligned
from hybridcache.optimum import Bounds
from hybridcache.replay_values import Result
from hybridcache.workloads import Workload

KINDS = ("turn_end", "prompt_end", "chunk_end", "breakpoint", "fork", "cut", "interior")
REASONS = ("cold", "unknown", "no_checkpoint", "remainder", "no_room", "complete", "missed")
OPERATIONS = ("reserve", "launch", "plan", "applied", "commit", "close")

Rows = list[list[str]]


def opening(workload: Workload, model: str) -> str:
    """What is replayed."""
    return (
        f"{workload.name}: {len(workload):,} requests, {workload.input_tokens / 1e6:,.1f} M prompt tokens, "
        f"the longest request {workload.longest:,}; {model}"
    )


def report(results: Sequence[Result], *, working_set: float | None = None) -> str:
    """All tables as plain text."""
    parts = tables(results, working_set=working_set)
    return "\n\n".join((f"{title}\n" if title else "") + aligned(rows) for title, rows in parts)


def tables(results: Sequence[Result], *, working_set: float | None = None) -> list[tuple[str, Rows]]:
    """(title, rows) of each. working_set: GB, for the column that relates budgets to it."""
    return [
        ("", main_table(results, working_set)),
        ("prompt tokens not hit, % of all, by reason; in brackets what the ideal hits", lost_table(results)),
        ("of these, what one more boundary would have hit, by what it left for", missed_table(results)),
        ("checkpoints published / restored / evicted, by kind of boundary", kinds_table(results)),
        ("held by the tree at the end / at most after a close", held_table(results)),
        ("time of the core: median us a call, and the sum of each in seconds", time_table(results)),
    ]


def main_table(results: Sequence[Result], working_set: float | None) -> Rows:
    """A row a cell: what it hit, and what that came to."""
    head = ["policy", "GB", "of WS %", "hints", "hit %", "worth", "ideal %", "beyond M", "FLOPs saved %"]
    head += ["passes", "too large", "refused", "waits", "seconds"]
    plain = {(r.policy, r.budget_bytes): r.hit_rate for r in results if not r.settings["hints"]}
    rows = [head]
    for r in results:
        base = plain.get((r.policy, r.budget_bytes)) if r.settings["hints"] else None
        share = "" if not working_set else f"{100 * r.budget_bytes / GB / working_set:.4g}"
        row = [r.policy, f"{r.budget_bytes / GB:.4g}", share, "+".join(map(_short, r.settings["hints"]))]
        row += [f"{100 * r.hit_rate:.2f}", "" if base is None else f"{100 * (r.hit_rate - base):+.2f}"]
        row += [f"{100 * r.ideal_rate:.2f}", f"{r.beyond_ideal / 1e6:,.2f}", f"{100 * r.flops_rate:.2f}"]
        counts = (r.extra_passes, r.too_large, r.refused, r.waits)
        rows.append([*row, *(f"{count:,}" if count else "-" for count in counts), f"{r.seconds:.1f}"])
    return _without_empty(rows)


def lost_table(results: Sequence[Result]) -> Rows:
    """Why tokens were not hit (I12): all of them, and those that an earlier request had read."""
    rows = [["policy", "GB", *REASONS]]
    for r in results:
        lost = {**r.lost, "missed": r.missed_tokens}
        cells = [
            f"{100 * lost[name] / r.prompt_tokens:.2f} ({100 * r.beyond.get(name, 0) / r.prompt_tokens:.2f})"
            if lost.get(name)
            else ""
            for name in REASONS
        ]
        rows.append([*_name(r), *cells])
    return _without_empty(rows)


def missed_table(results: Sequence[Result]) -> Rows:
    """Which tokens of the lost ones a boundary would have saved (`Match.missed`), by what it left for."""
    causes = sorted({cause for r in results for cause in r.missed_by})
    rows = [["policy", "GB", *causes]]
    for r in results:
        shares = (100 * r.missed_by.get(cause, 0) / r.prompt_tokens for cause in causes)
        rows.append([*_name(r), *(f"{share:.2f}" if share else "" for share in shares)])
    return _without_empty(rows)


def kinds_table(results: Sequence[Result]) -> Rows:
    """What became of the checkpoints."""
    rows = [["policy", "GB", *KINDS, "dropped", "duplicate", "evicted in flight"]]
    for r in results:
        counts = [[of.get(kind, 0) for of in (r.published, r.restored, r.evicted)] for kind in KINDS]
        cells = [" / ".join(f"{n:,}" for n in each) if any(each) else "" for each in counts]
        others = (r.dropped_checkpoints, r.duplicate_checkpoints, r.evicted_in_flight)
        rows.append([*_name(r), *cells, *(f"{n:,}" if n else "" for n in others)])
    return _without_empty(rows)


def held_table(results: Sequence[Result]) -> Rows:
    """What the tree holds, and what tree and leases together ever took."""
    rows = [["policy", "GB", "checkpoints", "pages", "GB held", "slots taken at most", "pages taken at most"]]
    for r in results:
        end, peak = defaultdict(int, r.end), defaultdict(int, r.peak)
        row = [f"{end[name]:,} / {peak[name]:,}" for name in ("checkpoints", "tree_pages")]
        row.append(f"{end['cached_bytes'] / GB:.2f} / {peak['cached_bytes'] / GB:.2f}")
        rows.append([*_name(r), *row, f"{peak['taken_slots']:,}", f"{peak['taken_pages']:,}"])
    return rows


def time_table(results: Sequence[Result]) -> Rows:
    """What the calls cost on this machine."""
    rows = [["policy", "GB", *OPERATIONS, "all"]]
    for r in results:
        times = [r.operations.get(name) for name in OPERATIONS]
        cells = [f"{t['median_us']:.1f}, {t['total_s']:.2f}" if t else "" for t in times]
        rows.append([*_name(r), *cells, f"{r.core_seconds:.2f}"])
    return rows


def optimum_table(bounds: Sequence[Bounds]) -> Rows:
    """What an all-knowing policy could hit."""
    rows = [["optimum: GB", "feasible %", "at most %", "ideal %"]]
    rows += [[f"{each.budget / GB:.4g}", *(f"{share:.1f}" for share in each.percent)] for each in bounds]
    return rows


def bounds_as_json(bounds: Bounds) -> dict[str, Any]:
    lower, upper, ideal = bounds.percent
    return {
        "budget_bytes": bounds.budget,
        "feasible_percent": lower,
        "at_most_percent": upper,
        "ideal_percent": ideal,
    }


def _name(r: Result) -> list[str]:
    return [r.policy + (" with hints" if r.settings["hints"] else ""), f"{r.budget_bytes / GB:.4g}"]


def _short(hint: str) -> str:
    return {"expected_return": "return", "breakpoints": "breaks"}.get(hint, hint)


def _without_empty(rows: Rows) -> Rows:
    """Leaves out the columns in which nothing stands."""
    used = [any(row[place] not in ("", "-") for row in rows[1:]) for place in range(len(rows[0]))]
    return [[cell for cell, keep in zip(row, used, strict=True) if keep] for row in rows]


def as_json(
    workload: Workload, model: dict[str, Any], results: Sequence[Result], *, working_set: float | None = None
) -> dict[str, Any]:
    """All figures, and what they were measured on; no name of a host, no path."""
    return {
        "benchmark": "replay",
        "workload": {
            "name": workload.name,
            "unit": workload.unit,
            "requests": len(workload),
            "prompt_tokens": workload.input_tokens,
            "longest": workload.longest,
            "working_set_gb": working_set,
        },
        "model": model,
        "machine": {
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "cells": [result.as_json() for result in results],
    }


def plot(results: Sequence[Result], path: Path) -> bool:
    """Draws hit rate against budget, a line a policy, dashed with hints; False: no matplotlib. The suffix of
    `path` says in which format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for r in results:
        lines[r.policy, bool(r.settings["hints"])].append((r.budget_bytes / GB, 100 * r.hit_rate))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {policy: f"C{number}" for number, policy in enumerate(dict.fromkeys(p for p, _ in lines))}
    for (policy, hinted), points in lines.items():
        budgets, rates = zip(*sorted(points), strict=True)
        label, style = f"{policy} with hints" if hinted else policy, "s--" if hinted else "o-"
        axes.plot(budgets, rates, style, color=colors[policy], label=label)
    axes.axhline(100 * results[0].ideal_rate, color="tab:gray", linestyle=":", label="without a bound")
    axes.set(xlabel="budget, GB", ylabel="hit, % of prompt tokens", title=results[0].workload)
    axes.set(xscale="log", ylim=(0, 100))
    ticks = sorted({r.budget_bytes / GB for r in results})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
