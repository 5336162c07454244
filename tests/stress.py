"""`make stress`: random walks of the core beside the oracle, on all cores, for as many actions as asked.

Prints actions and seconds. The walks, and what is compared after each action, are those of
tests/test_state_machine.py; the seeds start elsewhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

import tests.small_parts  # noqa: F401
from tests.actions import random_walk
from tests.test_state_machine import ACTIONS, make_core

STEPS = 250


def walk(seed: int) -> int:
    random_walk(seed, STEPS, make_core, actions=ACTIONS)
    return STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1_000_000, help="the first one")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + -(-options.actions // STEPS))
    started, done = time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for steps in pool.imap_unordered(walk, seeds, chunksize=4):
            done += steps
            if done % (STEPS * 200) == 0:
                print(f"{done:,} actions, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{done:,} actions without a difference in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
