"""Replay of a workload through the real core: `run` drives one HybridCache, without tensors, and measures.

Owns what a request does to the cache, step by step, and the figures that a cell of the table is made of;
`run_cells` spreads cells over processes. Requests run one at a time in file order, or as `replay_clock` says.
Decides nothing that the cache decides. How results are shown is `replay_report`'s matter. numpy only.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hybridcache.cache import HybridCache, Lease
from hybridcache.config import ModelLayout
from hybridcache.foresight import NEVER, Foresight, Known
from hybridcache.replay_values import Result, Settings
from hybridcache.workloads import Int32, Workload

T = TypeVar("T")
Progress = Callable[[int, int], None]  # how many are done, of how many
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
HELD = ("checkpoints", "tree_pages", "cached_bytes")


class Cell(NamedTuple):
    """One cell of the table: what is asked of `run`."""

    budget_bytes: int
    policy: str
    settings: Settings


def run(
    workload: Workload,
    layout: ModelLayout,
    budget_bytes: int,
    policy: str = "default",
    *,
    foresight: Foresight | None = None,
    progress: Progress | None = None,
    cache_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Replays `workload` once and returns what came of it.

    settings: fields of `Settings`. foresight: of the same workload and `read_all`, so that several cells
    share one. cache_options: further arguments of HybridCache. ValueError on bad arguments, also those of
    HybridCache.
    """
    chosen = Settings(**settings)
    facts = foresight or Foresight(workload, chosen.read_all)
    if facts.workload is not workload or facts.read_all != chosen.read_all:
        raise ValueError("foresight: of another workload or read_all, expected one of this replay")
    cell = Cell(budget_bytes, policy, chosen)
    return run_cell(facts, layout, cell, cache_options or {}, progress)


