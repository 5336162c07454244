"""How a run of the demo is shown: lines while it runs, table, summary, plot and JSON.

Owns the wording and the layout of the output. Reads `demo.Row` and `demo.Demo`, runs nothing and touches
neither the model nor the cache. matplotlib is optional: without it there is no plot, and the command line
says so.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from .demo import PAGE_SIZE, Demo, Row

COLUMNS = (
    "turn",
    "prompt",
    "reused",
    "computed",
    "beyond ideal",
    "extra passes",
    "cold ms",
    "cached ms",
    "ratio",
    "exact",
)


def opening(demo: Demo) -> str:
    """What is about to run, and on what."""
    profile, kinds = demo.profile, demo.model.config.layer_types
    layers = f"{kinds.count('linear_attention')} recurrent + {kinds.count('full_attention')} full layers"
    size, mib = sum(map(len, demo.corpus.files.values())), demo.memory_bytes / 2**20
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    return f"""\
An agent conversation on CPU: {profile.turns} turns, {profile.first:,} tokens first,
then {profile.turn_tokens} a turn, {profile.generate} of them generated.
  text    {len(demo.corpus.files)} files ({size:,} bytes) of this repository as tool results;
          a token is a byte of UTF-8
  model   {type(demo.model).__name__} of transformers {transformers.__version__}, {layers}, {profile.dtype};
          random weights, set so that its states remember (transformers' own would forget within a token)
  cache   an arena of {mib:.1f} MiB, pages of {PAGE_SIZE} tokens, prefill in chunks of {profile.chunk:,}
  engine  torch {torch.__version__}, {threads} for every side

  cold    time to first token of the plain model: one forward over the whole prompt
  cached  the same through hybridcache: match, plan, restore and the forwards over the rest
  ideal   computes only what no earlier step has read
  exact   every logit that was computed equals, bit for bit, the same steps of the plain model on one
          DynamicCache that never left
"""


def progress(row: Row, turns: int) -> str:
    """One line for a finished turn."""
    return (
        f"turn {row.turn:>2}/{turns}: prompt {row.prompt:>6,}, computed {row.computed:>6,}, "
        f"first token: cold {row.cold_ms:>7.1f} ms, cached {row.cached_ms:>7.1f} ms, "
        f"{'exact' if row.exact else 'NOT EXACT'}"
    )


def table(rows: Sequence[Row]) -> str:
    """A line a turn, right-aligned under the names of the columns; then why a turn is not as it should be."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], *notes(rows)])


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table: the first row names the columns."""
    return [COLUMNS, *map(_cells, rows)]


def notes(rows: Sequence[Row]) -> list[str]:
    """Why a turn is not as it should be."""
    said = [f"turn {row.turn}: {row.note}" for row in rows if row.note]
    miscounted = [row.turn for row in rows if not row.counts_agree]
    return said + [f"turn {turn}: the lease counts otherwise than the hook" for turn in miscounted]


def _cells(row: Row) -> tuple[str, ...]:
    counts = (row.turn, row.prompt, row.reused, row.computed, row.beyond_ideal, row.extra_passes)
    times = (f"{row.cold_ms:.1f}", f"{row.cached_ms:.1f}", f"{row.speedup:.1f}x")
    return (*(f"{count:,}" for count in counts), *times, "yes" if row.exact else "NO")


def summarize(demo: Demo) -> dict[str, Any]:
    """The summary's figures; sums are over turns 2 and later."""
    later = demo.rows[1:]
    return {
        "ok": all(row.ok for row in demo.rows),
        "exact_turns": sum(row.exact for row in demo.rows),
        "compared_logit_rows": demo.compared,
        "prompt": sum(row.prompt for row in later),
        "computed": sum(row.computed for row in later),
        "beyond_ideal": sum(row.beyond_ideal for row in later),
        "extra_passes": sum(row.extra_passes for row in later),
        "last_ratio": demo.rows[-1].speedup,
        "median_ratio": statistics.median(row.speedup for row in later or demo.rows),
        "cold_difference": max(row.cold_difference for row in demo.rows),
    }


def summary(demo: Demo) -> str:
    """What the rows come to, in words."""
    figures, turns = summarize(demo), len(demo.rows)
    lines = [
        f"exact on {figures['exact_turns']} of {turns} turns "
        f"({demo.compared:,} rows of {demo.model.config.vocab_size} logits compared)",
        f"logits differ from the cold forward's by at most {figures['cold_difference']:.2g} "
        "(other steps round otherwise)",
    ]
    if turns > 1:
        lines[1:1] = [
            f"from turn 2 on: {figures['beyond_ideal']:,} tokens beyond the ideal, "
            f"{figures['extra_passes']} extra passes; "
            f"{figures['computed']:,} of {figures['prompt']:,} prompt tokens computed",
            f"turn {turns}: time to first token {figures['last_ratio']:.1f}x under the cold one "
            f"(median from turn 2 on: {figures['median_ratio']:.1f}x)",
        ]
    if demo.corpus.rounds:
        times = demo.corpus.rounds
        lines.append(f"the text was too short: read again at other offsets, {times} time(s)")
    return "\n".join([*lines, "PASS" if figures["ok"] else "FAIL"])


def as_json(demo: Demo) -> dict[str, Any]:
    """All rows, and what they ran on; no name of a host, no path."""
    return {
        "benchmark": "demo",
        "profile": asdict(demo.profile),
        "machine": {
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": demo.profile.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {
            "class": type(demo.model).__name__,
            "layer_types": list(demo.model.config.layer_types),
            "page_size": PAGE_SIZE,
            "memory_bytes": demo.memory_bytes,
        },
        "rows": [{**asdict(row), "ratio": row.speedup, "ok": row.ok} for row in demo.rows],
        "cache": demo.cached.cache.stats(),
        "summary": summarize(demo),
    }


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draw the times to first token and the tokens computed as PNG; False: no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    turns, reused = [row.turn for row in rows], [row.reused for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    times, tokens = figure.subplots(1, 2)
    times.plot(turns, [row.cold_ms for row in rows], "o-", color="tab:gray", label="cold, one forward")
    times.plot(turns, [row.cached_ms for row in rows], "o-", color="tab:green", label="hybridcache")
    times.set(xlabel="turn", ylabel="ms", yscale="log", title="Time to first token")
    tokens.bar(turns, reused, color="tab:green", label="reused")
    tokens.bar(turns, [row.computed for row in rows], bottom=reused, color="tab:orange", label="computed")
    tokens.set(xlabel="turn", ylabel="tokens", title="Where the prompt came from")
    for axes in (times, tokens):
        axes.legend(loc="best")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)
    return True
