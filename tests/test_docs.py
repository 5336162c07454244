"""Every code block of README and docs runs: python as it stands, shell line by line.

README's python is `test_readme`'s matter. Here: all shell, and the python of docs/, where the blocks of one
page run in order and share their names, as a reader would type them; `SETUPS` has what a page takes as given.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hybridcache import cli
from hybridcache._hf_config import PRESET_CONFIGS
from tests.conftest import Driver, tokens
from tests.test_workloads import small

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
SHELL, PYTHON, NO_CODE = ("sh", "bash", "shell"), ("python", "py"), ("", "text", "json", "toml", "yaml")
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {}  # page: what its blocks take as given


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, without the indent that lists give them."""
    for found in FENCE.finditer(text):
        lines = [line.removeprefix(found["indent"]) for line in found["text"].splitlines()]
        line = text.count("\n", 0, found.start()) + 2
        yield Block(line, found["language"], "\n".join(lines) + "\n")


def run_python(page: str, text: str, names: dict[str, Any]) -> int:
    """Runs the python of a page; how many blocks that were. A traceback names the line of the page."""
    count = 0
    for block in blocks(text):
        if block.language in PYTHON:
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            count += 1
    return count


def commands(block: Block) -> list[str]:
    """The lines of a shell block, joined where they go on, without prompts and comments."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line and not line.startswith("#")]


SHELL_LINES = [
    pytest.param(command, id=f"{page.name}:{block.line}-{command[:40]}")
    for page in PAGES
    for block in blocks(page.read_text())
    if block.language in SHELL
    for command in commands(block)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_language_that_is_run_or_is_no_code(page: Path) -> None:
    text = page.read_text()
    found = list(blocks(text))
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found)
    assert {block.language for block in found} <= {*SHELL, *PYTHON, *NO_CODE}


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("hybridcache")
    level = logger.level
    text = page.read_text()
    try:
        run = run_python(page.name, text, SETUPS.get(page.name, dict)())
    finally:
        logger.setLevel(level)  # a page turns the log on
    assert run == sum(block.language in PYTHON for block in blocks(text))


@pytest.mark.parametrize("command", SHELL_LINES)
def test_a_line_of_shell(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small("agentic").save(tmp_path / "trace.jsonl.gz")
    driver = Driver()
    driver.turn(tokens(30))
    (tmp_path / "dump.txt").write_text(driver.cache.dump())
    (tmp_path / "config.json").write_text(json.dumps(PRESET_CONFIGS["qwen3.5-9b"]))
    name, *arguments = shlex.split(command)
    run(name, arguments)


def run(name: str, arguments: list[str]) -> None:
    """Does what a reader's shell would do; what takes long or changes the machine is looked at only."""
    if name == "hybridcache" and arguments[0] == "bench":
        cli.parser().parse_args(arguments)
    elif name == "hybridcache":
        short = ["--turns", "1", "--first", "300", "--turn-tokens", "64"] if arguments[0] == "demo" else []
        assert cli.main([*arguments, *short]) == 0
    elif name == "make":
        make = shutil.which("make")
        assert make is not None
        subprocess.run([make, "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif name == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            assert all(re.search(rf"^{each} = \[", project, re.MULTILINE) for each in extra.split(","))
    elif name == "python" and arguments[0].startswith("examples/"):
        assert (ROOT / arguments[0]).is_file()
        assert Path(arguments[0]).name in (ROOT / "tests" / "test_examples.py").read_text()
    else:
        pytest.fail(f"{name}: nobody knows how to run that here")


# --- the machinery ---

PAGE = """\
Some text.

```python
first = given + 1
```

- a list

  ```python
  second = first * 2
  if second:
      third = 3
  ```

```sh
$ hybridcache size qwen3.5-9b \\
    --memory 80GB  # a comment
# nothing
make lint
```

```
no code
```
"""


def test_blocks_of_a_page_share_their_names_and_errors_name_the_line() -> None:
    names: dict[str, Any] = {"given": 1}
    assert run_python("page.md", PAGE, names) == 2
    assert (names["second"], names["third"]) == (4, 3)
    with pytest.raises(NameError) as raised:
        run_python("page.md", PAGE, {})
    assert raised.traceback[-1].lineno + 1 == 4 and str(raised.traceback[-1].path).endswith("page.md")
    found = list(blocks(PAGE))
    assert [block.language for block in found] == ["python", "python", "sh", ""]
    assert commands(found[2]) == ["hybridcache size qwen3.5-9b --memory 80GB", "make lint"]


@pytest.mark.parametrize(
    "command",
    [
        "hybridcache nothing",
        "hybridcache size gpt --memory 1GB",
        "make nothing",
        "pip install .[no]",
        "rm -r x",
        "python examples/no.py",
    ],
)
def test_a_line_that_does_not_run_is_noticed(command: str) -> None:
    name, *arguments = shlex.split(command)
    with pytest.raises((AssertionError, SystemExit, subprocess.CalledProcessError, pytest.fail.Exception)):
        run(name, arguments)


def test_the_command_line_is_installed_under_its_name() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'hybridcache = "hybridcache.cli:main"' in project
    done = subprocess.run(
        [sys.executable, "-m", "hybridcache", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: hybridcache ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "size qwen3.5-397b --memory 8x141GB --tp 8",
            "33 conversations of 50,000 tokens with 2 states each stay",
        ),
        ("replay agentic --memory 10GB,50GB", "agentic: 960 requests, 53.4 M prompt tokens"),
        ("show agentic:sessions=3 --memory 10GB --svg tree.svg", "svg: tree.svg"),
    ],
)
def test_a_newcomer_without_torch_waits_less_than_half_a_minute(
    command: str, said: str, tmp_path: Path
) -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'prometheus_client')); "
    code += "from hybridcache import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert said in " ".join(done.stdout.split())
