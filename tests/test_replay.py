"""Replay: what it does to the core, what it counts, hints, and several requests at once.

The layout is tiny: a page of 4 tokens is 64 bytes, a slot is 512 (8 pages). Expected figures are counted by
hand or by a loop that shares no code with the replay.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from hybridcache import HybridCache, Lease, replay_report
from hybridcache._arguments import PARTS
from hybridcache.config import LayerSpec, ModelLayout, TensorSpec
from hybridcache.foresight import NEVER, Foresight
from hybridcache.replay import ALPHAS, Cell, Replay, run, run_cells
from hybridcache.replay_values import Result, Settings
from hybridcache.workloads import GENERATORS, Request, Workload
from tests.test_workloads import random_workload, small

LAYOUT = ModelLayout(
    4,
    (
        LayerSpec(0, "attention", (TensorSpec("k", (2,), "int64"),)),
        LayerSpec(1, "recurrent", (TensorSpec("recurrent", (64,), "int64"),)),
    ),
    flops_per_token=10,
    flops_per_pair=2,
)
PLENTY = 1 << 20
DENSE = {"interior_spacing": 16, "pass_cost": 4}  # small prompts have as many boundaries as large ones


def figures(result: Result) -> dict[str, Any]:
    """All but times."""
    found = result.as_json()
    return {k: v for k, v in found.items() if k not in ("operations", "seconds", "core_seconds")}


def requests(*made: tuple[Any, ...]) -> Workload:
    return Workload("made", 1, tuple(Request(*each) for each in made))


# --- what is counted ---


def test_conversations_with_room_for_all_hit_all() -> None:
    """5 sessions, 4 turns: 300 tokens, then 40 more a turn, of which 15 were generated."""
    workload = small("roundrobin")
    result = run(workload, LAYOUT, PLENTY, "default")
    assert result.prompt_tokens == 5 * (300 + 340 + 380 + 420) == workload.input_tokens
    assert result.hit_tokens == result.ideal_tokens == 5 * (315 + 355 + 395)
    assert result.flops_saved == 5 * sum(10 * n + n * n for n in (315, 355, 395)) == result.flops_ideal
    assert result.flops == 5 * sum(10 * n + n * n for n in (300, 340, 380, 420))
    assert result.lost == {"cold": 5 * 300, "unknown": 5 * 3 * 25} and result.beyond == {}
    assert result.requests == 20 and result.published["turn_end"] == 20 and result.restored["turn_end"] == 15
    assert result.evicted == {} and result.missed_tokens == 0
    assert result.end["checkpoints"] == result.peak["checkpoints"] > 20
    assert (result.hit_rate, result.beyond_ideal) == (result.hit_tokens / result.prompt_tokens, 0)
    assert {name: each["calls"] for name, each in result.operations.items()} == {
        "reserve": 20,
        **dict.fromkeys(("launch", "plan", "applied", "commit"), 40),
        "close": 20,
    }
    assert result.core_seconds == pytest.approx(sum(each["total_s"] for each in result.operations.values()))


def test_the_last_sampled_token_may_count_as_unread() -> None:
    result = run(small("roundrobin"), LAYOUT, PLENTY, "default", read_all=False)
    assert result.hit_tokens == result.ideal_tokens == 5 * (314 + 354 + 394)


def test_rotation_defeats_recency_at_any_budget_below_all() -> None:
    workload = small("roundrobin")
    everything = run(workload, LAYOUT, PLENTY, "lru").end["cached_bytes"]
    assert run(workload, LAYOUT, everything // 3, "lru").hit_tokens == 0
    assert run(workload, LAYOUT, everything, "lru").beyond_ideal == 0


def test_no_budget_no_hit() -> None:
    result = run(small("agentic"), LAYOUT, 0, "default")
    assert result.hit_tokens == 0 and result.end == {"checkpoints": 0, "tree_pages": 0, "cached_bytes": 0}
    assert result.lost == {"cold": result.prompt_tokens}
    assert result.beyond == {"cold": result.ideal_tokens}


@pytest.mark.parametrize("policy", ["default", "lru"])
@pytest.mark.parametrize("inner", [True, False])
def test_every_token_is_accounted_for(policy: str, inner: bool) -> None:
    rng, partial = random.Random(3), 0
    for _ in range(25):
        workload, budget = random_workload(rng), rng.randrange(0, 6000)
        result = run(workload, LAYOUT, budget, policy, inner_checkpoints=inner, cache_options=DENSE)
        assert result.requests == len(workload)
        assert result.hit_tokens + sum(result.lost.values()) == result.prompt_tokens
        assert result.ideal_tokens == sum(Foresight(workload).ideals)
        assert all(tokens > 0 for tokens in result.beyond.values())
        assert sum(result.beyond.values()) == result.beyond_ideal >= 0
        assert result.peak["cached_bytes"] <= budget
        left = sum(result.published.values()) - sum(result.evicted.values())
        assert left == result.end["checkpoints"]
        partial += 0 < result.beyond_ideal < result.ideal_tokens
    assert partial > 5


def by_hand(workload: Workload, budget: int, policy: Any, inner: bool) -> HybridCache:
    """The same requests, driven by a loop of its own, in an arena of another size."""
    cache = HybridCache(
        LAYOUT,
        memory_bytes=4 * PLENTY,
        max_cached_bytes=budget,
        policy=policy,
        inner_checkpoints=inner,
        interior_spacing=16,
        pass_cost=4,
    )
    for request in workload.requests:
        unit = workload.unit
        prompt, output = (
            [s * unit + j for first, n in runs for s in range(first, first + n) for j in range(unit)]
            for runs in (request.input, request.output)
        )
        lease = cache.reserve(prompt, max_new_tokens=len(output))
        assert lease is not None
        while lease.computed < len(prompt):
            lease.launch(len(prompt) - lease.computed)
            cache.applied(cache.plan())
            lease.commit()
        if output:
            lease.launch(len(output))
            cache.applied(cache.plan())
            lease.commit(output)
        lease.close()
    return cache


@pytest.mark.parametrize("policy", ["default", "lru"])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_core_sees_what_an_engine_would_do(name: str, policy: str, inner: bool) -> None:
    workload = small(name)
    cell = Cell(6000, policy, Settings(inner_checkpoints=inner))
    replayed = Replay(Foresight(workload), LAYOUT, cell, DENSE, None)
    result = replayed.run()
    stats = by_hand(workload, 6000, policy, inner).stats()
    assert replayed.cache.stats() == stats
    assert result.hit_tokens == stats["tokens_hit"] and result.extra_passes == stats["extra_passes"]
    assert (result.extra_passes > 0) <= (not inner)
    assert sum(result.evicted.values()) > 0 and result.evicted_in_flight == 0
    replayed.cache.check()


def test_cuts_cost_passes_where_states_inside_a_forward_cannot_be_kept() -> None:
    workload = small("think")
    assert run(workload, LAYOUT, PLENTY, cache_options=DENSE, inner_checkpoints=False).extra_passes > 0
    assert run(workload, LAYOUT, PLENTY, cache_options=DENSE).extra_passes == 0


# --- the running request is charged ---


def test_charged_counts_what_runs_and_whole_slabs() -> None:
    """An arena of 40 slabs: 39 of pages, 8 pages of 4 tokens each, so 1,248 tokens are the most."""
    slab = 512
    workload = requests(
        (0, 0.0, ((0, 1200),), ((5000, 48),)),
        (1, 1.0, ((0, 1200),), ((5000, 49),)),  # one token more than an empty arena could hold
        (2, 2.0, ((0, 100),)),
    )
    result = run(workload, LAYOUT, 40 * slab, in_flight="charged")
    assert (result.too_large, result.refused, result.missed_tokens) == (1, 0, 1200)
    assert result.requests == 3 and result.prompt_tokens == 2500
    assert result.beyond["missed"] == 1199
    assert result.peak["taken_slots"] <= 40 and result.peak["taken_pages"] <= 39 * 8
    free = run(workload, LAYOUT, 40 * slab)
    assert free.too_large == 0 and free.beyond.get("missed") is None
    with pytest.raises(ValueError, match="memory_bytes"):
        run(workload, LAYOUT, slab, in_flight="charged")


def test_charged_evicts_for_what_runs() -> None:
    workload = small("fewshot")
    charged = run(workload, LAYOUT, 60 * 512, "supersede", in_flight="charged")
    free = run(workload, LAYOUT, 60 * 512, "supersede")
    assert charged.evicted_in_flight > 0 == free.evicted_in_flight
    assert charged.hit_tokens < free.hit_tokens


# --- hints ---


class Told:
    """What the calls of the cache are told; it takes `now` and `expected_return`, whether they do or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserves: list[dict[str, Any]] = []
        self.commits: list[int] = []
        self.closes: list[dict[str, Any]] = []
        reserve, commit, close = HybridCache.reserve, Lease.commit, Lease.close

        def told_reserve(cache: Any, tokens: Any, *, now: Any = None, **rest: Any) -> Any:
            self.reserves.append({"now": now, **rest})
            return reserve(cache, tokens, **rest)

        def told_commit(lease: Any, tokens: Any = (), *, now: Any = None) -> None:
            self.commits.append(now)
            commit(lease, tokens)

        def told_close(lease: Any, *, now: Any = None, expected_return: Any = None, **rest: Any) -> None:
            self.closes.append({"now": now, "expected_return": expected_return, **rest})
            close(lease, **rest)

        monkeypatch.setattr(HybridCache, "reserve", told_reserve)
        monkeypatch.setattr(Lease, "commit", told_commit)
        monkeypatch.setattr(Lease, "close", told_close)


