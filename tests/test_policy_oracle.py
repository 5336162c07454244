"""The learned policy beside its oracle: each rule of docs/policy.md with numbers by hand, then traffic.

Every call goes to both sides and all worths are compared after it (policy_traffic.py). More traffic on
demand: `python -m tests.test_policy_oracle --requests 100000`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import pytest

from tests.oracle_policy import BUCKETS, ONE, Hazards, Record, best_rate, first_age, quarters
from tests.policy_traffic import Pair, Traffic

UNIT = 1 << 28  # one use a request
SLOT = 10 << 20


def exact(slabs: int = 100, **options: Any) -> Pair:
    """Where a boundary that saves 10 tokens, and whose node has no whole page, is worth 1 + index + flow."""
    shape = {"page_size": 16, "page_bytes": 1 << 20, "slot_bytes": SLOT, **options}
    return Pair(memory_bytes=slabs * shape["slot_bytes"], **shape)


def ten(first: int) -> list[int]:
    return [first * 1000 + i for i in range(10)]


def index(pair: Pair, path: list[int], salt: bytes = b"") -> int:
    """What of its worth is not flow."""
    return pair.worth(path, salt) - 1 - record(pair, path, salt).flow


def record(pair: Pair, path: list[int], salt: bytes = b"") -> Record:
    return pair.history.records[salt, tuple(path)]


# ---- section 3


def test_age_buckets_are_single_requests_and_then_four_an_octave() -> None:
    assert [first_age(b) for b in (0, 7, 8, 9, 10, 11, 12, 13, 16)] == [0, 7, 8, 10, 12, 14, 16, 20, 32]
    assert first_age(BUCKETS - 1) == 28672


def test_classes() -> None:
    fresh = Record((b"", ()), 1, "cut", turns=3, gap=8 * 1000)
    assert fresh.classify() == ("cut", 3, 10)
    fresh.turns = 7
    assert fresh.classify() == ("cut", 5, 10), "half octaves: 0, 1, 2, 3, 4-5, 6-7"
    fresh.turns = 1000
    assert fresh.classify() == ("cut", 13, 10)
    fresh.passed = True
    assert fresh.classify() == ("cut", 14, 10), "passed counts, not the turns"
    fresh.uses, fresh.gap = 3, 1 << 20
    assert fresh.classify() == ("cut", 16, 12), "uses count, not that it is passed"
    fresh.uses = 10**6
    assert fresh.classify()[1] == 19


def test_an_index_is_looked_up_in_quarters_of_a_bucket_where_it_more_than_doubles() -> None:
    assert [quarters(16, age) for age in range(32, 40)] == [0, 0, 1, 1, 2, 2, 3, 3]
    flat, steep = Hazards(), Hazards()
    which = "turn_end", 0, 0
    steep.index(which, 0, 0, 1)  # learns, at request 1; then what it learned is that all are used at age 40
    steep.known[which][1][:] = [0] * 17 + [ONE] * (BUCKETS - 17)

    def looks(hazards: Hazards, bucket: int, ages: range) -> list[int]:
        return [hazards.next_look(which, bucket, age, 1) for age in ages]

    assert looks(flat, 8, range(8, 10)) == [10, 10] and looks(flat, 16, range(32, 40)) == [40] * 8
    assert looks(steep, 16, range(32, 40)) == [34, 34, 36, 36, 38, 38, 40, 40]
    assert looks(steep, 12, range(16, 20)) == [20] * 4, "far from the spike"


def test_of_what_nothing_is_known_about_a_prompt_end_in_130_is_used_at_each_age() -> None:
    """3 % a bucket, a quarter of that for a prompt end, less what its own half of a spell at age 0 takes."""
    pair = exact()
    pair.turn(ten(1))
    assert 0.0070 * UNIT < index(pair, ten(1)) < 0.0075 * UNIT


def test_the_index_of_a_rotation_rises_to_its_next_use() -> None:
    """Seven prompts in turn, each asked for at age 7: of age a, one use for the 7 - a requests until then and
    half of the one in which it comes."""
    pair = exact()
    for i in range(7):
        pair.turn(ten(i))
    for i in range(700):
        pair.ask(ten(i % 7))
    found = [index(pair, ten(6 - age)) for age in range(7)]
    for age, each in enumerate(found):
        assert 0.94 < each / UNIT * (7.5 - age) < 1.01
    assert found == sorted(found)


def test_where_hazards_fall_with_age_it_forgets() -> None:
    """Half of all prompts are asked for at age 1, the others never: half a use for the 1 + 3/4 requests that
    one is held on average, and next to nothing once age 1 is over."""
    pair = exact(slabs=12)
    for i in range(600):
        pair.turn(ten(i))
        if i % 2:
            pair.ask(ten(i))
    pair.turn(ten(1000))
    assert 0.92 < index(pair, ten(1000)) / UNIT * 3.5 < 1.02
    for i in range(3):
        pair.ask(ten(2000 + i))
    assert index(pair, ten(1000)) < 0.02 * UNIT


def test_hazards_in_integers_are_those_of_the_page() -> None:
    traffic = Traffic(3, options={"memory_bytes": 192 * 20})
    traffic.run(150)
    hazards = traffic.pair.history.hazards
    fine = [which for which in hazards.at_risk if len(which) == 3]
    assert len(fine) > 20
    for which in fine:
        ours, theirs = hazards.learn(which), by_the_page(hazards, which)
        assert all(abs(a / ONE - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))
        for bucket, behind in ((0, 0), (1, 0), (7, 0), (20, 0), (20, 1), (24, 3)):
            assert best_rate(ours, bucket, behind) / UNIT == pytest.approx(
                gittins(theirs, bucket, behind / 4), rel=0.02, abs=1e-5
            )


def by_the_page(hazards: Hazards, which: tuple[Any, ...]) -> list[float]:
    rarer = {"prompt_end": 4, "chunk_end": 8, "cut": 8, "interior": 16}.get(which[0], 1)
    h = [0.03] * BUCKETS
    for level, (u, w) in enumerate(((2, 16), (2, 16), (8, 40), (8, 40))):
        events, at_risk = hazards.events[which[:level]], hazards.at_risk[which[:level]]
        expected = sum(n * each / 2 for n, each in zip(at_risk, h, strict=True)) + u
        scale = (sum(events) + u / (rarer if level == 1 else 1)) / expected
        h = [
            min(1, (2 * e + w * min(1, scale * x)) / (n + w))
            for e, n, x in zip(events, at_risk, h, strict=True)
        ]
    return h


def gittins(h: list[float], bucket: int, behind: float) -> float:
    """With a share of the bucket behind, over which its uses are spread evenly."""
    rest = h[bucket] * (1 - behind) / (1 - h[bucket] * behind)
    alive, used, held, best = 1.0, 0.0, 0.0, 0.0
    for b, hazard in enumerate([rest, *h[bucket + 1 :]], bucket):
        width = (first_age(b + 1) - first_age(b)) * (1 - behind if b == bucket else 1)
        held += alive * (1 - hazard / 2) * width
        used += alive * hazard
        alive *= 1 - hazard
        best = max(best, used / held)
    return best


def test_counts_of_a_use_and_of_a_bucket_that_was_passed() -> None:
    """A spell that comes to ages 0, 1, 2 and is used there: two halves in each, one use in the last."""
    pair = exact()
    pair.turn(ten(1))
    pair.ask(ten(2), salt=b"another")
    pair.ask(ten(1))
    hazards, which = pair.history.hazards, ("prompt_end", 0, 0)
    assert hazards.at_risk[which][:4] == [2, 2, 2, 0] and hazards.events[which][:4] == [0, 0, 1, 0]
    assert hazards.at_risk["prompt_end", 15, 2][:2] == [1, 0], "its next spell: one use, a gap of 2"
    assert hazards.at_risk[()][:4] == [3, 2, 2, 0]


# ---- section 2


def test_who_comes_back_deeper_passes_what_is_above() -> None:
    pair = exact()
    pair.turn([*ten(1), *ten(2)], breakpoints=[10])
    above = record(pair, ten(1))
    assert above.which == ("breakpoint", 0, 0) and not above.passed
    pair.ask([*ten(1), *ten(2)])
    assert above.passed and above.which == ("breakpoint", 14, 0) and above.uses == 0
    pair.ask(ten(1))
    assert above.which == ("breakpoint", 15, 2), "two requests after it was made, and used counts, not passed"


def test_boundaries_inherit_the_turn_and_the_gap() -> None:
    pair = exact()
    pair.turn(ten(1))
    pair.ask(ten(5))
    pair.ask(ten(6))
    pair.turn([*ten(1), *ten(2)])
    second = record(pair, [*ten(1), *ten(2)])
    assert (second.turns, second.gap, second.which) == (1, 24, ("prompt_end", 1, 2))
    assert record(pair, ten(1)).gap == 24 and record(pair, ten(1)).uses == 1


def test_the_gap_of_what_was_used_is_the_mean_of_its_own() -> None:
    """Gaps of 1 and 4: 2.5 requests, in eighths; what it hands down is the last one."""
    pair = exact()
    pair.turn(ten(1))
    pair.ask([*ten(1), 1])
    for i in range(3):
        pair.ask(ten(5 + i))
    pair.turn([*ten(1), *ten(2)])
    assert record(pair, ten(1)).gap == 20
    assert record(pair, [*ten(1), *ten(2)]).gap == 32


def test_a_use_is_the_deepest_record_resident_or_not() -> None:
    """Else what is kept would look useful for being kept."""
    pair = exact()
    pair.turn(ten(1))
    pair.turn([*ten(1), *ten(2)])
    pins = pair.pin(ten(1))
    pair.clear()
    pair.release(pins)
    used = record(pair, ten(1)).uses
    pair.ask([*ten(1), *ten(2)])
    assert pair.oracle.counters["restored_prompt_end"] == 2, "it resumed at 10"
    assert (record(pair, ten(1)).uses, record(pair, [*ten(1), *ten(2)]).uses) == (used, 1)


def test_where_a_path_parts_between_records_a_ghost_is_made() -> None:
    pair = exact()
    pair.turn([*ten(1), *ten(2)])
    pair.turn([*ten(1), *ten(3)])
    fork = record(pair, ten(1))
    assert fork.kind == "fork" and fork.passed and fork.checkpoint is not None, (
        "wanted, since others left there"
    )
    pair.turn([*ten(1)[:4], *ten(4)])
    assert record(pair, ten(1)[:4]).checkpoint is None, "4 tokens are not worth a pass of 8"


def test_a_fork_is_wanted_where_the_prompt_leaves_what_is_remembered_though_nothing_is_resident() -> None:
    pair = exact()
    pair.turn([*ten(1), *ten(2)])
    pair.clear()
    lease = pair.reserve([*ten(1), *ten(3)])
    assert lease is not None
    assert [(w.position, w.kind) for w in lease[0].wanted] == [(10, "fork")]
    assert pair.step(lease, 20, []) and lease[1].computed == 10


def test_a_fork_is_wanted_at_a_ghost_that_is_used_for_the_second_time() -> None:
    pair = exact()
    pair.turn(ten(1))
    pair.clear()
    for wanted in ([], [10]):
        lease = pair.reserve([*ten(1), *ten(3)])
        assert lease is not None
        assert [w.position for w in lease[0].wanted] == wanted
        pair.close(lease)


def test_one_salt_knows_no_records_of_another() -> None:
    pair = exact()
    pair.turn(ten(1), salt=b"a")
    pair.turn([*ten(1), *ten(2)], salt=b"b")
    assert record(pair, ten(1), b"a").uses == 0
    assert record(pair, [*ten(1), *ten(2)], b"b").turns == 0


def test_the_ghosts_of_the_oldest_spells_are_forgotten() -> None:
    """65,536 tokens; 240 prompts of 300 and a branch of 10 are 6,474 too many: 22 prompts. Not where a lease
    stands or paths branch, however long ago, and not what was asked for since."""
    pair = exact(slabs=12)
    prompts = [[i * 1000 + k for k in range(300)] for i in range(240)]
    branch = [*prompts[1][:150], *ten(999)]
    for each in (prompts[0], prompts[1], branch):
        pair.turn(each)
    pair.clear()
    lease = pair.reserve([*prompts[0], 7])
    assert lease is not None
    for each in (*prompts[2:100], prompts[1], branch, *prompts[100:]):
        pair.turn(each) if each in prompts[2:] else pair.ask(each)
    history = pair.history
    assert history.tokens <= 65536 < history.tokens + 300
    known = [(b"", tuple(each)) in history.records for each in prompts]
    assert known == [True, True] + [False] * 22 + [True] * 216
    parting = history.records[b"", tuple(prompts[1][:150])]
    assert (
        parting.order < record(pair, prompts[24]).order and parting.checkpoint is None and not parting.leases
    )
    pair.close(lease)
    lease = pair.reserve([*prompts[5], 7])
    assert lease is not None and lease[0].trail.last.depth == 0, "as if it had never been here"


def test_no_more_than_64_records_are_looked_at_for_a_new_one() -> None:
    """100 prompts of 2,000 tokens, of which 32 may stay: the next record takes 64 away, and only the one
    after that the rest."""
    pair = exact(slabs=1000, page_size=256, page_bytes=1 << 10, slot_bytes=1 << 10, pass_cost=5000)
    for i in range(100):
        pair.turn([i * 2000 + k for k in range(2000)])
    history = pair.history
    assert history.tokens == 200_000 and len(history.records) == 100, "what is resident is not forgotten"
    pair.clear()
    pair.turn(ten(500))
    assert history.tokens == 200_010 - 64 * 2000
    pair.turn(ten(501))
    assert history.tokens <= 65536 < history.tokens + 2000


def test_a_salt_is_forgotten_with_its_last_record_and_lease() -> None:
    pair = exact()
    lease = pair.reserve(ten(1), salt=b"a")
    assert lease is not None and b"a" in pair.history.roots
    pair.close(lease)
    assert not pair.history.roots
    pair.turn(ten(1), salt=b"a")
    assert list(pair.history.roots) == [b"a"]


# ---- regressions: what the core got wrong when it met this oracle


def test_content_is_told_apart_as_long_as_it_is_remembered() -> None:
    """The id of a content that was in no lease and no node was given to the next one, which the history took
    for the old one."""
    pair = exact()
    cat, dog = ((1000, b"cat"), *ten(1)[1:]), ((1000, b"dog"), *ten(1)[1:])
    pair.turn(ten(1), content_keys=[(0, b"cat")])
    pair.clear()
    pair.turn([*ten(1), *ten(2)], content_keys=[(0, b"dog")])
    known = pair.history.records
    assert known[b"", cat].uses == 0 and (b"", dog) not in known
    assert known[b"", (*dog, *ten(2))].turns == 0
    pair.turn([*ten(1), *ten(3)], content_keys=[(0, b"cat")])
    assert known[b"", cat].uses == 1 and known[b"", (*cat, *ten(3))].turns == 1, "and the old one is itself"


def test_a_return_that_is_far_away_at_the_last_age_is_waited_for() -> None:
    """At age 32768 the last bucket would end if it had an end: the core looked the record up for ever."""
    pair = exact()
    pair.turn(ten(1), now=0)
    pair.turn(ten(2), now=10, close={"expected_return": 10**9})
    for _ in range(first_age(BUCKETS) + 10):
        ours, theirs = pair.oracle.reserve([7]), pair.core.reserve([7])
        assert ours is not None and theirs is not None
        pair.oracle.close(ours, discard=True)
        theirs.close(discard=True)
    pair.compare("a long time")
    found = record(pair, ten(2))
    assert found.bucket == BUCKETS - 1 and found.hint == "returns"
    assert found.due is not None and found.due > pair.history.now


def test_a_record_above_the_end_of_its_trail_is_not_forgotten_as_it_is_made() -> None:
    """More is remembered than should be, and nothing can be forgotten but the record that was made for the
    breakpoint: the core freed it under the checkpoint that was to stand there."""
    pair = Pair(page_size=4096, page_bytes=1 << 10, slot_bytes=1 << 10, memory_bytes=200 << 10)
    path = list(range(65_600))
    pair.turn(path)
    pair.clear()
    pair.turn([*path, 7], breakpoints=[10])
    above = record(pair, path[:10])
    assert above.checkpoint is not None and not above.leases and pair.history.tokens > 65536
    pair.core.check()


# ---- sections 1 and 4


def test_worth_counts_what_it_saves_over_the_next_above_and_the_pages_of_a_leaf() -> None:
    pair = exact()
    pair.turn(ten(1))
    pair.turn([*ten(1), *[50_000 + i for i in range(30)]])
    deep = record(pair, [*ten(1), *[50_000 + i for i in range(30)]])
    assert deep.depth == 40
    assert pair.worth(list(deep.path)) == 1 + deep.index * 30 * (1 << 20) // (SLOT + 2 * (1 << 20))


def returning(pair: Pair, path: list[int], now: int, units: int) -> None:
    pair.turn(path, now=now, close={"now": now, "expected_return": units})


def test_an_expected_return_is_worth_one_use_for_the_requests_until_then() -> None:
    """Rates: 2 requests in 20 units, 3 in 30. Looked up again at each request, if it is less than 16 away."""
    pair = exact()
    pair.turn(ten(1), now=0)
    pair.turn(ten(2), now=20, close={"now": 20, "expected_return": 40})
    assert pair.worth(ten(2)) == 1 + UNIT // 4
    pair.turn(ten(3), now=30, close={"expected_return": 50})
    assert pair.worth(ten(2)) == 1 + UNIT // 3, "30 units are left of the 40"
    assert pair.worth(ten(3)) == 1 + UNIT // 5
    pair.ask(ten(9), now=61)
    assert record(pair, ten(2)).hint is None, "61 is past the 60 that were said"
    assert 1 < pair.worth(ten(2)) < 0.02 * UNIT
    assert pair.worth(ten(3)) == 1 + UNIT, "19 units, of which four requests took 61: the next one"


def test_of_one_request_only_the_boundary_that_followers_use_is_expected() -> None:
    pair = exact()
    path = [*ten(1), *ten(2)]
    pair.turn([*path, *ten(3)], breakpoints=[10], now=0, close={"expected_return": 100})
    assert pair.worth(ten(1)) == 1 < pair.worth([*path, *ten(3)]), "nobody came back to any kind: the deepest"
    pair.turn([*ten(4), *ten(5)], breakpoints=[10], now=1)
    pair.ask(ten(4), now=2)
    pair.turn([*ten(6), *ten(7)], breakpoints=[10], now=3, close={"expected_return": 100})
    assert pair.worth([*ten(6), *ten(7)]) == 1 < pair.worth(ten(6)), "somebody came back to a breakpoint"


def test_what_will_not_return_is_worth_nothing_until_somebody_comes_back() -> None:
    pair = exact()
    pair.turn(ten(1), close={"keep": "nothing"})
    assert pair.worth(ten(1)) == 1
    pair.ask(ten(2))
    assert pair.worth(ten(1)) == 1
    pair.ask(ten(1))
    assert pair.worth(ten(1)) > 1 + UNIT // 100


def test_the_index_of_ghosts_flows_to_the_next_resident_above() -> None:
    """And so keeps the prefix that they share."""
    pair = exact()
    pair.turn(ten(1), now=0)
    pins = pair.pin(ten(1))
    pair.turn([*ten(1), *ten(2)], now=20, close={"now": 20, "expected_return": 40})
    pair.turn([*ten(1), *ten(3)], now=30, close={"expected_return": 50})
    assert record(pair, ten(1)).flow == 0, (
        "nothing has left yet, so memory costs nothing, and nothing is shared"
    )
    pair.clear()
    pair.release(pins)
    above = record(pair, ten(1))
    assert above.flow == UNIT // 3 + UNIT // 5
    assert pair.worth(ten(1)) == 1 + above.index + UNIT // 3 + UNIT // 5


def test_the_price_is_what_left_lately() -> None:
    pair = exact()
    pair.turn(ten(1), now=0)
    returning(pair, ten(2), 20, 40)
    pins = pair.pin(ten(1))
    pair.clear()
    assert pair.oracle.store.learned.price == (1 + UNIT // 4) // 33, "a slot against 32"
    pair.release(pins)


def test_a_resident_that_is_sure_to_leave_gives_all_and_none_while_it_is_pinned() -> None:
    pair = exact()
    pair.turn(ten(1), now=0)
    for i in range(2, 80):  # what returns at once, and leaves all the same, makes memory dear
        pair.turn(ten(i), salt=b"dear", now=1, close={"expected_return": 1})
    pair.clear(b"dear")
    child = [*ten(1), *ten(100)]
    pair.turn(child, now=1, close={"expected_return": 3})
    expected, above = record(pair, child), record(pair, ten(1))
    assert pair.oracle.store.learned.price > pair.worth(child) > UNIT // 500
    assert expected.given == above.flow == expected.index > 0
    assert pair.worth(ten(1)) == 1 + above.index + above.flow
    pins = pair.pin(child)
    assert above.flow == 0 and pair.worth(ten(1)) == 1 + above.index
    pair.release(pins)
    assert above.flow == expected.index


def test_the_lowest_worth_leaves_first_and_of_equals_the_oldest() -> None:
    pair = exact(slabs=6)
    left = []
    for i in range(8):
        pair.turn(ten(i), close={"keep": "nothing" if i in (1, 2, 4) else "all"})
        known = {path[0] // 1000 for _, path in pair.oracle.store.checkpoints}
        left += [n for n in range(i) if n not in known and n not in left]
    assert left[:3] == [1, 2, 4]


def test_a_step_of_priority_doubles_what_a_boundary_is_worth() -> None:
    for step in (1, 8, -3):
        plain, urgent = exact(), exact()
        for pair, options in ((plain, {}), (urgent, {"priority": step})):
            pair.turn(ten(1), **options)
        usual, other = index(plain, ten(1)), index(urgent, ten(1))
        assert other == (usual << step if step > 0 else usual >> -step) and usual > 8


def test_a_boundary_has_the_priority_of_the_last_request_that_came_back_to_it() -> None:
    pair = exact()
    pair.turn(ten(1), priority=5)
    pair.ask([*ten(1), 1])
    assert record(pair, ten(1)).priority == 0


# ---- traffic


def traffic(seed: int, requests: int) -> Counter[str]:
    options: dict[str, Any] = {
        "memory_bytes": 192 * (12, 20, 30)[seed % 3],
        "inner_checkpoints": seed % 4 == 2,
        "pass_cost": (8, 0, 20)[seed % 3],
    }
    if seed % 5 == 3:
        options["max_cached_bytes"] = 192 * 10
    if seed % 5 == 4:
        options.pop("memory_bytes")
        options.update(num_pages=60, num_slots=10)
    found = Traffic(seed, hints=seed % 2 == 1, options=options)
    try:
        found.run(requests)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, request {found.events['requests']}: {error}") from error
    return found.events


def test_traffic_is_the_same_on_both_sides() -> None:
    events: Counter[str] = Counter()
    for seed in range(10):
        events += traffic(seed, 300)
    assert events["requests"] == 3000 and events["evicted"] > 3000
    rare = ("hits", "forks", "uses", "parted", "returns", "silent", "did_not_return")
    assert not [name for name in rare if events[name] < 50], events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1000, help="the first one")
    options = parser.parse_args()
    for number in range(-(-options.requests // 500)):
        traffic(options.seed + number, 500)
        print(f"{(number + 1) * 500:,} requests", flush=True)


if __name__ == "__main__":
    main()
