"""The offline optimum against exhaustive search on tiny workloads, and what must hold on any."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from hybridcache import optimum as module
from hybridcache._dual import SCALE, Dual
from hybridcache._packing import Packing, Sizes, pack_all
from hybridcache._paths import read_paths
from hybridcache.optimum import Bounds, optimum, working_set

Item = tuple[str, tuple[int, ...]]  # ("page" | "state", the tokens from the start to its end)


class Tiny(NamedTuple):
    """A workload small enough to try everything: prompts and outputs as tuples of tokens."""

    requests: list[tuple[tuple[int, ...], tuple[int, ...]]]
    sizes: Sizes
    whole: bool

    def runs(self) -> list[tuple[list[list[int]], list[list[int]]]]:
        return [([[t, 1] for t in prompt], [[t, 1] for t in output]) for prompt, output in self.requests]

    def limit(self, index: int) -> int:
        return len(self.requests[index][0]) - (not self.whole)

    def text(self, index: int) -> tuple[int, ...]:
        prompt, output = self.requests[index]
        return prompt + output

    def pages(self, text: tuple[int, ...]) -> list[Item]:
        size = self.sizes.page_size
        return [("page", text[:end]) for end in range(size, len(text) + 1, size)]

    def cost(self, item: Item) -> int:
        page = self.sizes.token * self.sizes.page_size
        return (
            page if item[0] == "page" else self.sizes.state + page * bool(len(item[1]) % self.sizes.page_size)
        )

    def needs(self, index: int, hit: int) -> list[Item]:
        prefix = self.text(index)[:hit]
        return [*self.pages(prefix), ("state", prefix)] if hit else []

    def leaves(self, index: int, hit: int) -> set[Item]:
        """What a request that hits `hit` tokens can leave in memory beside what was there."""
        text = self.text(index)
        return {*self.pages(text), *(("state", text[:end]) for end in range(hit + 1, len(text) + 1))}

    def bounds(self, budgets: list[int], **kw: Any) -> list[Bounds]:
        kv, state, page_size = self.sizes
        return optimum(self.runs(), kv, state, budgets, page_size=page_size, whole=self.whole, **kw)


def draw(seed: int) -> Tiny:
    """Prompts that extend, resend, or leave earlier ones, over two tokens."""
    rng = random.Random(seed)
    requests: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for _ in range(rng.randint(2, 6)):
        base: tuple[int, ...] = ()
        if requests and rng.random() < 0.8:
            base = sum(rng.choice(requests), ())
            base = base[: rng.randint(0, len(base))] if rng.random() < 0.5 else base
        prompt = (*base, *(rng.randint(0, 1) for _ in range(rng.randint(0 if base else 1, 2))))[:5]
        requests.append((prompt, tuple(rng.randint(0, 1) for _ in range(rng.randint(0, 1)))))
    sizes = Sizes(rng.choice([1, 1, 2, 3]), rng.choice([0, 1, 2, 5]), rng.choice([1, 1, 2, 3]))
    return Tiny(requests, sizes, rng.random() < 0.3)


def fullest(items: list[Item], costs: list[int], room: int, index: int = 0) -> Iterator[list[Item]]:
    """Subsets that fit; all that leave no room for another item, and some that do."""
    if sum(costs[index:]) <= room:
        yield items[index:]
        return
    if costs[index] <= room:
        for rest in fullest(items, costs, room - costs[index], index + 1):
            yield [items[index], *rest]
    yield from fullest(items, costs, room, index + 1)


def exhaustive(tiny: Tiny, budget: int) -> int:
    """The most tokens that any schedule hits: every hit, and every set to keep in every gap, is tried."""
    useful: list[set[Item]] = [set() for _ in (*tiny.requests, 0)]  # to some later request
    for index in reversed(range(len(tiny.requests))):
        some = (set(tiny.needs(index, hit)) for hit in range(tiny.limit(index) + 1))
        useful[index] = useful[index + 1].union(*some)
    frontier: dict[frozenset[Item], int] = {frozenset(): 0}
    for index in range(len(tiny.requests)):
        after: dict[frozenset[Item], int] = {}
        for kept, total in frontier.items():
            for hit in range(tiny.limit(index) + 1):
                if not kept.issuperset(tiny.needs(index, hit)):
                    continue
                there = sorted((kept | tiny.leaves(index, hit)) & useful[index + 1])
                for chosen in fullest(there, [tiny.cost(each) for each in there], budget):
                    key = frozenset(chosen)
                    after[key] = max(after.get(key, 0), total + hit)
        frontier = after
    return max(frontier.values())


def simulate(tiny: Tiny, bounds: Bounds) -> None:
    """Carry a schedule out on explicit sets of pages and states: all that is kept was there, and fits."""
    hits, origins, gap_bytes = bounds.schedule
    texts = [tiny.text(index) for index in range(len(hits))]
    gaps: list[set[Item]] = [set() for _ in texts]
    for index, hit in enumerate(hits.tolist()):
        for item in tiny.needs(index, hit):
            readers = [i for i in range(index) if texts[i][: len(item[1])] == item[1]]
            since = readers[-1] if item[0] == "page" else int(origins[index])
            assert since in readers
            for gap in range(since, index):
                gaps[gap].add(item)
    memory: set[Item] = set()
    for index, hit in enumerate(hits.tolist()):
        assert 0 <= hit <= max(tiny.limit(index), 0)
        assert memory.issuperset(tiny.needs(index, hit))
        assert gaps[index] <= memory | tiny.leaves(index, hit)
        memory = gaps[index]
        assert sum(tiny.cost(each) for each in memory) == gap_bytes[index] <= bounds.budget
    assert int(hits.sum()) == bounds.lower


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny workloads need few: any prices prove a bound."""
    monkeypatch.setattr(module, "DUAL_STEPS", 600)


