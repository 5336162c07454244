"""`hybridcache replay`: the command, its arguments, and what it prints, writes and draws."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hybridcache import _command, cli, replay_command, replay_report
from hybridcache._hf_config import PRESET_CONFIGS
from hybridcache.config import ModelLayout
from hybridcache.replay import run
from hybridcache.replay_values import Settings
from tests.test_replay import DENSE, LAYOUT
from tests.test_workloads import small

ARGUMENTS = ["replay", "agentic:sessions=4,turns=3", "--memory", "1GB,4GB", "--policy", "lru,default"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target, saved = tmp_path / "figures.json", tmp_path / "saved.jsonl.gz"
    more = ["--plot", str(tmp_path / "rates.png"), "--json", str(target), "--save", str(saved)]
    assert cli.main([*ARGUMENTS, *more, "--model", "Qwen3.5-397B", "--working-set", "8"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("agentic: 12 requests, 0.6 M prompt tokens") and out.err == ""
    found = json.loads(target.read_text())
    assert [(c["policy"], c["budget_bytes"]) for c in found["cells"]] == [
        (policy, budget) for budget in (10**9, 4 * 10**9) for policy in ("lru", "default")
    ]
    for cell in found["cells"]:
        assert f"{100 * cell['hit_rate']:.2f}" in out.out and f"{100 * cell['flops_rate']:.2f}" in out.out
    assert found["cells"][2]["hit_tokens"] > found["cells"][0]["hit_tokens"]
    assert found["model"]["slot_bytes"] == 192_061_440 and found["workload"]["working_set_gb"] == 8
    assert "12.5" in out.out and "50" in out.out  # of the working set
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["replay", str(saved), *ARGUMENTS[2:], "--json", "-"]) == 0
    again = capsys.readouterr()
    assert [c["hit_tokens"] for c in json.loads(again.out)["cells"]] == [
        c["hit_tokens"] for c in found["cells"]
    ]
    assert "FLOPs saved" in again.err


def test_hints_and_the_rest_of_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["replay", "think:sessions=3,turns=3", "--memory", "50%", "--working-set", "6", "--json", "-"]
    assert cli.main([*arguments, "--hints", "keep", "--limit", "8", "--policy", "all", "--progress"]) == 0
    out = capsys.readouterr()
    cells = json.loads(out.out)["cells"]
    policies = replay_command.cache._POLICIES
    assert [(c["policy"], tuple(c["settings"]["hints"])) for c in cells] == [
        (policy, hints) for policy in policies for hints in ((), ("keep",))
    ]
    assert {c["requests"] for c in cells} == {8} and {c["budget_bytes"] for c in cells} == {3 * 10**9}
    assert "worth" in out.err
    options = ["--no-inner-checkpoints", "--last-unread", "--concurrency", "2", "--in-flight", "charged"]
    options += ["--prefill-rate", "5000", "--decode-rate", "20", "--arrivals", "open", "--page-size", "16"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(qwen()))
    assert cli.main([*arguments, *options, "--model", str(config), "--tp-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = Settings("charged", False, False, (), 2, 5000.0, 20.0, "open")
    assert found["cells"][0]["settings"] == {**asdict(expected), "hints": []}
    half = ModelLayout.from_hf_config(qwen(), page_size=16, tp_size=2)
    assert found["model"]["slot_bytes"] == half.slot_bytes and found["model"]["page_size"] == 16


def qwen() -> dict[str, Any]:
    return dict(PRESET_CONFIGS["qwen3.5-9b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nothing.gz"], "workload: 'nothing.gz', expected a file or one of agentic"),
        (["agentic:sessions=many"], "workload: 'sessions=many'"),
        (["agentic:colour=1"], "workload: .*colour"),
        (["--memory", "10"], "memory: '10', expected a size"),
        (["--memory", "10XB"], "memory: '10XB'"),
        (["--memory", "10%", "--working-set", "0"], "a working set"),
        (["--memory", ","], "expected at least one of each"),
        (["--policy", "best"], "policy: 'best', expected some of"),
        (["--model", "gpt"], "model: 'gpt', expected a config.json or one of qwen3.5-397b"),
        (["--hints", "guess"], "hints: 'guess'"),
        (["--in-flight", "no"], "in_flight: 'no'"),
        (["--jobs", "0"], "jobs: 0"),
        (["--plot", "rates.txt"], "plot: 'rates.txt'"),
        (["--plot", "nowhere/rates.png"], "plot: 'nowhere/rates.png'"),
        (["--json", "nowhere/x.json"], "nowhere"),
        (["--in-flight", "charged", "--memory", "1MB"], "memory_bytes: 1000000"),
    ],
)
def test_a_wrong_argument_is_named(
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"--memory": "1GB"}
    workload = "agentic:sessions=1,turns=1" if change[0].startswith("--") else change[0]
    pairs = [] if not change[0].startswith("--") else change
    arguments |= dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert cli.main(["replay", workload, *(each for pair in arguments.items() for each in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hybridcache replay: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("1.5GiB", 3 << 29), ("500 MB", 5 * 10**8), ("7B", 7), ("12.5%", 9_125_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert replay_command.read_size(text, 73.0) == size


def test_progress_on_a_terminal_writes_over_itself() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    out, lines = Terminal(), io.StringIO()
    ticker, logger = _command.Ticker(out, clock=clock), _command.Ticker(lines, clock=clock)
    for at, text in ((0.1, "early"), (0.3, "long text"), (0.35, "soon"), (11.0, "late")):
        now[0] = at
        ticker.show(text)
        logger.show(text)
    ticker.wipe()
    logger.wipe()
    assert out.getvalue() == "\rlong text\rlate     \r    \r" and lines.getvalue() == "late\n"


def test_nothing_that_happened_is_left_out_of_the_tables() -> None:
    result = run(small("tot"), LAYOUT, 5000, "default", inner_checkpoints=False, cache_options=DENSE)
    text = replay_report.report([result], working_set=1.0)
    for kind in result.published:
        counts = (of.get(kind, 0) for of in (result.published, result.restored, result.evicted))
        assert kind in text and " / ".join(map(str, counts)) in text
    for reason, tokens in result.lost.items():
        beyond = result.beyond.get(reason, 0)
        share = f"{100 * tokens / result.prompt_tokens:.2f} ({100 * beyond / result.prompt_tokens:.2f})"
        assert reason in text and share in text
    assert {"never_made", "cap"} <= set(result.missed_by)
    for cause, tokens in result.missed_by.items():
        assert cause in text and f"{100 * tokens / result.prompt_tokens:.2f}" in text
    assert f"{result.extra_passes}" in text and "commit" in text


def test_the_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not replay_report.plot([run(small("fewshot"), LAYOUT, 5000)], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_neither_torch_nor_transformers_nor_matplotlib_is_needed() -> None:
    code = (
        "import sys; from hybridcache import cli; "
        "status = cli.main(['replay', 'tot:problems=1', '--memory', '1GB', '--concurrency', '2']); "
        "assert status == 0 and not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, capture_output=True
    )


def test_the_optimum_and_shares_of_the_working_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["replay", "roundrobin:sessions=3,turns=3", "--memory", "50%,100%", "--optimum"]
    assert cli.main([*arguments, "--json", str(figures)]) == 0
    assert "optimum: GB" in capsys.readouterr().out
    half, whole = json.loads(figures.read_text())["optimum"]
    assert half["feasible_percent"] <= half["at_most_percent"] < whole["feasible_percent"]
    assert whole["feasible_percent"] == whole["ideal_percent"] == pytest.approx(whole["at_most_percent"])