def test_hints_say_what_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    workload = requests(
        (0, 1.0, ((0, 40),), ((100, 8),)),
        (1, 2.5, ((0, 40), (200, 4))),
        (0, 3.25, ((0, 40), (300, 4))),
    )
    run(workload, LAYOUT, PLENTY, hints=("keep", "expected_return", "breakpoints"))
    assert [each["now"] for each in told.reserves] == [1000, 2500, 3250]
    assert told.commits == [1000, 1000, 2500, 3250]
    assert [each["breakpoints"] for each in told.reserves] == [[], [40], [40]]
    assert told.closes == [
        {"now": 1000, "expected_return": 2250, "keep": "prompt"},
        {"now": 2500, "expected_return": NEVER, "keep": "all"},
        {"now": 3250, "expected_return": NEVER, "keep": "all"},
    ]
    told.closes.clear()
    run(workload, LAYOUT, PLENTY)
    assert told.closes == [{"now": now, "expected_return": None} for now in (1000, 2500, 3250)]
    assert "breakpoints" not in told.reserves[-1]


def test_what_hints_are_worth() -> None:
    """Sessions without a shared start whose outputs do not return: being told frees their slots."""
    workload = small("think")
    plain, hinted = (run(workload, LAYOUT, 12_000, hints=hints) for hints in ((), ("keep",)))
    assert hinted.published.get("turn_end", 0) < plain.published["turn_end"] == 20
    asked = run(workload, LAYOUT, PLENTY, hints=("breakpoints",), cache_options={"interior_spacing": 1 << 30})
    assert asked.published["breakpoint"] > 20 and asked.beyond_ideal < 300
    rows = replay_report.main_table([plain, hinted], None)
    worth = rows[2][rows[0].index("worth")]
    assert worth == f"{100 * (hinted.hit_rate - plain.hit_rate):+.2f}"
    assert rows[2][rows[0].index("hints")] == "keep" and rows[1][rows[0].index("hints")] == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_flight", "other"),
        ("arrivals", "never"),
        ("hints", ("keep", "guess")),
        ("concurrency", -1),
        ("prefill_rate", 0),
        ("decode_rate", float("nan")),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Settings(**{field: value})


