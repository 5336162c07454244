"""The core beside the oracle: hypothesis finds short counterexamples, a seeded walk covers the ground.

After every action (harness.py, verify): both sides give the same ids, page tables, plans, steps, matches and
counts, `check()` is quiet, and a symbolic memory that executes the core's plans holds what both believe.
Where an invariant is guarded: I1 Oracle.check and cache.check; I2, I5, I8, I11 SymbolicMemory.verify and
forward; I3, I9, I12 Harness.match; I4 probes of what was fed but not committed (Harness.verify); I6
bad_calls.py, and the comparison after each None; I7 test_equal_calls_give_equal_digests; I10
Harness.check_resting.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hybridcache.cache import HybridCache
from tests import actions, transcript_actions
from tests.actions import WEIGHTS, random_walk
from tests.bad_calls import bad_call
from tests.harness import Config, Harness, draw_config
from tests.walk_events import MISSED_EVENTS, TRANSCRIPT_EVENTS, WALK_EVENTS

ACTIONS = {**WEIGHTS, **transcript_actions.WEIGHTS, bad_call: 6}
SEEDS, STEPS = 400, 150
EVENTS = (*WALK_EVENTS, "bad_calls")  # those of the fuzzer's corpus too, which has no transcripts


def make_core(config: Config) -> HybridCache:
    return HybridCache(config.layout, **config.memory, **{"policy": "supersede", **config.options})


def test_walks_agree_with_the_oracle_at_every_step() -> None:
    events: Counter[str] = Counter()
    steps = most = 0
    walks: Counter[int] = Counter()
    drafts: Counter[int] = Counter()
    for seed in range(SEEDS):
        h = random_walk(seed, STEPS, make_core, actions=ACTIONS)
        events += h.total_events()
        steps += h.steps
        most = max(most, h.most_in_flight)
        walks[h.oracle.run_ahead] += 1
        drafts[h.oracle.draft_tokens] += 1
    assert steps == SEEDS * STEPS >= 60_000
    assert min(walks[0], walks[1]) > 0.4 * SEEDS
    assert most == 8
    assert drafts[0] > 0.25 * SEEDS and all(drafts[k] > 0.05 * SEEDS for k in range(1, 8)), drafts
    assert not [name for name in (*EVENTS, *TRANSCRIPT_EVENTS, *MISSED_EVENTS) if events[name] < 5], events


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_equal_calls_give_equal_digests(seed: int) -> None:
    """I7: two ranks that make the same calls decide the same, whatever else their process did."""
    digests: list[list[int]] = [[], []]
    dumps = []
    for rank in digests:
        h = random_walk(
            seed, 120, make_core, after=lambda h, rank=rank: rank.append(h.core.digest), actions=ACTIONS
        )
        dumps.append(h.core.dump())
    assert digests[0] == digests[1] and dumps[0] == dumps[1]
    assert len(set(digests[0])) > 20, "a digest that hardly ever changes proves nothing"


def engine_step(h: Harness) -> None:
    """Launches, runs and commits every request in flight, as far as its prompt goes."""
    h.launch_batch(h.flights, [f.oracle.prompt_length for f in h.flights], [])
    h.plan()
    h.apply()
    for flight in h.flights:
        h.run(flight)
    h.commit(h.flights, batch=True)
    h.verify()


def test_a_refused_request_does_not_count_its_own_hit_as_room() -> None:
    """Found by the walk: the checkpoint to resume from was pinned, but its pages were counted as room."""
    h = Harness(Config(page_size=1, pages_per_slab=1, slabs=9), 0, make_core)
    for prompt in ([9], [1, 2, 3]):
        h.reserve(b"", prompt, [], 0)
        engine_step(h)
        h.close(h.flights[0], "all", False)
    h.reserve(b"", [8], [], 0)
    h.reserve(b"", [1, 2, 3, 4, 5, 6], [], 0)
    assert len(h.flights) == 1 and h.events["no_room"] == 1
    h.verify()
    assert h.core.stats()["checkpoints"] == 2


def test_only_the_parent_of_a_fork_cuts_before_the_prompt_end() -> None:
    """A forked lease does not branch."""
    options = {"pass_cost": 0}
    h = Harness(Config(page_size=4, pages_per_slab=1, slabs=40, options=options), 0, make_core)
    h.reserve(b"", list(range(20)), [], 0)
    h.fork(h.flights[0])
    engine_step(h)
    assert [f.oracle.computed for f in h.flights] == [12, 20]


def test_a_close_with_two_open_steps_rests_whole() -> None:
    """Found by the walk: the inner slots of a step that no plan collected were freed at once."""
    options = {"run_ahead": 1, "inner_checkpoints": True}
    h = Harness(Config(page_size=4, pages_per_slab=1, slabs=40, options=options), 0, make_core)
    h.reserve(b"", list(range(20)), [10], 0)
    h.launch(h.flights[0], 8, [])
    h.plan()
    h.launch(h.flights[0], 12, [])
    assert len(h.flights[0].oracle.open[1].inner) == 2
    h.close(h.flights[0], "all", False)
    h.verify()


def test_rests_that_end_at_a_close_end_in_the_order_of_ids() -> None:
    """Found by the walk: the one that closes was let go of before those that were made before it."""
    h = Harness(Config(page_size=2, pages_per_slab=1, slabs=40, options={"run_ahead": 1}), 0, make_core)
    h.reserve(b"", [1, 2], [], 2)
    engine_step(h)
    h.reserve(b"", [1, 2, *range(5, 20)], [], 0)
    first, second = h.flights
    assert (first.oracle.boundary, second.oracle.start) == (2, 2)
    h.launch(second, 2, [])
    h.plan()
    h.apply()
    h.run(second)
    h.commit([second], batch=False)
    h.launch_batch([first, second], [1, 1], [3])
    h.plan()
    h.apply()
    assert second.oracle.anchored == 4 and second.oracle.boundary == 2
    h.close(first, "nothing", False)
    h.close(second, "all", False)
    h.verify()


class SideBySide(RuleBasedStateMachine):
    """One rule an action; hypothesis draws and shrinks arena, actions and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.h: Harness | None = None

    @initialize(data=st.data())
    def build(self, data: Any) -> None:
        self.h = Harness(draw_config(picker(data)), 0, make_core)

    def act(self, action: Any, data: Any) -> None:
        assert self.h is not None
        try:
            action(self.h, picker(data))
            self.h.verify()
        except (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"{action.__name__}: {error!r}\n{self.h.report()}") from error


