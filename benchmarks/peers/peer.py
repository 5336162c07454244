"""What the scripts of all peers share: the command line, the conversations, and the JSON that they print.

Imports only the standard library: it runs in the peers' environments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
from array import array
from collections.abc import Callable

from benchmarks.clock import Recorder

TURN = 832  # tokens, 13 pages
PAGE = 64
VOCABULARY = 248_320
GROWTH = 0.05  # of a conversation while it is measured

Add = Callable[[str, int], None]  # (operation, nanoseconds)
Turn = Callable[[Add], None]  # the next turn, each call timed
Make = Callable[[array, int], Turn]  # (tokens, how many of them are cached at first): a conversation


def random_tokens(count: int, seed: int) -> array[int]:
    source = random.Random(seed)
    return array("q", (source.randrange(VOCABULARY) for _ in range(count)))


def measure(recorder: Recorder, make: Make, size: int, repetitions: int) -> None:
    """Turns at `size` tokens, so few of a conversation that it grows little. The very first warms up."""
    turns = max(1, int(size * GROWTH) // TURN)
    cached = max(size // TURN, 1) * TURN
    for each in range(repetitions + 1):
        if each % turns == 0:
            tokens = random_tokens(cached + (turns + 1) * TURN, seed=size + each)
            turn = make(tokens, cached)
        keep = recorder if each > 0 else Recorder()
        turn(lambda operation, nanoseconds, keep=keep: keep.add(operation, size, "warm", nanoseconds))


def main(peer: str, distribution: str, *makes: Make) -> None:
    parser = argparse.ArgumentParser(description=f"Times {peer} on the CPU; prints JSON.")
    parser.add_argument("--sizes", default="1024,65536", help="tokens of context, with commas between them")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    recorder = Recorder()
    for size in map(int, options.sizes.split(",")):
        for make in makes:
            measure(recorder, make, size, options.repetitions)
    version = importlib.metadata.version(distribution)
    print(json.dumps({"peer": peer, "version": version, "rows": recorder.rows()}))
