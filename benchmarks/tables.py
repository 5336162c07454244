"""A table in Markdown and what draws a plot, for the reports of all benchmarks. Owns nothing of what stands
in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def drawing() -> Any:
    """matplotlib's pyplot, which draws into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def table(lines: Sequence[Sequence[str]]) -> str:
    """The first line names the columns; the first column is left-aligned, all others right-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("| " + " | ".join(cells) + " |")
        if number == 0:
            out.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(out) + "\n"