def test_foresight_belongs_to_its_workload() -> None:
    workload = small("fewshot")
    with pytest.raises(ValueError, match="foresight"):
        run(workload, LAYOUT, PLENTY, foresight=Foresight(workload), read_all=False)


# --- several at once ---

SERVED = {"prefill_rate": 10.0, "decode_rate": 5.0}  # 100 tokens and 10 of output: 12 seconds


def clocked(workload: Workload, concurrency: int, **settings: Any) -> Result:
    return run(workload, LAYOUT, PLENTY, concurrency=concurrency, **{**SERVED, **settings})


def test_who_arrives_waits_for_his_turn() -> None:
    workload = requests((0, 0.0, ((0, 100),), ((500, 10),)), (1, 1.0, ((200, 100),), ((600, 10),)))
    alone, together = clocked(workload, 1), clocked(workload, 2)
    assert (alone.ends_at, alone.waits, alone.waited_seconds) == (24.0, 1, 11.0)
    assert (together.ends_at, together.waits, together.waited_seconds) == (13.0, 0, 0.0)


def test_what_runs_is_not_known_yet() -> None:
    """A second, equal prompt arrives while the first is read: nothing to hit, and the ideal says so."""
    workload = requests((0, 0.0, ((0, 100),)), (1, 5.0, ((0, 100),)), (2, 30.0, ((0, 100),)))
    result = clocked(workload, 2)
    assert result.ideal_tokens == 99 and sum(Foresight(workload).ideals) == 198
    assert clocked(workload, 1).ideal_tokens == 198
    assert 0 < result.hit_tokens <= 99


