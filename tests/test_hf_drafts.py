"""Speculative decoding and overlap on real models: the tokens of greedy decoding, and exact checkpoints.

Owns the contract of `generate(drafter=...)` and `Request.verify` (one row, verified in place), and that of
the row form and of overlap, driven by tests/draft_engine.py. Wherever bits can be compared they are: `Ledger`
repeats the passes that stayed in a run that never left, and the passes of `LayersOneByOne` round as plain
decoding does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from transformers import DynamicCache  # noqa: E402

from hybridcache.errors import StateError  # noqa: E402
from hybridcache.hf import CachedModel, PromptLookup, Result  # noqa: E402
from tests.draft_engine import DraftEngine, Talk, mixed_widths, wrong_now_and_then  # noqa: E402
from tests.test_hf_exact import Ledger, MismatchError  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    PARTS,
    RECURRENT,
    VOCAB,
    KernelsOneByOne,
    continue_schedule,
    greedy,
    live_state,
    random_tokens,
    run_schedule,
    tiny_model,
)

PAGES, SLOTS = 60, 30
COUNT = 28  # tokens after the prompt
ROUNDING = 1e-4  # of the largest |logit|: what another split into steps may change, in fp32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_5")


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return random_tokens(23, seed=1)


@pytest.fixture(scope="module")
def truth(model: Any, prompt: list[int]) -> list[int]:
    """COUNT greedy tokens after the prompt, none of them a close call: rounding cannot change one."""
    sequence = prompt + greedy(model, prompt, COUNT)
    assert_no_close_call(model, sequence, len(prompt))
    return sequence


def assert_no_close_call(model: Any, sequence: list[int], length: int) -> None:
    logits = run_schedule(model, sequence[:-1], [length, *range(length + 1, len(sequence))])[length - 1 :]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 2 * ROUNDING * logits.abs().max()


def engine_for(model: Any, draft_tokens: int, **options: Any) -> CachedModel:
    sizes = {"num_pages": PAGES, "num_slots": SLOTS, "page_size": 7}
    return CachedModel(model, draft_tokens=draft_tokens, **{**sizes, **options})


def assert_nothing_taken(cache: Any) -> None:
    cache.check()
    cache.clear()
    stats = cache.stats()
    assert (stats["resting_leases"], stats["taken_pages"], stats["taken_slots"]) == (0, 0, 0)


def perfect(sequence: list[int], seed: int) -> Callable[[list[int], int], list[int]]:
    return lambda tokens, k: sequence[len(tokens) : len(tokens) + k]


def wrong(sequence: list[int], seed: int) -> Callable[[list[int], int], list[int]]:
    return lambda tokens, k: [(token + 1) % VOCAB for token in sequence[len(tokens) : len(tokens) + k]]


def mixture(sequence: list[int], seed: int) -> Callable[[list[int], int], list[int]]:
    """Of any length up to k, often wrong somewhere."""
    chance, often = random.Random(seed), wrong_now_and_then(sequence, seed, VOCAB)
    return lambda tokens, k: often(tokens, chance.randint(0, k))


def lookup(sequence: list[int], seed: int) -> PromptLookup:
    return PromptLookup(1)


DRAFTERS = {"perfect": perfect, "wrong": wrong, "mixture": mixture, "lookup": lookup}


# The adapter: one row, verified in place --------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_drafts_of_any_quality_change_no_token(
    model: Any, prompt: list[int], truth: list[int], kind: str, k: int
) -> None:
    """Nor the state that is left: what stays is bitwise that of a run that never read a wrong draft."""
    engine, ledger = engine_for(model, k), Ledger(model)
    result = engine.generate(
        prompt, max_new_tokens=COUNT, drafter=DRAFTERS[kind](truth, k), return_logits=True
    )
    assert result.sequence == truth
    ledger.check(result.sequence, result.steps)
    assert_figures_add_up(result, COUNT)
    if kind == "perfect":
        assert (result.void_passes, result.drafts_accepted) == (0, result.drafts_proposed)
        assert len(result.steps) == 1 + -(-(COUNT - 1) // (k + 1))
    if kind == "wrong":
        assert (result.drafts_accepted, result.void_passes) == (0, result.verify_passes)
        assert len(result.steps) == COUNT
    follow_up(engine, ledger, result, len(truth) - 1)


def assert_figures_add_up(result: Result, count: int) -> None:
    """All output but the last token is read, one token a pass and the accepted drafts."""
    length = len(result.sequence) - count
    decoding = [step for step in result.steps if step.begin >= length]
    assert (
        sum(step.end - step.begin for step in decoding) == count - 1 == len(decoding) + result.drafts_accepted
    )
    assert result.drafts_accepted <= result.drafts_proposed
    assert result.void_passes <= result.verify_passes <= len(decoding)


def follow_up(engine: CachedModel, ledger: Ledger, result: Result, reused: int) -> None:
    """The next turn resumes where the last one ended, and is bitwise the run that never left."""
    again = engine.generate(result.sequence + random_tokens(9, seed=77), max_new_tokens=3, return_logits=True)
    assert again.reused == reused
    ledger.check(again.sequence, again.steps)
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize(
    "options",
    [
        {"copies": "indirect"},
        {"rebuild_every_step": True},
        {"copies": "indirect", "rebuild_every_step": True},
    ],
    ids=str,
)
def test_either_way_of_copying_and_of_keeping_the_models_cache(
    model: Any, prompt: list[int], truth: list[int], options: dict[str, Any]
) -> None:
    plain, other = engine_for(model, 3), engine_for(model, 3, page_size=7, **options)
    results = [
        engine.generate(prompt, max_new_tokens=COUNT, drafter=mixture(truth, 5), return_logits=True)
        for engine in (plain, other)
    ]
    assert [result.sequence for result in results] == [truth, truth]
    assert results[0].void_passes == results[1].void_passes > 0
    pairs = zip(results[0].steps, results[1].steps, strict=True)
    assert all(torch.equal(one.logits, two.logits) for one, two in pairs)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "kimi_linear", "nemotron_h"])
def test_other_hybrids_draft_too(name: str) -> None:
    """What is rewound after wrong drafts is bitwise what it was: MLA, convolutions, Mamba states."""
    model, prompt = tiny_model(name), random_tokens(20, seed=2)
    engine, ledger = engine_for(model, 4), Ledger(model)
    truth = prompt + greedy(model, prompt, 24)
    assert_no_close_call(model, truth, len(prompt))
    result = engine.generate(prompt, max_new_tokens=24, drafter=mixture(truth, 3), return_logits=True)
    assert result.sequence == truth
    assert 0 < result.void_passes < result.verify_passes
    ledger.check(result.sequence, result.steps)
    follow_up(engine, ledger, result, len(truth) - 1)


@pytest.mark.parametrize("make", [perfect, mixture])
def test_the_end_of_a_sequence_among_the_drafts_is_where_it_ends(
    model: Any, prompt: list[int], truth: list[int], make: Any
) -> None:
    for last in range(len(prompt), len(truth), 7):
        end = truth[last]
        expected = truth[: truth.index(end, len(prompt)) + 1]
        engine, ledger = engine_for(model, 7), Ledger(model)
        result = engine.generate(
            prompt, max_new_tokens=COUNT, eos_token_id=end, drafter=make(truth, last), return_logits=True
        )
        assert result.sequence == expected
        assert result.steps[-1].end == len(expected) - 1  # the end token is never read
        ledger.check(result.sequence, result.steps)
        follow_up(engine, ledger, result, len(expected) - 1)


@pytest.mark.parametrize("make", [perfect, wrong, mixture])
def test_breakpoints_in_the_output_are_made_whatever_is_accepted_beyond_them(
    model: Any, prompt: list[int], truth: list[int], make: Any
) -> None:
    engine, ledger = engine_for(model, 7), Ledger(model)
    cuts = [24, 27, 28, 33, 38, 45, 46, 47, 49]
    result = engine.generate(
        prompt, max_new_tokens=COUNT, breakpoints=cuts, drafter=make(truth, 1), return_logits=True
    )
    assert result.sequence == truth
    ledger.check(result.sequence, result.steps)
    assert set(cuts) <= {step.end for step in result.steps}
    for cut in cuts:
        other = [*truth[:cut], (truth[cut] + 1) % VOCAB, *random_tokens(5, seed=cut)]
        branch = engine.generate(other, max_new_tokens=2, return_logits=True)
        assert branch.reused == cut
        ledger.check(branch.sequence, branch.steps)
    assert_nothing_taken(engine.cache)


def test_without_room_for_the_row_steps_are_ordinary(model: Any, prompt: list[int], truth: list[int]) -> None:
    engine = engine_for(model, 3, num_slots=1)
    result = engine.generate(prompt, max_new_tokens=COUNT, drafter=perfect(truth, 0))
    assert result.sequence == truth
    assert (result.verify_passes, result.drafts_proposed) == (0, 0)
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_batches_and_branches_complete_in_a_small_arena(model: Any, truth: list[int], slots: int) -> None:
    engine = engine_for(model, 3, num_slots=slots, num_pages=22)
    prompts = [truth[:23], truth[:29], random_tokens(15, seed=8)]
    continued = [prompt + greedy(model, prompt, 12) for prompt in prompts]

    def drafter(tokens: list[int], k: int) -> list[int]:
        known = next(each for each in continued if each[: len(tokens)] == tokens)
        return mixture(known, len(tokens))(tokens, k)

    results = engine.generate(prompts, max_new_tokens=12, drafter=drafter)
    assert [result.sequence for result in results] == continued
    assert sum(result.drafts_accepted for result in results) > 0
    branches = engine.branches(prompts[2], 3, max_new_tokens=12, drafter=drafter)
    assert [branch.sequence for branch in branches] == [continued[2]] * 3
    assert_nothing_taken(engine.cache)


def test_verify_by_hand(model: Any, prompt: list[int], truth: list[int]) -> None:
    engine, ledger = engine_for(model, 3), Ledger(model)
    request = engine.open(prompt, max_new_tokens=COUNT, return_logits=True)
    assert request is not None
    with pytest.raises(StateError, match="prompt tokens read"):
        request.verify(truth[23], truth[24:26])
    while not request.prefilled:
        request.prefill()
    right = request.verify(truth[23], truth[24:27])
    assert right is not None
    assert (right.proposed, right.accepted, right.void, len(right.records)) == (3, 3, False, 1)
    assert request.tokens == truth[:27]
    partly = request.verify(truth[27], [truth[28], (truth[29] + 1) % VOCAB, truth[30]])
    assert partly is not None
    assert (partly.proposed, partly.accepted, partly.void, len(partly.records)) == (3, 1, True, 1)
    assert request.tokens == truth[:29]
    assert int(request.last_logits.argmax()) == truth[29]
    child = request.fork()
    assert child is not None
    alone = child.verify(truth[29], [])
    assert alone is not None
    assert alone[1:] == (0, 0, False)
    for bad, message in (([1, 2, 3, 4], "drafts: 4 tokens"), ([VOCAB], "drafts: 128")):
        with pytest.raises(ValueError, match=message):
            child.verify(truth[30], bad)
    with pytest.raises(ValueError, match="token: -1"):
        child.verify(-1, [])
    assert child.verify(truth[30], truth[31:34]) is not None
    assert (request.tokens, child.tokens) == (truth[:29], truth[:34])
    ledger.check(request.tokens, request.steps)
    ledger.check(child.tokens, child.steps)
    request.close()
    child.close()
    assert_nothing_taken(engine.cache)


def test_a_verify_step_without_room_changes_nothing(model: Any, prompt: list[int], truth: list[int]) -> None:
    engine = engine_for(model, 3, num_pages=8, num_slots=4)
    first, second = engine.open(prompt[:14]), engine.open(random_tokens(40, seed=3))
    assert first is not None
    assert second is not None
    first.prefill()
    before = list(first.tokens), first.lease.computed, engine.cache.stats()["taken_slots"]
    assert first.verify(1, [2, 3]) is None
    assert (list(first.tokens), first.lease.computed, engine.cache.stats()["taken_slots"]) == before
    second.close()
    assert first.verify(1, [2, 3]) is not None
    first.close()
    assert_nothing_taken(engine.cache)


class BoomError(Exception):
    pass


def _boom(tokens: list[int], k: int) -> list[int]:
    raise BoomError


BAD_DRAFTERS = {
    "raises": (_boom, BoomError, None),
    "too many": (lambda tokens, k: [1] * (k + 1), ValueError, "drafter: returned 4 ids, expected at most 3"),
    "out of vocabulary": (lambda tokens, k: [VOCAB], ValueError, "drafts: 128, expected 0 <= token < 128"),
    "negative": (lambda tokens, k: [-1], ValueError, "drafts: -1"),
    "nothing": (lambda tokens, k: None, TypeError, "drafter: returned None"),
    "no integers": (lambda tokens, k: [1.5], TypeError, r"drafter: returned \[1\.5\]"),
}


@pytest.mark.parametrize("bad", BAD_DRAFTERS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_bad_drafter_closes_the_request_and_leaves_the_cache_clean(
    model: Any, prompt: list[int], truth: list[int], bad: str, after: int
) -> None:
    drafter, error, message = BAD_DRAFTERS[bad]
    engine, good, calls = engine_for(model, 3), mixture(truth, 4), 0

    def turns_bad(tokens: list[int], k: int) -> Any:
        nonlocal calls
        calls += 1
        return (good if calls <= after else drafter)(tokens, k)

    with pytest.raises(error, match=message):
        engine.generate([random_tokens(9, seed=4), prompt], max_new_tokens=COUNT, drafter=turns_bad)
    stats = engine.cache.stats()
    assert (stats["resting_leases"], stats["open_leases"]) == (0, 0)
    engine.cache.check()
    assert engine.generate(prompt, max_new_tokens=COUNT, drafter=good).sequence == truth
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("call", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["forward", "apply", "store"])
def test_a_failure_in_a_verify_step_leaks_nothing_and_corrupts_nothing(
    model: Any, prompt: list[int], truth: list[int], where: str, call: int
) -> None:
    """The prompt, then a void pass and what is read again, then the next void pass..."""
    engine = engine_for(model, 3)
    owner = {"forward": engine, "apply": engine.pools, "store": engine.bridge}[where]
    original, calls = getattr(owner, where), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise BoomError
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, where, failing)
        with pytest.raises(BoomError):
            engine.generate(prompt, max_new_tokens=COUNT, drafter=wrong(truth, 0))
    engine.cache.check()
    assert engine.generate(prompt, max_new_tokens=COUNT, drafter=mixture(truth, 6)).sequence == truth
    assert_nothing_taken(engine.cache)


def test_bad_options_of_drafting(model: Any, prompt: list[int]) -> None:
    lookup = PromptLookup()
    with pytest.raises(ValueError, match="drafter: given with draft_tokens=0"):
        engine_for(model, 0).generate(prompt, max_new_tokens=1, drafter=lookup)
    engine = engine_for(model, 2)
    for call in (engine.generate, lambda tokens, **options: engine.branches(tokens, 2, **options)):
        with pytest.raises(ValueError, match="drafter: given with do_sample=True"):
            call(prompt, max_new_tokens=1, drafter=lookup, do_sample=True)
        with pytest.raises(TypeError, match="drafter: 3, expected a callable"):
            call(prompt, max_new_tokens=1, drafter=3)
    for bad in (8, -1):
        with pytest.raises(ValueError, match=f"draft_tokens: {bad}"):
            engine_for(model, bad)
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize(
    ("ngram", "tokens", "k", "expected"),
    [
        (2, [1, 2, 3, 4, 1, 2], 2, [3, 4]),
        (2, [1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the last occurrence
        (2, [1, 2, 3, 1, 2], 7, [3, 1, 2, 3, 1, 2, 3]),  # what it found goes on
        (1, [5, 5], 3, [5, 5, 5]),
        (2, [5, 5], 3, []),
        (2, [5, 5, 5], 3, [5, 5, 5]),  # occurrences may overlap
        (3, [1, 2, 3, 9, 0, 2, 3], 3, []),
        (3, [1, 2], 3, []),
        (1, [1], 3, []),
        (2, [1, 2, 3, 1, 2], 0, []),
    ],
)
def test_prompt_lookup(ngram: int, tokens: list[int], k: int, expected: list[int]) -> None:
    before = list(tokens)
    assert PromptLookup(ngram)(tokens, k) == expected
    assert tokens == before


def test_prompt_lookup_takes_a_length() -> None:
    with pytest.raises(ValueError, match="ngram: 0"):
        PromptLookup(0)
    with pytest.raises(TypeError, match="ngram"):
        PromptLookup(1.5)


# A row for each token, and overlap --------------------------------------------------------------------------


class WrongCheckpointError(AssertionError):
    """A checkpoint is not the state of the run that never drafted."""


def restored(engine: DraftEngine, tokens: list[int], position: int) -> DynamicCache:
    """What the checkpoint at exactly `position` holds."""
    cached = engine.cached
    lease = cached.cache.reserve([*tokens[:position], 0])
    assert lease is not None
    assert lease.start == position
    step = lease.launch(1)
    assert step is not None
    cached.apply_plan()
    slot = step.write_slot if cached.copies == "eager" else step.read_slot
    cache = cached.bridge.load(lease.pages, slot, position)
    lease.close(discard=True)
    return cache


def check_checkpoints(
    engine: DraftEngine, model: Any, talk: Talk, positions: list[int], tolerance: float = 0.0
) -> None:
    """Each holds what one DynamicCache held there that read the same tokens and never drafted."""
    length, done, never = len(talk.prompt), 0, DynamicCache(config=model.config)
    for position in sorted(positions):
        ends = [end for end in [*talk.ends, *range(length + 1, position + 1)] if done < end <= position]
        continue_schedule(model, never, talk.sequence, [done, *ends])
        done = position
        found = restored(engine, talk.sequence, position)
        pairs = [
            (live_state(found, i, part), live_state(never, i, part)) for i in RECURRENT for part in PARTS
        ]
        attention = next(i for i in range(len(never.layers)) if i not in RECURRENT)
        for name in ("keys", "values"):
            pairs.append((getattr(found.layers[attention], name), getattr(never.layers[attention], name)))
        if not all(_equal(one, other, tolerance) for one, other in pairs):
            raise WrongCheckpointError(position)


def _equal(found: Any, expected: Any, tolerance: float) -> bool:
    if tolerance:
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
    return torch.equal(found, expected)


def next_turn(engine: DraftEngine, model: Any, talk: Talk, reused: int) -> None:
    """Resumes at `reused`, and is bitwise the run that never left: it read the output token by token."""
    prompt = talk.sequence + random_tokens(9, seed=78)
    result = engine.cached.generate(prompt, max_new_tokens=2, return_logits=True)
    assert result.reused == reused
    ends = [end for end in [*talk.ends, *range(len(talk.prompt) + 1, reused + 1)] if end <= reused]
    expected = run_schedule(model, result.sequence, [*ends, *[step.end for step in result.steps]])
    assert torch.equal(torch.cat([step.logits for step in result.steps]), expected[reused:])


@pytest.mark.parametrize("copies", ["eager", "indirect"])
@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_row_that_is_published_is_the_state_of_plain_decoding(
    model: Any, prompt: list[int], truth: list[int], k: int, run_ahead: int, copies: Any
) -> None:
    """Bitwise: a pass reads n tokens, and each layer reads them as plain decoding does."""
    engine = DraftEngine(model, draft_tokens=k, run_ahead=run_ahead, copies=copies, num_slots=70)
    cuts = list(range(len(prompt) + 1, len(truth)))
    talk = engine.open(
        prompt,
        COUNT,
        wrong_now_and_then(truth, k, VOCAB),
        widths=mixed_widths(k + 1, seed=k),
        breakpoints=cuts,
    )
    engine.run()
    assert talk.sequence == truth
    assert talk.accepted > 0
    assert talk.passes < COUNT - 1
    check_checkpoints(engine, model, talk, cuts)
    next_turn(engine, model, talk, len(truth) - 1)
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_rows_of_one_pass_over_all_tokens_are_within_rounding(
    model: Any, prompt: list[int], truth: list[int], run_ahead: int
) -> None:
    """Not bitwise: matrix products of n rows round differently from those of one (`KernelsOneByOne`)."""
    engine = DraftEngine(model, draft_tokens=7, run_ahead=run_ahead, forward=KernelsOneByOne, num_slots=70)
    cuts = list(range(len(prompt) + 1, len(truth)))
    drafter = wrong_now_and_then(truth, 1, VOCAB)
    talk = engine.open(prompt, COUNT, drafter, widths=mixed_widths(8, seed=1), breakpoints=cuts)
    engine.run()
    assert talk.sequence == truth
    check_checkpoints(engine, model, talk, cuts, tolerance=ROUNDING)
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_joints_that_are_seen_in_the_tokens_are_published_from_their_rows(
    model: Any, prompt: list[int], truth: list[int], run_ahead: int
) -> None:
    engine = DraftEngine(model, draft_tokens=5, run_ahead=run_ahead)
    joints = frozenset(truth[24:40:3])
    drafter = wrong_now_and_then(truth, 2, VOCAB)
    talk = engine.open(prompt, COUNT, drafter, widths=repeat(4), joints=joints)
    engine.run()
    places = [at + 1 for at in range(len(prompt), len(truth) - 1) if truth[at] in joints]
    assert talk.wanted == places
    check_checkpoints(engine, model, talk, places)
    assert_nothing_taken(engine.cache)


def test_overlap_without_drafts(model: Any, prompt: list[int], truth: list[int]) -> None:
    engine = DraftEngine(model, draft_tokens=0, run_ahead=1, chunk=10)
    cuts = [26, 30, 31, 44]
    talk = engine.open(
        prompt, COUNT, mixture(truth, 0), widths=repeat(1), breakpoints=cuts, stops=frozenset()
    )
    assert talk.drafter(truth[:30], 0) == []
    engine.run()
    plain = engine_for(model, 0, prefill_chunk=10).generate(prompt, max_new_tokens=COUNT)
    assert talk.sequence == plain.sequence == truth
    assert talk.read == len(truth)  # the step in flight has read the last token
    check_checkpoints(engine, model, talk, cuts)
    next_turn(engine, model, talk, len(truth))
    assert_nothing_taken(engine.cache)


@cache
def plainly(model: Any, prompt: tuple[int, ...]) -> list[int]:
    return [*prompt, *greedy(model, prompt, 24)]


PROMPTS = [random_tokens(11 + seed, seed=seed + 40) for seed in range(3)]


def batch(engine: DraftEngine, model: Any, **options: Any) -> list[Talk]:
    """Three requests of 24 tokens whose drafts are right now and then."""
    talks = []
    for seed, prompt in enumerate(PROMPTS):
        drafter = wrong_now_and_then(plainly(model, tuple(prompt)), seed, VOCAB)
        widths = mixed_widths(engine.cached.draft_tokens + 1, seed)
        talks.append(engine.open(prompt, 24, drafter, widths=widths, **options))
    return talks


@pytest.mark.parametrize("draft_tokens", [0, 2, 5])
@pytest.mark.parametrize("read_last", [False, True])
def test_stopping_while_a_step_is_in_flight(model: Any, read_last: bool, draft_tokens: int) -> None:
    """In the middle of an accepted run, at its end, or with the one token beyond: text and state agree."""
    cut_short = voided = 0
    for stop in (1, 8, 13):
        engine = DraftEngine(model, draft_tokens=draft_tokens, run_ahead=1)
        talks = batch(engine, model, read_last=read_last)
        for talk in talks:
            talk.stops = frozenset([plainly(model, tuple(talk.prompt))[len(talk.prompt) + stop]])
        engine.run()
        assert engine.cache.stats()["resting_leases"] == 0
        for talk in talks:
            plain = plainly(model, tuple(talk.prompt))
            end = next(at for at in range(len(talk.prompt), len(plain)) if plain[at] in talk.stops) + 1
            assert talk.sequence == plain[:end]
            assert talk.read == end if read_last or not draft_tokens else talk.read in (end - 1, end)
            cut_short += talk.cut_short
            voided += talk.voided
            next_turn(engine, model, talk, talk.read)
        assert_nothing_taken(engine.cache)
    assert bool(voided) == bool(cut_short) == bool(draft_tokens)


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_cancelling_while_a_step_is_in_flight(model: Any, draft_tokens: int) -> None:
    """Others go on undisturbed; what was published before stays, and is exact."""
    for turn in (1, 4, 7):
        engine = DraftEngine(model, draft_tokens=draft_tokens, run_ahead=1, chunk=7)
        talks = batch(engine, model, breakpoints=[17, 19, 22])
        for _ in range(turn):
            engine.advance()
        cancelled = talks[turn % 3]
        assert cancelled.flight
        engine.cancel(cancelled, discard=turn == 4)
        assert engine.cache.stats()["resting_leases"] == 1
        engine.cache.check()
        engine.run()
        assert engine.cache.stats()["resting_leases"] == 0
        for talk in talks:
            if talk is not cancelled:
                assert talk.sequence == plainly(model, tuple(talk.prompt))
                next_turn(engine, model, talk, talk.read)
        made = [cut for cut in (17, 19, 22) if len(cancelled.prompt) < cut <= cancelled.read]
        check_checkpoints(engine, model, cancelled, made)
        assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("slots", [4, 6, 9])
def test_three_requests_with_room_for_few_rows(model: Any, slots: int, run_ahead: int) -> None:
    engine = DraftEngine(model, draft_tokens=3, run_ahead=run_ahead, num_slots=slots)
    talks = batch(engine, model)
    refused = 0
    while not all(talk.done for talk in talks):
        engine.advance()
        refused += any(talk.narrow for talk in talks)
    assert refused > 0
    for talk in talks:
        assert talk.sequence == plainly(model, tuple(talk.prompt))
    assert_nothing_taken(engine.cache)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_turns_of_a_conversation_that_drafts(model: Any, run_ahead: int) -> None:
    """Each turn resumes at the end of the one before, whose state was a row, and drafts on from there."""
    engine, tokens, ends, read = DraftEngine(model, draft_tokens=4, run_ahead=run_ahead), [], [], 0
    for turn in range(4):
        prompt = tokens + random_tokens(6 + turn, seed=60 + turn)
        known = prompt + greedy(model, prompt, 12)
        drafter = wrong_now_and_then(known, turn, VOCAB)
        talk = engine.open(prompt, 12, drafter, widths=mixed_widths(5, turn), read_last=True)
        assert talk.lease.start == read
        engine.run()
        assert talk.sequence == known
        talk.ends = [*ends, *talk.ends]
        tokens, read = talk.sequence, talk.read
        ends = [*talk.ends, *range(len(prompt) + 1, read + 1)]
    next_turn(engine, model, talk, read)
    assert_nothing_taken(engine.cache)


# Negative controls: what an engine, or the cache, could get wrong must be noticed ---------------------------


def _rows_off_by_one(engine: DraftEngine, patch: pytest.MonkeyPatch) -> None:
    """Each state is left in the row of the token after."""
    store = engine._store

    def shifted(step: Any, cache: Any, begin: int, after: list[Any]) -> None:
        store(step, cache, begin, [after[-1], *after[:-1]])

    patch.setattr(engine, "_store", shifted)


def _always_the_first_candidate(engine: DraftEngine, patch: pytest.MonkeyPatch) -> None:
    """A step behind a verify step reads the first row, whatever was accepted."""
    load = engine.cached.bridge.load

    def first(pages: Any, slot: int, length: int) -> Any:
        return load(pages, firsts.get(slot, slot), length)

    firsts: dict[int, int] = {}
    launch = engine._launch

    def recording(talks: list[Talk]) -> Any:
        launched = launch(talks)
        firsts.clear()
        verify_steps = [step for _, step in launched if step.verifies]
        for step in verify_steps:
            firsts.update(dict.fromkeys(step.candidates, step.candidates[0]))
        return launched

    patch.setattr(engine, "_launch", recording)
    patch.setattr(engine.cached.bridge, "load", first)


def _conv_of_the_last_row(engine: DraftEngine, patch: pytest.MonkeyPatch) -> None:
    """The convolution's part of every row is that of the last token."""
    store = engine._store

    def stale(step: Any, cache: Any, begin: int, after: list[Any]) -> None:
        conv = {key: value for key, value in after[-1].items() if key[1] == "conv"}
        store(step, cache, begin, [{**states, **conv} for states in after])

    patch.setattr(engine, "_store", stale)


