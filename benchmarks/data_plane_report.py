"""What a run of the data plane's benchmark says: its tables, its bounds and whether they hold, a plot.

Owns the bounds. Reads rows as `data_plane` makes them; measures nothing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_clock import Ceilings
from benchmarks.tables import drawing, table

Rows = list[dict[str, Any]]
OURS, PER_LAYER, LAYER_MAJOR = "ours", "per layer", "layer-major"
HEAD = "qwen3.5-397b"


def heading(about: dict[str, Any], limits: Ceilings, nbytes: int) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    copy, fill = f"{limits.copy / 1e12:.3f} TB/s (read and written)", f"{limits.fill / 1e12:.3f} TB/s"
    down, up = f"{limits.to_host / 1e9:.1f} GB/s down", f"{limits.to_device / 1e9:.1f} GB/s up"
    lines.append(
        f"ceilings of this run, plain operations on {nbytes / 2**30:g} GiB: copy {copy}, fill {fill};"
    )
    lines.append(f"pinned host copies {down}, {up}")
    return "\n".join(lines) + "\n"


def us(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def tables(rows: Rows) -> str:
    """One model and rank: one line an operation and count, `launched us / replayed us` for each layout."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    by_key = {(row["operation"], row["count"], row["layout"]): row for row in rows}
    lines = [["us launched / replayed", "MiB", *layouts, "TB/s", "of ceiling", "launched, x per layer"]]
    for operation, count in dict.fromkeys((row["operation"], row["count"]) for row in rows):
        found = {layout: by_key.get((operation, count, layout)) for layout in layouts}
        ours = found[OURS]
        if ours is None:
            continue
        cells = [
            f"{us(row['launched_us'])} / {us(row['replayed_us'])}" if row else "" for row in found.values()
        ]
        theirs = found.get(PER_LAYER)
        faster = f"{theirs['launched_us'] / ours['launched_us']:.1f}" if theirs else ""
        rates = f"{ours['tb_s']:.3f}", f"{100 * ours['fraction']:.1f} %"
        lines.append([f"{operation} x{count}", f"{ours['bytes'] / 2**20:,.1f}", *cells, *rates, faster])
    first = rows[0]
    return f"{first['model']}, tensor parallel {first['tp']}\n{table(lines)}"


def _row(rows: Rows, tp: int, operation: str, count: int, layout: str = OURS) -> dict[str, Any] | None:
    for row in rows:
        key = row["model"], row["tp"], row["operation"], row["count"], row["layout"]
        if key == (HEAD, tp, operation, count, layout):
            return row
    return None


def bounds(rows: Rows) -> Rows:
    """What is promised of Qwen3.5-397B, and of all that was measured. `measured` None: not in this run."""
    fractions = [
        ("restore one whole slot", 1, "restore", 1, 0.92),
        ("restore eight slots of a rank of 8", 8, "restore", 8, 0.92),
        ("restore one slot of a rank of 8", 8, "restore", 1, 0.75),
        ("zero one whole slot", 1, "zero", 1, 0.90),
        ("zero one slot of a rank of 8", 8, "zero", 1, 0.70),
        ("one whole slot to the host", 1, "to host", 1, 0.90),
        ("one whole slot from the host", 1, "to device", 1, 0.90),
        ("one slot of a rank of 8 to the host", 8, "to host", 1, 0.90),
        ("one slot of a rank of 8 from the host", 8, "to device", 1, 0.90),
    ]
    found = []
    for what, tp, operation, count, least in fractions:
        row = _row(rows, tp, operation, count)
        found.append(_bound(f"{what}, of the ceiling", row and row["fraction"], least, "at least"))
    for tp in (1, 8):
        ours, theirs = _row(rows, tp, "restore", 1), _row(rows, tp, "restore", 1, PER_LAYER)
        faster = theirs["launched_us"] / ours["launched_us"] if ours and theirs else None
        found.append(_bound(f"one slot, tp {tp}, launched: per layer / ours", faster, 10, "at least"))
    for peer, bound in ((PER_LAYER, 1.05), (LAYER_MAJOR, None)):
        for form in ("launched_us", "replayed_us"):
            worst = max(_ratios(rows, peer, form), default=None)
            what = f"any operation and count, {form.removesuffix('_us')}: ours / {peer}, the worst"
            found.append(_bound(what, worst, bound, "at most"))
    return found


def _ratios(rows: Rows, peer: str, form: str) -> list[float]:
    keys = ("model", "tp", "operation", "count")
    theirs = {tuple(row[key] for key in keys): row for row in rows if row["layout"] == peer}
    ours = [(row, theirs.get(tuple(row[key] for key in keys))) for row in rows if row["layout"] == OURS]
    return [row[form] / other[form] for row, other in ours if other and row[form] and other[form]]


def _bound(what: str, measured: float | None, bound: float | None, sign: str) -> dict[str, Any]:
    """`bound` None: said for completeness, nothing is promised."""
    holds = None
    if measured is not None and bound is not None:
        holds = measured >= bound if sign == "at least" else measured <= bound
    return {"what": what, "measured": measured, "sign": sign, "bound": bound, "holds": holds}


def bounds_table(found: Rows) -> str:
    verdict = {True: "holds", False: "FAILS", None: "not measured"}
    lines = [["shown by this run", "measured", "bound", ""]]
    for each in found:
        measured = "" if each["measured"] is None else f"{each['measured']:.3f}"
        bound = "none" if each["bound"] is None else f"{each['sign']} {each['bound']:g}"
        said = each["measured"] is not None and each["bound"] is None
        lines.append([each["what"], measured, bound, "" if said else verdict[each["holds"]]])
    return table(lines)


def plot(rows: Rows, about: dict[str, Any], path: str) -> bool:
    """Restores: microseconds as launched, and the fraction of the copy ceiling. False without matplotlib."""
    pyplot = drawing()
    if pyplot is None:
        return False
    panels = list(dict.fromkeys((row["model"], row["tp"]) for row in rows))
    figure, axes = pyplot.subplots(2, len(panels), figsize=(3.6 * len(panels), 7), squeeze=False)
    for column, (model, tp) in enumerate(panels):
        here = [row for row in rows if (row["model"], row["tp"], row["operation"]) == (model, tp, "restore")]
        for layout in dict.fromkeys(row["layout"] for row in here):
            line = [row for row in here if row["layout"] == layout]
            counts = [row["count"] for row in line]
            style = {"marker": "o" if layout == OURS else "x", "label": layout, "markersize": 4}
            axes[0][column].loglog(counts, [row["launched_us"] for row in line], **style)
            axes[1][column].semilogx(counts, [100 * row["fraction"] for row in line], **style)
        axes[0][column].set_title(f"{model}, tp {tp}", fontsize=9)
        axes[1][column].set_ylim(0, 105)
        axes[1][column].set_xlabel("slots restored at once")
    axes[0][0].set_ylabel("microseconds, launched")
    axes[1][0].set_ylabel("% of the copy ceiling")
    axes[0][0].legend(fontsize=7)
    for each in axes.flat:
        each.grid(True, alpha=0.3)
    figure.suptitle(f"Restoring states, {about['device']}, {about['date']}", fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
