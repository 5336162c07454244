"""`inner_checkpoints` of the transformers adapter: one forward pass leaves exact states at inner positions.

Owns: those states are bit for bit those of a run that was cut there, where nothing but the recurrence can
tell the difference; who resumes from one equals, bit for bit, the same pass and the same steps that never
left; no second pass is made. The reference splits the recurrence by its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from transformers import DynamicCache  # noqa: E402

from hybridcache._hf_bridge import live_state  # noqa: E402
from hybridcache.hf import CachedModel, UnsupportedModelError  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    BUILDERS,
    PARTS,
    all_but_the_recurrence_one_by_one,
    continue_schedule,
    greedy,
    largest_error,
    random_tokens,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUTS = (5, 6, 14, 33)
LENGTH = 40


def engine_for(model: Any, **options: Any) -> CachedModel:
    sizes = {"num_pages": 120, "num_slots": 30, "page_size": 7, "inner_checkpoints": True}
    return CachedModel(model, **{**sizes, **options})


class Recorded:
    """The forward passes of an engine: where each began and was split, and where it ended."""

    def __init__(self, engine: CachedModel, patch: pytest.MonkeyPatch) -> None:
        self.inner: list[tuple[int, int]] = []  # (position, slot), of all passes
        self.passes: list[list[int]] = []
        forward = engine.forward

        def recording(tokens: Sequence[int], cache: Any, *, every_row: bool, inner: Any) -> Any:
            begin = cache.get_seq_length()
            self.inner += [(begin + offset, slot) for offset, slot in inner]
            cuts = [begin + offset for offset, _ in inner]
            self.passes.append([begin, *cuts, begin + len(tokens)])
            return forward(tokens, cache, every_row=every_row, inner=inner)

        patch.setattr(engine, "forward", recording)


def slot_state(engine: CachedModel, slot: int) -> dict[tuple[int, str], Any]:
    return {
        (spec.index, part.name): pool[slot].clone()
        for spec in engine.layout.layers
        if spec.kind == "recurrent"
        for part, pool in zip(spec.parts, engine.pools.state(spec.index), strict=True)
    }


def state_of_a_run_cut_at(engine: CachedModel, tokens: list[int], cuts: Sequence[int]) -> Any:
    """The states at `cuts[-1]` of a plain run in as many passes."""
    cache = DynamicCache(config=engine.model.config)
    continue_schedule(engine.model, cache, tokens, [0, *cuts])
    return {key: live_state(cache, *key) for key in slot_state(engine, 0)}


def same(found: dict[Any, Any], expected: dict[Any, Any]) -> bool:
    return all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("options", [{}, {"copies": "indirect", "page_size": 16}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_inner_states_are_bitwise_those_of_a_run_that_was_cut_there(
    name: str, dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any positions, two of them a token apart; a second prompt finds the dtypes of the states known."""
    model = tiny_model(name, DTYPES[dtype])
    engine = engine_for(model, **options)
    with all_but_the_recurrence_one_by_one(model):
        for seed in (1, 2):
            recorded = Recorded(engine, monkeypatch)
            tokens = random_tokens(LENGTH, seed=seed)
            result = engine.generate(tokens, max_new_tokens=1, breakpoints=CUTS)
            assert len(recorded.passes) == 1 and result.extra_passes == 0
            positions = [position for position, _ in recorded.inner]
            assert positions == sorted({*CUTS, LENGTH - 8})  # and the cut a little before the prompt's end
            for number, (position, slot) in enumerate(recorded.inner):
                expected = state_of_a_run_cut_at(engine, tokens, positions[: number + 1])
                assert same(slot_state(engine, slot), expected), position
            monkeypatch.undo()
    engine.cache.check()