def budgets_of(tiny: Tiny, seed: int) -> list[int]:
    top = sum(
        tiny.cost(each) for each in {item for i in range(len(tiny.requests)) for item in tiny.leaves(i, 0)}
    )
    rng = random.Random(seed)
    return sorted({rng.randint(1, max(1, min(top, 14))) for _ in range(3)})


@pytest.mark.parametrize("seed", range(40))
def test_between_the_bounds_lies_what_exhaustive_search_finds(seed: int) -> None:
    for each in range(seed * 10, seed * 10 + 10):
        tiny = draw(each)
        for bounds in tiny.bounds(budgets_of(tiny, each), rounds=100):
            best = exhaustive(tiny, bounds.budget)
            assert bounds.lower <= best <= bounds.upper, (each, tiny, bounds)
            simulate(tiny, bounds)


def test_the_bounds_are_close_on_tiny_workloads() -> None:
    """A search that misses the best schedule, or prices that prove little, would show here."""
    found = reached = proven = 0
    for seed in range(1000, 1120):
        tiny = draw(seed)
        for bounds in tiny.bounds(budgets_of(tiny, seed), rounds=200):
            best = exhaustive(tiny, bounds.budget)
            found, reached, proven = found + best, reached + bounds.lower, proven + bounds.upper
    assert reached >= 0.995 * found
    assert proven <= 1.1 * found + 120


@pytest.mark.parametrize("seed", range(60))
def test_the_working_set_is_the_smallest_budget_that_takes_every_hit(seed: int) -> None:
    tiny = draw(2000 + seed)
    kv, state, page_size = tiny.sizes
    enough = working_set(tiny.runs(), kv, state, page_size=page_size, whole=tiny.whole)
    if not enough:
        return
    below, at, above = tiny.bounds([max(enough - 1, 1), enough, enough + 7])
    assert at.lower == at.upper == at.ideal == above.lower == above.upper
    assert exhaustive(tiny, enough) == at.ideal
    if enough > 1:
        assert exhaustive(tiny, enough - 1) < at.ideal
        assert below.lower < below.ideal


@pytest.mark.parametrize("seed", range(6))
def test_both_bounds_rise_with_the_budget_and_repeat(seed: int) -> None:
    requests = sessions(seed)
    budgets = [40, 80, 160, 20, 320, 160]
    found = optimum(requests, 1, 10, budgets, page_size=4, rounds=60)
    again = optimum(requests, 1, 10, budgets, page_size=4, rounds=60)
    assert [each.budget for each in found] == budgets
    assert [each[:5] for each in found] == [each[:5] for each in again]
    for left, right in zip(found, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(left.schedule, right.schedule, strict=True))
    ordered = sorted(found)
    for small, large in itertools.pairwise(ordered):
        assert small.lower <= large.lower and small.upper <= large.upper
        assert small.lower <= small.upper <= small.ideal


