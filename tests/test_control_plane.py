"""The benchmark of the control plane: its arithmetic, what it drives, and a quick run of all of it."""

from __future__ import annotations

import argparse
import json
import time
from array import array
from pathlib import Path

import numpy as np
import pytest

from benchmarks import chains, clock, control_plane, floor, operations, report
from benchmarks.peers import environments, peer


def rows(operation: str, *medians: float, caches: str = "warm") -> report.Rows:
    sizes = (1 << 10, 1 << 16, 1 << 20)
    return [
        {"operation": operation, "size": size, "caches": caches, "n": 1, "median_us": each, "p99_us": each}
        for size, each in zip(sizes, medians, strict=False)
    ]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 5), (0.51, 6), (0.99, 10), (1.0, 10), (0.1, 1), (0.0, 1)]
)
def test_a_quantile_is_the_smallest_sample_that_the_share_is_not_above(share: float, expected: int) -> None:
    assert clock.quantile(list(range(1, 11)), share) == expected


def test_a_recorder_gives_medians_in_microseconds_by_key() -> None:
    recorder = clock.Recorder()
    for nanoseconds in (3000, 1000, 2000):
        recorder.add("match", 7, "warm", nanoseconds)
    recorder.add("match", 7, "cold", 9000)
    assert recorder.median_us("match", 7) == 2.0
    assert recorder.median_us("match", 8) is None
    warm, cold = recorder.rows()
    assert (warm["n"], warm["median_us"], warm["p99_us"]) == (3, 2.0, 3.0)
    assert (cold["caches"], cold["median_us"]) == ("cold", 9.0)


def test_a_sleeping_call_costs_only_what_it_computes() -> None:
    nanoseconds, result = clock.timed(lambda: time.sleep(0.05) or "done")
    assert result == "done" and 0 < nanoseconds < 20_000_000
    busy, _ = clock.timed(lambda: sum(range(300_000)))
    assert busy > 300_000  # less than a nanosecond a number would be no Python


def test_bounds_hold_or_fail_or_were_not_measured() -> None:
    assert report.Bound("", 3.0, 3, "x").holds is True
    assert report.Bound("", 3.01, 3, "x").holds is False
    assert report.Bound("", 3.0, 3, "x", most=False).holds is True
    assert report.Bound("", 2.99, 3, "x", most=False).holds is False
    assert report.Bound("", None, 3, "x").holds is None
    assert report.ratio(6, 2) == 3 and report.ratio(None, 2) is None and report.ratio(6, None) is None


def test_the_bounds_are_those_that_are_promised() -> None:
    measured = [
        *rows("memcmp beside reserve", 1, 10, 100),
        *rows("reserve beside memcmp", 2, 20, 250),
        *rows("match", 1, 10, 120),
        *rows("close", 3, 3, 9),
        *rows("transcript: turn", 10, 11, 19),
    ]
    cold = [
        *rows("memcmp beside reserve", 1, 10, 100, caches="cold"),
        *rows("reserve beside memcmp", 2, 20, 400, caches="cold"),
    ]
    tree = [{"policy": "default", "checkpoints": 5, "tokens": 9, "eviction_us": 4.5, "bytes_per_token": 8.5}]
    peers = {"sglang": {"version": "1", "rows": rows("match", 9, 49, 6000)}, "vllm": {"reason": "no wheel"}}
    found = {line.what: line for line in report.bounds(measured + cold, tree, peers)}
    assert found["reserve of a cached 1M prompt / memcmp of it"].measured == 2.5
    assert found["the same, CPU caches flushed"].holds is False
    assert found["close, 1M / 1K"].measured == 3 and found["close, 1M / 1K"].holds is False
    assert found["a turn through a transcript, 1M / 1K"].holds is True
    assert found["one eviction with 5 checkpoints"].holds is True
    assert found["index a cached token, 9 tokens"].holds is False
    assert found["sglang's match / our match at 64K"].measured == 4.9
    assert found["sglang's match / our match at 64K"].holds is False
    assert found["sglang's match / our match at 1M"].holds is True
    assert found["vllm's hash + look up / our match at 1M"].holds is None
    assert found["commit of 832 tokens, 1M / 1K"].holds is None


def test_a_peer_without_figures_gives_its_reason() -> None:
    peers = {"vllm": {"reason": "no wheel"}, "sglang": {"version": "1", "rows": rows("match", 9, 50, 6000)}}
    text = report.ratios(rows("match", 1, 10, 100), peers)
    assert "vllm: no figures: no wheel" in text
    assert "9.00 = 9.0 x" in text and "6,000 = 60.0 x" in text


def test_a_table_is_aligned() -> None:
    lines = report.table([["a", "b"], ["long", "1"]]).splitlines()
    assert lines == ["| a    | b |", "|------|---|", "| long | 1 |"]


