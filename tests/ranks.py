"""`make ranks`: processes that make the same calls reach the same digest (I7), with other addresses, hash
seeds and speeds.

Each rank drives the core through the same seeded calls, no oracle, and prints its digest every so often; the
parent compares all of them.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

from hybridcache.cache import HybridCache

LAYOUT = SimpleNamespace(page_size=4, page_bytes=64, slot_bytes=192)


class Rank:
    """A seeded engine: prompts that share prefixes, decode, forks, cancels, on a full arena."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cache = HybridCache(
            LAYOUT,
            memory_bytes=192 * 150,
            run_ahead=1,
            pass_cost=4,
            interior_spacing=8,
            max_cached_bytes=192 * 120,
        )
        self.leases: list = []
        self.known: list[list[int]] = [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
        self.calls = 0

    def prompt(self) -> list[int]:
        rng = self.rng
        base = rng.choice(self.known)
        prompt = base[: rng.randrange(1, len(base) + 1)] + [
            rng.randrange(3) for _ in range(rng.randrange(1, 12))
        ]
        if len(prompt) < 120:
            self.known.append(prompt)
        del self.known[:-200]
        return prompt

    def step(self, lease) -> None:
        rng = self.rng
        step = lease.launch(rng.randrange(1, 20) if lease.computed < lease.prompt_length else 1)
        self.cache.applied(self.cache.plan())
        self.calls += 3
        if step is None:
            self.leases.remove(lease)
            lease.close(keep=rng.choice(["all", "nothing"]))
        elif rng.random() < 0.9:
            due = max(0, step.end - max(step.begin, lease.prompt_length))
            lease.commit([rng.randrange(3) for _ in range(due)])
        else:
            self.leases.remove(lease)
            lease.close()
        self.calls += 1

    def turn(self) -> None:
        rng, cache = self.rng, self.cache
        chance = rng.random()
        if len(self.leases) < 12 and chance < 0.35:
            lease = cache.reserve(self.prompt(), salt=bytes([rng.randrange(2)]))
            if lease is not None:
                self.leases.append(lease)
        elif chance < 0.4 and self.leases:
            child = rng.choice(self.leases).fork()
            if child is not None:
                self.leases.append(child)
        elif chance < 0.5 and self.leases:
            self.leases.pop(rng.randrange(len(self.leases))).close(
                keep=rng.choice(["all", "prompt", "nothing"])
            )
        elif self.leases:
            self.step(rng.choice(self.leases))
        self.calls += 1


def run_rank(calls: int) -> None:
    noise = [
        bytearray(random.randrange(1, 5000)) for _ in range(int(os.environ["RANK"]) * 100)
    ]  # other addresses
    rank, mark = Rank(42), 0
    while rank.calls < calls:
        rank.turn()
        if rank.calls // 10_000 > mark:
            mark = rank.calls // 10_000
            print(rank.calls, rank.cache.digest, flush=True)
            if hash(str(rank.cache.digest) + os.environ["RANK"]) % 7 == 0:
                time.sleep(0.01)  # other speeds
    rank.cache.check()
    del noise
    evicted = sum(value for key, value in rank.cache.stats().items() if key.startswith("evicted_"))
    print(rank.calls, rank.cache.digest, evicted, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return run_rank(options.calls)
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", "--rank", "--calls", str(options.calls)],
            env={
                **os.environ,
                "RANK": str(number),
                "PYTHONHASHSEED": str(number),
                "MALLOC_PERTURB_": str(number),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(options.ranks)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks) or len(set(outputs)) != 1:
        raise SystemExit(f"the ranks differ: {[output.splitlines()[-1:] for output in outputs]}")
    calls, digest, evicted = outputs[0].splitlines()[-1].split()
    assert int(evicted) > 0
    print(
        f"{options.ranks} ranks, {int(calls):,} calls each, {evicted} evictions, digest {digest} on all, "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