@pytest.mark.parametrize("name", BUILDERS)
def test_real_layers_differ_by_rounding_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of all rows at once round differently from those of a cut run."""
    engine = engine_for(tiny_model(name))
    recorded, tokens = Recorded(engine, monkeypatch), random_tokens(LENGTH, seed=3)
    engine.generate(tokens, max_new_tokens=1, breakpoints=CUTS)
    positions = [position for position, _ in recorded.inner]
    assert len(positions) == 5
    for number, (_, slot) in enumerate(recorded.inner):
        expected = state_of_a_run_cut_at(engine, tokens, positions[: number + 1])
        for key, found in slot_state(engine, slot).items():
            assert largest_error(found, expected[key]) < 1e-5


@pytest.mark.parametrize("name", BUILDERS)
def test_at_multiples_of_the_chunk_a_bf16_run_is_bitwise_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alignment=64`: there the scan does in pieces what it does at once, and so do these small products."""
    engine = engine_for(tiny_model(name, torch.bfloat16), alignment=64, page_size=16)
    recorded, tokens = Recorded(engine, monkeypatch), random_tokens(200, seed=3)
    engine.generate(tokens, max_new_tokens=1, breakpoints=(70, 130))
    positions = [position for position, _ in recorded.inner]
    assert positions == [64, 128, 192]
    for number, (_, slot) in enumerate(recorded.inner):
        expected = state_of_a_run_cut_at(engine, tokens, positions[: number + 1])
        assert same(slot_state(engine, slot), expected)


# Who resumes there ------------------------------------------------------------------------------------------


@contextmanager
def recurrence_in_pieces(
    model: Any, cache: DynamicCache, cuts: Sequence[int], kept: dict[tuple[int, int], Any]
) -> Iterator[None]:
    """The reference: each recurrent layer is called once for each stretch between `cuts`, positions of which
    the first is where the pass begins and the last where it ends; `kept[position, layer]` is what it left."""
    patched = []
    for index, layer in enumerate(model.model.layers):
        if hasattr(cache.layers[index], "recurrent_states"):
            names = ("linear_attn", "self_attn", "mixer")
            mixer = next(getattr(layer, name) for name in names if hasattr(layer, name))
            mixer.forward = _piecewise(mixer.forward, index, cache, cuts, kept)
            patched.append(mixer)
    try:
        yield
    finally:
        for mixer in patched:
            del mixer.forward


def _piecewise(
    forward: Callable[..., Any],
    index: int,
    cache: DynamicCache,
    cuts: Sequence[int],
    kept: dict[tuple[int, int], Any],
) -> Callable[..., Any]:
    def piecewise(hidden_states: Any, **rest: Any) -> Any:
        out = torch.empty_like(hidden_states)
        for begin, end in pairwise(cuts):
            part = slice(begin - cuts[0], end - cuts[0])
            out[:, part] = forward(hidden_states=hidden_states[:, part], **rest)
            kept[end, index] = [live_state(cache, index, name).clone() for name in PARTS]
        return out

    return piecewise


def run_passes(
    model: Any, cache: DynamicCache, tokens: list[int], passes: list[list[int]]
) -> tuple[Any, dict[tuple[int, int], Any]]:
    """Logits of the passes, each split at its inner positions, and the states that were left there."""
    rows, kept = [], {}
    for cuts in passes:
        with recurrence_in_pieces(model, cache, cuts, kept):
            rows.append(continue_schedule(model, cache, tokens, [cuts[0], cuts[-1]]))
    return torch.cat(rows), kept


def never_left(model: Any, tokens: list[int], passes: list[list[int]], position: int) -> DynamicCache:
    """A plain cache that stands at an inner `position` of these passes."""
    whole, cut = (DynamicCache(config=model.config) for _ in range(2))
    _, kept = run_passes(model, whole, tokens, passes)
    for index, layer in enumerate(whole.layers):
        if (position, index) in kept:
            conv, state = kept[position, index]
            cut.update_conv_state(torch.nn.functional.pad(conv.unsqueeze(0), (1, 0)), index)
            cut.update_recurrent_state(state.unsqueeze(0), index)
        elif getattr(layer, "keys", None) is not None:
            cut.update(layer.keys[:, :, :position], layer.values[:, :, :position], index)
    return cut


