"""The journal of the core: what take_events() says is what the tree holds, at every step of random walks."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from hybridcache.cache import HybridCache
from hybridcache.values import (
    CheckpointRemoved,
    CheckpointStored,
    Cleared,
    PagesRemoved,
    PagesStored,
)
from tests import actions, transcript_actions
from tests.actions import random_walk
from tests.conftest import Driver
from tests.event_mirror import Mirror, plain
from tests.harness import Config, Harness, Pick

SEEDS, STEPS = 40, 150


def empty(h: Harness, pick: Pick) -> None:
    """Ends all that runs, lets go of all pins and clears."""
    while h.flights:
        actions.finish(h, pick)
        actions.cancel(h, pick)
    while h.pending:
        h.apply()
    while h.pins:
        h.release(0)
    h.clear(None)


ACTIONS = {**actions.WEIGHTS, **transcript_actions.WEIGHTS, empty: 2}


def make_core(config: Config, event_capacity: int | None = None) -> HybridCache:
    options = {"policy": "supersede", "event_capacity": event_capacity, **config.options}
    return HybridCache(config.layout, **config.memory, **options, events=True)


def holdings(h: Harness) -> tuple[dict[int, Any], dict[int, Any]]:
    """What the oracle holds: pages and checkpoints with their paths. A page's has no lookahead in it."""
    store, size = h.oracle.store, h.config.page_size
    pages = {page: (s, path[: store.whole(len(path)) * size]) for (s, path), page in store.pages.items()}
    return pages, {c.slot: c.key for c in store.checkpoints.values()}


def test_a_mirror_of_the_events_equals_the_tree_at_every_step() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        mirror = Mirror()

        def compare(h: Harness, mirror: Mirror = mirror) -> None:
            events = h.core.take_events()
            seen.update(type(event).__name__ for event in events)
            seen["content"] += sum(1 for e in events if isinstance(e, PagesStored) and e.contents)
            seen["salt"] += sum(1 for e in events if isinstance(e, CheckpointStored) and e.salt)
            mirror.apply(events)
            pages, checkpoints = holdings(h)
            assert mirror.pages == pages
            assert mirror.checkpoints == checkpoints
            seen["alike"] += len(set(pages.values())) < len(pages)
            seen["pages"] += len(pages)

        random_walk(seed, STEPS, make_core, after=compare, actions=ACTIONS)
    names = (
        "PagesStored",
        "PagesRemoved",
        "CheckpointStored",
        "CheckpointRemoved",
        "content",
        "salt",
        "pages",
    )
    assert not [name for name in names if seen[name] < 30], seen
    assert min(seen["Cleared"], seen["alike"]) >= 30, seen


def ids(events: list[Any]) -> int:
    """What they count towards the capacity."""
    return sum(1 + len(getattr(e, "pages", ())) + len(getattr(e, "tokens", ())) for e in events)


def test_events_that_nobody_takes_are_bounded_and_then_all_is_told_anew() -> None:
    """Taken seldom: a mirror is right whenever it is told something, and what waits stays within bounds."""
    seen: Counter[str] = Counter()
    for seed in range(50, 50 + SEEDS):
        mirror, capacity = Mirror(), (1, 40, 200, 1000)[seed % 4]
        draw = random.Random(seed)

        def compare(h: Harness, mirror: Mirror = mirror, capacity: int = capacity, draw: Any = draw) -> None:
            if draw.randrange(12):
                return
            events = h.core.take_events()
            anew = events[:1] == [Cleared()]
            seen["anew"] += anew and len(events) > 1
            seen["within"] += bool(events) and not anew
            assert ids(events) <= capacity or anew
            stores = (PagesStored, CheckpointStored)
            assert ids(events) <= capacity or all(isinstance(event, stores) for event in events[1:])
            mirror.apply(events)
            pages, checkpoints = holdings(h)
            assert (mirror.pages, mirror.checkpoints) == (pages, checkpoints)
            seen["pages"] += len(pages)

        random_walk(seed, STEPS, partial(make_core, event_capacity=capacity), after=compare, actions=ACTIONS)
    assert min(seen.values()) > 30 and len(seen) == 3, seen


