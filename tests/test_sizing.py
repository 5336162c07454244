"""`hybridcache size`: its figures against published models, the core's geometry, and a filled core."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybridcache import HybridCache, ModelLayout, cli, size_command
from hybridcache._hf_config import PRESET_CONFIGS
from hybridcache.config import PRESETS
from hybridcache.sizing import Machine, Sizing, Traffic, advice, size
from tests.conftest import tokens
from tests.toy_engine import LAYERS

H200 = 141 * 10**9
STATE_TOKENS = {  # how many tokens of KV one state weighs: of the whole model, and of a rank with TP 8
    "qwen3.5-397b": (6252, 24_007_680 / 15_360),
    "qwen3.5-122b": (6252, 1563),
    "qwen3-next-80b": (3144, 786),
    "qwen3.5-35b": (3144, 786),
    "qwen3.5-27b": (2349, 1174.5),
    "qwen3.5-9b": (1572, 786),
    "kimi-linear-48b": (5384, 673),
}


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_state_costs_in_tokens(name: str) -> None:
    for tp_size, expected in zip((1, 8), STATE_TOKENS[name], strict=True):
        layout = ModelLayout.preset(name, tp_size=tp_size)
        sizing = size(layout, Machine(H200, 8, tp_size, 10**9))
        assert int(sizing.state_tokens) == int(expected)
        assert sizing.slab_tokens >= sizing.state_tokens > sizing.slab_tokens - layout.page_size


def test_the_largest_model_on_eight_gpus_by_hand() -> None:
    machine = Machine(H200, 8, 8, 397 * 10**9)
    sizing = size(
        ModelLayout.preset("qwen3.5-397b", tp_size=8), machine, whole=ModelLayout.preset("qwen3.5-397b")
    )
    assert machine.cache_bytes == 141_000_000_000 - 49_625_000_000 - 14_100_000_000 == 77_275_000_000
    assert sizing.pages_per_slab == 25 and sizing.slab_bytes == 25 * 64 * 15_360
    assert sizing.num_slabs == 77_275_000_000 // 24_576_000 == 3144
    assert sizing.running_slabs == 8 + 5  # a slot each; 8 x 13 pages of 800 tokens
    # 50,000 tokens are 782 pages; n conversations take 2n + ceil(782n / 25) slabs
    assert sizing.sessions() == 94 and 94 * 2 + 2941 <= 3131 < 95 * 2 + 2972
    assert sizing.kv_copies == 4  # two KV heads on eight ranks
    assert sizing.turn_saved == pytest.approx(0.9798, abs=5e-5)


def test_a_smaller_tp_is_advised_only_where_its_weights_fit() -> None:
    whole, layout = ModelLayout.preset("qwen3.5-397b"), ModelLayout.preset("qwen3.5-397b", tp_size=8)
    for weights, said in (
        (397, "More replicas of a smaller TP hold more"),
        (794, "At TP 4, which would hold"),
    ):
        found = advice(size(layout, Machine(H200, 8, 8, weights * 10**9), whole=whole))
        assert [said in each for each in found if "heads are replicated" in each] == [True]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("page_size", [16, 64, 1024])
def test_slabs_and_pages_are_those_of_the_core(name: str, tp_size: int, page_size: int) -> None:
    layout = ModelLayout.preset(name, tp_size=tp_size, page_size=page_size)
    sizing = size(layout, Machine(20 * 10**9, 4, tp_size, 7))
    for memory_bytes in (sizing.machine.cache_bytes, sizing.memory_bytes):
        geometry = HybridCache(layout, memory_bytes=memory_bytes).geometry
        found = (geometry.num_slabs, geometry.num_pages, geometry.pages_per_slab, geometry.slab_bytes)
        assert found == (sizing.num_slabs, sizing.num_pages, sizing.pages_per_slab, sizing.slab_bytes)
        assert geometry.total_bytes == sizing.memory_bytes


def fill(cache: HybridCache, prompts: list[np.ndarray], chunk: int) -> None:
    """Each of them once: read in chunks, and closed."""
    for prompt in prompts:
        lease = cache.reserve(prompt)
        assert lease is not None
        while lease.computed < len(prompt):
            assert lease.launch(chunk) is not None
            cache.applied(cache.plan())
            lease.commit()
        lease.close()


@pytest.mark.parametrize("context", [40, 41, 43, 100, 7])
@pytest.mark.parametrize("states", [1, 2])
def test_so_many_conversations_stay_in_a_core_and_no_more(context: int, states: int) -> None:
    layout = ModelLayout(4, LAYERS)
    traffic = Traffic(context=context, turn=1, states=states, running=1)
    sizing = size(layout, Machine(150 * layout.page_bytes, reserve=0), traffic)
    fit = sizing.sessions()
    assert fit >= 3
    chunk = context if states == 1 else -(-context // 2)  # one state at the end, or one in the middle too
    for count, stay in ((fit, True), (fit + 1, False)):
        cache = HybridCache(
            layout, memory_bytes=sizing.memory_bytes, pass_cost=1 << 40, interior_spacing=1 << 40
        )
        prompts = [tokens(context, seed) for seed in range(count)]
        fill(cache, prompts, chunk)
        lease = cache.reserve(tokens(1, seed=999))  # and one that runs
        assert lease is not None
        held = [cache.match(np.append(prompt, 1)).length == context for prompt in prompts]
        evicted = sum(n for name, n in cache.stats().items() if name.startswith("evicted_"))
        assert (evicted == 0) is stay
        if stay:
            assert all(held) and cache.stats()["checkpoints"] == count * states


def test_sessions_are_the_most_that_fit() -> None:
    layout = ModelLayout.preset("qwen3-next-80b", tp_size=2, page_size=16)
    sizing = size(layout, Machine(80 * 10**9, 4, 2, 40 * 10**9), Traffic(sessions=40, states=3))
    room = sizing.num_slabs - sizing.running_slabs
    for context in (1, 15, 16, 17, 5000, 123_456):
        for states in (1, 2, 9):
            fit = sizing.sessions(context, states)
            assert sizing.slabs(fit, context, states) <= room < sizing.slabs(fit + 1, context, states)
    each = sizing.states_each(40)
    assert each >= 1 and sizing.slabs(40, states=each) <= room < sizing.slabs(40, states=each + 1)
    assert sizing.states_each(10_000) == 0


def test_running_requests_with_drafts_in_overlap_take_rows() -> None:
    assert Traffic().slots_per_request == 1
    assert Traffic(draft_tokens=3).slots_per_request == 1 + 2 * 4
    assert Traffic(draft_tokens=3, run_ahead=0).slots_per_request == 1 + 4
    layout = ModelLayout(4, LAYERS)
    cache = HybridCache(layout, memory_bytes=60 * layout.page_bytes, draft_tokens=3, run_ahead=1)
    lease = cache.reserve([1, 2, 3])
    assert lease is not None
    for count in (3, 4, 4):
        assert lease.launch(count) is not None
        cache.applied(cache.plan())
        if count == 3:
            lease.commit()
    # the prompt's end became a checkpoint of the tree, the rest are the request's
    assert (
        cache.stats()["taken_slots"] - cache.stats()["checkpoints"]
        == Traffic(draft_tokens=3).slots_per_request
    )


# --- advice ---


def sized(memory: int = 100, **traffic: int) -> Sizing:
    layout = ModelLayout(4, LAYERS)
    return size(
        layout,
        Machine(memory * layout.page_bytes, reserve=0),
        Traffic(**{"context": 40, "turn": 1, "states": 1, "running": 1, **traffic}),
    )


@pytest.mark.parametrize(
    ("sizing", "said"),
    [
        (sized(), "8 conversations of 40 tokens with 1 state each stay."),
        (
            sized(sessions=4),
            "all of 4 conversations of 40 tokens with 1 state each stay; there is room for 14 states",
        ),
        (sized(sessions=9), r"of 9 conversations .*, 8 stay \(89 %; nor would all with one state"),
        (sized(states=3, sessions=8), r"of 8 conversations .* 7 stay \(88 %; with 2 states each all would"),
        (sized(context=800), "Not one conversation of 800 tokens fits beside 1 running"),
        (sized(1), "No room: of a GPU's"),
        (sized(running=30), "30 running requests take 60 % of the cache"),
        (sized(running=3, draft_tokens=5), r"3 running requests take .* 13 slots each"),
    ],
)
def test_advice(sizing: Sizing, said: str) -> None:
    assert re.search(said, " ".join(advice(sizing))), advice(sizing)
    assert sizing.fits is (re.search("No room|Not one|nor would|all would", " ".join(advice(sizing))) is None)


def test_advice_on_padding_and_replicated_heads() -> None:
    layout, whole = (ModelLayout.preset("qwen3.5-397b", tp_size=n, page_size=1024) for n in (8, 1))
    said = " ".join(advice(size(layout, Machine(H200, 8, 8), whole=whole)))
    assert "keep each token's KV 4 times" in said and "23.7 % of its slab unused" in said


# --- the command ---


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "figures.json"
    arguments = ["size", "Qwen3.5-397B", "--memory", "8x141GB", "--tp", "8", "--weights", "float8_e4m3fn"]
    more = ["--json", str(target), "--plot", str(tmp_path / "fits.png")]
    assert cli.main([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Qwen3.5-397B on 8 x 141 GB, TP 8: 1 replica; pages of 64 tokens")
    found = json.loads(target.read_text())
    assert found["sessions"] == 94 and found["state_tokens"] == 1563 and found["num_slabs"] == 3144
    for shown in ("77.28", "24,007,680", "1,563", "3,144", "memory_bytes=77266944000", "94 conversations"):
        assert shown in out
    assert [each["change"] for each in found["alternatives"]] == [
        "KV in float8_e4m3fn",
        "TP 4, 2 replicas",
        "pages of 16 tokens",
    ]
    half = found["alternatives"][0]
    assert half["kv_bytes_per_token"] * 2 == found["kv_bytes_per_token"] and half["sessions"] == 178
    assert {"context": 50_000, "states": 2, "sessions": 94} in found["fits_table"]
    assert " ".join(" ".join(found["advice"]).split()) in " ".join(out.split())
    assert (tmp_path / "fits.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["size", "qwen3-next-80b", "--memory", "80GB", "--tp", "2", "--json", "-"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["machine"]["gpus"] == 2 and "No room" in out.err
    assert cli.main([*arguments, "--weights", "40GB"]) == 0
    assert cli.main([*arguments, "--weights", "40GB", "--sessions", "100000"]) == 1
    assert json.loads(capsys.readouterr().out.split("\n}\n")[1] + "}")["traffic"]["sessions"] == 100_000


def test_a_config_and_all_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PRESET_CONFIGS["qwen3.5-9b"]))
    options = "--weights 9GiB --reserve 20 --page-size 16 --kv-dtype float8_e4m3fn --state-dtype bfloat16"
    options += " --conv-dtype float32 --context 1000 --turn 10 --states 3 --running 2 --draft-tokens 1"
    assert cli.main(["size", str(config), "--memory", "2x24GiB", *options.split(), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    layout = ModelLayout.from_hf_config(
        PRESET_CONFIGS["qwen3.5-9b"],
        tp_size=2,
        page_size=16,
        kv_dtype="float8_e4m3fn",
        state_dtype="bfloat16",
        conv_dtype="float32",
    )
    machine = Machine(24 << 30, 2, 2, 9 << 30, 0.2)
    traffic = Traffic(context=1000, turn=10, states=3, running=2, draft_tokens=1)
    assert found["sessions"] == size(layout, machine, traffic).sessions()
    assert found["slot_bytes"] == layout.slot_bytes and found["model"] == "config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["gpt"], "model: 'gpt', expected a config.json or one of"),
        (["--memory", "many"], "memory: 'many', expected a size"),
        (["--memory", "0x80GB"], "memory: '0x80GB'"),
        (["--memory", "4x80GB", "--tp", "3"], "gpus: 4, expected a multiple of tp_size 3"),
        (["--tp", "0"], "tp_size: 0"),
        (["--weights", "heavy"], "weights: 'heavy'"),
        (["--reserve", "100"], "reserve: 1.0"),
        (["--kv-dtype", "float3"], "dtype: 'float3'"),
        (["--context", "0"], "context: 0"),
        (["--sessions", "0"], "sessions: 0"),
        (["--draft-tokens", "-1"], "draft_tokens: -1"),
        (["--plot", "fits.txt"], "plot: 'fits.txt'"),
        (["--json", "nowhere/x.json"], "nowhere"),
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
    model = [] if change[0].startswith("--") else change
    assert (
        cli.main(
            [
                "size",
                *(model or ["qwen3.5-9b", *change]),
                *([] if "--memory" in change else ["--memory", "8x80GB"]),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("hybridcache size: ") and message in error, error


def test_a_config_does_not_say_what_its_weights_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    for text, message in (
        (json.dumps(PRESET_CONFIGS["qwen3.5-9b"]), "weights: None"),
        ("[]", "an object"),
        ("{", "is no JSON"),
    ):
        config.write_text(text)
        assert cli.main(["size", str(config), "--memory", "80GB"]) == 2
        assert message in capsys.readouterr().err


def test_no_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not size_command.plot(sized(), tmp_path / "p.png")


def test_sizing_needs_no_core_and_the_command_no_torch() -> None:
    code = "import sys; from hybridcache import cli; "
    code += "assert cli.main(['size', 'qwen3.5-9b', '--memory', '80GB']) == 0; "
    code += "assert not {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, capture_output=True
    )
