"""`make mutants`: does any test notice when the code is wrong? Breaks core and pools a line at a time.

Owns build/mutants/. Each mutant of mutants_list.py is put into a copy of the tree, compiled as far as it
reaches, and shown to the tests of the core (Python's to those of pools and states), the cheapest first, then
to random walks beside the oracle. It is killed when one of them fails, crashes or takes too long. The run
fails unless the unchanged tree passes, every snippet still occurs exactly once, and every mutant is killed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from tests.mutants_list import ROOT, Mutant, all_mutants, mistakes, table

BUILD = ROOT / "build" / "mutants"
CORE = f"hybridcache/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
# In this order, between them the first few walks, which kill most of what is left, and at the end the others.
FIRST_TESTS = ("test_invariants.py",)
MORE_TESTS = (
    "test_missed.py",
    "test_regressions.py",
    "test_run_ahead.py",
    "test_drafts.py",
    "test_mutant_holes.py",
    "test_placement.py",
    "test_bad_input.py",
    "test_events.py",
    "test_times.py",
    "test_policy_oracle.py",
)
FIRST_SEED, FIRST_WALKS, WALKS, STEPS = 500_000, 8, 80, 150
START, NOTHING = "start", "nothing"
LIMIT_S, LIMIT_BYTES = 240.0, 12 << 30


class Result(NamedTuple):
    name: str
    killed: bool
    by: str
    seconds: float


# ---- building


def users_of(file: str) -> list[str]:
    """The .cpp files that have to be compiled again when `file` of csrc/ has changed."""
    texts = {p.name: p.read_text() for p in sorted((ROOT / "csrc").iterdir())}
    reached = {Path(file).name}
    while True:
        more = {n for n, text in texts.items() if set(re.findall(r'#include "(.+?)"', text)) & reached}
        if more <= reached:
            return sorted(n for n in reached if n.endswith(".cpp"))
        reached |= more


def compiler(*arguments: object) -> None:
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g0", "-w", "-fPIC", "-fvisibility=hidden"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"does not compile:\n{done.stderr[-2000:]}")


def compile_one(source: Path, target: Path) -> None:
    pybind11 = importlib.import_module("pybind11")
    includes = [f"-I{source.parent}", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    compiler(*includes, "-c", source, "-o", target)


def build_base(jobs: int) -> None:
    """The unchanged objects, which the mutants share."""
    shutil.rmtree(BUILD, ignore_errors=True)
    base = BUILD / "base"
    base.mkdir(parents=True)
    sources = sorted((ROOT / "csrc").glob("*.cpp"), key=lambda p: -p.stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda p: compile_one(p, base / f"{p.stem}.o"), sources))
    compiler("-shared", *sorted(base.glob("*.o")), "-o", base / "core.so")


class Worker:
    """A copy of the tree, into which one mutant at a time is put."""

    def __init__(self, number: int) -> None:
        self.tree = BUILD / f"worker{number}"
        for folder in ("csrc", "hybridcache", "tests"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / folder, self.tree / folder, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.tree)
        shutil.copy(BUILD / "base" / "core.so", self.tree / CORE)

    def build(self, file: str) -> None:
        objects = {p.stem: p for p in (BUILD / "base").glob("*.o")}
        for name in users_of(file):
            source = self.tree / "csrc" / name
            objects[source.stem] = self.tree / f"{source.stem}.o"
            compile_one(source, objects[source.stem])
        (self.tree / CORE).unlink()  # never written in place: a child may have it mapped
        compiler("-shared", *objects.values(), "-o", self.tree / CORE)

    def run(self, mutant: Mutant) -> Result:
        started = time.monotonic()
        path = self.tree / mutant.file
        unchanged = path.read_text()
        path.write_text(mutant.applied_to(unchanged))
        try:
            in_core = mutant.file.startswith("csrc/")
            if in_core:
                self.build(mutant.file)
            killed, by = self.show_to_tests(in_core=in_core, pools=not in_core)
        except RuntimeError as error:
            killed, by = False, str(error)
        finally:
            path.write_text(unchanged)
            shutil.copy(BUILD / "base" / "core.so", self.tree / "fresh.so")
            (self.tree / "fresh.so").replace(self.tree / CORE)
        return Result(mutant.name, killed, by, time.monotonic() - started)

    def show_to_tests(self, *, in_core: bool, pools: bool) -> tuple[bool, str]:
        """In a child that has imported what is slow to import, and nothing of this tree."""
        child = os.fork()
        if child == 0:
            in_child(self.tree, in_core, pools)
        status = waited(child)
        where = (self.tree / "where.txt").read_text()
        if where == START:
            raise RuntimeError(
                f"broke before the first test:\n{(self.tree / 'output.txt').read_text()[-2000:]}"
            )
        if status is None:
            return True, f"{where} (more than {LIMIT_S:.0f} s)"
        if os.WIFSIGNALED(status):
            return True, f"{where} ({signal.Signals(os.WTERMSIG(status)).name})"
        return os.waitstatus_to_exitcode(status) != 0, where


def waited(child: int) -> int | None:
    """Its exit status; None if it had to be stopped."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# ---- in the child