def test_a_journal_that_overflows_holds_nothing_until_it_is_read() -> None:
    driver = Driver(events=True, event_capacity=30, pages_per_slab=1, slabs=64)
    driver.turn([*range(8)])
    first = plain(driver.cache.take_events())
    assert first[0] == PagesStored(b"", -1, first[0].pages, [*range(8)], {})
    for number in range(4):  # more than 30 ids
        driver.turn([100 + number] * 9, salt=b"b")
    anew = plain(driver.cache.take_events())
    assert anew[:2] == [Cleared(), first[0]], "salts in order, each from its root down"
    assert [type(event) for event in anew[2:4]] == [CheckpointStored, PagesStored]
    assert sum(isinstance(event, PagesStored) for event in anew) == 5
    assert driver.cache.take_events() == [], "and from here on what happens, as ever"
    driver.turn([*range(8), 8, 9])
    [end] = plain(driver.cache.take_events())
    assert (type(end), end.position) == (CheckpointStored, 10)
    for number in range(4):
        driver.turn([200 + number] * 9)
    driver.cache.clear()
    assert plain(driver.cache.take_events()) == [Cleared()]


def turns_of(capacity: int | None, clear: bool) -> list[Any]:
    driver = Driver(events=True, event_capacity=capacity)
    for number in range(8):
        driver.turn([number] * 9)
        if clear:
            driver.cache.clear()
    return plain(driver.cache.take_events())


def test_the_capacity_is_kept_to_the_id() -> None:
    events = turns_of(None, clear=False)
    assert turns_of(ids(events), clear=False) == events
    assert turns_of(ids(events) - 1, clear=False)[0] == Cleared()


def test_what_a_clear_does_away_with_takes_no_room() -> None:
    """The removals of one clear at a time, not of all eight."""
    events = turns_of(None, clear=True)
    removals = [PagesRemoved([0, 1]), *[CheckpointRemoved(0)] * 4]
    assert sum(event == Cleared() for event in events) == 8
    assert turns_of(ids(events) + ids(removals), clear=True) == events


