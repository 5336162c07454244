"""The benchmark of decode steps in its tiny form: it runs, counts what is copied, notices wrong states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import decode, decode_report  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_case() -> decode.Case:
    options = decode.arguments(["--tiny"])
    return next(iter(decode.cases(options, torch.device("cpu"))))


def test_the_tiny_form_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "result.json", tmp_path / "result.png"
    decode.main(["--tiny", "--json", str(path), "--plot", str(plot)])
    result = json.loads(path.read_text())
    found = {(row["operation"], row["sequences"], row["tokens"], row["form"]): row for row in result["rows"]}
    state = 4 * 16 * 8 * 4  # one layer's
    for tokens, operation in ((1, "decode"), (5, "verify")):
        for sequences in (1, 3):
            ours = found[operation, sequences, tokens, "ours"]
            theirs = found[operation, sequences, tokens, "transformers"]
            assert ours["bytes"] == theirs["bytes"] == 2 * sequences * (1 + tokens) * state
            assert ours["gathered_bytes"] == ours["scattered_bytes"] == 0
            copied = 2 * sequences * tokens * state  # two layers, a call a token
            assert theirs["gathered_bytes"] == theirs["scattered_bytes"] == copied
    prefill = found["prefill", 1, 40, "transformers"]
    assert prefill["gathered_bytes"] == prefill["scattered_bytes"] == 2 * state
    assert all(row["launched_us"] > 0 and row["replayed_us"] is None for row in result["rows"])
    holds = {each["what"]: each["holds"] for each in result["bounds"]}
    assert holds["bytes that ours gathers and scatters"] is True
    assert holds["any step, replayed: ours / with copies, the worst"] is None
    out = capsys.readouterr().out
    assert "verify x3, 4 drafts" in out and "prefill of 40 tokens" in out
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("damage", ["output", "state", "nothing"])
def test_a_wrong_step_is_noticed(damage: str) -> None:
    case = tiny_case()
    inputs, slots = decode.Inputs(case, 3, 1, torch.float32), decode.ids(case, 3, 1)[0]
    both = decode.forms(decode.rules(case.device), inputs, 1)
    right = both["ours"][0]

    def spoilt(state: Any, reads: Any, writes: Any) -> Any:
        out = right(state, reads, writes)
        (out if damage == "output" else state[writes[1, 0]])[0, 0, 0] += 0.1 if damage != "nothing" else 0
        return out

    if damage == "nothing":
        decode.compare(case, spoilt, both["transformers"][0], slots)
    else:
        with pytest.raises(AssertionError, match="not close"):
            decode.compare(case, spoilt, both["transformers"][0], slots)


def test_steps_name_slots_once() -> None:
    case = tiny_case()
    for sequences, tokens in ((1, 1), (3, 5)):
        for reads, writes in decode.ids(case, sequences, tokens):
            named = [*reads.tolist(), *writes.flatten().tolist()]
            assert len(set(named)) == len(named) == sequences * (1 + tokens)


def row(form: str, **values: Any) -> dict[str, Any]:
    key = {"model": "m", "tp": 1, "operation": "decode", "sequences": 64, "tokens": 1, "form": form}
    measured = {"launched_us": 9.0, "replayed_us": 5.0, "bytes": 1 << 30, "layers": 4, "fraction": 0.9}
    return {**key, **measured, "gathered_bytes": 0, "scattered_bytes": 0, **values}


def test_bounds_hold_or_fail_as_measured() -> None:
    rows = [row("ours"), row("fla", replayed_us=4.0, launched_us=10.0, gathered_bytes=7)]
    found = {each["what"]: each for each in decode_report.bounds(rows)}
    assert found["any step, replayed: ours / with copies, the worst"]["holds"] is False
    assert found["any step, launched: ours / with copies, the worst"]["measured"] == pytest.approx(0.9)
    what = "decode of 64 MiB of states a layer and more, of the ceiling: the worst"
    assert found[what]["holds"] is True
    rows[0] |= {"fraction": 0.7, "gathered_bytes": 1}
    found = {each["what"]: each for each in decode_report.bounds(rows)}
    assert found[what]["holds"] is False
    assert found["bytes that ours gathers and scatters"]["holds"] is False
    rows[0]["bytes"] = 1 << 20  # too little to say anything of the memory
    assert {each["what"]: each for each in decode_report.bounds(rows)}[what]["holds"] is None