# ---------------------------------------------------------------- what it drives


def test_memcmp_compares_what_it_says() -> None:
    tokens = np.arange(100, dtype=np.int32)
    compared = floor.Memcmp(tokens)
    compared.run(100)
    tokens[60] = -1
    compared.run(60)
    with pytest.raises(AssertionError, match="differs"):
        compared.run(61)


def test_cold_means_more_than_the_last_level_cache_was_written() -> None:
    caches = floor.Caches("cold")
    caches.settle()
    assert caches._lines.size * 64 >= 2 * floor.last_level_cache_bytes()
    assert (caches._lines == 1).all()
    warm = floor.Caches("warm")
    warm.settle()
    assert warm._lines.size == 0


@pytest.mark.parametrize("length", [832, 1024, 1663, 1664, 4096, 65536])
def test_whole_turns_lead_to_the_length_that_was_asked_for(length: int) -> None:
    chain = chains.Chain(length, 1664, seed=1)
    cache = chains.make_cache(tokens=length + 1664, checkpoints=2 * length // chains.TURN + 4)
    chain.build(cache)
    assert chain.length == length == cache.match(chain.prompt()).length
    assert 832 <= chain.first_turn() < 1664
    cache.check()


def test_evictions_are_measured_one_by_one() -> None:
    recorder = clock.Recorder()
    operations.measure_evictions(recorder, 4096, floor.Caches("warm"), 20)
    samples = recorder.samples[clock.Key(operations.EVICTION, 4096, "warm")]
    assert 15 <= len(samples) <= 20
    assert recorder.median_us(operations.EVICTION, 4096) > 0


def test_a_tree_is_counted_in_bytes_a_token() -> None:
    options = argparse.Namespace(turns=2000, repetitions=20)
    results = control_plane.measure_memory(options, lambda what: None)  # in processes of their own
    for result in results:
        assert result["eviction_us"] > 0
    result = results[1]
    assert result["policy"] == "lru" and results[0]["bytes_per_token"] > result["bytes_per_token"]
    assert result["tokens"] == 2_000_000 and 2000 <= result["checkpoints"] <= 2100
    assert 4 < result["bytes_per_token"] < 20  # its edges alone are four


def test_conversations_of_peers_grow_little() -> None:
    calls: list[tuple[int, int]] = []

    def make(tokens: array[int], cached: int) -> peer.Turn:
        state = {"length": cached}

        def turn(add: peer.Add) -> None:
            assert state["length"] + peer.TURN <= len(tokens)
            calls.append((cached, state["length"]))
            state["length"] += peer.TURN
            add("turn", 1000)

        return turn

    recorder = clock.Recorder()
    peer.measure(recorder, make, 1 << 16, 10)
    assert len(calls) == 11 and all(length < cached * 1.06 for cached, length in calls)
    assert len(recorder.samples[clock.Key("turn", 1 << 16, "warm")]) == 10


def test_a_peer_that_is_not_set_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    assert environments.measure("vllm", [1024], 1) == {"reason": "not set up (make bench-peers)"}
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "reason").write_text("no wheel for this Python\n")
    assert environments.measure("vllm", [1024], 1) == {"reason": "no wheel for this Python"}


# ---------------------------------------------------------------- all of it


def test_a_quick_run_measures_everything_within_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    written, plotted = tmp_path / "run.json", tmp_path / "run.png"
    control_plane.main(["--quick", "--no-peers", "--json", str(written), "--plot", str(plotted)])
    assert time.monotonic() - started < 60
    result = json.loads(written.read_text())
    operations_seen = {(row["operation"], row["size"], row["caches"]) for row in result["rows"]}
    for size in (1 << 10, 1 << 16):
        for operation in (
            "memcmp",
            "match",
            "match int64",
            "reserve",
            "commit 832",
            "decode step",
            "close",
            "turn",
        ):
            assert {(operation, size, "warm"), (operation, size, "cold")} <= operations_seen
        assert (operations.EVICTION, size, "warm") in operations_seen
    assert {row["size"] for row in result["batches"]} == {1, 256}
    assert [each["policy"] for each in result["memory"]] == ["default", "lru"]
    assert result["machine"]["cores"] >= 1 and "cpu" in result["machine"]
    assert plotted.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "shown by this run" in printed and "not measured" in printed
    assert any(operation == "transcript: turn" for operation, _, _ in operations_seen)


def test_files_are_small() -> None:
    folder = Path(control_plane.__file__).parent
    for path in [*folder.rglob("*.py"), *folder.rglob("*.cpp")]:
        assert len(path.read_text().splitlines()) <= 420, f"{path.name} is long"
