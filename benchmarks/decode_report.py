"""What a run of the decode benchmark says: its tables, what is promised and whether it holds, a plot.

Owns the bounds. Reads rows as `decode` makes them; measures nothing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.data_plane_report import _bound, bounds_table, heading, us
from benchmarks.tables import drawing, table

__all__ = ["bounds", "bounds_table", "heading", "plot", "tables"]

Rows = list[dict[str, Any]]
OURS = "ours"
LARGE = 64 << 20  # bytes of states in a step from which on it is the memory that counts


def tables(rows: Rows) -> str:
    """One model and rank: a line an operation and count, `launched us / replayed us` of a whole step."""
    head = ["us a step, launched / replayed", "MiB", "ours", "TB/s", "of ceiling"]
    lines = [[*head, "with copies", "x", "MiB gathered", "scattered", "bits, 8 columns"]]
    for row in rows:
        other = peer(rows, row)
        if row["form"] != OURS or other is None:
            continue
        mib = (f"{other[name] / 2**20:,.1f}" for name in ("gathered_bytes", "scattered_bytes"))
        lines.append(
            [
                name_of(row),
                f"{row['bytes'] / 2**20:,.1f}",
                times(row),
                f"{row['tb_s']:.3f}",
                f"{100 * row['fraction']:.1f} %",
                times(other),
                f"{best(other) / best(row):.2f}",
                *mib,
                "equal" if row["equal"] else "close",
            ]
        )
    first = rows[0]
    title = f"{first['model']}, tensor parallel {first['tp']}, {first['layers']} recurrent layers"
    return f"{title}\n{table(lines)}{prefill(rows)}"


def prefill(rows: Rows) -> str:
    """What the gather and the scatter add to a prompt's suffix."""
    with_slots, without = (row for row in rows if row["operation"] == "prefill")
    copied = (with_slots["gathered_bytes"] + with_slots["scattered_bytes"]) / 2**20
    return (
        f"prefill of {with_slots['tokens']} tokens through {with_slots['form']}, launched: "
        f"{us(with_slots['launched_us'])} us, {us(without['launched_us'])} us without slots; "
        f"{copied:,.1f} MiB gathered and scattered\n"
    )


def name_of(row: dict[str, Any]) -> str:
    tokens = f", {row['tokens'] - 1} drafts" if row["tokens"] > 1 else ""
    return f"{row['operation']} x{row['sequences']}{tokens}"


def times(row: dict[str, Any]) -> str:
    return f"{us(row['launched_us'])} / {us(row['replayed_us'])}"


def best(row: dict[str, Any]) -> float:
    """Replayed, where there are graphs."""
    return float(row["replayed_us"] or row["launched_us"])


def peer(rows: Rows, row: dict[str, Any]) -> dict[str, Any] | None:
    keys = ("model", "tp", "operation", "sequences", "tokens")
    for other in rows:
        if other["form"] != OURS and all(other[key] == row[key] for key in keys):
            return other
    return None


def bounds(rows: Rows) -> Rows:
    """No step is slower than with copies; large ones run at the speed of the memory."""
    ours = [row for row in rows if row["form"] == OURS and row["operation"] != "convolve"]
    pairs = [(row, other) for row in ours if (other := peer(rows, row)) is not None]
    found = []
    for form in ("replayed_us", "launched_us"):
        ratios = [row[form] / other[form] for row, other in pairs if row[form]]
        what = f"any step, {form.removesuffix('_us')}: ours / with copies, the worst"
        found.append(_bound(what, max(ratios, default=None), 1.0, "at most"))
    for operation in ("decode", "verify"):
        large = [
            row["fraction"]
            for row in ours
            if row["operation"] == operation and row["bytes"] >= LARGE * row["layers"] and row["replayed_us"]
        ]
        what = f"{operation} of 64 MiB of states a layer and more, of the ceiling: the worst"
        found.append(_bound(what, min(large, default=None), 0.85, "at least"))
    moved = [row["gathered_bytes"] + row["scattered_bytes"] for row in ours]
    found.append(_bound("bytes that ours gathers and scatters", float(max(moved)), 0, "at most"))
    return found


def plot(rows: Rows, about: dict[str, Any], path: str) -> bool:
    """Microseconds of a step by sequences, ours and with copies. False without matplotlib."""
    pyplot = drawing()
    if pyplot is None:
        return False
    panels = list(dict.fromkeys((row["model"], row["tp"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axis, (model, tp) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["model"], row["tp"]) == (model, tp)]
        for operation, style in (("decode", "-"), ("verify", "--")):
            for form, marker in dict.fromkeys(
                (row["form"], "o" if row["form"] == OURS else "x")
                for row in here
                if row["operation"] == operation
            ):
                line = [row for row in here if (row["operation"], row["form"]) == (operation, form)]
                label = f"{operation}, {form}"
                axis.loglog(
                    [row["sequences"] for row in line],
                    [best(row) for row in line],
                    style,
                    marker=marker,
                    markersize=4,
                    label=label,
                )
        axis.set_title(f"{model}, tp {tp}", fontsize=9)
        axis.set_xlabel("sequences")
        axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("microseconds a step")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"The recurrent update of a step, {about['device']}, {about['date']}", fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
