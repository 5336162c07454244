"""The collector through the real prometheus-client: what it exports is what stats() says, name by name."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from hybridcache import HybridCache, ModelLayout
from tests.conftest import Driver, tokens
from tests.toy_engine import LAYERS

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from hybridcache import metrics  # noqa: E402

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(registry) -> Samples:
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def busy() -> Driver:
    """A cache with something in every entry that a run can bring about."""
    driver = Driver(slabs=48)
    for turn in range(24):
        driver.turn(tokens(30, seed=turn % 5), tokens(3, seed=turn), chunk=9)
    prompt = tokens(30, seed=4)
    driver.turn(np.append(prompt[:11], tokens(9, seed=77)), breakpoints=[6])
    lease = driver.cache.reserve(tokens(20, seed=50))
    assert lease is not None
    driver.prefill(lease)
    child = lease.fork()
    assert child is not None
    driver.pin = driver.cache.pin(tokens(20, seed=50))
    while driver.cache.reserve(tokens(30, seed=51)) is not None:
        pass
    return driver


def test_every_sample_is_an_entry_of_stats() -> None:
    registry, driver = prometheus_client.CollectorRegistry(), busy()
    metrics.register(driver.cache, registry)
    found, stats = scrape(registry), driver.cache.stats()
    for families, suffix in ((metrics.COUNTERS, "_total"), (metrics.GAUGES, "")):
        for family in families:
            for value, name in family.stats.items():
                labels = ((family.label, value),) if family.label else ()
                assert found["hybridcache:" + family.name + suffix, labels] == stats[name]
    seen = ("tokens_hit", "refused_reserves", "forks", "pins", "lost_cold", "lost_no_checkpoint")
    for name in (*seen, "pinned_checkpoints", "checkpoints", "slabs_with_pages"):
        assert stats[name] > 0, "the traffic shows nothing of " + name
    assert sum(stats[f"evicted_{kind}"] for kind in metrics.KINDS) > 0
    assert set(stats) == metrics.KNOWN, "an entry of stats() has no metric of its own"


def test_tokens_add_up_and_roles_fill_the_arena() -> None:
    registry, driver = prometheus_client.CollectorRegistry(), busy()
    metrics.register(driver.cache, registry)
    found, stats, geometry = scrape(registry), driver.cache.stats(), driver.cache.geometry

    def total(name: str) -> float:
        return sum(value for (sample, _), value in found.items() if sample == "hybridcache:" + name)

    queried = total("prefix_cache_queries_total")
    assert queried == total("prefix_cache_hits_total") + total("prefix_cache_lost_tokens_total") > 0
    assert total("slots") == stats["taken_slots"]
    assert total("slabs") == geometry.num_slabs and found["hybridcache:slabs", (("role", "pages"),)] > 0
    assert total("pages") + stats["taken_slots"] * geometry.pages_per_slab == geometry.num_pages
    assert total("checkpoints") == stats["checkpoints"] >= total("checkpoints_pinned") > 0
    share = stats["taken_pages"] * geometry.page_bytes + stats["taken_slots"] * geometry.slab_bytes
    assert total("cache_usage_perc") == pytest.approx(share / geometry.total_bytes)
    assert 0.5 < total("cache_usage_perc") <= 1


def test_time_per_operation_is_what_times_says() -> None:
    registry, driver = prometheus_client.CollectorRegistry(), busy()
    metrics.register(driver.cache, registry, rank="0")
    found, times = scrape(registry), driver.cache.times()
    assert min(times[name].calls for name in ("reserve", "launch", "plan", "applied", "commit")) > 20
    for name, each in times.items():
        labels = (("operation", name), ("rank", "0"))
        assert found["hybridcache:operation_seconds_count", labels] == each.calls
        assert found["hybridcache:operation_seconds_sum", labels] == each.nanoseconds / 1e9


def test_a_fixed_arena_has_free_slots() -> None:
    layout = ModelLayout(4, LAYERS)
    cache = HybridCache(layout, num_pages=10, num_slots=7)
    lease = cache.reserve(list(range(9)))
    registry = prometheus_client.CollectorRegistry()
    metrics.register(cache, registry)
    found = scrape(registry)
    assert [found["hybridcache:slots", (("role", role),)] for role in ("checkpoint", "lease", "free")] == [
        0,
        1,
        6,
    ]
    assert [found["hybridcache:pages", (("role", role),)] for role in ("tree", "lease", "free")] == [0, 3, 7]
    assert lease is not None


def test_several_caches_are_told_apart_and_none_is_kept_alive() -> None:
    registry, first, second = prometheus_client.CollectorRegistry(), Driver(), Driver()
    collector = metrics.register(first.cache, registry, rank="0")
    collector.add(second.cache, rank="1")
    first.turn(tokens(12))
    queries = "hybridcache:prefix_cache_queries_total"
    assert [scrape(registry)[queries, (("rank", rank),)] for rank in "01"] == [12, 0]
    with pytest.raises(ValueError, match=r"labels: .* expected others than those of another cache"):
        collector.add(Driver().cache, rank="1")
    with pytest.raises(ValueError, match=r"labels: \['host'\], expected \['rank'\]"):
        collector.add(Driver().cache, host="a")
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.register(Driver().cache, registry, rank="2")
    del first
    gc.collect()
    assert [labels for name, labels in scrape(registry) if name == queries] == [(("rank", "1"),)]


def test_what_the_core_counts_anew_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, registry = Driver(), prometheus_client.CollectorRegistry()
    metrics.register(driver.cache, registry)
    stats = driver.cache.stats()
    monkeypatch.setattr(driver.cache, "stats", lambda: {**stats, "something_new": 5})
    assert scrape(registry)["hybridcache:other", (("name", "something_new"),)] == 5


def test_a_server_is_scraped_while_the_cache_works() -> None:
    driver, registry = Driver(slabs=24), prometheus_client.CollectorRegistry()
    metrics.register(driver.cache, registry, model="tiny")
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as response:
                seen.append(response.read().decode())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        end = time.monotonic() + 30
        for turn in itertools.count():
            driver.turn(tokens(30, seed=turn % 7), tokens(2, seed=turn))
            if (turn > 20 and len(seen) > 3) or time.monotonic() > end:
                break
    finally:
        stop.set()
        reader.join()
        server.shutdown()
        server.server_close()
        thread.join()
    assert len(seen) > 1 and all('hybridcache:requests_running{model="tiny"}' in text for text in seen)
    assert "# TYPE hybridcache:prefix_cache_queries_total counter" in seen[0]


def test_the_package_does_not_need_prometheus() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import hybridcache; hybridcache.HybridCache"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
