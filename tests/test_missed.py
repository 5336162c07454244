"""Why a hit was short: which boundary would have helped, when it left and for what. Cases by hand; the state
machine compares every match with the oracle's, and all causes come up there (test_state_machine.py)."""

from __future__ import annotations

import logging
from typing import Any, get_args

import numpy as np
import pytest

from hybridcache.values import Cause, Match, Missed
from tests.conftest import Driver, tokens
from tests.oracle_view import CAUSES


def learned(**options: Any) -> Driver:
    return Driver(policy="default", **options)


def missed_tokens(driver: Driver) -> dict[str, int]:
    """By cause, those that are not 0."""
    found = {k.removeprefix("missed_"): n for k, n in driver.cache.stats().items() if k.startswith("missed_")}
    assert tuple(found) == get_args(Cause)
    return {cause: n for cause, n in found.items() if n}


def displace_all(driver: Driver) -> None:
    """By one request that needs nearly all of the arena."""
    driver.turn(tokens(170, seed=100))


def test_what_left_for_another_request_is_named_though_its_kv_is_gone() -> None:
    driver = learned(slabs=24)
    driver.turn(tokens(40)[:30], tokens(40)[30:36])
    displace_all(driver)
    match = driver.cache.match(tokens(40))
    assert (match.length, match.kv_length, match.reason) == (0, 0, "cold")
    assert match.missed == Missed(36, "turn_end", "reserve", 1, None), "the deepest of three"
    driver.turn(tokens(40))
    assert driver.match == match, "the lease acted on what match had said"
    assert missed_tokens(driver) == {"reserve": 36}


def test_requests_are_counted_since_it_left() -> None:
    driver = learned()
    driver.turn(tokens(30))
    for ago in range(5):
        if ago == 0:
            driver.cache.clear()
        assert driver.cache.match(tokens(40)).missed == Missed(30, "prompt_end", "clear", ago, None)
        driver.turn(tokens(30, seed=1 + ago))


def test_the_caller_says_how_long_ago() -> None:
    driver = learned()
    driver.turn(tokens(30), now=1000, close={"now": 1500})
    driver.cache.clear()
    driver.turn(tokens(30, seed=1), now=1800)
    assert driver.cache.match(tokens(40)).missed == Missed(30, "prompt_end", "clear", 1, 300)
    driver.turn(tokens(40), now=2500)
    assert driver.match.missed == Missed(30, "prompt_end", "clear", 1, 1000), "by its own time"


def test_time_told_later_does_not_date_what_left_before() -> None:
    driver = learned()
    driver.turn(tokens(30))
    driver.cache.clear()
    driver.turn(tokens(30, seed=1), now=1800)
    assert driver.cache.match(tokens(40)).missed == Missed(30, "prompt_end", "clear", 1, None)


def test_the_deepest_that_could_have_been_used() -> None:
    driver = learned(inner_checkpoints=True)
    driver.turn(tokens(60)[:30], breakpoints=[10, 20])
    driver.cache.clear()
    made = {8: "interior", 10: "breakpoint", 16: "interior", 20: "breakpoint", 22: "cut", 30: "prompt_end"}
    for length in range(9, 60):
        deepest = max(position for position in made if position < length)
        found = driver.cache.match(tokens(60)[:length]).missed
        assert found == Missed(deepest, made[deepest], "clear", 0, None)
    assert driver.cache.match(tokens(60)[:8]).missed == Missed(7, None, "never_made", None, None)


def test_what_is_there_is_not_missed() -> None:
    driver = learned()
    driver.turn(tokens(60)[:30])
    driver.cache.clear()
    driver.turn(tokens(60)[:30])
    match = driver.cache.match(tokens(60))
    assert match.length == 30 and match.missed is None, "it came back"
    assert driver.cache.match(tokens(31)).reason == "complete"
    assert driver.cache.match(tokens(31)).missed is None


