"""Instructions of the core's hot paths, counted by valgrind: `python -m benchmarks.instructions [--update]`.

Builds instructions.cpp with the core (no Python in it) under build/instructions and runs each operation
under callgrind, which collects only inside it. What is counted is compared with instructions.json: unlike
time, it does not depend on who else uses the machine. `--update` writes that file anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BASELINE = Path(__file__).with_suffix(".json")
FLAGS = ("-std=c++20", "-O3", "-g1", f"-I{ROOT / 'csrc'}")
TOLERANCE = 0.10
TOLERANCE_OF_ANOTHER_COMPILER = 0.50
REPETITIONS = 40


def missing_tool() -> str | None:
    """What this needs and cannot find, if anything."""
    return next((tool for tool in ("valgrind", compiler()) if shutil.which(tool) is None), None)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    done = subprocess.run([compiler(), "-dumpfullversion"], check=True, capture_output=True, text=True)
    return f"{Path(compiler()).name} {done.stdout.strip()}"


def build(folder: Path) -> Path:
    """The program; objects that are newer than their source and all headers are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("*.h"))
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.stem != "bind"]
    sources.append(Path(__file__).with_suffix(".cpp"))
    objects = {source: folder / f"{source.stem}.o" for source in sources}

    def is_fresh(source: Path) -> bool:
        built = objects[source]
        return built.exists() and built.stat().st_mtime > max(newest, source.stat().st_mtime)

    def compile_one(source: Path) -> None:
        subprocess.run([compiler(), *FLAGS, "-c", str(source), "-o", str(objects[source])], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, [source for source in sources if not is_fresh(source)]))
    program = folder / "instructions"
    subprocess.run([compiler(), *map(str, objects.values()), "-o", str(program)], check=True)
    return program


def operations(program: Path) -> list[str]:
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


class Count(NamedTuple):
    """Of one operation."""

    instructions: float
    allocations: float


def count(program: Path, operation: str, repetitions: int = REPETITIONS) -> Count:
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured*"]
    command = [*tool, str(program), operation, str(repetitions)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Count(collected(done.stderr) / repetitions, int(done.stdout.split()[-1]) / repetitions)


def collected(output: str) -> int:
    found = re.search(r"Collected : (\d+)", output)
    if found is None or int(found[1]) == 0:
        raise RuntimeError(f"valgrind collected nothing:\n{output}")
    return int(found[1])


def count_all() -> dict[str, Any]:
    program = build(ROOT / "build" / "instructions")
    counts = {operation: count(program, operation) for operation in operations(program)}
    instructions = {operation: round(each.instructions) for operation, each in counts.items()}
    allocations = {operation: round(each.allocations, 2) for operation, each in counts.items()}
    return {"compiler": compiler_version(), "instructions": instructions, "allocations": allocations}


def regressions(measured: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A sentence for each operation that takes more than the baseline allows, or is in only one."""
    same = measured["compiler"].split(".")[0] == baseline["compiler"].split(".")[0]
    tolerance = TOLERANCE if same else TOLERANCE_OF_ANOTHER_COMPILER
    ours, theirs = measured["instructions"], baseline["instructions"]
    wrong = [f"{each}: only in one of the two" for each in sorted(ours.keys() ^ theirs.keys())]
    for each in sorted(ours.keys() & theirs.keys()):
        if ours[each] > theirs[each] * (1 + tolerance):
            wrong.append(f"{each}: {ours[each]:,} instructions, expected {theirs[each]:,} + {tolerance:.0%}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write what is measured to instructions.json")
    options = parser.parse_args()
    if (tool := missing_tool()) is not None:
        sys.exit(f"instructions: no {tool} here, expected it to be installed")
    measured = count_all()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else None
    for each, number in measured["instructions"].items():
        before = baseline["instructions"].get(each) if baseline else None
        change = f"{number / before - 1:+8.1%}" if before else ""
        print(f"{each:35} {number:10,} {change:8} {measured['allocations'][each]:8.1f} allocations")
    if options.update:
        BASELINE.write_text(json.dumps(measured, indent=1) + "\n")
    elif baseline is None or (wrong := regressions(measured, baseline)):
        sys.exit("\n".join(wrong) if baseline else f"{BASELINE.name}: missing, expected one (--update)")


if __name__ == "__main__":
    main()
