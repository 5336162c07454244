"""What `CachedModel.generate` and `branches` promise: plain decoding's tokens, what is reused, and nothing
leaked.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from hybridcache._hf_bridge import check_transformers_version  # noqa: E402
from hybridcache.errors import StateError  # noqa: E402
from hybridcache.hf import (  # noqa: E402
    CachedModel,
    OutOfRoomError,
    TransformersVersionError,
    UnsupportedModelError,
)
from tests.tiny_models import VOCAB, greedy, random_tokens, run_schedule, tiny_model  # noqa: E402

PAGES, SLOTS = 40, 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_next")


def engine_for(model: Any, **options: Any) -> CachedModel:
    return CachedModel(model, **{"num_pages": PAGES, "num_slots": SLOTS, "page_size": 7, **options})


def assert_nothing_leaked(engine: CachedModel) -> None:
    """All pages can be had by one request, all slots by as many requests: nobody else holds any."""
    engine.cache.check()
    engine.cache.clear()
    everything = engine.open([1], max_new_tokens=PAGES * 7 - 1)
    assert everything is not None
    everything.close(discard=True)
    each = [engine.open([1, 2, slot]) for slot in range(SLOTS)]
    assert None not in each
    for request in each:
        request.close(discard=True)
    engine.cache.check()


# Tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "qwen3_5_moe", "kimi_linear"])
def test_greedy_turns_equal_plain_decoding(name: str) -> None:
    model = tiny_model(name)
    engine = engine_for(model, prefill_chunk=16)
    tokens: list[int] = []
    for turn, count in enumerate([21, 9, 30]):
        prompt = tokens + random_tokens(count, seed=turn)
        result = engine.generate(prompt, max_new_tokens=8)
        assert result.sequence == prompt + greedy(model, prompt, 8)
        assert result.reused == max(len(tokens) - 1, 0)  # the last token of a turn was sampled, never read
        assert result.computed == len(prompt) - result.reused
        assert result.match.length == result.reused
        assert (result.steps[0].begin, result.steps[-1].end) == (result.reused, len(prompt) + 7)
        assert result.seconds_to_first_token > 0
        tokens = result.sequence
    assert_nothing_leaked(engine)


def test_the_same_prompt_again_computes_little_and_says_the_same(model: Any) -> None:
    engine, prompt = engine_for(model, prefill_chunk=16), random_tokens(50, seed=1)
    first = engine.generate(prompt, max_new_tokens=5)
    again = engine.generate(prompt, max_new_tokens=5)
    assert again.sequence == first.sequence == prompt + greedy(model, prompt, 5)
    assert (again.match.kv_length, again.match.reason) == (50, "remainder")
    assert again.reused == 48  # the last chunk's end; a state at 50 exists, but one token must be computed
    assert again.computed == 2


def test_salts_share_nothing(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(30, seed=2)
    engine.generate(prompt, max_new_tokens=3, salt=b"one")
    longer = prompt + random_tokens(9, seed=3)
    results = engine.generate([longer, longer], max_new_tokens=3, salt=[b"two", b"one"])
    assert [result.reused for result in results] == [0, 30]
    assert results[0].match.reason == "cold"
    assert results[0].sequence == results[1].sequence


def test_a_batch_with_different_cached_prefixes(model: Any) -> None:
    engine = engine_for(model)
    starts = [random_tokens(count, seed=count) for count in (12, 25, 8)]
    known = [engine.generate(start, max_new_tokens=4).sequence for start in starts[:2]]
    prompts = [known[0] + [5, 6], known[1] + random_tokens(11, seed=4), starts[2]]
    results = engine.generate(prompts, max_new_tokens=6)
    assert [result.reused for result in results] == [15, 28, 0]
    for prompt, result in zip(prompts, results, strict=True):
        assert result.sequence == prompt + greedy(model, prompt, 6)


def test_a_batch_shares_what_its_first_prompt_leaves(model: Any) -> None:
    engine, system = engine_for(model), random_tokens(33, seed=5)
    prompts = [system + random_tokens(6, seed=seed) for seed in range(3)]
    results = engine.generate(prompts, max_new_tokens=2, breakpoints=(33,))
    assert [result.reused for result in results] == [0, 33, 33]


def test_a_batch_larger_than_the_arena_completes(model: Any) -> None:
    engine = engine_for(model, num_pages=9, num_slots=2)
    prompts = [random_tokens(20, seed=seed) for seed in range(6)]
    order: list[int] = []
    results = engine.generate(prompts, max_new_tokens=4, on_step=lambda index, record: order.append(index))
    assert [result.sequence for result in results] == [
        prompt + greedy(model, prompt, 4) for prompt in prompts
    ]
    assert set(order) == set(range(6))
    engine.cache.check()


def test_every_form_of_input_ids(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(10, seed=6)
    expected = prompt + greedy(model, prompt, 2)
    arrays = (np.array(prompt), np.array(prompt, dtype=np.uint8), array("q", prompt), bytes(prompt))
    for one in (prompt, tuple(prompt), torch.tensor(prompt), torch.tensor([prompt]), *arrays):
        assert engine.generate(one, max_new_tokens=2).sequence == expected
    for many in ([prompt], [torch.tensor(prompt)], (tuple(prompt),)):
        assert [result.sequence for result in engine.generate(many, max_new_tokens=2)] == [expected]


def test_end_of_sequence_ends_and_stays(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(10, seed=7)
    plain = greedy(model, prompt, 8)
    end = plain[3]
    expected = prompt + plain[: plain.index(end) + 1]
    assert engine.generate(prompt, max_new_tokens=8, eos_token_id=end).sequence == expected
    assert engine.generate(prompt, max_new_tokens=8, eos_token_id=[end, VOCAB]).sequence == expected


def test_no_new_tokens_only_reads_the_prompt(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(10, seed=8)
    result = engine.generate(prompt, max_new_tokens=0)
    assert (result.sequence, result.seconds_to_first_token) == (prompt, None)
    assert engine.generate([*prompt, 1], max_new_tokens=0).reused == 10


def test_keep_nothing_leaves_nothing_of_the_turn(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(30, seed=9)
    sequence = engine.generate(prompt, max_new_tokens=5, keep="nothing").sequence
    assert engine.generate([*sequence, 1, 2], max_new_tokens=0).reused < len(sequence) - 1


def test_sampling_follows_the_generator_and_its_limits(model: Any) -> None:
    prompt = random_tokens(10, seed=10)

    def sample(seed: int, **options: Any) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        engine = engine_for(model)
        return engine.generate(
            prompt, max_new_tokens=12, do_sample=True, generator=generator, **options
        ).sequence

    assert sample(1) == sample(1) != sample(2)
    assert (
        sample(1, top_k=1)
        == sample(2, top_p=1e-6)
        == sample(3, temperature=1e-4)
        == prompt + greedy(model, prompt, 12)
    )


def test_logits_are_returned_only_if_asked_for(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(10, seed=11)
    assert [step.logits for step in engine.generate(prompt, max_new_tokens=2).steps] == [None, None]
    other = engine.generate(prompt, max_new_tokens=1, salt=b"x", return_logits=True)
    assert torch.equal(other.steps[0].logits, run_schedule(model, prompt, [10]))


# Branches ---------------------------------------------------------------------------------------------------


def test_branches_read_the_prompt_once(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(30, seed=12)
    steps: list[tuple[int, int]] = []
    results = engine.branches(
        prompt, 3, max_new_tokens=4, on_step=lambda index, record: steps.append((index, record.end))
    )
    expected = prompt + greedy(model, prompt, 4)
    assert [result.sequence for result in results] == [expected] * 3
    assert [result.reused for result in results] == [0, 30, 30]
    assert [result.computed for result in results] == [30, 0, 0]
    assert sum(end <= 30 for _, end in steps) == len([step for step in results[0].steps if step.end <= 30])
    assert_nothing_leaked(engine)


def test_sampled_branches_differ_and_are_what_their_logits_say(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(20, seed=13)
    generator = torch.Generator().manual_seed(0)
    results = engine.branches(
        prompt, 3, max_new_tokens=6, do_sample=True, temperature=2.0, generator=generator, return_logits=True
    )
    assert len({tuple(result.sequence) for result in results}) == 3
    root_ends = [step.end for step in results[0].steps]
    for result in results:
        ends = [end for end in root_ends if end <= 20] + [step.end for step in result.steps if step.end > 20]
        expected = run_schedule(model, result.sequence, ends)[result.steps[0].begin :]
        assert torch.equal(torch.cat([step.logits for step in result.steps]), expected)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_more_branches_than_slots_complete(model: Any, slots: int) -> None:
    engine, prompt = engine_for(model, num_slots=slots), random_tokens(15, seed=14)
    results = engine.branches(prompt, 5, max_new_tokens=3)
    assert [result.sequence for result in results] == [prompt + greedy(model, prompt, 3)] * 5
    assert (15 in [result.reused for result in results]) == (slots > 2)  # root, fork, checkpoint
    engine.cache.check()


# Failures ---------------------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


def _fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int]) -> None:
    """The numbered calls of `owner.name`, counted from now, raise: odd ones at once, even ones with the work
    done.
    """
    original, count = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            if count % 2 == 0:
                original(*args, **kwargs)
            raise BoomError(f"call {count} of {name}")
        return original(*args, **kwargs)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize("calls", [{1}, {2}, {5}, {7}, {1, 2}, {5, 6}], ids=str)
@pytest.mark.parametrize("where", ["forward", "apply", "store"])
def test_a_failure_leaks_nothing_and_corrupts_nothing(model: Any, where: str, calls: set[int]) -> None:
    engine = engine_for(model, prefill_chunk=9)
    known = engine.generate(random_tokens(20, seed=15), max_new_tokens=3).sequence
    owner = {"forward": engine, "apply": engine.pools, "store": engine.bridge}[where]
    prompts = [known + random_tokens(12, seed=16), random_tokens(12, seed=17)]
    with pytest.MonkeyPatch.context() as patch:
        _fail_at(patch, owner, where, calls)
        with pytest.raises(BoomError):
            engine.generate(prompts, max_new_tokens=4)
    engine.cache.check()
    for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=4), strict=True):
        assert result.sequence == prompt + greedy(model, prompt, 4)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("call", [1, 2])
def test_a_plan_that_failed_once_is_settled_at_once(model: Any, call: int) -> None:
    """Nothing rests on it: what the request held can be had without another step."""
    engine = engine_for(model, prefill_chunk=9)
    with pytest.MonkeyPatch.context() as patch:
        _fail_at(patch, engine.pools, "apply", {call})
        with pytest.raises(BoomError):
            engine.generate(random_tokens(20, seed=22), max_new_tokens=1)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_failing_branch_or_callback_leaks_nothing(model: Any, call: int) -> None:
    engine, prompt = engine_for(model), random_tokens(20, seed=18)
    with pytest.MonkeyPatch.context() as patch:
        _fail_at(patch, engine, "forward", {call})
        with pytest.raises(BoomError):
            engine.branches(prompt, 3, max_new_tokens=3)
    assert_nothing_leaked(engine)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        _fail_at(patch, engine, "check_token", {call})
        with pytest.raises(BoomError):
            engine.generate(prompt, max_new_tokens=8, on_step=lambda index, record: seen.append(index))
    assert_nothing_leaked(engine)


def test_the_context_manager_discards_on_an_exception(model: Any) -> None:
    engine, prompt = engine_for(model), random_tokens(20, seed=19)
    request = engine.open(prompt)

    def use() -> None:
        with request:
            request.prefill()
            raise BoomError

    with pytest.raises(BoomError):
        use()
    assert request.closed
    assert engine.cache.match([*prompt, 1]).length == 20  # what was committed before stays
    assert_nothing_leaked(engine)


def test_no_room_that_we_could_make_is_a_typed_error(model: Any) -> None:
    engine = engine_for(model, num_slots=1)
    held = engine.open([1, 2, 3])
    assert held is not None
    assert engine.open([4, 5, 6]) is None
    with pytest.raises(OutOfRoomError):
        engine.generate([4, 5, 6], max_new_tokens=1)
    with pytest.raises(OutOfRoomError):
        engine.branches([4, 5, 6], 2, max_new_tokens=1)
    held.close()
    assert len(engine.generate([4, 5, 6], max_new_tokens=1).sequence) == 4


def test_a_step_without_room_changes_nothing_and_can_be_tried_again(model: Any) -> None:
    engine = engine_for(model, num_pages=4)
    first, second = engine.open(random_tokens(14, seed=21), return_logits=True), engine.open([1, 2, 3])
    assert first is not None
    assert second is not None
    first.prefill()
    for token in range(7):
        assert first.decode(token) is not None
    before = list(first.tokens), first.lease.computed, len(first.steps)
    assert first.decode(7) is None  # a fourth page, which the other request holds
    assert (list(first.tokens), first.lease.computed, len(first.steps)) == before
    second.close()
    assert first.decode(7) is not None
    ends = [step.end for step in first.steps]
    expected = run_schedule(model, first.tokens, ends)
    assert torch.equal(torch.cat([step.logits for step in first.steps]), expected)
    first.close()
    engine.cache.check()


def test_calls_out_of_order(model: Any) -> None:
    engine = engine_for(model)
    request = engine.open(random_tokens(10, seed=20), max_new_tokens=2)
    with pytest.raises(StateError, match="prompt tokens read"):
        request.decode(1)
    request.prefill(4)
    assert not request.prefilled
    request.prefill()
    with pytest.raises(StateError, match="prefill"):
        request.prefill()
    with pytest.raises(ValueError, match="token: 128"):
        request.decode(VOCAB)
    request.decode(1)
    request.close()
    request.close()
    with pytest.raises(StateError):
        request.decode(1)
    assert len(request.tokens) == 11


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "empty"),
        ([[1], [VOCAB]], {}, "token: 128"),
        ([1, -1], {}, "token: -1"),
        ([1, 1 << 40], {}, "token: 1099511627776"),
        (torch.tensor([[1, VOCAB]]), {}, "token: 128"),
        (np.array([1, VOCAB]), {}, "token: 128"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "one row"),
        (torch.zeros(3), {}, "integers"),
        ([1, 2], {"max_new_tokens": -1}, "max_new_tokens"),
        ([1, 2], {"keep": "some"}, "keep"),
        ([[1], [2]], {"salt": [b"a"]}, "salt"),
        ([[1], [2]], {"breakpoints": [[1]]}, "breakpoints"),
    ],
    ids=str,
)
def test_bad_arguments_refuse_the_whole_call(
    model: Any, prompt: Any, options: dict[str, Any], message: str
) -> None:
    engine = engine_for(model)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, **{"max_new_tokens": 2, **options})
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    "prompt", [[1, 2.5], [[1], 2], "ab", [[1], "ab"], 3, np.array([1.0]), torch.tensor([True])], ids=str
)
def test_what_is_no_token_is_a_type_error(model: Any, prompt: Any) -> None:
    with pytest.raises(TypeError):
        engine_for(model).generate(prompt, max_new_tokens=1)


def test_bad_engines(model: Any) -> None:
    with pytest.raises(ValueError, match="prefill_chunk"):
        engine_for(model, prefill_chunk=0)
    with pytest.raises(TypeError, match="model"):
        engine_for(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="training"):
        engine_for(tiny_model("qwen3_next").train())
    for old in ("4.57.1", "5.6.2"):
        with pytest.raises(TransformersVersionError, match=r"5\.7"):
            check_transformers_version(old)
    for new in ("5.7", "5.7.0", "5.23.0.dev0", "6.0.0"):
        check_transformers_version(new)


def test_a_model_without_recurrent_layers_is_refused() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    with pytest.raises(UnsupportedModelError, match="qwen3"):
        engine_for(Qwen3ForCausalLM(config).eval())