@pytest.mark.parametrize("policy", ["default", "lru", "supersede", "gdsf", "marconi"])
def test_where_the_tree_knows_more_than_it_can_resume_none_was_made(policy: Any) -> None:
    driver = Driver(policy=policy)
    driver.turn(tokens(60))
    other = np.append(tokens(60)[:40], tokens(20, seed=5))
    match = driver.cache.match(other)
    assert (match.kv_length, match.length, match.reason) == (40, 0, "no_checkpoint")
    assert match.missed == Missed(40, None, "never_made", None, None)
    driver.cache.clear()
    known = Missed(40, None, "never_made", None, None) if policy == "default" else None
    assert driver.cache.match(other).missed == known, "the history of the default policy outlives KV"


def test_a_boundary_that_was_there_comes_before_a_deeper_one_that_never_was() -> None:
    """A template drops the end of the answer: known a little beyond the cut, which is what is missed."""
    driver = learned()
    driver.turn(tokens(60)[:50], breakpoints=[38])
    other = np.append(tokens(60)[:40], tokens(20, seed=5))
    driver.cache.clear()
    assert driver.cache.match(other).missed == Missed(38, "breakpoint", "clear", 0, None)


def test_the_cap() -> None:
    driver = learned(max_cached_bytes=64 * 12)
    driver.turn(tokens(20))
    driver.turn(tokens(30, seed=1))
    missed = driver.cache.match(tokens(40)).missed or driver.cache.match(tokens(40, seed=1)).missed
    assert missed is not None and missed.cause == "cap" and missed.requests_ago == 0


def test_what_a_request_gives_up_for_want_of_room() -> None:
    driver = learned(slabs=9, pages_per_slab=1, page_size=1)
    driver.turn([1, 2, 3, 4])
    best = driver.cache.match([1, 2, 3, 4, 5, 6, 7, 8])
    assert best.length == 4 and best.missed is None
    lease = driver.cache.reserve([1, 2, 3, 4, 5, 6, 7, 8])
    assert lease is not None and lease.start < 4
    assert lease.match.reason == "no_room"
    assert lease.match.missed == Missed(4, "prompt_end", "no_room", 0, None)
    assert missed_tokens(driver) == {"no_room": 4 - lease.start}


def test_a_launch_takes_its_own_boundary_back_and_another_leaves_for_it() -> None:
    driver = learned(slabs=10, pages_per_slab=1, page_size=1)
    driver.turn([9])
    lease = driver.cache.reserve([1, 2, 3])
    assert lease is not None
    driver.prefill(lease)
    assert driver.cache.match([1, 2, 3, 4]).length == 3
    assert lease.launch(6) is not None, "room for three, and three slabs more"
    assert driver.cache.match([1, 2, 3, 4]).missed == Missed(3, "prompt_end", "taken_back", 0, None)
    assert driver.cache.match([9, 8]).missed == Missed(1, "prompt_end", "launch", 0, None)


def test_images_are_told_apart() -> None:
    driver = learned()
    prompt = list(range(40))
    driver.turn(prompt, content_keys=[(10, b"cat")])
    driver.cache.clear()
    longer = [*prompt, 99]
    assert driver.cache.match(longer, content_keys=[(10, b"cat")]).missed == Missed(
        40, "prompt_end", "clear", 0, None
    )
    for keys in ([(10, b"dog")], []):
        assert driver.cache.match(longer, content_keys=keys).missed == Missed(
            10, None, "never_made", None, None
        )
    driver.turn(longer, content_keys=[(10, b"cat")])
    assert driver.match.missed == Missed(40, "prompt_end", "clear", 0, None)


def test_i8_nothing_is_missed_of_another_salt() -> None:
    driver = learned()
    driver.turn(tokens(30), salt=b"one")
    driver.cache.clear()
    assert driver.cache.match(tokens(40), salt=b"two").missed is None
    driver.turn(tokens(40), salt=b"two")
    assert driver.match.missed is None
    assert driver.cache.match(tokens(40), salt=b"one").missed == Missed(30, "prompt_end", "clear", 1, None)


