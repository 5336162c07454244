"""The contract of the transformers adapter: a restored run equals, bit for bit, the run that never left.

Owns the exactness check (`Ledger`) and its negative controls: each corruption of pages, slots or states that
a bug could cause must make the very same check fail, far above any rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from transformers import DynamicCache  # noqa: E402

from hybridcache._hf_bridge import live_state  # noqa: E402
from hybridcache.hf import CachedModel, Request, StepRecord  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    BUILDERS,
    continue_schedule,
    largest_error,
    random_tokens,
    run_schedule,
    tiny_model,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TURNS = [13, 29, 1, 41, 18]  # user tokens of each turn: boundaries fall anywhere
WELL_ABOVE = 1e-3  # of the largest |logit|; what is exact is exactly equal, rounding stays below 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


class MismatchError(AssertionError):
    """Logits are not bitwise those of the run that never left."""

    def __init__(self, error: float) -> None:
        super().__init__(f"logits differ from the run that never left by {error:.3g} of the largest |logit|")
        self.error = error


class Ledger:
    """Which steps have led to each state, so that a run that never left can repeat them without hybridcache.

    It keeps the DynamicCache of each run at its end, and goes on with it where a request goes on from there.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ends: dict[tuple[int, ...], list[int]] = {(): []}
        self._caches: dict[tuple[int, ...], Any] = {}

    def check(self, tokens: list[int], steps: list[StepRecord]) -> None:
        """Every row of logits of `steps` is bitwise that of one DynamicCache that has read `tokens` all
        along.
        """
        start = steps[0].begin
        before = self._ends[tuple(tokens[:start])]
        ends = before + [step.end for step in steps]
        for count in range(len(before), len(ends)):
            key = tuple(tokens[: ends[count]])
            self._ends[key] = ends[: count + 1]
            self._caches.pop(key, None)
        expected = self._never_left(tokens, before, ends)
        logits = torch.cat([step.logits for step in steps])
        if not torch.equal(logits, expected):
            raise MismatchError(largest_error(logits, expected))

    def _never_left(self, tokens: list[int], before: list[int], ends: list[int]) -> Any:
        start = before[-1] if before else 0
        cache = self._caches.pop(tuple(tokens[:start]), None)
        if cache is None:
            cache = DynamicCache(config=self._model.config)
            continue_schedule(self._model, cache, tokens, [0, *before])
        expected = continue_schedule(self._model, cache, tokens, [start, *ends[len(before) :]])
        self._caches[tuple(tokens[: ends[-1]])] = cache
        return expected


def engine_for(model: Any, **options: Any) -> CachedModel:
    return CachedModel(model, **{"num_pages": 80, "num_slots": 12, "page_size": 7, **options})


def speak(engine: CachedModel, prompt: list[int], count: int, **options: Any) -> Any:
    return engine.generate(prompt, max_new_tokens=count, return_logits=True, **options)