def test_a_poor_search_at_a_larger_budget_takes_the_schedule_of_a_smaller_one() -> None:
    found = optimum(sessions(0), 1, 10, list(range(15, 400, 5)), page_size=4, rounds=0)
    for small, large in itertools.pairwise(found):
        assert small.lower <= large.lower and small.upper <= large.upper


def sessions(seed: int, count: int = 6, turns: int = 6) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Interleaved conversations that share 8 tokens; each turn adds 5, of which 2 are generated."""
    rng = random.Random(seed)
    order = [session for session in range(count) for _ in range(turns)]
    rng.shuffle(order)
    length, requests = dict.fromkeys(range(count), 20), []
    for session in order:
        start = 1000 * (session + 1)
        requests.append(([[0, 8], [start, length[session]]], [[start + length[session], 2]]))
        length[session] += 5
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_no_online_policy_beats_the_bound(seed: int) -> None:
    """Random eviction of random sets, which keep states at any position, on conversations."""
    rng = random.Random(seed)
    runs = sessions(seed, 4, 5)
    flat = [tuple(tuple(s + i for s, n in part for i in range(n)) for part in request) for request in runs]
    tiny = Tiny([(prompt, output) for prompt, output in flat], Sizes(1, 10, 1), False)
    for bounds in tiny.bounds([30, 60, 120], rounds=60):
        best = 0
        for _ in range(20):
            kept, total = set[Item](), 0
            for index in range(len(runs)):
                hit = max(h for h in range(tiny.limit(index) + 1) if kept.issuperset(tiny.needs(index, h)))
                total += hit
                kept |= tiny.leaves(index, hit)
                ends = {len(tiny.text(i)[:-2]) for i in (index, rng.randrange(len(runs)))}
                states = [each for each in kept if each[0] == "state" and len(each[1]) in ends]
                rng.shuffle(states)
                chosen = set[Item]()
                for state in sorted(states):
                    more = chosen | {*tiny.pages(state[1]), state}
                    if sum(map(tiny.cost, more)) <= bounds.budget:
                        chosen = more
                kept = chosen
            best = max(best, total)
        assert best <= bounds.upper


def test_every_price_proves_a_bound() -> None:
    """Any prices at all: the bound from them is never below what a schedule reaches."""
    rng = np.random.default_rng(5)
    for seed in range(120):
        tiny = draw(3000 + seed)
        paths = read_paths(tiny.runs(), 1, tiny.whole)
        if not len(paths.owner):
            continue
        budget = budgets_of(tiny, seed)[0]
        best, dual = exhaustive(tiny, budget), Dual(paths, tiny.sizes, budget)
        for scale in (0.0, 0.1, 1.0, 5.0):
            prices = (rng.random(dual.gaps) * scale * SCALE).tolist()
            assert dual.bound([int(each) for each in prices]) >= best


def test_exact_and_float_dual_agree() -> None:
    paths = read_paths(sessions(1))
    dual = Dual(paths, Sizes(3, 40, 4), 200)
    prices = np.random.default_rng(1).random(dual.gaps) * 3
    assert dual.bound(dual.exact(prices)) == int(dual.smoothed(prices, 1.0)[0])


def test_the_search_for_prices_reaches_what_is_known() -> None:
    """32 sessions strictly in turn, three turns: by symmetry half the memory serves half of them."""
    requests = [([[1000 * s, 100 + 10 * t]], []) for t in range(3) for s in range(32)]
    enough = working_set(requests, 1, 20, page_size=1)
    assert enough == 32 * (110 + 20)  # after turn two all wait for turn three
    half = optimum(requests, 1, 20, [enough // 2], page_size=1, rounds=300)[0]
    assert half.ideal == 32 * (100 + 110)
    assert 0.49 * half.ideal <= half.lower <= half.upper <= 0.54 * half.ideal


def test_trivial_cases_are_exact() -> None:
    twice = [([[0, 10]], [])] * 2
    for whole, hit in ((False, 9), (True, 10)):
        at = optimum(twice, 2, 5, [2 * hit + 5], page_size=1, whole=whole)[0]
        assert (at.lower, at.upper, at.ideal, at.prompt_tokens) == (hit, hit, hit, 20)
    assert working_set(twice, 2, 5, page_size=1) == 23
    assert working_set(twice, 2, 5, page_size=4) == 2 * 8 + 8 + 5  # two whole pages and a tail
    assert working_set(twice, 2, 5, page_size=4, unit=2) == 2 * 16 + 8 + 5  # 19 of 20 tokens
    short = optimum(twice, 2, 5, [15], page_size=1)[0]  # the state and five tokens: any position will do
    assert short.lower == 5 and short.schedule.origins.tolist() == [0, 0]
    tiny = optimum(twice, 2, 5, [4], page_size=1)[0]  # no room for a state
    assert tiny.lower == 0
    apart = optimum([([[0, 5]], []), ([[9, 5]], [])], 1, 1, [100])[0]
    assert (apart.lower, apart.upper, apart.ideal) == (0, 0, 0)
    assert optimum([], 1, 1, [5])[0][:5] == (5, 0, 0, 0, 0)
    assert optimum([], 1, 1, [5])[0].percent == (0.0, 0.0, 0.0)


def test_a_state_that_a_deeper_hit_passes_is_kept_across_it() -> None:
    """0: reads A B. 1: resumes after A B, so cannot leave the state after A. 2: A C wants it."""
    a, b, c = [0, 10], [100, 10], [200, 10]
    requests = [([a, b], []), ([a, b, [300, 1]], []), ([a, c], [])]
    packing = pack_all(read_paths(requests), Sizes(1, 50, 1))
    assert packing.hits.tolist() == [0, 20, 10]
    assert packing.origins.tolist() == [0, 0, 0]
    assert packing.used.tolist() == [20 + 50 + 50, 10 + 50, 0]
    assert packing.move(1, 10)  # it resumes after A itself, and hands that state on
    assert packing.used.tolist() == [10 + 50, 10 + 50, 0] and packing.origins.tolist() == [0, 0, 1]
    packing.undo(0)
    assert packing.used.tolist() == [20 + 50 + 50, 10 + 50, 0]


def test_moves_and_undo_leave_what_the_hits_alone_imply() -> None:
    rng = random.Random(4)
    paths = read_paths(sessions(3))
    sizes = Sizes(2, 30, 4)
    packing = Packing(paths, sizes, 1 << 40)
    for _ in range(60):
        mark = packing.mark()
        before = packing.used.copy(), packing.hits.copy(), packing.origins.copy(), packing.lowest.copy()
        for _ in range(rng.randint(1, 5)):
            request = rng.randrange(len(paths.ideal))
            packing.move(request, rng.randint(0, int(paths.ideal[request])))
        fresh = Packing(paths, sizes, 1 << 40)
        for request in np.flatnonzero(packing.hits).tolist():
            fresh.move(request, int(packing.hits[request]))
        assert np.array_equal(fresh.used, packing.used) and fresh.total == packing.total
        if rng.random() < 0.5:
            packing.undo(mark)
            after = packing.used, packing.hits, packing.origins, packing.lowest
            assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_stretches_of_prefixes() -> None:
    requests = [
        ([[0, 4], [10, 4]], []),
        ([[0, 2], [2, 2], [10, 2], [20, 3]], [[30, 2]]),
        ([[0, 4], [10, 2], [20, 3], [30, 1]], []),
        ([[0, 4], [10, 4]], [[5, 1]]),
    ]
    paths = read_paths(requests, unit=3)
    assert paths.stretches == [[], [(0, 18)], [(1, 29)], [(2, 18), (0, 23)]]
    assert paths.ideal.tolist() == [0, 18, 29, 23]
    assert read_paths(requests, unit=3, whole=True).ideal.tolist() == [0, 18, 30, 24]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"requests": 3}, "requests: 3, expected a sequence"),
        ({"requests": [([[0, 1]],)]}, r"expected \(prompt, output\)"),
        ({"requests": [([[0]], [])]}, r"requests: \[0\], expected runs"),
        ({"requests": [([[0, 0]], [])]}, "count: 0, expected 1 <="),
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token: 0"),
        ({"state_bytes": -1}, "state_bytes: -1"),
        ({"budgets": [0]}, "budgets: 0"),
        ({"budgets": [1.5]}, "budgets: 1.5, expected an integer"),
        ({"unit": 0}, "unit: 0"),
        ({"page_size": 0}, "page_size: 0"),
        ({"whole": 1}, "whole: 1, expected True or False"),
        ({"rounds": -1}, "rounds: -1"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: str) -> None:
    good = {"requests": [([[0, 1]], [])], "kv_bytes_per_token": 1, "state_bytes": 1, "budgets": [1]}
    with pytest.raises((TypeError, ValueError), match=error):
        optimum(**{**good, **change})
