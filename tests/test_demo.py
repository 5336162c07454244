"""The demo, in small: what it reports when all is well, and that it reports it when something is not.

Owns no model of its own: every run goes through the command line, as a user's does. The faults are put into
the library from outside (a shifted state, a shifted page, a turn that is not kept, a cut that nobody needs).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import hybridcache
from hybridcache import cli, demo, demo_report
from hybridcache.hf import CachedModel, Request
from hybridcache.pools import Pools

PACKAGE = Path(demo.__file__).parent
SMALL = [
    "demo",
    *["--turns", "3", "--first", "512", "--turn-tokens", "128", "--generate", "8", "--chunk", "200"],
]


class Run:
    """One run of the command line: its exit status, output and figures."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, target = folder, folder / "demo.json"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.status = cli.main([*SMALL, "--out", str(folder), "--json", str(target), *arguments])
        self.output, self.text = out.getvalue(), target.read_text()
        self.figures = json.loads(self.text)
        self.rows = self.figures["rows"]

    def column(self, name: str) -> list[object]:
        return [row[name] for row in self.rows]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without faults, for those who only look at it."""
    return Run(tmp_path_factory.mktemp("demo"))


# --- all is well ---


def test_small_run(small: Run) -> None:
    assert small.status == 0
    assert small.column("prompt") == [512, 640, 768]
    # The last of 8 generated tokens was never read: a turn reads 120 new tokens and that one.
    assert small.column("reused") == [0, 519, 647]
    assert small.column("computed") == [512, 121, 121]
    assert small.column("beyond_ideal") == [0, 0, 0]
    assert small.column("extra_passes") == small.column("lease_extra_passes") == [0, 0, 0]
    assert small.column("exact") == [True, True, True]
    assert all(row["cached_ms"] > 0 and row["cold_ms"] > 0 for row in small.rows)
    assert all(0 < row["cold_difference"] < 1e-4 for row in small.rows[1:])
    assert small.figures["summary"]["compared_logit_rows"] == 512 + 2 * 121 + 3 * 7
    assert (small.folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_states_come_from_the_arena(small: Run) -> None:
    stats = small.figures["cache"]
    assert stats["tokens_hit"] == 519 + 647
    assert stats["restored_turn_end"] == 2


def test_output(small: Run) -> None:
    lines = small.output.splitlines()
    assert [line[:9] for line in lines if "first token: cold" in line] == [
        "turn  1/3",
        "turn  2/3",
        "turn  3/3",
    ]
    header = next(i for i, line in enumerate(lines) if line.split()[:2] == ["turn", "prompt"])
    rows = [line.split() for line in lines[header + 2 : header + 5]]
    assert [(row[1], row[2], row[3], row[-1]) for row in rows] == [
        ("512", "0", "512", "yes"),
        ("640", "519", "121", "yes"),
        ("768", "647", "121", "yes"),
    ]
    assert any("random weights, set so that its states remember" in line for line in lines)
    assert lines[-2:] == ["PASS", "plot: demo.png"]


def test_json_says_what_it_ran_on_and_not_where(small: Run) -> None:
    assert set(small.figures["machine"]) == {
        "architecture",
        "cpus",
        "threads",
        "python",
        "torch",
        "transformers",
    }
    assert small.figures["machine"]["threads"] == 1
    for private in (str(small.folder), str(PACKAGE), str(Path.home()), socket.gethostname()):
        assert f'"{private}' not in small.text


def test_json_on_standard_output_is_alone_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--turns", "1", "--out", str(tmp_path), "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["rows"]) == 1
    assert "PASS" in captured.err


def test_bfloat16_is_exact_too(tmp_path: Path) -> None:
    small = Run(tmp_path, "--dtype", "bfloat16")
    assert small.status == 0
    assert small.column("exact") == [True, True, True]


def test_nothing_global_stays_changed(tmp_path: Path) -> None:
    torch.manual_seed(7)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    Run(tmp_path, "--turns", "1", "--threads", str(3 - min(threads, 2)))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    small = Run(tmp_path, "--turns", "1")
    assert small.status == 0
    assert "pip install matplotlib" in small.output
    assert not (tmp_path / "demo.png").exists()


# --- something is wrong ---


def shift(part: torch.Tensor, ids: list[int], axis: int) -> None:
    for index in ids:
        part[index] = part[index].roll(1, axis)


@pytest.mark.parametrize("fault", ["state", "conv", "kv"])
def test_a_wrong_restore_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    apply = Pools.apply

    def wrong(pools: Pools, plan) -> None:
        apply(pools, plan)
        slots = [int(target) for _, target in plan.copy_slots]
        pages = [int(target) for _, target in plan.copy_pages]
        if fault == "kv":
            shift(pools.kv(3)[0], pages, 0)
        else:
            shift(pools.state(0)[fault == "state"], slots, 0)

    monkeypatch.setattr(Pools, "apply", wrong)
    small = Run(tmp_path)
    assert small.status == 1
    first = (
        fault != "state"
    )  # which is read where the plan leaves it, also behind the end of one's own prompt
    assert small.column("exact") == [first, False, False]
    assert "rows of logits differ" in small.rows[1]["note"]
    assert small.figures["summary"]["exact_turns"] == first
    assert small.output.splitlines()[-2] == "FAIL"


def test_a_turn_that_is_not_kept_is_beyond_the_ideal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Request.close
    monkeypatch.setattr(Request, "close", lambda request: close(request, keep="nothing"))
    small = Run(tmp_path)
    assert small.status == 1
    assert small.rows[1]["beyond_ideal"] >= 7  # at best it resumes at the end of the prompt before
    assert small.rows[1]["computed"] == 121 + small.rows[1]["beyond_ideal"]
    assert "not where the live run stood" in small.rows[1]["note"]


def test_an_extra_pass_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = CachedModel.open

    def with_cut(model: CachedModel, prompt: list[int], **options):
        return reserve(model, prompt, breakpoints=[len(prompt) - 40], **options)

    monkeypatch.setattr(CachedModel, "open", with_cut)
    small = Run(tmp_path)
    assert small.status == 1
    assert small.column("extra_passes") == small.column("lease_extra_passes") == [1, 1, 1]
    assert small.column("exact") == [True, True, True]


def test_what_makes_a_row_fail() -> None:
    good = demo.Row(2, 640, 519, 121, 0, 0, 0, 9.0, 3.0, True, 0.0, "")
    assert good.ok
    assert good.speedup == 3.0
    for wrong in (
        {"exact": False},
        {"beyond_ideal": 1},
        {"extra_passes": 1},
        {"lease_extra_passes": 1},
        {"computed": 120},
    ):
        assert not replace(good, **wrong).ok, wrong
    first = replace(good, turn=1, extra_passes=1, lease_extra_passes=1)
    assert first.ok  # a first prompt may pay for a cut
    assert "the lease counts otherwise" in demo_report.table([replace(good, computed=120)])


# --- the parts ---


def test_the_model_remembers() -> None:
    """A recurrent state that is off must show: else exactness would prove nothing."""
    profile = demo.Profile(first=512)
    with demo.engine(profile):
        model = demo.build_model(profile)
        live = demo.LiveReference(model)
        tokens = list(range(256)) * 2
        live.read(tokens, 448)
        other = demo.LiveReference(model)
        other.read(tokens, 448)
        state = other._cache.layers[1].recurrent_states
        (state[0] if isinstance(state, dict) else state).zero_()
        assert float((live.read(tokens, 512) - other.read(tokens, 512)).abs().max()) > 0.5


def test_ideal_is_what_was_read() -> None:
    assert demo.common_prefix([1, 2, 3], [1, 2, 3, 4]) == 3
    assert demo.common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert demo.common_prefix([], [1]) == 0


def test_corpus_is_cut_to_size_and_read_again_elsewhere() -> None:
    files = [("a.md", bytes(range(100)) * 3), ("b.md", b"xyz" * 50), ("empty.md", b"")]
    first, again = demo.Corpus(files), demo.Corpus(files)
    assert [len(first.text(size)) for size in (1, 77, 400)] == [1, 77, 400]
    assert again.text(200) == demo.Corpus(files).text(200)
    assert again.text(200).startswith(b"\n<|tool|>\n")
    text = demo.Corpus(files).text(2000)
    assert b"a.md from byte 0\n" in text
    assert b"a.md from byte 97\n" in text
    assert b"empty.md" not in text
    with pytest.raises(ValueError, match="files"):
        demo.Corpus([("empty.md", b"")])


def test_text_is_the_repository_or_else_the_package(tmp_path: Path) -> None:
    names = [name for name, _ in demo.repository_files(PACKAGE)]
    assert {"hybridcache/demo.py", "tests/test_demo.py", "docs/design.md"} <= set(names)
    shutil.copytree(PACKAGE, tmp_path / "hybridcache", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    alone = [name for name, _ in demo.repository_files(tmp_path / "hybridcache")]
    assert "hybridcache/demo.py" in alone
    assert all(name.startswith("hybridcache/") for name in alone)


def test_conversation_adds_what_the_profile_says() -> None:
    profile = demo.Profile(first=300, turn_tokens=100, generate=5)
    conversation = demo.Conversation(demo.Corpus([("a.md", b"text " * 1000)]), profile)
    before = conversation.prompt
    conversation.answer([1, 2, 3, 4, 5])
    assert (len(before), len(conversation.prompt)) == (300, 400)
    assert conversation.prompt[:305] == [*before, 1, 2, 3, 4, 5]
    assert bytes(conversation.prompt[-len(demo.ASK) :]) == demo.ASK


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns", "0"], "turns is 0, expected at least 1"),
        (["--first", "10"], "first is 10, expected at least 256"),
        (["--turn-tokens", "71"], "turn_tokens is 71, expected at least 72"),
        (["--chunk", "-1"], "chunk is -1, expected at least 1"),
        (["--dtype", "int8"], "dtype is 'int8', expected one of float32, bfloat16"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_an_example_and_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    options = text.split("\noptions:\n")[1]
    assert exit_.value.code == 0
    assert "hybridcache demo --turns 3 --first 2048" in text
    for field in fields(demo.Profile):
        shown = options.split(f"--{field.name.replace('_', '-')} ", 1)[1].split("\n  --", 1)[0]
        assert f"({field.default})" in shown


def test_help_needs_neither_torch_nor_transformers() -> None:
    hidden = "sys.modules['torch'] = sys.modules['transformers'] = None"
    code = f"import sys; {hidden}; import hybridcache.cli; hybridcache.cli.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "hybridcache demo" in result.stdout


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(hybridcache, "demo")
    monkeypatch.setitem(sys.modules, "hybridcache.demo", None)
    assert cli.main(SMALL) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "100000"],
        ["--first", "99999999999"],
        ["--json", "no/such/folder/x.json"],
        ["--out", "/dev/null/x"],
    ],
)
def test_what_cannot_work_is_refused_before_the_run(arguments, capsys) -> None:
    assert cli.main(["demo", *arguments]) == 2
    assert "hybridcache demo: " in capsys.readouterr().err
