"""A dump of the cache as an SVG: each node a box that says what it holds and what it is worth.

Owns the geometry, the colours and the markup, which is written here, without a library. Reads `tree_view`'s
values only. The longer a box, the more tokens its edge has (by their logarithm); the darker the bar at its
foot, the later its state would leave.
"""

from __future__ import annotations

import math
from html import escape

from hybridcache.tree_view import Dump, Node, checkpoint_words, describe_lease, ordinal

COLOURS = {
    "turn_end": "#4c9f70",
    "prompt_end": "#4a86c5",
    "chunk_end": "#8f7fc0",
    "breakpoint": "#d08a3c",
    "fork": "#c9565a",
    "cut": "#57a5a5",
    "interior": "#9a8f6a",
}
EMPTY, TEXT, LINE = "#d9d9d9", "#222222", "#8a8a8a"
ROW, BOX, GAP, MARGIN = 60, 51, 26, 16  # pixels: of a row, of a box in it, between boxes, around all
LETTER = 6.1  # the width of a letter of the text, about


def svg(dump: Dump, title: str, head: str) -> str:
    """The whole file, under a title and a line about the cache."""
    parts: list[str] = []
    y, right = MARGIN + 44.0, 0.0
    for salt, roots in dump.salts.items():
        parts.append(_text(MARGIN, y + 14, f"salt {salt or '(none)'}", bold=True))
        y += 24
        rows, places = _rows(roots), _columns(roots)
        for root in roots:
            for node in root.walk():
                x, width = places[id(node)]
                right = max(right, x + width)
                top = y + rows[id(node)] * ROW
                parts += _links(node, x + width, top, places, rows)
                parts.append(_box(node, x, top, width, _shade(node, dump)))
        y += (len(set(rows.values())) + (salt in dump.hidden)) * ROW + 12
        if salt in dump.hidden:
            parts.append(_text(MARGIN, y - ROW, f"... {dump.hidden[salt]:,} more"))
    for lease in dump.leases:
        parts.append(_text(MARGIN, y + 14, describe_lease(lease)))
        right = max(right, MARGIN + LETTER * len(describe_lease(lease)))
        y += 18
    header = [_text(MARGIN, MARGIN + 12, title, bold=True), _text(MARGIN, MARGIN + 30, head)]
    legend = _legend(MARGIN, y + 12)
    width = max(right, MARGIN + LETTER * len(head), 900) + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y + 44:.0f}" '
        'font-family="monospace" font-size="10">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([*header, *parts, *legend])
        + "\n</svg>\n"
    )


def _rows(roots: list[Node]) -> dict[int, float]:
    """The row of each node: leaves take one each, in order; the first child stands beside its parent."""
    rows: dict[int, float] = {}
    row = -1
    for root in roots:
        firsts = {id(root): False}
        for node in root.walk():
            row += not firsts[id(node)]
            rows[id(node)] = row
            firsts |= {id(child): child is node.children[0] for child in node.children}
    return rows


def _columns(roots: list[Node]) -> dict[int, tuple[float, float]]:
    """Where each box begins, and how wide it is."""
    places: dict[int, tuple[float, float]] = {}
    for root in roots:
        places[id(root)] = (MARGIN, _width(root))
        for node in root.walk():
            x, width = places[id(node)]
            places |= {id(child): (x + width + GAP, _width(child)) for child in node.children}
    return places


def _width(node: Node) -> float:
    words = max(len(line) for line in _lines(node))
    return max(LETTER * words + 14, 40 + 14 * math.log2(1 + node.depth - node.begin))


def _lines(node: Node) -> list[str]:
    """What is written in the box."""
    first = [f"at {node.depth:,}", f"{node.depth - node.begin:,} tokens", f"{node.pages:,} pages"]
    first += [f"{node.pins} pin{'s' * (node.pins > 1)}"] if node.pins else []
    first += [f"{node.hidden:,} more"] if node.hidden else []
    held = node.checkpoint
    if held is None:
        return [" · ".join(first), "no state"]
    second = [held.kind, f"slot {held.slot}", f"tick {held.tick}"]
    second += ["superseded"] if held.superseded else []
    third = [f"worth {held.worth:.3g}"] if held.worth is not None else []
    third += [f"leaves {ordinal(held.leaves)}"] if held.leaves is not None else []
    third += ["pinned"] if held.pinned else []
    return [" · ".join(words) for words in (first, second, third)]


def _shade(node: Node, dump: Dump) -> float | None:
    """0: the next to leave; 1: the last one, or pinned; None: nobody knows."""
    held = node.checkpoint
    if held is None or (held.leaves is None and not held.pinned):
        return None
    return 1.0 if held.leaves is None else held.leaves / max(dump.arena["checkpoints"], held.leaves)


def _box(node: Node, x: float, y: float, width: float, shade: float | None) -> str:
    held = node.checkpoint
    colour = COLOURS.get(held.kind, "#b07aa1") if held else EMPTY
    style = f'fill="{colour}" fill-opacity="0.28" stroke="{colour if held else LINE}"'
    style += ' stroke-width="2.5"' if node.pins or (held and held.pinned) else ""
    style += ' stroke-dasharray="5 3"' if held and held.superseded else ""
    parts = [f"<title>{escape(_tooltip(node))}</title>"]
    parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX}" rx="4" {style}/>')
    parts += [_text(x + 7, y + 14 + 13 * place, line) for place, line in enumerate(_lines(node))]
    if shade is not None:
        bar = f'x="{x + 4:.1f}" y="{y + BOX - 5:.1f}" width="{width - 8:.1f}" height="3"'
        parts.append(f'<rect {bar} fill="{colour}" fill-opacity="{0.1 + 0.9 * shade:.2f}"/>')
    return "<g>" + "".join(parts) + "</g>"


def _tooltip(node: Node) -> str:
    tokens = " ".join(map(str, node.tokens))
    lines = [
        f"tokens [{node.begin:,}, {node.depth:,}): {tokens} ...",
        f"pages {node.pages:,}, pins {node.pins}",
    ]
    lines += ["  ".join(checkpoint_words(node.checkpoint))] if node.checkpoint else ["no state here"]
    lines += [f"{name} {value}" for name, value in node.more.items()]
    return "\n".join(lines)


def _links(
    node: Node, x: float, y: float, places: dict[int, tuple[float, float]], rows: dict[int, float]
) -> list[str]:
    """A line to each child: across, and down to its row."""
    links = []
    for child in node.children:
        down = y + (rows[id(child)] - rows[id(node)]) * ROW + BOX / 2
        path = f"M {x:.1f} {y + BOX / 2:.1f} h {GAP / 2} V {down:.1f} H {places[id(child)][0]:.1f}"
        links.append(f'<path d="{path}" fill="none" stroke="{LINE}"/>')
    return links


def _legend(x: float, y: float) -> list[str]:
    parts = []
    for kind, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="10" height="10" fill="{colour}" fill-opacity="0.5"/>')
        parts.append(_text(x + 14, y + 9, kind))
        x += 14 + LETTER * (len(kind) + 2)
    parts.append(
        _text(x, y + 9, "dashed: superseded · bold: pinned · the darker the foot, the later it leaves")
    )
    return parts


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{TEXT}"{weight}>{escape(text)}</text>'