class Where:
    """Notes the test that runs, and stays at the first that failed."""

    def __init__(self, tree: Path) -> None:
        self.file, self.failed = tree / "where.txt", False

    def note(self, where: str) -> None:
        self.file.write_text(where)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.failed:
            self.note(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = True
            self.note(f"{report.nodeid} (collection)")


def in_child(tree: Path, in_core: bool, pools: bool) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        where = Where(tree)
        where.note(START)
        with (tree / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        move_to(tree)
        code = suite(tree, where, in_core, pools)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def move_to(tree: Path) -> None:
    """Makes the copy the tree that `import` and subprocesses see."""
    os.chdir(tree)
    os.environ.update(PYTHONPATH=str(tree), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "hybridcache")]:
        del sys.modules[name]
    core = importlib.import_module("hybridcache._core")
    if Path(core.__file__).parent != tree / "hybridcache":
        raise RuntimeError(f"hybridcache: imported from {core.__file__}, expected {tree}")


def suite(tree: Path, where: Where, in_core: bool, pools: bool) -> int:
    """1 if something fails, else 0."""
    if in_core:
        if tests_fail(tree, where, FIRST_TESTS):
            return 1
        walk(where, range(FIRST_SEED, FIRST_SEED + FIRST_WALKS))
        if tests_fail(tree, where, MORE_TESTS):
            return 1
        walk(where, range(FIRST_SEED + FIRST_WALKS, FIRST_SEED + WALKS))
    if pools and tests_fail(tree, where, ["test_pools.py", "test_gated_delta.py"]):
        return 1
    where.note(NOTHING)
    return 0


def tests_fail(tree: Path, where: Where, names: Sequence[str]) -> bool:
    files = [f"tests/{name}" for name in names if (tree / "tests" / name).exists()]
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={tree}"]
    return pytest.main([*options, *files], plugins=[where]) != 0


def walk(where: Where, seeds: Sequence[int]) -> None:
    """Raises where the core and the oracle differ."""
    actions = importlib.import_module("tests.actions")
    machine = importlib.import_module("tests.test_state_machine")
    for seed in seeds:
        where.note(f"walk of seed {seed}")
        actions.random_walk(seed, STEPS, machine.make_core, actions=machine.ACTIONS)


# ---- the run


worker: Worker | None = None


def set_up(numbers: Any) -> None:
    global worker
    worker = Worker(numbers.get())


def run_one(mutant: Mutant) -> Result:
    assert worker is not None
    return worker.run(mutant)


def preload() -> None:
    """What every child needs and what is slow to import: they get it by fork."""
    for name in ("numpy", "hypothesis.stateful", "pybind11"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def passes_unchanged() -> bool:
    failed, by = Worker(0).show_to_tests(in_core=True, pools=True)
    if failed:
        print(f"the unchanged tree fails: {by}\n{(BUILD / 'worker0' / 'output.txt').read_text()[-3000:]}")
    return not failed


def run_all(mutants: list[Mutant], jobs: int) -> list[Result]:
    context = multiprocessing.get_context("fork")
    numbers = context.SimpleQueue()
    for number in range(1, jobs + 1):
        numbers.put(number)
    results = []
    with context.Pool(jobs, set_up, (numbers,)) as pool:
        for result in pool.imap_unordered(run_one, mutants):
            verdict = "killed by" if result.killed else "SURVIVED:"
            print(f"{result.name:44} {result.seconds:5.1f} s  {verdict} {result.by}", flush=True)
            results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="about N mutants, spread evenly over the list"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what stands for what, and run nothing")
    options = parser.parse_args()
    started, mutants = time.monotonic(), all_mutants()
    if wrong := list(mistakes(mutants)):
        print("\n".join(wrong))
        return 1
    if options.table:
        print(table(mutants))
        return 0
    if options.only:
        if unknown := set(options.only) - {m.name for m in mutants}:
            parser.error(f"--only: {sorted(unknown)}, expected names of mutants")
        mutants = [m for m in mutants if m.name in options.only]
    if options.sample:
        mutants = mutants[:: max(1, len(mutants) // options.sample)]
    build_base(options.jobs)
    preload()
    if not passes_unchanged():
        return 1
    print(f"the unchanged tree passes, {time.monotonic() - started:.0f} s", flush=True)
    results = run_all(mutants, options.jobs)
    killed = sum(result.killed for result in results)
    print(f"killed {killed} of {len(mutants)} in {time.monotonic() - started:.0f} s")
    return int(killed != len(mutants))


if __name__ == "__main__":
    sys.exit(main())
