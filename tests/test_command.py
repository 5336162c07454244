"""What the subcommands share: tables with and without rich, sizes, models, progress; every `--help`."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridcache import _command, cli

ROOT = Path(__file__).parent.parent
ROWS = [["what", "count", "[red]share[/red]"], ["first", "1,000", "12.5"], ["a longer second", "7", "100.0"]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def cells(text: str) -> list[str]:
    return re.findall(r"[\w,.\[\]/]+", re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_a_table_is_plain_text_where_nobody_looks() -> None:
    out = io.StringIO()
    _command.show_table(ROWS, out, title="things")
    lines = out.getvalue().splitlines()
    assert lines[0] == "things" and set(lines[2]) == {"-"}
    assert lines[3] == "first            1,000              12.5"


def test_a_terminal_gets_a_table_of_rich_with_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    plain, rich, without = io.StringIO(), Terminal(), Terminal()
    _command.show_table(ROWS, plain)
    _command.show_table(ROWS, rich)
    assert "─" in rich.getvalue() and cells(rich.getvalue()) == cells(plain.getvalue())
    monkeypatch.setitem(sys.modules, "rich.table", None)
    _command.show_table(ROWS, without)
    assert without.getvalue() == plain.getvalue()


def subcommands() -> list[str]:
    (choices,) = (action.choices for action in cli.parser()._actions if action.choices)
    return sorted(choices)


def test_without_a_command_all_of_them_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert "examples:" in said and all(name in said for name in ("size", "replay", "show", "bench", "demo"))


def test_json_without_a_path_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["size", "qwen3.5-9b", "--memory", "80GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", subcommands())
def test_every_help_shows_examples_that_parse_and_offers_json(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--json" in out
    examples = re.findall(rf"^  hybridcache ({name}\b.*?)(?:  .*)?$", out, re.MULTILINE)
    assert examples
    for example in examples:
        assert cli.parser().parse_args(example.split()).command == name


def test_the_help_of_all_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    examples = re.findall(r"^  hybridcache (.+)$", out, re.MULTILINE)
    assert sorted(example.split()[0] for example in examples) == subcommands()
    for example in examples:
        cli.parser().parse_args(example.split())


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("1.5 GiB", 3 << 29), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert _command.read_bytes("memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "5", "5 gb", "-5GB", "5XB"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^memory: .*expected a size"):
        _command.read_bytes("memory", text)


def test_targets_are_tried_before_the_work(tmp_path: Path) -> None:
    _command.check_targets("-", tmp_path / "p.svg")
    with pytest.raises(OSError, match="nowhere"):
        _command.check_targets(str(tmp_path / "nowhere" / "x.json"), None)
    with pytest.raises(ValueError, match="plot"):
        _command.check_targets(None, tmp_path / "p.gif")


def test_work_that_takes_long_says_so_after_a_while() -> None:
    def worked(out: io.StringIO, patience: float, shown: bool | None = None) -> str:
        with _command.Status("at first", out, shown=shown, patience=patience) as status:
            status.say("the work")
            time.sleep(0.6)
        return out.getvalue()

    slow = worked(Terminal(), 0.0)
    assert re.search(r"\rthe work \(\d+ s\)", slow) and slow.endswith("\r")
    assert worked(Terminal(), 5.0) == ""
    assert worked(io.StringIO(), 0.0) == "" == worked(Terminal(), 0.0, shown=False)
    with pytest.raises(KeyError), _command.Status("it fails", Terminal()):
        raise KeyError


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "hybridcache", "show", "agentic:sessions=40,turns=2", "--memory", "9GB"]
    with subprocess.Popen(
        [*command, "--limit", "5000", "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait() == 0 and "Error" not in errors and "Broken" not in errors, errors
