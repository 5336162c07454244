"""What a run of the benchmark of times to first token says: its tables, its bounds and whether they hold, a
plot.

Owns the bounds. Reads rows as `ttft` makes them; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.data_plane_report import _bound, bounds_table
from benchmarks.tables import drawing, table

__all__ = ["bounds", "bounds_table", "heading", "inner", "plot", "talks", "turns"]

Rows = list[dict[str, Any]]
WITHIN = 1.10  # of the ideal
FASTER = 20  # than cold


def heading(about: dict[str, Any], model: Any) -> str:
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = f"{parameters / 1e9:.2f} billion weights in {model.dtype}, {config.num_hidden_layers} layers"
    return ", ".join(f"{name} {value}" for name, value in about.items()) + f"\n{config.model_type}: {shape}\n"


def mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


def turns(rows: Rows) -> str:
    """One conversation, a line a turn."""
    head = ["turn", "prompt", "new", "cold ms", "ideal ms", "cached ms", "/ ideal", "cold /"]
    lines = [[*head, "beyond ideal", "bits", "MiB taken: cold", "ideal", "cached"]]
    for row in rows:
        lines.append(
            [
                str(row["turn"] + 1),
                f"{row['prompt']:,}",
                f"{row['suffix']:,}",
                f"{row['cold_ms']:,.1f}",
                f"{row['ideal_ms']:,.1f}",
                f"{row['cached_ms']:,.1f}",
                f"{row['cached_ms'] / row['ideal_ms']:.3f}",
                f"{row['cold_ms'] / row['cached_ms']:.1f}",
                str(row["beyond_ideal"]),
                "equal" if row["exact"] else "DIFFER",
                mib(row["cold_bytes"]),
                mib(row["ideal_bytes"]),
                mib(row["cached_bytes"]),
            ]
        )
    return f"one conversation\n{table(lines)}"


def talks(rows: Rows) -> str:
    """Conversations that take turns, a line a turn: the median of all, and the worst."""
    if not rows:
        return "no conversations in turn\n"
    number = len({row["talk"] for row in rows})
    lines = [["turn", "ideal ms", "cached ms", "worst / ideal", "beyond ideal", "bits"]]
    for turn in sorted({row["turn"] for row in rows}):
        here = [row for row in rows if row["turn"] == turn]
        lines.append(
            [
                str(turn + 1),
                f"{median(row['ideal_ms'] for row in here):,.1f}",
                f"{median(row['cached_ms'] for row in here):,.1f}",
                f"{max(row['cached_ms'] / row['ideal_ms'] for row in here):.3f}",
                str(sum(row["beyond_ideal"] for row in here)),
                "equal" if all(row["exact"] for row in here) else "DIFFER",
            ]
        )
    return f"{number} conversations in turn\n{table(lines)}"


def inner(found: dict[str, Any]) -> str:
    lines = [["checkpoints inside a prompt", "passes", "inner", "ms to first token", "more than without"]]
    for prompt in ("next turn", "first prompt"):
        least = found[prompt]["no checkpoint"]["ms"]
        for name, row in found[prompt].items():
            cells = str(row["passes"]), str(row["inner"]), f"{row['ms']:,.1f}", f"{row['ms'] - least:+,.1f}"
            lines.append([f"{prompt}: {name}", *cells])
    same = "the same bits" if found["resumed_equal"] else "other bits"
    difference = f"largest difference {found['resumed_difference']:.1e} of the largest logit"
    plain = f"a plain run that reads the same tokens in two passes instead of one: {found['yardstick']:.1e}"
    return f"{table(lines)}who resumes at either checkpoint gets {same} ({difference}; {plain})\n"


def bounds(result: dict[str, Any]) -> Rows:
    """What is promised, of the turns after the first: that one is cold for everybody."""
    found = []
    for name in ("alone", "together"):
        rows = result[name]
        later = [row for row in rows if row["turn"]]
        ratio = _worst(max, (row["cached_ms"] / row["ideal_ms"] for row in later))
        found.append(_bound(f"{name}: cached / ideal, the worst turn", ratio, WITHIN, "at most"))
        pairs = _worst(max, map(pair_by_pair, later))
        found.append(_bound(f"{name}: the same, pair by pair", pairs, None, "at most"))
        beyond = sum(row["beyond_ideal"] for row in rows) if rows else None
        found.append(_bound(f"{name}: tokens computed beyond the ideal", beyond, 0, "at most"))
        wrong = sum(not row["exact"] for row in rows) if rows else None
        found.append(_bound(f"{name}: turns whose bits differ from the ideal", wrong, 0, "at most"))
    later = [row for row in result["alone"] if row["turn"]]
    faster = _worst(min, (row["cold_ms"] / row["cached_ms"] for row in later))
    found.append(_bound("alone: cold / cached, the worst turn", faster, FASTER, "at least"))
    first = (row["cached_ms"] / row["ideal_ms"] for row in result["alone"] if not row["turn"])
    found.append(
        _bound("alone: the first turn, through the cache / without", next(first, None), WITHIN, "at most")
    )
    saved = None
    if result["inner"]:
        costs = {name: row["ms"] for name, row in result["inner"]["next turn"].items()}
        least = costs["no checkpoint"]
        saved = (costs["inner checkpoint"] - least) / (costs["second pass"] - least)
    found.append(_bound("a checkpoint inside a turn: inner / second pass", saved, None, "at most"))
    return found


def pair_by_pair(row: dict[str, Any]) -> float:
    """The median of cached / ideal of runs that followed each other: a slow host slows both of them."""
    return median(c / i for c, i in zip(row["cached_runs_ms"], row["ideal_runs_ms"], strict=True))


def _worst(choose: Callable[..., Any], values: Any) -> float | None:
    return choose(values, default=None)


def plot(result: dict[str, Any], path: str) -> bool:
    """Milliseconds to the first token by turn, and cached over ideal. False without matplotlib."""
    pyplot = drawing()
    if pyplot is None:
        return False
    figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows = result["alone"] or result["together"]
    numbers = [row["turn"] + 1 for row in rows]
    for name, label in (("cold_ms", "cold"), ("cached_ms", "cached"), ("ideal_ms", "ideal: never left")):
        style = {"marker": "o", "markersize": 4, "linestyle": "--" if name == "ideal_ms" else "-"}
        points = [(number, row[name]) for number, row in zip(numbers, rows, strict=True) if name in row]
        if points:
            times.semilogy(*zip(*points, strict=True), label=label, **style)
    for name, label, marker in (("alone", "one conversation", "o"), ("together", "several in turn", "x")):
        later = [row for row in result[name] if row["turn"]]
        points = [row["cached_ms"] / row["ideal_ms"] for row in later]
        ratios.scatter([row["turn"] + 1 for row in later], points, marker=marker, s=18, label=label)
    ratios.axhline(WITHIN, color="grey", linestyle=":", linewidth=1)
    ratios.axhline(1, color="grey", linewidth=1)
    times.set_ylabel("milliseconds to the first token")
    ratios.set_ylabel("cached / ideal")
    for each in (times, ratios):
        each.set_xlabel("turn")
        each.grid(True, alpha=0.3)
        each.legend(fontsize=8)
    about = result["machine"]
    figure.suptitle(
        f"A conversation of {rows[0]['prompt']:,} tokens and more, {about['device']}, {about['date']}"
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
