"""`hybridcache bench`: which benchmarks it runs, where it finds them, what it writes and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridcache import bench_command, cli

ROOT = Path(__file__).parent.parent
FAKE = """\
import argparse, json, sys
parser = argparse.ArgumentParser()
parser.add_argument("--json")
parser.add_argument("--quick", action="store_true")
options = parser.parse_args()
import hybridcache
print("a table of {name}")
json.dump({{"quick": options.quick, "of": hybridcache.__file__}}, open(options.json, "w"))
sys.exit({status})
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose benchmarks cost nothing, and a package that was installed elsewhere."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "hybrid-prefix-cache"\n')
    for name in bench_command.BENCHMARKS:
        (tmp_path / "benchmarks" / f"{name}.py").write_text(FAKE.format(name=name, status=0))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    monkeypatch.setattr(bench_command, "is_checkout", lambda folder: folder == tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("cuda", "names"), [(False, ["control_plane"]), (True, list(bench_command.BENCHMARKS))]
)
def test_it_runs_what_the_machine_can_run(
    cuda: bool,
    names: list[str],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_command, "has_cuda", lambda: cuda)
    assert cli.main(["bench", "--quick", "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert sorted(figures) == sorted(names)
    assert all(
        each["quick"] and each["of"] == str(ROOT / "hybridcache" / "__init__.py") for each in figures.values()
    )
    out = capfd.readouterr().out
    assert all(f"a table of {name}" in out for name in names)
    assert ("data_plane was left out: torch finds no CUDA device" in out) != cuda


def test_figures_on_standard_output_have_it_for_themselves(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "control_plane", "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["control_plane"]["quick"] is False
    assert "a table of control_plane" in err


def test_one_that_breaks_off_is_named_and_the_others_are_kept(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "benchmarks" / "control_plane.py").write_text(FAKE.format(name="it", status=3))
    assert cli.main(["bench", "control_plane", "data_plane", "--quick", "--json", "figures.json"]) == 1
    assert list(json.loads(Path("figures.json").read_text())) == ["data_plane"]
    assert "benchmarks.control_plane broke off" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "name: 'nothing', expected one of control_plane, data_plane"),
        (["data_plane"], "no CUDA device; expected one, or --quick"),
        (["--json", "nowhere/figures.json"], "nowhere"),
    ],
)
def test_wrong_arguments_run_nothing(
    arguments: list[str],
    said: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_command, "has_cuda", lambda: False)
    assert cli.main(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert said in err and "a table" not in out


def test_without_a_checkout_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_command, "SOURCE", tmp_path)
    assert cli.main(["bench"]) == 2
    said = capfd.readouterr().err
    assert (
        "the benchmarks are part of the repository" in said and "python -m benchmarks.control_plane" in said
    )


def test_a_checkout_is_known_by_its_project(tmp_path: Path) -> None:
    assert bench_command.is_checkout(ROOT) and bench_command.checkout() == ROOT
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "control_plane.py").touch()
    assert not bench_command.is_checkout(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert not bench_command.is_checkout(tmp_path)


def test_the_real_one_measures_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hybridcache", "bench", "control_plane", "--quick"]
    done = subprocess.run(
        [*command, "--json", "figures.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["control_plane"]
    assert figures["machine"] and figures["rows"] and figures["bounds"]
    assert "A turn, by tokens of context" in done.stdout