def run_cell(
    facts: Foresight,
    layout: ModelLayout,
    cell: Cell,
    cache_options: dict[str, Any],
    progress: Progress | None = None,
) -> Result:
    """One cell; before "marconi" its alpha is tuned as its paper does, unless one is given: the one of ALPHAS
    that hits most in the first tenth of the requests (of equals the least)."""
    tuned: dict[str, float] = {}
    if cell.policy == "marconi" and "marconi_alpha" not in cache_options:
        workload = facts.workload
        first = replace(workload, requests=workload.requests[: -(-len(workload) // 10)])
        known = Foresight(first, facts.read_all)
        hits = {
            alpha: Replay(known, layout, cell, {**cache_options, "marconi_alpha": alpha}, None)
            .run()
            .hit_tokens
            for alpha in ALPHAS
        }
        tuned["marconi_alpha"] = max(ALPHAS, key=lambda alpha: hits[alpha])
    result = Replay(facts, layout, cell, {**cache_options, **tuned}, progress).run()
    result.tuned = tuned
    return result


def policy_options(name: str) -> dict[str, Any]:
    """What a policy's name says to HybridCache: "default-flow-gaps": the default without two parts."""
    policy, *without = name.split("-")
    return {"policy": policy, "without": tuple(without)}


def run_cells(
    workload: Workload,
    layout: ModelLayout,
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    cache_options: dict[str, Any] | None = None,
) -> Iterator[Result]:
    """The results of `cells`, in order, as soon as each is there; `jobs` processes work side by side.

    progress: counts requests with one job, cells with several.
    """
    work = _Work(workload, layout, cache_options or {})
    if jobs == 1 or len(cells) < 2:
        yield from (work(cell, progress) for cell in cells)
        return
    for read_all in {cell.settings.read_all for cell in cells}:
        _ = work.facts[read_all].ideals  # once here, not once a process
    context = get_context("spawn")  # the caller may run threads, which a fork would not survive
    with ProcessPoolExecutor(min(jobs, len(cells)), context, _begin_work, (work,)) as pool:
        for done, result in enumerate(pool.map(_do_work, cells), 1):
            if progress:
                progress(done, len(cells))
            yield result


class _Work:
    """What all cells of a table share, with what is known about the workload."""

    def __init__(self, workload: Workload, layout: ModelLayout, options: dict[str, Any]) -> None:
        self.layout, self.options = layout, options
        self.facts = {read_all: Foresight(workload, read_all) for read_all in (False, True)}

    def __call__(self, cell: Cell, progress: Progress | None = None) -> Result:
        facts = self.facts[cell.settings.read_all]
        return run_cell(facts, self.layout, cell, self.options, progress)


_work: _Work  # in a worker process only


def _begin_work(work: _Work) -> None:
    global _work
    _work = work


def _do_work(cell: Cell) -> Result:
    return _work(cell)


def arena_bytes(workload: Workload, layout: ModelLayout, budget_bytes: int, settings: Settings) -> int:
    """The arena of "free": the budget, its pages spread out, and all that may run, each with a checkpoint
    every two thousand tokens besides those at powers of two. `Result.evicted_in_flight` shows that it was
    enough."""
    if settings.in_flight == "charged":
        return budget_bytes
    slab = -(-layout.slot_bytes // layout.page_bytes) * layout.page_bytes
    pages = -(-workload.longest // layout.page_size) + 1
    slots = 64 + workload.longest // 2048
    return 4 * budget_bytes + max(settings.concurrency, 1) * (2 * pages * layout.page_bytes + slots * slab)


@dataclass
class Job:
    """An admitted request."""

    index: int
    lease: Lease
    tokens: Int32  # prompt and the part of the output that counts as read


class Replay:
    """One cell while it runs. With `live` the ideal is counted anew, in the order in which steps commit."""

    def __init__(
        self,
        facts: Foresight,
        layout: ModelLayout,
        cell: Cell,
        cache_options: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.facts, self.workload, self.layout = facts, facts.workload, layout
        self.settings, self.progress = cell.settings, progress
        free = self.settings.in_flight == "free"
        self.cache = HybridCache(
            layout,
            memory_bytes=arena_bytes(self.workload, layout, cell.budget_bytes, self.settings),
            max_cached_bytes=cell.budget_bytes if free else None,
            inner_checkpoints=self.settings.inner_checkpoints,
            **policy_options(cell.policy),
            **cache_options,
        )
        geometry = self.cache.geometry
        self.most_pages = (geometry.num_slabs - 1) * geometry.pages_per_slab
        self.result = Result(self.workload.name, cell.policy, cell.budget_bytes, asdict(self.settings))
        self.live = Known() if self.settings.concurrency else None
        self.times: dict[str, list[int]] = {}
        self.beyond: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.evicted = 0

    def run(self) -> Result:
        _ = self.facts.ideals  # known before the time of the cell is taken
        started = time.perf_counter()
        if self.settings.concurrency:
            from hybridcache.replay_clock import Clock

            Clock(self).run()
        else:
            self.in_file_order()
        self.finish(time.perf_counter() - started)
        return self.result

    def in_file_order(self) -> None:
        for index, request in enumerate(self.workload.requests):
            job = None if self.too_large(index) else self.admit(index, request.t)
            if job is None:
                self.miss(index)
                continue
            while self.launch(job):
                self.commit(job, request.t)
            self.close(job, request.t)

    # --- one request ---

    def too_large(self, index: int) -> bool:
        """Whether not even an empty arena would hold it."""
        length = self.workload.length(self.workload.requests[index].input) + self.read_length(index)
        return -(-length // self.layout.page_size) > self.most_pages

    def read_length(self, index: int) -> int:
        """Tokens of the output that count as read."""
        length = self.workload.length(self.workload.requests[index].output)
        return length if self.settings.read_all else max(length - 1, 0)

    def admit(self, index: int, now: float) -> Job | None:
        """Reserves; None: no room now."""
        request = self.workload.requests[index]
        prompt, new = self.workload.tokens(request.input), self.read_length(index)
        hints: dict[str, Any] = at(HybridCache.reserve, now)
        if "breakpoints" in self.settings.hints:
            hints["breakpoints"] = self.facts.breakpoints(index)
        lease = self.timed("reserve", self.cache.reserve, prompt, max_new_tokens=new, **hints)
        if lease is None:
            return None
        self.count(index, lease, self.ideal(index, prompt))
        output = self.workload.tokens(request.output)[:new]
        return Job(index, lease, np.concatenate((prompt, output)))

    def launch(self, job: Job) -> float | None:
        """One step: the prompt as far as the cache lets it run, then the output; the seconds that it takes,
        or None at the end."""
        lease, prompt = job.lease, job.lease.prompt_length
        begin = lease.computed
        if begin == len(job.tokens):
            return None
        step = self.timed("launch", lease.launch, (prompt if begin < prompt else len(job.tokens)) - begin)
        if step is None:
            raise RuntimeError(
                f"request {job.index}: no room to launch at {begin} of reserved {lease.capacity}"
            )
        self.timed("applied", self.cache.applied, self.timed("plan", self.cache.plan))
        rate = self.settings.prefill_rate if begin < prompt else self.settings.decode_rate
        return (step.end - begin) / rate

    def commit(self, job: Job, now: float) -> None:
        lease = job.lease
        begin, end = max(lease.committed, lease.prompt_length), lease.computed
        self.timed("commit", lease.commit, job.tokens[begin:end], **at(Lease.commit, now))
        if self.live:
            self.live.read(job.tokens[:end])

    def close(self, job: Job, now: float) -> None:
        self.result.extra_passes += job.lease.extra_passes
        before = self.cache.stats()
        hints: dict[str, Any] = at(Lease.close, now)
        if "keep" in self.settings.hints:
            hints["keep"] = self.facts.keep(job.index)
        if "expected_return" in self.settings.hints and accepts(Lease.close, "expected_return"):
            hints["expected_return"] = self.expected_return(job.index, now)
        self.timed("close", job.lease.close, **hints)
        after = self.cache.stats()
        self.result.evicted_in_flight += evictions(before) - self.evicted
        self.evicted = evictions(after)
        for name, stats in (
            ("taken_pages", before),
            ("taken_slots", before),
            *((name, after) for name in HELD),
        ):
            self.peak[name] = max(self.peak[name], stats[name])
        self.tick()

    def expected_return(self, index: int, now: float) -> int:
        """Milliseconds from `now`, where the request is finished, to the session's next one."""
        gap, settings = self.facts.gap(index), self.settings
        if gap is None:
            return NEVER
        if not settings.concurrency:
            return round(1000 * gap)
        if settings.arrivals == "closed":
            return round(1000 * self.thinking(index, gap))
        return max(round(1000 * (self.workload.requests[index].t + gap - now)), 0)

    def thinking(self, index: int, gap: float) -> float:
        """Seconds between a request's end and its follower: the gap of the trace less its ideal service."""
        computed = self.workload.length(self.workload.requests[index].input) - self.facts.ideals[index]
        service = computed / self.settings.prefill_rate + self.read_length(index) / self.settings.decode_rate
        return max(gap - service, 0.0)

    # --- figures ---

    def timed(self, name: str, call: Callable[..., T], *args: Any, **options: Any) -> T:
        started = time.perf_counter_ns()
        value = call(*args, **options)
        self.times.setdefault(name, []).append(time.perf_counter_ns() - started)
        return value

    def ideal(self, index: int, prompt: Int32) -> int:
        """Tokens that a cache without bounds would hit now."""
        return (
            self.facts.ideals[index] if self.live is None else min(self.live.match(prompt), len(prompt) - 1)
        )

    def count(self, index: int, lease: Lease, ideal: int) -> None:
        match = lease.match
        self.beyond[match.reason] += ideal - match.length
        self.result.hit_tokens += match.length
        self.result.flops_saved += self.layout.flops(0, match.length)
        self.total(lease.prompt_length, ideal)

    def miss(self, index: int) -> None:
        """A request that cannot fit, or that found no room although nothing else runs, computes all."""
        prompt = self.workload.tokens(self.workload.requests[index].input)
        ideal = self.ideal(index, prompt)
        if self.too_large(index):
            self.result.too_large += 1
        else:
            self.result.refused += 1
        self.result.missed_tokens += len(prompt)
        self.beyond["missed"] += ideal
        self.total(len(prompt), ideal)
        self.tick()

    def total(self, length: int, ideal: int) -> None:
        self.result.requests += 1
        self.result.prompt_tokens += length
        self.result.ideal_tokens += ideal
        self.result.flops += self.layout.flops(0, length)
        self.result.flops_ideal += self.layout.flops(0, ideal)

    def tick(self) -> None:
        if self.progress:
            self.progress(self.result.requests, len(self.workload))

    def finish(self, seconds: float) -> None:
        result, stats = self.result, self.cache.stats()
        for name in ("published", "restored", "evicted", "lost"):
            setattr(result, name, by_name(stats, f"{name}_"))
        result.missed_by = by_name(stats, "missed_")
        for name in ("dropped_checkpoints", "duplicate_checkpoints"):
            setattr(result, name, stats[name])
        result.beyond = {name: tokens for name, tokens in self.beyond.items() if tokens}
        result.end, result.peak = {name: stats[name] for name in HELD}, dict(self.peak)
        result.operations = {name: summary(times) for name, times in self.times.items()}
        result.core_seconds = sum(each["total_s"] for each in result.operations.values())
        result.seconds = seconds


def at(call: Callable[..., Any], now: float) -> dict[str, Any]:
    """`now=` in milliseconds, for a call that takes it."""
    return {"now": round(1000 * now)} if accepts(call, "now") else {}


_accepted: dict[tuple[Callable[..., Any], str], bool] = {}


def accepts(call: Callable[..., Any], name: str) -> bool:
    """Whether `call` has an argument of that name; looked up once."""
    if (call, name) not in _accepted:
        _accepted[call, name] = name in inspect.signature(call).parameters
    return _accepted[call, name]


def evictions(stats: dict[str, int]) -> int:
    return sum(by_name(stats, "evicted_").values())


def by_name(stats: dict[str, int], prefix: str) -> dict[str, int]:
    """The counters of one prefix that are not 0, without it."""
    return {name[len(prefix) :]: n for name, n in stats.items() if name.startswith(prefix) and n}


def summary(times: list[int]) -> dict[str, float]:
    """Of durations in ns."""
    return {"calls": len(times), "median_us": statistics.median(times) / 1e3, "total_s": sum(times) / 1e9}