def test_the_ideal_grows_with_each_commit() -> None:
    """A pass of 92 tokens up to the cut, one of 8; the same prompt arrives between the two commits."""
    workload = requests((0, 0.0, ((0, 100),)), (1, 9.5, ((0, 100),)))
    result = clocked(workload, 2, inner_checkpoints=False, cache_options=DENSE)
    assert result.extra_passes > 0 and result.ideal_tokens == result.hit_tokens == 92


def test_users_wait_for_answers() -> None:
    """The second turn came 20 s after the first, which takes 12: 8 seconds of thinking."""
    turns = ((0, 0.0, ((0, 100),), ((500, 10),)), (0, 20.0, ((0, 100), (500, 10), (700, 30)), ()))
    assert clocked(requests(*turns), 1).ends_at == 20.0 + 3.0
    delayed = requests((9, 0.0, ((800, 300),)), *turns)
    assert clocked(delayed, 1).ends_at == 30.0 + 12.0 + 8.0 + 3.0
    assert clocked(delayed, 1, arrivals="open").ends_at == 42.0 + 3.0
    assert clocked(delayed, 2, arrivals="open").ends_at == 30.0
    slow = clocked(requests(*turns), 1, arrivals="open", decode_rate=0.5)  # 30 s: it cannot come before
    assert slow.ends_at == 30.0 + 3.0


