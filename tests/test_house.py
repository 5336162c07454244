"""The house: imports run one way, the core includes no torch, and the words are those of the vocabulary."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "types",
    "times",
    "door",
    "edge",
    "radix",
    "id_set",
    "arena",
    "tree",
    "journal",
    "transcript",
    "placement",
    "hazard",
    "calendar",
    "history",
    "heap",
    "eviction",
    "admission",
    "page_table",
    "lease",
    "cache",
    "check",
]


def includes(path: Path) -> set[str]:
    return set(re.findall(r'#include "(\w+)\.h"', path.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_the_core_includes_only_what_lies_below(path: Path) -> None:
    assert not re.search(r"torch|ATen|c10|cuda", path.read_text())
    if path.stem in LAYERS:
        below = LAYERS[: LAYERS.index(path.stem) + 1]
        # cache.cpp asks check for its two public calls; check is built on cache and on nothing above
        assert includes(path) <= set(below), f"{path.name} includes what lies above it"
    door = ("tokens", "event_values", "match_values")  # only it includes these
    if path.suffix == ".h" and path.stem not in door:
        assert "Python.h" not in path.read_text() and "pybind11" not in path.read_text()


STANDARD = {
    "__future__",
    "collections.abc",
    "dataclasses",
    "functools",
    "math",
    "operator",
    "types",
    "typing",
}


def imports(name: str) -> set[str]:
    text = (ROOT / "hybridcache" / f"{name}.py").read_text()
    at_runtime = text.replace("if TYPE_CHECKING:\n    from", "# from")
    return set(re.findall(r"^\s*(?:from|import) ([\w.]+)", at_runtime, re.MULTILINE))


def test_the_two_worlds_meet_only_in_the_plan() -> None:
    for name in ("pools", "_moves"):
        known = {each for each in imports(name) if each.startswith("hybridcache")}
        assert known <= {"hybridcache.config", "hybridcache._moves"}
    assert imports("_kernels") <= STANDARD | {"contextlib", "torch", "triton", "triton.language"}
    assert imports("_decode") <= STANDARD | {"hybridcache._kernels", "torch", "triton", "triton.language"}
    known = {"hybridcache._pieces", "importlib", "importlib.util", "itertools", "torch"}
    assert imports("gated_delta") <= STANDARD | known
    assert imports("_pieces") <= STANDARD | {"itertools"}
    assert imports("config") | imports("_specs") | imports("_hf_config") <= STANDARD | {
        "hybridcache._specs",
        "hybridcache._hf_config",
    }
    for name in ("cache", "config", "errors", "values", "_specs", "_hf_config", *REPLAY):
        if name == "bench_command":
            continue  # it asks torch whether there is a GPU
        assert not {each for each in imports(name) if each.split(".")[0] in ("torch", "transformers")}


REPLAY = {  # module: what of the package it may know; a workload knows no cache, a report runs nothing
    "workloads": set[str](),
    "replay_values": set[str](),
    "foresight": {"workloads"},
    "replay": {"cache", "config", "foresight", "replay_clock", "replay_values", "workloads"},
    "replay_clock": {"replay"},  # for its type; `replay` imports it when a clock is asked for
    "replay_report": {"_command", "optimum", "replay_values", "workloads"},
    "replay_command": {
        "_arguments",
        "_command",
        "cache",
        "config",
        "optimum",
        "replay",
        "replay_report",
        "replay_values",
        "workloads",
    },
    "sizing": {"_specs", "config"},  # pure arithmetic
    "size_command": {"_command", "_specs", "config", "sizing"},
    "tree_view": set[str](),  # a dump is text
    "tree_svg": {"tree_view"},
    "show_command": {
        "_command",
        "foresight",
        "replay",
        "replay_command",
        "replay_values",
        "tree_svg",
        "tree_view",
    },
    "bench_command": {"_command"},
    "_command": {"config"},
    "events": {"values"},  # a router is told what the journal says, and nothing else is known of the cache
}


@pytest.mark.parametrize("name", REPLAY)
def test_the_replay_knows_the_cache_by_its_door(name: str) -> None:
    text = (ROOT / "hybridcache" / f"{name}.py").read_text()
    known = {each.removeprefix("hybridcache.") for each in imports(name) if each.startswith("hybridcache")}
    known |= set(re.findall(r"from hybridcache\.(\w+) import", text))
    if "from hybridcache import" in text:
        known -= {"hybridcache"}
        names = re.search(r"from hybridcache import (.+)", text)
        known |= set(names[1].split(", ")) if names else set()
    assert known <= REPLAY[name]
    assert "_core" not in text.replace("core_seconds", "")


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, hybridcache; hybridcache.HybridCache; assert 'torch' not in sys.modules; "
        "hybridcache.Pools; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


BANNED = {r"\bblocks?\b": "page", r"\bsnapshots?\b": "checkpoint", r"\bnamespaces?\b": "salt"}
ALLOWED = re.compile(
    r"^\s*}?\s*(//)? ?namespace\b|using namespace|the namespace|SimpleNamespace|argparse\.Namespace"
)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "csrc").iterdir()), *sorted((ROOT / "hybridcache").glob("*.py"))],
    ids=lambda path: path.name,
)
def test_words(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for pattern, word in BANNED.items():
            if re.search(pattern, line, re.IGNORECASE) and not ALLOWED.search(line):
                pytest.fail(f"{path.name}:{number}: say {word}: {line.strip()}")


def test_files_are_small() -> None:
    for path in [*(ROOT / "csrc").iterdir(), *(ROOT / "hybridcache").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 420, f"{path.name} is long"


def test_the_table_of_mutants_in_the_docs_is_that_of_the_mutants() -> None:
    from tests.mutants_list import all_mutants, mistakes, table

    assert not list(mistakes(all_mutants()))  # each applies exactly once
    assert table(all_mutants()) in (ROOT / "docs" / "invariants.md").read_text()