def _nothing(engine: DraftEngine, patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    "damage", [_rows_off_by_one, _always_the_first_candidate, _conv_of_the_last_row, _nothing]
)
def test_control_wrong_rows_are_noticed(
    model: Any, prompt: list[int], truth: list[int], damage: Callable[..., None]
) -> None:
    engine = DraftEngine(model, draft_tokens=3, run_ahead=1)
    cuts = list(range(len(prompt) + 1, len(truth)))
    drafter = wrong_now_and_then(truth, 1, VOCAB)
    talk = engine.open(prompt, COUNT, drafter, widths=repeat(4), breakpoints=cuts)
    with pytest.MonkeyPatch.context() as patch:
        damage(engine, patch)
        engine.run()
    if damage is _nothing:
        check_checkpoints(engine, model, talk, cuts)
    else:
        with pytest.raises(WrongCheckpointError):
            check_checkpoints(engine, model, talk, cuts)


@pytest.mark.parametrize("rewinds", [True, False])
def test_control_a_cache_that_is_not_rewound_is_noticed(
    model: Any, prompt: list[int], truth: list[int], rewinds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After wrong drafts the model's own cache is ahead; with its KV cut back alone, its states still are."""
    engine, ledger = engine_for(model, 3), Ledger(model)
    if not rewinds:
        monkeypatch.setattr("hybridcache._hf_bridge.live_state", lambda *args: live_state(*args).clone())
    result = engine.generate(prompt, max_new_tokens=12, drafter=wrong(truth, 0), return_logits=True)
    if rewinds:
        ledger.check(result.sequence, result.steps)
    else:
        with pytest.raises(MismatchError):
            ledger.check(result.sequence, result.steps)
