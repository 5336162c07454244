"""The benchmark of times to first token in its tiny form: every turn is exact and reads nothing twice, and
what would not be is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from benchmarks import ttft, ttft_report  # noqa: E402
from benchmarks.ttft_model import NeverLeft, build, config, plain_copy, same, states  # noqa: E402
from benchmarks.ttft_talk import ARTICLE, TINY  # noqa: E402
from hybridcache import ModelLayout  # noqa: E402
from hybridcache.hf import CachedModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_the_tiny_form_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "result.json", tmp_path / "result.png"
    ttft.main(["--tiny", "--talks", "2", "--talk-turns", "3", "--json", str(path), "--plot", str(plot)])
    result = json.loads(path.read_text())
    assert [row["turn"] for row in result["alone"]] == list(range(TINY.turns))
    assert [(row["turn"], row["talk"]) for row in result["together"]] == [
        (turn, talk) for turn in range(3) for talk in (1, 2)
    ]
    for row in result["alone"] + result["together"]:
        assert row["exact"] and row["beyond_ideal"] == 0
        assert row["reused"] == (
            TINY.prompt_length(row["turn"]) - TINY.added + TINY.generated - 1 if row["turn"] else 0
        )
        assert row["passes"] == 1 and row["cached_ms"] > 0 and row["ideal_ms"] > 0
        runs = ttft.RUNS if row["turn"] else 1
        assert len(row["cached_runs_ms"]) == len(row["ideal_runs_ms"]) == runs
    assert all(row["cold_ms"] > 0 for row in result["alone"])
    turn = result["inner"]["next turn"]
    assert [(row["passes"], row["inner"]) for row in turn.values()] == [(1, 0), (2, 0), (1, 1)]
    assert result["inner"]["resumed_difference"] < 1e-5 and 0 < result["inner"]["yardstick"] < 1e-5
    holds = {each["what"]: each["holds"] for each in result["bounds"]}
    assert holds["alone: turns whose bits differ from the ideal"] is True
    assert holds["together: tokens computed beyond the ideal"] is True
    assert result["machine"]["transformers"] and result["profile"] == TINY._asdict()
    out = capsys.readouterr().out
    assert "one conversation" in out and "2 conversations in turn" in out and "DIFFER" not in out
    assert plot.stat().st_size > 10_000


def test_the_large_model_is_the_published_one_and_the_profile_that_of_the_article() -> None:
    layout = ModelLayout.from_hf_config(config(tiny=False))
    assert layout == ModelLayout.preset("qwen3.5-9b") and layout.state_bytes == 51_511_296
    assert ARTICLE == (50_000, 800, 64, 15)
    assert [ARTICLE.prompt_length(turn) for turn in (0, 1, 14)] == [50_000, 50_800, 61_200]


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CPU, tiny=True)


def _spoil_kv(cache: Any) -> None:
    cache.layers[3].values[0, 1, 7, 3] += 1e-3


def _spoil_state(cache: Any) -> None:
    states(cache, 1)[1][0, 2, 3, 4] += 1e-3


def _spoil_conv(cache: Any) -> None:
    states(cache, 0)[0][0, 5, 1] += 1e-3


def _spoil_what_nobody_reads(cache: Any) -> None:
    states(cache, 0)[0][0, 5, 0] += 1


@pytest.mark.parametrize("spoil", [_spoil_kv, _spoil_state, _spoil_conv, _spoil_what_nobody_reads])
def test_a_difference_of_one_number_is_noticed(model: Any, spoil: Any) -> None:
    left = NeverLeft(model)
    left.read(torch.arange(20))
    copied = left.copy()
    assert same(left.cache, copied.cache)
    spoil(copied.cache)
    assert same(left.cache, copied.cache) == (spoil is _spoil_what_nobody_reads)
    assert same(left.cache, copied.cache, begin=8) == (spoil in (_spoil_what_nobody_reads, _spoil_kv))


def test_a_copy_goes_on_alone(model: Any) -> None:
    left = NeverLeft(model)
    left.read(torch.arange(20))
    copied = NeverLeft(model, plain_copy(model, left.cache))
    token, logits = copied.first_token(torch.arange(30), [20, 25, 30])
    assert left.cache.get_seq_length() == 20 and copied.cache.get_seq_length() == 30
    again, expected = left.first_token(torch.arange(30), [20, 25, 30])
    assert torch.equal(logits, expected) and token == again


@pytest.mark.parametrize("damage", ["state", "nothing"])
def test_a_turn_that_resumes_from_a_wrong_state_is_noticed(
    model: Any, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "state":
        load = CachedModel.apply_plan

        def apply_and_spoil(engine: CachedModel) -> None:
            load(engine)
            engine.pools.slots()[:, 4:8] = 0  # a number of the first state, wherever it is kept

        monkeypatch.setattr(CachedModel, "apply_plan", apply_and_spoil)
    rows = ttft.alone(ttft.engine_for(model, TINY, 1), model, TINY._replace(turns=2))
    assert all(row["exact"] for row in rows) == (damage == "nothing")


def row(turn: int, **values: Any) -> dict[str, Any]:
    return {
        "turn": turn,
        "cached_ms": 10.0,
        "ideal_ms": 9.5,
        "cold_ms": 300.0,
        "beyond_ideal": 0,
        "exact": True,
        "cached_runs_ms": [10.0, 20.0, 10.0],
        "ideal_runs_ms": [9.0, 10.0, 9.5],
        **values,
    }


def test_bounds_hold_or_fail_as_measured() -> None:
    turn = {"no checkpoint": {"ms": 5.0}, "second pass": {"ms": 9.0}, "inner checkpoint": {"ms": 7.0}}
    first = row(0, ideal_ms=1.0, cold_ms=10.0)  # counts for no turn but the first
    result = {
        "alone": [first, row(1), row(2, cached_ms=10.5, cold_ms=209.0)],
        "together": [row(1, exact=False, beyond_ideal=1)],
        "inner": {"next turn": turn},
    }
    found = {each["what"]: each for each in ttft_report.bounds(result)}
    assert found["alone: cached / ideal, the worst turn"]["measured"] == pytest.approx(10.5 / 9.5)
    assert found["alone: cached / ideal, the worst turn"]["holds"] is False
    assert found["together: cached / ideal, the worst turn"]["holds"] is True
    pairs = found["alone: the same, pair by pair"]
    assert pairs["measured"] == pytest.approx(10.0 / 9.0) and pairs["holds"] is None
    assert found["alone: cold / cached, the worst turn"]["measured"] == pytest.approx(209 / 10.5)
    assert found["alone: cold / cached, the worst turn"]["holds"] is False
    assert found["together: tokens computed beyond the ideal"]["holds"] is False
    assert found["together: turns whose bits differ from the ideal"]["holds"] is False
    assert found["alone: turns whose bits differ from the ideal"]["holds"] is True
    assert found["a checkpoint inside a turn: inner / second pass"]["measured"] == 0.5
    result["together"] = []
    found = {each["what"]: each["holds"] for each in ttft_report.bounds(result)}
    assert found["together: cached / ideal, the worst turn"] is None


def test_parts_are_added_to_a_file_of_the_same_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plot = tmp_path / "result.json", tmp_path / "result.png"
    common = ["--tiny", "--turns", "2", "--talks", "1", "--json", str(path), "--plot", str(plot)]
    ttft.main([*common, "--parts", "alone"])
    first = json.loads(path.read_text())
    assert first["alone"] and not first["inner"] and not first["together"] and plot.stat().st_size
    ttft.main([*common, "--parts", "together"])
    both = json.loads(path.read_text())
    assert both["alone"] == first["alone"] and len(both["together"]) == 2
    assert set(both["dates"]) == {"alone", "together"}
    holds = {each["what"]: each["holds"] for each in both["bounds"]}
    assert holds["alone: turns whose bits differ from the ideal"] is True
    assert holds["together: turns whose bits differ from the ideal"] is True
    path.write_text(json.dumps({**both, "machine": {**both["machine"], "torch": "0.1"}}))
    with pytest.raises(ValueError, match=r"machine \{.*, expected"):
        ttft.main([*common, "--parts", "inner"])
