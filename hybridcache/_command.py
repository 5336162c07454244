"""What the subcommands share: sizes, models and lists read from text, tables, progress, files written.

Owns the wording of wrong arguments of these kinds (ValueError, naming the argument) and the look of a table:
rich draws it on a terminal where the extra `cli` is installed, everywhere else it is plain aligned text.
Knows no cache.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from hybridcache.config import PRESETS, ModelLayout

PLOTS = (".png", ".svg", ".pdf")
UNITS: dict[str, int] = {"B": 1, **{f"{x}B": 1000**n for n, x in enumerate("kMGT", 1)}}
UNITS |= {f"{x}iB": 1024**n for n, x in enumerate("KMGT", 1)} | {"KB": 1000}
GB = 1e9

Rows = Sequence[Sequence[str]]


def split(text: str) -> list[str]:
    """A list with commas, no empty entries."""
    return [each.strip() for each in text.split(",") if each.strip()]


def read_bytes(name: str, text: str) -> int:
    """Bytes: a number with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{name}: {text!r}, expected a size such as 16GB or 8GiB")
    return round(float(found[1]) * UNITS[found[2]])


def read_config(text: str) -> dict[str, Any] | None:
    """A config.json; None for a preset's name, in any case."""
    if text.lower() in PRESETS:
        return None
    if not Path(text).is_file():
        raise ValueError(f"model: {text!r}, expected a config.json or one of {', '.join(PRESETS)}")
    try:
        config = json.loads(Path(text).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {text!r} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {text!r}, expected a config.json with an object in it")
    return config


def read_model(text: str, **options: Any) -> ModelLayout:
    """A preset by name, in any case, or a config.json. options: those of `ModelLayout.preset`."""
    config = read_config(text)
    if config is None:
        return ModelLayout.preset(text.lower(), **options)
    return ModelLayout.from_hf_config(config, **options)


def check_targets(json_target: str | None, plot: Path | None, *, plots: Sequence[str] = PLOTS) -> None:
    """What would fail after the work fails before it."""
    if json_target not in (None, "-"):
        Path(str(json_target)).open("a", encoding="utf-8").close()
    if plot and (plot.suffix not in plots or not plot.parent.is_dir()):
        raise ValueError(f"plot: {str(plot)!r}, expected a file of {', '.join(plots)} in a folder")


def add_json(add: Callable[..., Any], what: str) -> None:
    """`--json [PATH]`, where `what` says what is written."""
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help=f"write {what}; no PATH, or -: to standard output",
    )


def write(target: str, text: str) -> None:
    """To a file, or to standard output (`-`)."""
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def output(json_target: str | None) -> TextIO:
    """Where text for people goes: JSON on standard output wants that for itself."""
    return sys.stderr if json_target == "-" else sys.stdout


# --- tables ---


def show_table(rows: Rows, out: TextIO, *, title: str = "") -> None:
    """Writes a table; the first row names the columns."""
    if out.isatty() and show_rich(rows, out, title):
        return
    print((f"{title}\n" if title else "") + aligned(rows), file=out)


def aligned(rows: Rows) -> str:
    """Right-aligned columns under their names; the first one is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def show_rich(rows: Rows, out: TextIO, title: str = "") -> bool:
    """Writes a table as rich draws it; False: rich is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console(file=out, highlight=False).print(table)
    return True


# --- progress ---


class Ticker:
    """Progress on `out`: one line that is written over on a terminal, else a line every ten seconds."""

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock, self.terminal = out, clock, out.isatty()
        self.pause = 0.2 if self.terminal else 10.0
        self.next, self.width = clock() + self.pause, 0

    def show(self, text: str) -> None:
        """Writes `text`, if it is time."""
        if self.clock() < self.next:
            return
        self.next = self.clock() + self.pause
        if self.terminal:
            self.out.write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            self.out.write(text + "\n")
        self.out.flush()

    def wipe(self) -> None:
        """Leaves the terminal's line empty."""
        if self.width:
            self.out.write("\r" + " " * self.width + "\r")
            self.out.flush()
            self.width = 0


class Status:
    """What goes on, shown while it does: from two seconds on, by a thread of its own, so that work which
    cannot report shows too that it is alive. As a context manager; `say` changes the text.

    shown: None: if `out` is a terminal.
    """

    def __init__(
        self, text: str, out: TextIO | None = None, *, shown: bool | None = None, patience: float = 2.0
    ) -> None:
        self.text, self.out = text, sys.stderr if out is None else out
        self.patience = patience
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.shown = self.out.isatty() if shown is None else shown

    def say(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> Status:
        if self.shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.shown:
            self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        ticker = Ticker(self.out)
        if self._stop.wait(self.patience):
            return
        while not self._stop.wait(0.1):
            ticker.show(f"{self.text} ({time.monotonic() - started:.0f} s)")
        ticker.wipe()