OPTIONS = [
    {"page_size": 7},
    {"page_size": 16, "prefill_chunk": 11},
    {"page_size": 7, "prefill_chunk": 16, "copies": "indirect"},
    {"page_size": 64, "copies": "indirect", "num_pages": 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_many_turns_are_bitwise_the_run_that_never_left(
    name: str, dtype: str, options: dict[str, Any]
) -> None:
    """Living cache object or one rebuilt from pages and slot at every step: the same bits."""
    model = tiny_model(name, DTYPES[dtype])
    living = engine_for(model, **options)
    rebuilt = engine_for(model, rebuild_every_step=True, **options)
    ledger, tokens, read = Ledger(model), [], 0
    for turn, count in enumerate(TURNS):
        prompt = tokens + random_tokens(count, seed=turn)
        result, twin = speak(living, prompt, 6), speak(rebuilt, prompt, 6)
        assert (result.reused, twin.reused) == (read, read)
        ledger.check(result.sequence, result.steps)
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(result.steps, twin.steps, strict=True))
        tokens, read = result.sequence, len(result.sequence) - 1
        living.cache.check()


@pytest.mark.parametrize("name", ["qwen3_5_moe", "kimi_linear", "nemotron_h"])
def test_other_hybrids_are_exact_too(name: str) -> None:
    model = tiny_model(name)
    engine = engine_for(model, rebuild_every_step=True)
    ledger, tokens = Ledger(model), []
    for turn, count in enumerate(TURNS[:3]):
        result = speak(engine, tokens + random_tokens(count, seed=turn), 5)
        ledger.check(result.sequence, result.steps)
        assert result.reused == max(len(tokens) - 1, 0)
        tokens = result.sequence


@pytest.mark.parametrize("name", BUILDERS)
def test_pages_and_slot_hold_all_that_the_living_cache_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    engine = engine_for(model, prefill_chunk=10)
    store, compared = engine.bridge.store, []

    def store_and_compare(cache: Any, pages: Any, slot: int, begin: int, end: int) -> None:
        store(cache, pages, slot, begin, end)
        again = engine.bridge.load(pages, slot, end)
        for spec in engine.layout.layers:
            if spec.kind == "recurrent":
                for part in spec.parts:
                    assert torch.equal(
                        live_state(again, spec.index, part.name), live_state(cache, spec.index, part.name)
                    )
            else:
                assert torch.equal(again.layers[spec.index].keys, cache.layers[spec.index].keys)
                assert torch.equal(again.layers[spec.index].values, cache.layers[spec.index].values)
        assert again.get_seq_length() == cache.get_seq_length() == end
        compared.append(end)

    monkeypatch.setattr(engine.bridge, "store", store_and_compare)
    first = speak(engine, random_tokens(25, seed=1), 4, breakpoints=(2, 19))
    speak(engine, first.sequence + random_tokens(8, seed=2), 4)
    assert {2, 19, 25, 28, 37} <= set(compared)


@pytest.mark.parametrize("cut", [1, 31, 64, 100, 149])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "kimi_linear"])
def test_one_cut_is_within_rounding_of_single_shot(name: str, cut: int) -> None:
    model = tiny_model(name)
    engine = engine_for(model, page_size=16)
    tokens = random_tokens(150, seed=3)
    speak(engine, tokens[:cut], 0)
    result = speak(engine, tokens, 0)
    assert result.reused == cut
    assert result.steps[-1].end == 150
    error = largest_error(
        torch.cat([step.logits for step in result.steps]), run_schedule(model, tokens, [150])[cut:]
    )
    assert error < 1e-5


@pytest.mark.parametrize("cut", [5, 14, 23])
def test_a_prompt_that_leaves_another_at_a_breakpoint_resumes_there(cut: int) -> None:
    model = tiny_model("qwen3_next")
    engine = engine_for(model)
    ledger, first = Ledger(model), random_tokens(40, seed=4)
    result = speak(engine, first, 3, breakpoints=(cut,))
    ledger.check(result.sequence, result.steps)
    assert result.extra_passes == 1
    second = speak(engine, first[:cut] + random_tokens(20, seed=5), 3)
    assert second.reused == cut
    ledger.check(second.sequence, second.steps)