def picker(data: Any) -> Any:
    return lambda n: data.draw(st.integers(0, n - 1))


def useful(action: Any) -> Any:
    """When the action would do something: hypothesis picks rules alike."""
    stages = {
        actions.fork: ("idle",),
        actions.finish: ("idle",),
        actions.cancel: ("launched", "collected", "applied", "ran"),
    }

    def possible(self: SideBySide) -> bool:
        h = self.h
        if h is None or action in stages:
            return h is not None and bool(actions.at_stage(h, *stages[action]))
        if action in (actions.launch, actions.launch_batch):
            return bool(actions.launchable(h))
        if action is actions.verify:
            return any(f in actions.decoding(h) for f in actions.launchable(h)) and h.oracle.draft_tokens > 0
        if action in (actions.commit, actions.commit_batch):
            return bool(actions.committable(h))
        if action is actions.commit_wrong:
            return any(f.steps[0].verifies for f in actions.at_stage(h, "ran", "applied"))
        if action is actions.run:
            return bool(actions.runnable(h) or actions.passing(h))
        if action in (actions.plan, actions.apply):
            return h.oracle.may_plan() if action is actions.plan else bool(h.pending)
        if action in (actions.turn, actions.overlap, actions.want):
            return bool(h.flights)
        return bool(h.pins) if action is actions.release else True

    return precondition(possible)


def as_rule(action: Any) -> Any:
    def body(self: SideBySide, data: Any) -> None:
        self.act(action, data)

    body.__name__ = f"rule_{action.__name__}"
    return useful(action)(rule(data=st.data())(body))


for each, weight in ACTIONS.items():
    for copy in range(1 + weight // 7):
        setattr(SideBySide, f"rule_{each.__name__}_{copy}", as_rule(each))

TestSideBySide = SideBySide.TestCase
TestSideBySide.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    print_blob=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