def test_nobody_overtakes_who_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 slabs hold 19 x 32 tokens: two of 400 do not fit side by side, the third would, but is behind."""
    order: list[int] = []
    admit = Replay.admit

    def told(self: Replay, index: int, now: float) -> Any:
        job = admit(self, index, now)
        order.extend([index] if job else [])
        return job

    monkeypatch.setattr(Replay, "admit", told)
    workload = requests((0, 0.0, ((0, 400),)), (1, 1.0, ((1000, 400),)), (2, 2.0, ((2000, 20),)))
    workload = replace(workload, requests=(*workload.requests, Request(3, 3.0, ((5000, 700),))))
    result = run(workload, LAYOUT, 20 * 512, concurrency=4, in_flight="charged", **SERVED)
    assert order == [0, 1, 2] and result.too_large == 1
    assert (result.waits, result.waited_seconds) == (3, 39.0 + 38.0 + 37.0)
    assert (result.ends_at, result.refused) == (80.0, 0)


def test_one_session_at_a_time_is_the_file_order() -> None:
    """With arrivals far apart the clock changes nothing."""
    for name in GENERATORS:
        workload = small(name)
        spread = replace(
            workload,
            requests=tuple(replace(r, t=1000.0 * n) for n, r in enumerate(workload.requests)),
        )
        left, right = (figures(run(spread, LAYOUT, 6000, concurrency=n)) for n in (0, 1))
        for timed in ("settings", "ends_at", "waits", "waited_seconds"):
            left.pop(timed), right.pop(timed)
        assert left == right


@pytest.mark.parametrize("in_flight", ["free", "charged"])
def test_under_load_all_are_served_and_accounted_for(in_flight: str) -> None:
    for name in GENERATORS:
        workload = small(name)
        cell = Cell(150 * 512, "default", Settings(concurrency=3, in_flight=in_flight, decode_rate=1.0))  # type: ignore[arg-type]
        replayed = Replay(Foresight(workload), LAYOUT, cell, DENSE, None)
        result, stats = replayed.run(), replayed.cache.stats()
        assert stats["open_leases"] == 0 and result.requests == len(workload) == stats["closes"]
        assert result.hit_tokens + sum(result.lost.values()) == result.prompt_tokens
        assert all(tokens > 0 for tokens in result.beyond.values())
        assert result.evicted_in_flight == 0 or in_flight == "charged"
        replayed.cache.check()


# --- cells ---


def test_processes_count_as_one_does() -> None:
    workload = small("tot")
    cells = [Cell(budget, policy, Settings()) for budget in (3000, 9000) for policy in ("lru", "default")]
    seen: list[tuple[int, int]] = []
    one = list(run_cells(workload, LAYOUT, cells, progress=lambda done, of: seen.append((done, of))))
    assert seen == [(n + 1, len(workload)) for n in range(len(workload))] * 4
    seen.clear()
    two = list(run_cells(workload, LAYOUT, cells, jobs=2, progress=lambda done, of: seen.append((done, of))))
    assert list(map(figures, one)) == list(map(figures, two)) and seen == [(n, 4) for n in (1, 2, 3, 4)]
    assert [(r.budget_bytes, r.policy) for r in one] == [cell[:2] for cell in cells]


# --- policies to compare with ---


def test_alpha_is_tuned_on_the_first_tenth() -> None:
    workload = GENERATORS["fewshot"](requests=300)

    def hits(alpha: float, of: Workload = workload) -> int:
        return run(of, LAYOUT, 300_000, "marconi", cache_options={"marconi_alpha": alpha}).hit_tokens

    result = run(workload, LAYOUT, 300_000, "marconi")
    alpha = result.tuned["marconi_alpha"]
    assert result.hit_tokens == hits(alpha)
    first = replace(workload, requests=workload.requests[:30])
    assert hits(alpha, first) == max(hits(each, first) for each in ALPHAS)
    assert not run(workload, LAYOUT, 300_000, "marconi", cache_options={"marconi_alpha": 2.0}).tuned


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_default_can_be_switched_off(part: str) -> None:
    """And then something else stays."""
    workload = GENERATORS["fewshot"](requests=400)
    whole, without = (run(workload, LAYOUT, 300_000, policy) for policy in ("default", f"default-{part}"))
    assert without.policy == f"default-{part}"
    assert (whole.hit_tokens, whole.evicted) != (without.hit_tokens, without.evicted)


def test_a_part_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="without: 'flaw', expected some of"):
        run(GENERATORS["fewshot"](requests=2), LAYOUT, 300_000, "default-flaw")