@pytest.mark.parametrize(
    "options", [{}, {"rebuild_every_step": True}, {"copies": "indirect", "page_size": 16}], ids=str
)
def test_branches_are_independent_of_each_other(options: dict[str, Any]) -> None:
    """Interleaved decoding of three forks gives each the logits it has alone, and the fork point stays
    intact.
    """
    model = tiny_model("qwen3_5")
    engine = engine_for(model, **options)
    ledger, prompt = Ledger(model), random_tokens(24, seed=6)
    root = engine.open(prompt, max_new_tokens=12, return_logits=True)
    assert root is not None
    while not root.prefilled:
        root.prefill()
    branches = [root, root.fork(), root.fork()]
    for step in range(8):
        for offset, branch in enumerate(branches):
            assert branch.decode(random_tokens(8, seed=20 + offset)[step]) is not None
    grandchild = branches[1].fork()
    branches.append(grandchild)
    for step in range(3):
        for offset, branch in enumerate(branches):
            assert branch.decode(random_tokens(3, seed=30 + offset)[step]) is not None
    for branch in branches:  # each before the forks of it: the ledger knows where a fork began
        ledger.check(branch.tokens, branch.steps)
        branch.close()
    engine.cache.check()
    for branch in branches:  # what each has left in the tree is its own as well
        result = speak(engine, [*branch.tokens, 5, 6, 7], 1)
        assert result.reused == len(branch.tokens)
        ledger.check(result.sequence, result.steps)


@pytest.mark.parametrize("memory", [{"num_pages": 26, "num_slots": 4}, {"memory_bytes": 150_000}], ids=str)
def test_interleaved_conversations_stay_exact_under_eviction(memory: dict[str, int]) -> None:
    """More conversations than states fit: some turns resume, some start over, all are exact."""
    model = tiny_model("qwen3_next")
    engine = CachedModel(model, page_size=7, **memory)
    ledger, talks, reused = Ledger(model), [[] for _ in range(4)], []
    order = cycle([0, 1, 1, 2, 0, 3, 3])
    for turn in range(20):
        talk = next(order)
        if len(talks[talk]) > 60:
            talks[talk] = []
        prompt = talks[talk] + random_tokens(5 + turn % 4, seed=100 + turn)
        result = speak(engine, prompt, 4)
        ledger.check(result.sequence, result.steps)
        reused.append((result.reused, max(len(talks[talk]) - 1, 0)))
        talks[talk] = result.sequence
        engine.cache.check()
    assert any(got == ideal > 0 for got, ideal in reused), reused
    assert any(got < ideal for got, ideal in reused), f"nothing was evicted: {reused}"


# Negative controls: deliberate damage that the check above must notice --------------------------------------


def _only_parts(engine: CachedModel, patch: pytest.MonkeyPatch, keep: Callable[[str], bool]) -> None:
    """From now on only state parts whose name passes `keep` reach the slot."""
    state = engine.pools.state

    def partial_state(layer: int) -> Any:
        parts = next(spec.parts for spec in engine.layout.layers if spec.index == layer)
        pools = zip(parts, state(layer), strict=True)
        return tuple(pool if keep(part.name) else pool.clone() for part, pool in pools)

    patch.setattr(engine.pools, "state", partial_state)
    patch.setattr(engine.bridge, "_slots", {})  # views that were kept


def _no_copies(engine: CachedModel, patch: pytest.MonkeyPatch, field: str) -> None:
    """From now on the plan's copies named `field` are not carried out."""
    apply = engine.pools.apply

    def lossy_apply(plan: Any) -> None:
        assert len(getattr(plan, field)), f"the control expects a plan with {field}"
        apply(_Without(plan, field))

    patch.setattr(engine.pools, "apply", lossy_apply)


class _Without:
    """A plan in which one list of copies is empty."""

    def __init__(self, plan: Any, field: str) -> None:
        self._plan, self._field = plan, field

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._plan, name)
        return value[:0] if name == self._field else value


def _stale_page(engine: CachedModel, patch: pytest.MonkeyPatch) -> None:
    """From now on the KV of a step stays in the model's cache and never reaches its page."""
    patch.setattr(engine.bridge, "_write_kv", lambda *args: None)


