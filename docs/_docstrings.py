"""What the reference does to docstrings before they become pages: they are prose, written for `help()`.

A line `name: what it is` becomes an item of a list, a doctest a fence. Changes nothing else.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"(?:\w+(?:, \w+)*|`[^`]+`): \S")


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(_paragraph, obj.docstring.value.split("\n\n")))


def _paragraph(text: str) -> str:
    if text.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if ITEM.match(line)]
    if not starts:
        return text
    first = "\n".join(lines[: starts[0]])
    items = [
        re.sub(r"^(.+?): ", r"- *\1*: ", " ".join(line.strip() for line in lines[begin:end]), count=1)
        for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True)
    ]
    return "\n\n".join(filter(None, [first, "\n".join(items)]))
