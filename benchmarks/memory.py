"""A tree of 100M tokens and 100K checkpoints in a process of its own: build time, bytes of index, evictions.

    python -m benchmarks.memory --policy default --turns 100000

Prints one line of JSON. Conversations of 100 turns of 1,000 tokens grow one after the other. Memory is the
process's resident set, read before the cache exists, with the arena's tables, and with everything in the
tree; the tokens of a conversation are thrown away when it is built, so nothing else stays.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.chains import Chain, make_cache, take_turn
from benchmarks.clock import Recorder
from benchmarks.floor import Caches
from benchmarks.operations import EVICTION, evict_one_by_one, evicted

STEP = 1000  # tokens a turn
TURNS = 100  # of a conversation


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status: no VmRSS, expected Linux")


def build(turns: int, policy: str, repetitions: int) -> dict[str, float]:
    Chain(STEP * TURNS, 0, seed=0)  # what the first one leaves with the allocator is not the index
    empty = resident_bytes()
    cache = make_cache(tokens=turns * (STEP + 64), checkpoints=turns, policy=policy)  # each has a tail page
    arena = resident_bytes()
    started = time.perf_counter()
    for each in range(turns // TURNS):
        chain = Chain(STEP * TURNS, 0, seed=each)
        for _ in range(TURNS):
            take_turn(cache, chain, STEP)
    seconds = time.perf_counter() - started
    full = resident_bytes()
    stats, tokens = cache.stats(), turns * STEP
    if evicted(cache) > 0:
        raise RuntimeError(
            f"{evicted(cache)} checkpoints were evicted, expected an arena that is large enough"
        )
    recorder = Recorder()
    chains = [Chain(STEP * TURNS, 0, seed=10**6 + each) for each in range(2 * repetitions // TURNS + 8)]
    for caches, count in (("warm", repetitions), ("cold", min(repetitions, 40))):
        evict_one_by_one(recorder, cache, chains, stats["checkpoints"], Caches(caches), count)
    return {
        "policy": policy,
        "tokens": tokens,
        "checkpoints": stats["checkpoints"],
        "nodes": stats["nodes"],
        "build_s": seconds,
        "turn_us": seconds * 1e6 / turns,
        "arena_bytes": arena - empty,
        "tree_bytes": full - arena,
        "bytes_per_token": (full - empty) / tokens,
        "eviction_us": eviction_us(recorder),
        "rows": recorder.rows(),
    }


def eviction_us(recorder: Recorder) -> float:
    """What the request that evicts costs more than the one beside it: the median of the differences."""
    return recorder.median_us(EVICTION, next(iter(recorder.samples)).size) or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=1000)
    options = parser.parse_args()
    print(json.dumps(build(options.turns, options.policy, options.repetitions)))


if __name__ == "__main__":
    main()
