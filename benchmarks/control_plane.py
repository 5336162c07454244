"""What the control plane costs: `python -m benchmarks.control_plane [--quick] [--json FILE] [--plot FILE]`.

Every call of a turn from 1K to 1M tokens of context, warm and with flushed CPU caches, batches of decoding
leases, evictions, a tree of 100M tokens and 100K checkpoints in a process of its own; beside a memcmp of
the same tokens, and beside the peers whose environments `make bench-peers` has set up.
benchmarks/control_plane.md explains the tables. Exits with 0 also where a bound fails: it measures, the
last table says what holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads of numpy's BLAS are not what is measured

from benchmarks import operations, report
from benchmarks.clock import Recorder
from benchmarks.floor import Caches
from benchmarks.peers import environments

ROOT = Path(__file__).resolve().parent.parent


def measure(options: argparse.Namespace, say: Any) -> Recorder:
    recorder = Recorder()
    for name, repetitions in (("warm", options.repetitions), ("cold", options.cold)):
        say(f"turns, {name}")
        operations.measure_turns(recorder, options.sizes, Caches(name), repetitions)
        say(f"turns through transcripts, {name}")
        operations.measure_transcripts(recorder, options.sizes, Caches(name), repetitions)
    for length in options.sizes:
        say(f"evictions and refusals at {report.size_name(length)}")
        operations.measure_evictions(recorder, length, Caches("warm"), options.repetitions)
        operations.measure_shortage(recorder, length, Caches("warm"), options.repetitions)
    return recorder


def measure_batches(options: argparse.Namespace, say: Any) -> Recorder:
    recorder = Recorder()
    say("batches")
    operations.measure_batches(recorder, 4096, options.batches, Caches("warm"), options.repetitions)
    return recorder


def measure_memory(options: argparse.Namespace, say: Any) -> report.Rows:
    results = []
    for policy in ("default", "lru"):
        say(f"a tree of {options.turns:,} turns, {policy}")
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "--policy",
            policy,
            "--turns",
            str(options.turns),
        ]
        command += ["--repetitions", str(options.repetitions)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
    return results


def measure_peers(options: argparse.Namespace, say: Any) -> dict[str, Any]:
    results = {}
    for name in environments.PEERS:
        say(f"{name}, if it is set up")
        results[name] = environments.measure(name, options.sizes, 4 if options.quick else 20)
    return results


def memory_table(memory: report.Rows) -> str:
    lines = [
        [
            "policy",
            "tokens",
            "checkpoints",
            "build s",
            "us a turn",
            "tree B/token",
            "arena B/token",
            "B/token",
        ]
    ]
    for each in memory:
        tokens = each["tokens"]
        lines.append(
            [
                each["policy"],
                f"{tokens:,}",
                f"{each['checkpoints']:,}",
                f"{each['build_s']:.1f}",
                f"{each['turn_us']:.1f}",
                f"{each['tree_bytes'] / tokens:.2f}",
                f"{each['arena_bytes'] / tokens:.2f}",
                f"{each['bytes_per_token']:.2f}",
            ]
        )
    return report.table(lines)


def print_report(result: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()) + "\n")
    print(report.grid("A turn, by tokens of context; CPU caches warm", result["rows"], "warm"))
    print(
        report.grid(
            "A turn, by tokens of context; CPU caches flushed before each call", result["rows"], "cold"
        )
    )
    print(report.grid("Batches, by leases", result["batches"], "warm"))
    if result["memory"]:
        print("A tree in a process of its own: resident memory, evictions by checkpoints resident")
        print(memory_table(result["memory"]))
        for each in result["memory"]:
            for caches in ("warm", "cold"):
                print(report.grid(f"policy {each['policy']}, CPU caches {caches}", each["rows"], caches))
    if result["peers"]:
        print("Peers in the same run, medians, CPU caches warm")
        print(report.ratios(result["rows"], result["peers"]))
    print(report.bounds_table([report.Bound(*line[:5]) for line in result["bounds"]]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="under a minute: up to 64K, fewer repetitions")
    parser.add_argument("--no-peers", action="store_true", help="do not run the peers that are set up")
    options = parser.parse_args(arguments)
    options.sizes = [1 << 10, 1 << 16] if options.quick else list(report.SIZES)
    options.batches = [1, 256] if options.quick else [1 << power for power in range(9)]
    options.repetitions = 40 if options.quick else 400
    options.cold = 4 if options.quick else 40
    options.turns = 2_000 if options.quick else 100_000
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {what}", file=sys.stderr, flush=True)

    result: dict[str, Any] = {"machine": report.machine()}
    result["rows"] = measure(options, say).rows()
    result["batches"] = measure_batches(options, say).rows()
    result["memory"] = measure_memory(options, say)
    result["peers"] = {} if options.no_peers else measure_peers(options, say)
    result["bounds"] = report.bounds(result["rows"] + result["batches"], result["memory"], result["peers"])
    print_report(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot and not report.plot(result["rows"], result["peers"], options.plot):
        print("--plot: matplotlib is not installed, no plot was written", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
