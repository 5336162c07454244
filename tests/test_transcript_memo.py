"""What a transcript answers: what the same cache answers for a list of its tokens, whatever came between.

By example: what its anchor and its page table have to survive (evictions, merges, splits, truncation, clear),
salts and content, and that a match costs only what was appended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.comparing import shape_of
from tests.conftest import Driver

CAT, DOG = b"cat", b"dog"
PATH = list(range(1, 13))


def same(driver: Driver, transcript: Any, keys: Any = ()) -> Any:
    """Its match, which is that of its tokens."""
    found = driver.cache.match(transcript)
    expected = driver.cache.match(transcript.tokens, salt=transcript.salt, content_keys=keys)
    assert found == expected
    driver.cache.check()
    return found


def depths(driver: Driver) -> set[int]:
    """Where the nodes of the tree end."""
    return {depth for _, _, depth, _, _ in shape_of(driver.cache.dump())}


def finish(driver: Driver, lease: Any, output: Any = (), **close: Any) -> None:
    driver.prefill(lease)
    driver.decode(lease, output)
    lease.close(**close)
    driver.cache.check()


# ---- what it gives


def test_it_is_matched_as_its_tokens(driver: Driver) -> None:
    driver.turn(PATH, [20, 21, 22])
    t = driver.cache.transcript()
    reasons = set()
    for token in [*PATH, 20, 21, 22, 23, 24]:
        t.extend([token])
        reasons.add(same(driver, t).reason)
    assert len(reasons) > 2, reasons
    t.truncate(0)
    t.extend([99])
    assert same(driver, t).reason == "cold"


def test_it_is_reserved_as_its_tokens(driver: Driver) -> None:
    driver.turn(PATH, [20, 21, 22])
    t = driver.cache.transcript()
    t.extend([*PATH, 20, 21, 22, 30, 31])
    expected = driver.cache.match(t.tokens)
    lease = driver.cache.reserve(t, breakpoints=[16], max_new_tokens=9)
    assert lease.match == expected and lease.start == expected.length > 0
    assert lease.prompt_length == 17 and lease.capacity == 28
    driver.prefill(lease)
    lease.close()
    assert driver.cache.match([*PATH, 20, 21, 22, 30, 99]).length == 16  # the breakpoint
    assert same(driver, t).kv_length == 17


def test_arguments_of_reserve_beside_it() -> None:
    driver = Driver(policy="default")
    t = driver.cache.transcript()
    t.extend(PATH)
    finish(driver, driver.cache.reserve(t, breakpoints=(8,), max_new_tokens=4, now=5, priority=3))
    assert same(driver, t).kv_length == len(PATH)


def test_salts_know_nothing_of_each_other(driver: Driver) -> None:
    driver.turn(PATH, salt=b"one")
    ours, theirs, neither = (driver.cache.transcript(salt=salt) for salt in (b"one", b"two", b""))
    for t in (ours, theirs, neither):
        t.extend(PATH)
    found = [same(driver, t).kv_length for t in (ours, theirs, neither)]
    assert found == [len(PATH), 0, 0]
    assert (ours.salt, theirs.salt, neither.salt) == (b"one", b"two", b"")
    finish(driver, driver.cache.reserve(theirs))
    assert same(driver, theirs).kv_length == len(PATH) and same(driver, neither).kv_length == 0


def test_content_tells_equal_tokens_apart(driver: Driver) -> None:
    keys = [(1, CAT), (9, DOG)]
    driver.turn(PATH, content_keys=keys)
    t = driver.cache.transcript()
    t.extend(PATH[:5], content_keys=[(1, CAT)])
    t.extend(PATH[5:], content_keys=[(9, DOG)])  # absolute positions
    assert same(driver, t, keys).kv_length == len(PATH)
    t.truncate(9)
    t.extend(PATH[9:], content_keys=[(9, CAT)])
    assert same(driver, t, [(1, CAT), (9, CAT)]).kv_length == 9
    t.truncate(9)
    t.extend(PATH[9:])
    assert same(driver, t, [(1, CAT)]).kv_length == 9
    t.truncate(1)
    t.extend(PATH[1:])
    assert same(driver, t).kv_length == 1


def test_content_that_the_cache_hears_of_later(driver: Driver) -> None:
    """Nobody knew of it when the transcript was told, and everybody else forgets it in between."""
    keys, other = [(2, b"new")], [(2, b"other")]
    t = driver.cache.transcript()
    t.extend(PATH, content_keys=keys)
    assert same(driver, t, keys).kv_length == 0
    for round in range(3):
        driver.turn(PATH, content_keys=other)
        assert same(driver, t, keys).kv_length == 2
        driver.turn(PATH, content_keys=keys)
        assert same(driver, t, keys).kv_length == len(PATH)
        driver.cache.clear()
        assert same(driver, t, keys).kv_length == 0
        driver.turn(PATH, content_keys=[(2, b"number %d" % round)])
        assert same(driver, t, keys).kv_length == 2
        driver.cache.clear()
    finish(driver, driver.cache.reserve(t))
    assert driver.cache.match(PATH, content_keys=keys).kv_length == len(PATH)
    assert driver.cache.match(PATH, content_keys=other).kv_length == 2


def test_content_of_a_closed_one_is_not_mistaken_for_another(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH, content_keys=[(2, b"first")])
    finish(driver, driver.cache.reserve(t))
    t.truncate(1)
    t.close()
    t = driver.cache.transcript()
    t.extend(PATH, content_keys=[(2, b"second")])
    assert same(driver, t, [(2, b"second")]).kv_length == 2
    assert driver.cache.match(PATH, content_keys=[(2, b"first")]).kv_length == len(PATH)


def test_no_room_is_none_and_a_size_beyond_the_arena_an_error() -> None:
    driver = Driver(slabs=4)
    t, longer = driver.cache.transcript(), driver.cache.transcript()
    t.extend(range(24))
    longer.extend(range(25))
    holder = driver.cache.reserve([7] * 8)
    before = driver.cache.digest
    assert driver.cache.reserve(t) is None and driver.cache.reserve(list(range(24))) is None
    with pytest.raises(ValueError, match=r"^tokens: a prompt of 25"):
        driver.cache.reserve(longer)
    assert driver.cache.digest == before
    holder.close()
    lease = driver.cache.reserve(t)
    assert lease is not None
    finish(driver, lease)
    assert same(driver, t).kv_length == 24


# ---- a memo: it holds no page, pins nothing and outlives clear


def test_it_pins_nothing_and_outlives_clear(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == len(PATH)
    held = {name: driver.cache.stats()[name] for name in ("tree_pages", "checkpoints")}
    assert held["tree_pages"] > 0 and driver.cache.clear() == held["checkpoints"] > 0
    found = driver.cache.stats()
    assert found["tree_pages"] == found["taken_pages"] == found["taken_slots"] == found["checkpoints"] == 0
    assert same(driver, t).reason == "cold" and t.tokens.tolist() == PATH
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == len(PATH)


def test_of_another_salt_it_sees_no_clear(driver: Driver) -> None:
    kept, cleared = driver.cache.transcript(salt=b"a"), driver.cache.transcript(salt=b"b")
    for t in (kept, cleared):
        t.extend(PATH)
        finish(driver, driver.cache.reserve(t))
        assert same(driver, t).kv_length == len(PATH)
    driver.cache.clear(salt=b"b")
    assert same(driver, kept).kv_length == len(PATH) and same(driver, cleared).kv_length == 0


def test_to_match_changes_nothing_but_what_it_remembers(driver: Driver) -> None:
    driver.turn(PATH, [20, 21])
    t = driver.cache.transcript()
    t.extend([*PATH, 20, 99])
    before = driver.cache.digest, driver.cache.stats()
    for _ in range(3):
        driver.cache.match(t)
    assert (driver.cache.digest, driver.cache.stats()) == before


def crowd(driver: Driver, number: int) -> None:
    """Requests that come once, until nothing else is left."""
    for first in range(number):
        driver.turn([1000 + first, *range(40)])


def test_what_is_evicted_is_not_remembered() -> None:
    driver = Driver(slabs=12, policy="lru")
    t = driver.cache.transcript()
    t.extend(range(40))
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == 40
    crowd(driver, 8)
    assert driver.cache.stats()["evicted_prompt_end"] > 0
    assert same(driver, t).kv_length == 0
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == 40


def test_where_only_the_end_is_evicted_it_goes_on_from_above() -> None:
    """Its first twelve tokens are pinned; its table shrinks to theirs."""
    driver = Driver(slabs=16, policy="lru")
    driver.turn(list(range(12)))
    pin = driver.cache.pin(list(range(12)))
    t, same_path = driver.cache.transcript(), driver.cache.transcript()
    for each in (t, same_path):
        each.extend(range(40))
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == same(driver, same_path).kv_length == 40
    crowd(driver, 12)
    driver.cache.check()
    assert same(driver, same_path).kv_length == 12
    lease = driver.cache.reserve(t)  # not asked in between
    assert lease.start == 12
    assert lease.pages[:3].tolist() == driver.cache.reserve(list(range(13))).pages[:3].tolist()
    pin.release()


def test_a_split_above_changes_nothing(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH)
    finish(driver, driver.cache.reserve(t))
    assert same(driver, t).kv_length == len(PATH)
    for depth in (9, 3, 6):  # each a branch, whose parting is a node of its own
        driver.turn([*PATH[:depth], 70 + depth, 71, 72])
        assert depth in depths(driver)
        assert same(driver, t).kv_length == len(PATH)
    t.truncate(7)
    assert same(driver, t).kv_length == 7
    t.extend([76, 71, 72])
    t.truncate(6)
    t.extend([76, 71, 72])
    assert same(driver, t).kv_length == 9


def test_a_node_that_merges_into_the_one_below_it() -> None:
    """The anchor is where two paths part; one leaves, the node goes with it, its tokens stay known."""
    driver = Driver(slabs=64)
    driver.turn([*PATH, 50, 51, 52, 53])
    driver.turn([*PATH, 60, 61, 62, 63])
    together = [driver.cache.transcript() for _ in range(3)]
    for t in together:
        t.extend([*PATH, 70])
        assert same(driver, t).kv_length == len(PATH)
    pin = driver.cache.pin([*PATH, 50, 51, 52, 53])
    assert len(PATH) in depths(driver)
    driver.cache.clear()
    assert len(PATH) not in depths(driver) and 16 in depths(driver)
    driver.cache.check()
    for t in together[1:]:
        assert same(driver, t).kv_length == len(PATH)
    lease = driver.cache.reserve(together[0])
    assert lease.match.kv_length == len(PATH)
    finish(driver, lease)
    together[1].truncate(len(PATH))
    together[1].extend([50, 51, 52, 53, 54])
    assert same(driver, together[1]).kv_length == 16
    pin.release()
    driver.cache.clear()
    assert all(same(driver, t).reason == "cold" for t in together)


def test_truncate_moves_what_it_remembers_up(driver: Driver) -> None:
    driver.turn(PATH[:5])
    driver.turn(PATH, [20, 21, 22, 23])
    whole = [*PATH, 20, 21, 22, 23]
    for length in range(1, len(whole) + 1):
        t = driver.cache.transcript()
        t.extend(whole)
        assert same(driver, t).kv_length == len(whole)
        t.truncate(length)
        same(driver, t)
        t.truncate(length - 1)
        t.extend([90, 91])
        assert same(driver, t).kv_length == length - 1
        t.truncate(length - 1)
        t.extend(whole[length - 1 :])
        assert same(driver, t).kv_length == len(whole)
        t.close()


def test_what_joins_the_tree_behind_its_back_is_found(driver: Driver) -> None:
    t = driver.cache.transcript()
    t.extend(PATH[:6])
    finish(driver, driver.cache.reserve(t))
    t.extend(PATH[6:])
    assert same(driver, t).kv_length == 6
    driver.turn(PATH)
    assert same(driver, t).kv_length == len(PATH)


# ---- what it is for


def quickest(call: Callable[[], Any]) -> float:
    found = []
    for _ in range(30):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def test_a_turn_costs_what_was_appended_since() -> None:
    driver = Driver(page_size=64, slabs=20_000)
    path = np.arange(1_000_000, dtype=np.int32)
    driver.turn(path)
    t = driver.cache.transcript()
    t.extend(path)
    assert driver.cache.match(t).kv_length == len(path)
    t.extend([1, 2, 3])
    longer = t.tokens
    assert driver.cache.match(t) == driver.cache.match(longer)
    again = quickest(lambda: driver.cache.match(t))
    assert again < quickest(lambda: driver.cache.match(longer)) / 10
