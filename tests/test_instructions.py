"""The hot paths take no more instructions than benchmarks/instructions.json says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import instructions

BASELINE: dict[str, Any] = {"compiler": "g++ 12.2.0", "instructions": {"commit": 1000, "close": 100}}


def measured(compiler: str = "g++ 12.9.0", **counts: int) -> dict[str, Any]:
    return {"compiler": compiler, "instructions": {"commit": 1000, "close": 100} | counts}


def test_a_tenth_more_passes_and_more_than_that_is_named() -> None:
    assert instructions.regressions(measured(commit=1100), BASELINE) == []
    (wrong,) = instructions.regressions(measured(commit=1101), BASELINE)
    assert wrong == "commit: 1,101 instructions, expected 1,000 + 10%"


def test_another_compiler_may_take_half_as_much_more() -> None:
    assert instructions.regressions(measured("g++ 14.1.0", close=150), BASELINE) == []
    assert len(instructions.regressions(measured("g++ 14.1.0", close=151), BASELINE)) == 1


def test_an_operation_without_a_baseline_fails() -> None:
    assert instructions.regressions(measured(evict=1), BASELINE) == ["evict: only in one of the two"]


def test_nothing_collected_is_an_error() -> None:
    assert instructions.collected("==1== Collected : 42\n") == 42
    for output in ("==1== Collected : 0\n", "no such program"):
        with pytest.raises(RuntimeError, match="collected nothing"):
            instructions.collected(output)


def test_no_hot_path_has_become_slower() -> None:
    if (tool := instructions.missing_tool()) is not None:
        pytest.skip(f"no {tool} here: instructions are not counted")
    counted = instructions.count_all()
    assert not instructions.regressions(counted, json.loads(instructions.BASELINE.read_text()))
    # What does not depend on the length of the context must not begin to.
    counts = counted["instructions"]
    assert counts["decode step at 256K"] <= 1.05 * counts["decode step at 1K"]
    assert counts["commit of 832 at 256K"] <= 1.1 * counts["commit of 832 at 1K"]
    assert counts["refused reserve at 256K"] <= 1.1 * counts["refused reserve at 1K"]
    # In the steady state decoding takes no memory.
    assert {count for name, count in counted["allocations"].items() if name.startswith("decode")} == {0.0}