def test_a_transcript_misses_what_its_tokens_miss() -> None:
    driver = learned()
    driver.turn(tokens(30))
    transcript = driver.cache.transcript()
    transcript.extend(tokens(30))
    assert driver.cache.match(transcript) == driver.cache.match(tokens(30))
    driver.cache.clear()
    transcript.extend(tokens(12, seed=3))
    expected = Missed(30, "prompt_end", "clear", 0, None)
    assert driver.cache.match(transcript).missed == expected
    lease = driver.cache.reserve(transcript)
    assert lease is not None and lease.match.missed == expected


def test_i9_and_i7_asking_and_missing_change_nothing() -> None:
    driver = learned(slabs=24)
    driver.turn(tokens(30))
    displace_all(driver)
    before = driver.cache.digest, driver.cache.stats(), driver.cache.dump()
    assert driver.cache.match(tokens(40)).missed is not None
    assert before == (driver.cache.digest, driver.cache.stats(), driver.cache.dump())


def test_what_is_missed_is_part_of_what_is_lost() -> None:
    driver = learned(slabs=24)
    rng = np.random.default_rng(0)
    for _ in range(200):
        base = tokens(40, seed=int(rng.integers(12)))[: int(rng.integers(5, 40))]
        driver.turn(np.append(base, tokens(int(rng.integers(1, 8)), seed=int(rng.integers(3)))))
    stats = driver.cache.stats()
    lost = {k: n for k, n in stats.items() if k.startswith("lost_")}
    missed = missed_tokens(driver)
    assert {"never_made", "checkpoint"} <= set(missed)
    assert 0 < sum(missed.values()) <= sum(lost.values())
    assert sum(lost.values()) + stats["tokens_hit"] == stats["tokens_queried"]


def test_the_causes_are_written_once_more_in_the_oracle() -> None:
    assert get_args(Cause) == CAUSES


# ---- for people


@pytest.mark.parametrize("cause", get_args(Cause))
def test_every_cause_has_words(cause: Any) -> None:
    made = (None, None, None) if cause == "never_made" else ("cut", 1, 2500)
    text = Match(10, 40, "no_checkpoint", True, Missed(30, made[0], cause, *made[1:])).explain()
    assert text.startswith("resumes at 10, KV is known to 40 (no_checkpoint); 20 more by a ")
    assert "at 30: " in text
    dated = cause not in ("never_made", "no_room")
    assert ("1 request ago (2,500 of the caller's time) " in text) == dated
    assert Match(10, 10, "unknown", False).explain() == "resumes at 10, KV is known to 10 (unknown)"


def test_one_line_a_request_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    driver = learned(slabs=24)
    driver.turn(tokens(30))
    driver.cache.clear()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="hybridcache"):
        driver.turn(tokens(40))
        lease = driver.cache.reserve(tokens(60, seed=9))
        while driver.cache.reserve(tokens(60, seed=10)) is not None:
            pass
        driver.cache.match(tokens(40))
    first, *more, last = [record.getMessage() for record in caplog.records]
    assert first == (
        "reserve: a prompt of 40 tokens resumes at 0, KV is known to 0 (cold); "
        "30 more by a prompt_end at 30: it left 0 requests ago by clear()"
    )
    assert last == "reserve: no room now for a prompt of 60 tokens"
    assert len(more) == driver.cache.stats()["open_leases"], "one for each, and none for a match"
    assert lease is not None and {record.levelname for record in caplog.records} == {"DEBUG"}


def test_a_line_that_nobody_reads_is_not_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Match) -> str:
        raise AssertionError("made")

    monkeypatch.setattr(Match, "explain", refuse)
    with caplog.at_level(logging.INFO, logger="hybridcache"):
        learned().turn(tokens(30))
    with caplog.at_level(logging.DEBUG, logger="hybridcache"), pytest.raises(AssertionError, match="made"):
        learned().turn(tokens(30))