LAST_STEP = {  # damage while the last step of turn 1 leaves its state and KV behind
    "state one token off": lambda engine, patch: _only_parts(engine, patch, lambda name: False),
    "conv part stale": lambda engine, patch: _only_parts(engine, patch, lambda name: name != "conv"),
    "recurrent part stale": lambda engine, patch: _only_parts(engine, patch, lambda name: name == "conv"),
    "KV page stale": _stale_page,
    "nothing": lambda engine, patch: None,
}
FIRST_STEP = {  # damage while the first step of turn 2 takes them up
    "state not copied": lambda engine, patch: _no_copies(engine, patch, "copy_slots"),
    "tail page not copied": lambda engine, patch: _no_copies(engine, patch, "copy_pages"),
    "nothing": lambda engine, patch: None,
}


@contextmanager
def _noticed(damage: str) -> Iterator[None]:
    """The block must fail the exactness check by far; without damage it must pass."""
    if damage == "nothing":
        yield
        return
    with pytest.raises(MismatchError) as caught:
        yield
    assert not caught.value.error <= WELL_ABOVE  # NaN counts as well above


def _first_turn(engine: CachedModel, damage: Callable[..., None]) -> Request:
    request = engine.open(random_tokens(23, seed=7), max_new_tokens=6, return_logits=True)
    assert request is not None
    while not request.prefilled:
        request.prefill()
    tokens = random_tokens(4, seed=8)
    for token in tokens[:-1]:
        request.decode(token)
    with pytest.MonkeyPatch.context() as patch:
        damage(engine, patch)
        request.decode(tokens[-1])
    request.close()
    return request


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", LAST_STEP)
def test_control_damage_at_the_end_of_a_turn_is_noticed(damage: str, dtype: str) -> None:
    model = tiny_model("qwen3_5", DTYPES[dtype])
    engine, ledger = engine_for(model), Ledger(model)
    first = _first_turn(engine, LAST_STEP[damage])
    ledger.check(first.tokens, first.steps)  # the damage touches only what the next turn will read
    second = speak(engine, first.tokens + random_tokens(10, seed=9), 2)
    assert second.reused == len(first.tokens)
    with _noticed(damage):
        ledger.check(second.sequence, second.steps)


@pytest.mark.parametrize("damage", FIRST_STEP)
def test_control_damage_at_a_restore_is_noticed(damage: str) -> None:
    model = tiny_model("qwen3_next")
    engine, ledger = engine_for(model), Ledger(model)
    first = _first_turn(engine, lambda engine, patch: None)
    ledger.check(first.tokens, first.steps)
    with pytest.MonkeyPatch.context() as patch:
        FIRST_STEP[damage](engine, patch)
        second = speak(engine, first.tokens + random_tokens(10, seed=9), 0)
    with _noticed(damage):
        ledger.check(second.sequence, second.steps)


class _SharedSlot:
    """A lease whose steps read and write another lease's slot: what a fork that shares instead of copying
    would do.
    """

    def __init__(self, lease: Any, slot: int) -> None:
        self._lease, self._slot = lease, slot

    def launch(self, count: int) -> Any:
        return self._lease.launch(count)._replace(write_slot=self._slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)


@pytest.mark.parametrize("damage", ["slot shared", "nothing"])
def test_control_branches_that_share_a_slot_are_noticed(damage: str) -> None:
    model = tiny_model("qwen3_5")
    engine, ledger = engine_for(model, rebuild_every_step=True), Ledger(model)
    root = engine.open(random_tokens(24, seed=6), max_new_tokens=8, return_logits=True)
    assert root is not None
    while not root.prefilled:
        root.prefill()
    child = root.fork()
    assert child is not None
    root.decode(1)  # its state moves from the fork's checkpoint into its own live slot
    child.decode(2)
    if damage == "slot shared":
        child._lease = _SharedSlot(child._lease, root.lease.live_slot)
    for token in random_tokens(4, seed=10):
        root.decode(token)
        child.decode(127 - token)
    ledger.check(root.tokens[:25], root.steps[:-4])
    with _noticed(damage):
        ledger.check(child.tokens, child.steps)
    with _noticed(damage):
        ledger.check(root.tokens, root.steps)