@pytest.mark.parametrize(
    "options", [{}, {"copies": "indirect"}, {"rebuild_every_step": True, "page_size": 16}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_who_resumes_at_an_inner_checkpoint_is_bitwise_the_run_that_never_left(
    name: str, dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, DTYPES[dtype])
    engine = engine_for(model, **options)
    first, tokens = Recorded(engine, monkeypatch), random_tokens(LENGTH, seed=4)
    engine.generate(tokens, max_new_tokens=1, breakpoints=CUTS)
    for position in CUTS:
        second = Recorded(engine, monkeypatch)
        prompt = tokens[:position] + random_tokens(12, seed=position)
        result = engine.generate(prompt, max_new_tokens=3, return_logits=True)
        assert result.reused == position
        cache = never_left(model, tokens, first.passes[:1], position)
        expected, _ = run_passes(model, cache, result.sequence, second.passes)
        found = torch.cat([step.logits for step in result.steps])
        assert torch.equal(found, expected), largest_error(found, expected)
    engine.cache.check()


@pytest.mark.parametrize("late", [True, False])
def test_control_a_state_that_is_kept_late_is_noticed(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each inner state is replaced by that of the next inner position."""
    model = tiny_model("qwen3_5")
    engine = engine_for(model)
    keep, slots = engine.bridge.keep_states, []

    def keep_late(cache: Any, layer: int, slot: int) -> None:
        slots.append((layer, slot))
        keep(cache, layer, slot)
        if late and slots[-2:-1] and slots[-2][0] == layer:
            keep(cache, layer, slots[-2][1])

    monkeypatch.setattr(engine.bridge, "keep_states", keep_late)
    first, tokens = Recorded(engine, monkeypatch), random_tokens(LENGTH, seed=4)
    engine.generate(tokens, max_new_tokens=1, breakpoints=CUTS)
    second = Recorded(engine, monkeypatch)
    prompt = tokens[:14] + random_tokens(12, seed=14)
    result = engine.generate(prompt, max_new_tokens=1, return_logits=True)
    assert result.reused == 14
    cache = never_left(model, tokens, first.passes[:1], 14)
    expected, _ = run_passes(model, cache, result.sequence, second.passes)
    error = largest_error(torch.cat([step.logits for step in result.steps]), expected)
    assert error > 1e-3 if late else error == 0


# What it saves, and what it leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("inner", [True, False])
def test_a_cut_before_the_end_costs_a_second_pass_only_without(
    inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(tiny_model("qwen3_next"), inner_checkpoints=inner)
    recorded = Recorded(engine, monkeypatch)
    first = random_tokens(30, seed=5)
    result = engine.generate(first, max_new_tokens=1, breakpoints=(22,))
    assert len(recorded.passes) == (1 if inner else 2) == 1 + result.extra_passes
    monkeypatch.undo()
    again = engine.generate(first[:22] + random_tokens(9, seed=6), max_new_tokens=1)
    assert again.reused == 22


def test_turns_and_drafts_go_on_as_ever() -> None:
    """Many turns with breakpoints in each: the tokens of plain decoding."""
    model = tiny_model("qwen3_5")
    engine = engine_for(model, draft_tokens=3, prefill_chunk=16)
    tokens: list[int] = []
    for turn in range(4):
        prompt = tokens + random_tokens(30, seed=20 + turn)
        cuts = [len(tokens) + 4, len(tokens) + 21]
        result = engine.generate(
            prompt, max_new_tokens=5, breakpoints=cuts, drafter=lambda known, k: [known[-1]] * k
        )
        assert result.sequence == prompt + greedy(model, prompt, 5)
        assert result.reused == max(0, len(tokens) - 1) and result.extra_passes == 0
        tokens = result.sequence
        engine.cache.check()


def test_layers_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass, and after one that fails in the middle of a layer; what others have hooked in stays."""
    model = tiny_model("qwen3_5")
    engine = engine_for(model)
    first, hooked = (model.model.layers[index].linear_attn for index in (0, 1))
    own = hooked.forward
    hooked.forward = hook = lambda *args, **kwargs: own(*args, **kwargs)
    prompt = random_tokens(20, seed=7)
    engine.generate(prompt, max_new_tokens=1, breakpoints=(9,))
    assert "forward" not in vars(first) and vars(hooked)["forward"] is hook

    def boom(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(engine.bridge, "keep_states", boom)
    with pytest.raises(RuntimeError, match="boom"):
        engine.generate(random_tokens(20, seed=8), max_new_tokens=1, breakpoints=(9,))
    assert "forward" not in vars(first) and vars(hooked)["forward"] is hook
    monkeypatch.undo()
    engine.cache.check()
    del hooked.forward
    assert engine.generate(prompt, max_new_tokens=3).sequence == prompt + greedy(model, prompt, 3)


def test_a_model_whose_layers_cannot_be_split_is_refused() -> None:
    model = tiny_model("qwen3_5")
    model.model.layers[3].linear_attn.forward = lambda hidden_states: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"\[0, 1, 3\] only \[0, 1\]"):
        engine_for(model)
    engine_for(model, inner_checkpoints=False)
