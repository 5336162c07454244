"""The benchmark of the data plane on the CPU: it runs, says what it measured, and notices wrong moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import data_plane, data_plane_report
from benchmarks.gpu_layouts import LAYOUTS, Ids, SlotMajor, assert_moved
from hybridcache.config import LayerSpec, ModelLayout, TensorSpec


def small_layout() -> ModelLayout:
    """Two layers of each kind, in dtypes that torch can index on a CPU."""
    conv, state = TensorSpec("conv", (5, 3), "bfloat16"), TensorSpec("recurrent", (2, 3, 4), "float32")
    keys, values = TensorSpec("k", (1, 8), "bfloat16"), TensorSpec("v", (1, 8), "bfloat16")
    kinds = [("recurrent", (conv, state)), ("attention", (keys, values))] * 2
    return ModelLayout(4, tuple(LayerSpec(i, kind, parts) for i, (kind, parts) in enumerate(kinds)))


@pytest.mark.usefixtures("one_thread")
def test_the_quick_form_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    plot = tmp_path / "result.png"
    data_plane.main(["--quick", "--device", "cpu", "--json", str(path), "--plot", str(plot)])
    result = json.loads(path.read_text())
    rows = result["rows"]
    found = {(row["operation"], row["count"], row["layout"]) for row in rows}
    for operation in data_plane.OPERATIONS:
        for layout in ("ours", "per layer", "layer-major"):
            assert {(operation, 1, layout), (operation, 4, layout)} <= found
    assert {("to host", 1, "ours"), ("to device", 8, "per layer")} <= found
    assert all(row["launched_us"] > 0 and row["replayed_us"] is None for row in rows)
    assert all((row["fraction"] > 0) == (row["operation"] != "nothing") for row in rows)
    restore = next(row for row in rows if row["operation"] == "restore" and row["count"] == 4)
    assert restore["bytes"] == 4 * 2 * 6_438_912  # read and written
    assert set(result["ceilings"]) == {"copy", "fill", "to_host", "to_device"} and result["machine"]["torch"]
    out = capsys.readouterr().out
    assert "ceilings of this run" in out and "page tails x4" in out and "not measured" in out
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_wrong_moves_are_noticed(layout: Any) -> None:
    """Each fault in turn; the right call passes."""
    kept = layout(small_layout(), 8, 8, torch.device("cpu"))
    ids = Ids(np.array([[0, 1], [3, 2]], dtype=np.int32), np.array([6], dtype=np.int32), np.array([[4, 5]]))
    assert_moved(kept, ids, kept.launch(ids))
    right = kept.launch(ids)

    def and_then(spoil: Any) -> Any:
        def call() -> None:
            right()
            spoil()

        return call

    with pytest.raises(AssertionError, match="slot 0 changed"):
        assert_moved(kept, ids, and_then(lambda: kept.slot(0)[0].zero_()))
    with pytest.raises(AssertionError, match="slot 4 changed"):
        assert_moved(kept, ids, and_then(lambda: kept.slot(4)[-1].zero_()))
    with pytest.raises(AssertionError, match="2 differs from its source 3"):
        assert_moved(kept, ids, and_then(lambda: kept.slot(2)[-1].zero_()))
    with pytest.raises(AssertionError, match="5 differs from its source 4"):
        assert_moved(kept, ids, and_then(lambda: kept.page(5)[0].zero_()))
    with pytest.raises(AssertionError, match="slot 6 holds something"):
        assert_moved(kept, ids, and_then(lambda: kept.slot(6)[0].fill_(1)))


def test_plans_are_plans() -> None:
    """No id is a destination twice or also a source; the next plan names others."""
    layout = small_layout()
    case = data_plane.Case("tiny", 1, layout, 40, 30, torch.device("cpu"))
    for operation in data_plane.OPERATIONS:
        for count in (1, 4, 15):
            found = data_plane.plans(case, operation, count)
            assert len(found) == 2
            for ids in found:
                SlotMajor(layout, 40, 30, torch.device("cpu")).pools.apply(ids)
                moved = 2 * layout.slot_bytes * len(ids.copy_slots) + layout.slot_bytes * len(ids.zero_slots)
                moved += 2 * layout.page_bytes * len(ids.copy_pages)
                assert moved == data_plane.moved_bytes(layout, operation, count) > 0
            if count < 5:
                named = [{int(each) for part in ids for each in np.ravel(part)} for ids in found]
                assert operation == "publish" or not named[0] & named[1]


def row(operation: str, layout: str, **values: Any) -> dict[str, Any]:
    key = {"model": "qwen3.5-397b", "tp": 8, "operation": operation, "count": 1, "layout": layout}
    return {**key, "launched_us": 50.0, "replayed_us": 20.0, "fraction": 0.8, **values}


def test_bounds_hold_or_fail_as_measured() -> None:
    rows = [row("restore", "ours"), row("restore", "per layer", launched_us=499.0, replayed_us=19.0)]
    found = {each["what"]: each["holds"] for each in data_plane_report.bounds(rows)}
    assert found["restore one slot of a rank of 8, of the ceiling"] is True
    assert found["restore eight slots of a rank of 8, of the ceiling"] is None
    assert found["one slot, tp 8, launched: per layer / ours"] is False
    assert found["any operation and count, replayed: ours / per layer, the worst"] is False
    assert found["any operation and count, launched: ours / per layer, the worst"] is True
    assert found["any operation and count, launched: ours / layer-major, the worst"] is None
