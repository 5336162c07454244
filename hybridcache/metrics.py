"""Prometheus metrics of one or several caches. Extra `metrics` (prometheus-client).

Owns the names, in the style of the engines (`hybridcache:prefix_cache_queries_total` counts tokens, as theirs
do), and the reading of `HybridCache.stats()` and `times()` at each scrape: nothing is counted here, a cache
that is not scraped pays nothing. Knows no tree and no tensor. Both may be read from the thread that serves
metrics.

    from prometheus_client import start_http_server
    from hybridcache.metrics import register
    register(cache, model="qwen3.5-397b", rank="0")
    start_http_server(9400)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple, get_args

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from hybridcache.cache import HybridCache
from hybridcache.values import Cause, Reason

PREFIX = "hybridcache:"
KINDS = ("turn_end", "prompt_end", "chunk_end", "breakpoint", "fork", "cut", "interior")


class Family(NamedTuple):
    """One metric: `stats` says which entry of `stats()` is its value, under which value of `label`."""

    name: str
    help: str
    stats: dict[str, str]
    label: str = ""


def _by(prefix: str, values: tuple[str, ...]) -> dict[str, str]:
    return {value: f"{prefix}_{value}" for value in values}


REASONS = get_args(Reason)
CAUSES = get_args(Cause)
COUNTERS = (
    Family("prefix_cache_queries", "Prompt tokens of admitted requests.", {"": "tokens_queried"}),
    Family("prefix_cache_hits", "Of these, tokens that were resumed, not computed.", {"": "tokens_hit"}),
    Family(
        "prefix_cache_lost_tokens", "Of these, tokens computed, by why.", _by("lost", REASONS), label="reason"
    ),
    Family(
        "prefix_cache_missed_tokens",
        "Of the lost ones, tokens that one more boundary would have saved, by what became of it.",
        _by("missed", CAUSES),
        label="cause",
    ),
    Family("committed_tokens", "Tokens read by finished steps.", {"": "tokens_committed"}),
    Family(
        "admissions",
        "Requests by whether they found room.",
        {"admitted": "reserves", "refused": "refused_reserves"},
        label="outcome",
    ),
    Family(
        "steps",
        "Steps of requests by whether they found room.",
        {"launched": "launches", "refused": "refused_launches"},
        label="outcome",
    ),
    Family("commits", "Steps committed.", {"": "commits"}),
    Family("closes", "Leases closed.", {"": "closes"}),
    Family("forks", "Leases opened by a fork.", {"": "forks"}),
    Family("extra_passes", "Forward passes made only for a checkpoint.", {"": "extra_passes"}),
    Family("checkpoints_published", "States that joined the tree.", _by("published", KINDS), label="kind"),
    Family("checkpoints_restored", "Requests that resumed from one.", _by("restored", KINDS), label="kind"),
    Family("checkpoints_evicted", "States that left the tree.", _by("evicted", KINDS), label="kind"),
    Family("checkpoints_dropped", "Boundaries given up for want of room.", {"": "dropped_checkpoints"}),
    Family("checkpoints_duplicate", "States that the tree had already.", {"": "duplicate_checkpoints"}),
)
GAUGES = (
    Family("requests_running", "Open leases.", {"": "open_leases"}),
    Family("requests_resting", "Closed leases that a step in flight may touch.", {"": "resting_leases"}),
    Family("checkpoints", "States that the tree holds, by kind.", _by("held", KINDS), label="kind"),
    Family("checkpoints_pinned", "Of these, read by leases or pinned.", {"": "pinned_checkpoints"}),
    Family("pins", "Pins held by callers.", {"": "pins"}),
    Family("transcripts", "Open transcripts.", {"": "transcripts"}),
    Family("tree_nodes", "Nodes of the tree.", {"": "nodes"}),
    Family("cached_bytes", "Bytes that the tree holds.", {"": "cached_bytes"}),
)
DERIVED = ("checkpoints", "tree_pages", "taken_pages", "taken_slots", "slabs_with_pages")
KNOWN = {name for family in (*COUNTERS, *GAUGES) for name in family.stats.values()} | set(DERIVED)


class CacheCollector(Collector):
    """Collects from every cache that was added and still lives; a cache is not kept alive for its metrics.

    `labels`: the names of the labels that tell caches apart, the same for all of them.
    """

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self._caches: list[tuple[weakref.ref[HybridCache], tuple[str, ...]]] = []

    def add(self, cache: HybridCache, **labels: str) -> None:
        """ValueError if `labels` are not those of the collector, or those of another cache."""
        if set(labels) != set(self.labels):
            raise ValueError(f"labels: {sorted(labels)}, expected {sorted(self.labels)}")
        values = tuple(str(labels[name]) for name in self.labels)
        if any(each == values and ref() is not None for ref, each in self._caches):
            raise ValueError(f"labels: {labels}, expected others than those of another cache")
        self._caches.append((weakref.ref(cache), values))

    def describe(self) -> list[Metric]:
        """The names, for the registry to find clashes; no values."""
        return list(self._families().values())

    def collect(self) -> Iterator[Metric]:
        """One pass over `stats()` of each cache."""
        families = self._families()
        for ref, values in list(self._caches):
            cache = ref()
            if cache is None:
                self._caches.remove((ref, values))
                continue
            self._add(families, cache, values)
        yield from families.values()

    def _families(self) -> dict[str, Metric]:
        families: dict[str, Metric] = {}

        def gauge(name: str, text: str, *labels: str) -> None:
            families[name] = GaugeMetricFamily(PREFIX + name, text, labels=[*self.labels, *labels])

        for each in COUNTERS:
            labels = [*self.labels, *filter(None, [each.label])]
            families[each.name] = CounterMetricFamily(PREFIX + each.name, each.help, labels=labels)
        for each in GAUGES:
            gauge(each.name, each.help, *filter(None, [each.label]))
        gauge("slots", "Slots of the arena: checkpoints, those of leases, free ones.", "role")
        gauge("pages", "Pages of the arena: the tree's, those of leases alone, free ones.", "role")
        gauge("slabs", "Slabs of a unified arena: those that are a slot, hold pages, are free.", "role")
        gauge("cache_usage_perc", "The share of the arena's bytes that is taken, 1 is all of it.")
        gauge("arena_bytes", "Bytes of the arena.")
        gauge("other", "Further entries of stats(), by name.", "name")
        families["operation_seconds"] = SummaryMetricFamily(
            PREFIX + "operation_seconds",
            "Time in the core, by operation, as its caller sees it.",
            labels=[*self.labels, "operation"],
        )
        return families

    def _add(self, families: dict[str, Metric], cache: HybridCache, labels: tuple[str, ...]) -> None:
        stats = cache.stats()
        for family in (*COUNTERS, *GAUGES):
            for value, name in family.stats.items():
                more = (value,) if family.label else ()
                _sample(families[family.name], (*labels, *more), stats.get(name, 0))
        for name, roles in held_by_role(cache, stats).items():
            for role, count in roles.items():
                _sample(families[name], (*labels, role), count)
        geometry = cache.geometry
        taken = stats["taken_pages"] * geometry.page_bytes + stats["taken_slots"] * geometry.slab_bytes
        _sample(families["cache_usage_perc"], labels, taken / geometry.total_bytes)
        _sample(families["arena_bytes"], labels, geometry.total_bytes)
        for name in sorted(set(stats) - KNOWN):
            _sample(families["other"], (*labels, name), stats[name])
        seconds = families["operation_seconds"]
        assert isinstance(seconds, SummaryMetricFamily)
        for name, time in cache.times().items():
            seconds.add_metric((*labels, name), time.calls, time.nanoseconds / 1e9)


def held_by_role(cache: HybridCache, stats: dict[str, int]) -> dict[str, dict[str, int]]:
    """Slots, pages and slabs by who holds them. In a unified arena a free slab is free pages, no free slot.

    Entries of `stats()` that a running cache changes meanwhile may be one apart: nothing is below 0.
    """
    geometry = cache.geometry
    slots, pages = stats["taken_slots"], stats["taken_pages"]
    free_pages = geometry.num_pages - pages
    if geometry.num_slabs:
        free_pages -= slots * geometry.pages_per_slab
    held = {
        "slots": {"checkpoint": stats["checkpoints"], "lease": slots - stats["checkpoints"]},
        "pages": {"tree": stats["tree_pages"], "lease": pages - stats["tree_pages"], "free": free_pages},
    }
    if geometry.num_slabs:
        with_pages = stats["slabs_with_pages"]
        held["slabs"] = {"slot": slots, "pages": with_pages, "free": geometry.num_slabs - slots - with_pages}
    else:
        held["slots"]["free"] = geometry.num_slots - slots
    return {name: {role: max(n, 0) for role, n in roles.items()} for name, roles in held.items()}


def register(cache: HybridCache, registry: CollectorRegistry = REGISTRY, **labels: str) -> CacheCollector:
    """Adds a collector with this cache to the registry; further caches by the collector's `add`."""
    collector = CacheCollector(*labels)
    collector.add(cache, **labels)
    registry.register(collector)
    return collector


def _sample(family: Metric, labels: tuple[str, ...], value: float) -> None:
    assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
    family.add_metric(labels, value)