def test_the_capacity_is_what_the_arena_holds() -> None:
    """At least 2**20 ids: so many pages of a token leave and come back without an overflow."""
    driver = Driver(events=True, page_size=1, pages_per_slab=1, slabs=600)
    prompt = np.arange(500, dtype=np.int32)
    for _ in range(2**20 // 1600):  # 500 pages, as many tokens, the same pages, and a few states
        driver.turn(prompt, chunk=500)
        driver.cache.clear(salt=b"")
    assert not isinstance(driver.cache.take_events()[0], Cleared)
    for _ in range(2**20 // 1400):
        driver.turn(prompt, chunk=500)
        driver.cache.clear(salt=b"")
    assert driver.cache.take_events() == [Cleared()]
    with pytest.raises(ValueError, match="event_capacity: 0, expected 1 <= event_capacity"):
        Driver(events=True, event_capacity=0)


def test_events_do_not_enter_the_digest() -> None:
    digests = []
    for events in (False, True):
        driver = Driver(events=events, slabs=12)
        for turn in range(12):
            driver.turn([7] * (10 + turn % 3) + [turn] * 9, [1, 2, 3])
        digests.append((driver.cache.digest, driver.cache.dump(), driver.cache.stats()))
        assert bool(driver.cache.take_events()) == events
    assert digests[0] == digests[1]


def test_without_events_none_are_recorded(driver: Driver) -> None:
    driver.turn([1, 2, 3, 4, 5], [6, 7])
    assert driver.cache.take_events() == []
    driver.cache.clear()
    assert driver.cache.take_events() == []
    with pytest.raises(TypeError, match=r"events: 1, expected True or False"):
        Driver(events=1)


def test_by_example() -> None:
    """Pages of 4: 9 tokens, then 2 more; a second prompt leaves it inside the second page; both leave."""
    driver = Driver(events=True, pages_per_slab=1, slabs=32)
    driver.turn([*range(9)], [20, 21], salt=b"a")
    first = plain(driver.cache.take_events())
    pages = first[0].pages
    assert first == [
        PagesStored(b"a", -1, pages, [*range(8)], {}),
        CheckpointStored(b"a", pages[1], first[1].slot, 9, [8], {}),
        CheckpointStored(b"a", pages[1], first[2].slot, 11, [8, 20, 21], {}),
    ]
    driver.turn([0, 1, 2, 3, 4, 5, 50, 51, 52, 53], salt=b"a")  # splits the node inside the second page
    second = plain(driver.cache.take_events())
    stored = [event for event in second if isinstance(event, PagesStored)]
    assert stored == [PagesStored(b"a", pages[0], stored[0].pages, [4, 5, 50, 51], {})]
    ends = [event for event in second if isinstance(event, CheckpointStored)]
    assert [(each.position, each.tokens) for each in ends] == [(6, [4, 5]), (10, [52, 53])]
    pin = driver.cache.pin([*range(9)], salt=b"a")
    assert pin is not None
    driver.cache.clear()
    third = plain(driver.cache.take_events())
    gone = {event.slot for event in third if isinstance(event, CheckpointRemoved)}
    assert gone == {first[2].slot, ends[0].slot, ends[1].slot}
    assert [event for event in third if isinstance(event, PagesRemoved)] == [PagesRemoved(stored[0].pages)]
    pin.release()
    driver.cache.clear(salt=b"a")
    assert plain(driver.cache.take_events()) == [CheckpointRemoved(first[1].slot), PagesRemoved(pages[::-1])]
    driver.cache.clear()
    assert plain(driver.cache.take_events()) == [Cleared()]


def test_all_that_leaves_at_once_is_one_event_and_what_was_before_stays() -> None:
    driver = Driver(events=True)
    driver.turn([*range(9)])
    driver.cache.clear()
    events = plain(driver.cache.take_events())
    assert [type(event) for event in events] == [
        PagesStored,
        *[CheckpointStored] * (len(events) - 2),
        Cleared,
    ]


def test_what_an_open_lease_keeps_is_not_cleared() -> None:
    driver = Driver(events=True)
    lease = driver.cache.reserve([*range(9)], max_new_tokens=4)
    assert lease is not None
    driver.prefill(lease)
    mirror = Mirror()
    mirror.apply(driver.cache.take_events())
    before = dict(mirror.pages)
    driver.decode(lease, [1])
    driver.cache.clear()
    events = plain(driver.cache.take_events())
    assert Cleared() not in events
    mirror.apply(events)
    assert mirror.pages == before and len(before) == 2
    lease.close(discard=True)
    driver.cache.clear()
    assert plain(driver.cache.take_events())[-1] == Cleared()


def test_a_state_on_a_page_edge_has_that_pages_tokens() -> None:
    driver = Driver(events=True)
    driver.turn([*range(8)])
    [end] = [
        e for e in plain(driver.cache.take_events()) if isinstance(e, CheckpointStored) and e.position == 8
    ]
    assert end.tokens == [4, 5, 6, 7] and end.before >= 0


def test_content_has_plain_ids_and_is_named() -> None:
    driver = Driver(events=True)
    prompt = np.arange(10, 19)
    for picture in (b"cat", b"dog"):
        driver.turn(prompt, content_keys=[(5, picture)])
    stored = [event for event in plain(driver.cache.take_events()) if isinstance(event, PagesStored)]
    assert stored[0].tokens == prompt[:8].tolist() and stored[0].contents == {5: b"cat"}
    assert stored[1].before == stored[0].pages[0]
    assert stored[1].tokens == prompt[4:8].tolist() and stored[1].contents == {1: b"dog"}
