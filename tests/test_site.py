"""The documentation builds as a site without a warning, and its pages hold what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hybridcache

ROOT = Path(__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in NEEDED:
        if find_spec(name.partition(".")[0]) is None or find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install '.[docs]'")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_every_page_is_built_and_stands_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert (site / page.stem / "index.html").is_file()
            assert f'href="{page.stem}/"' in home


def test_the_reference_has_every_public_name_with_its_docstring(site: Path) -> None:
    text = (site / "reference" / "index.html").read_text()
    ids = set(re.findall(r'id="(hybridcache[\w.]*)"', text))
    known = {name.rpartition(".")[2] for name in ids}
    errors = {name for name in hybridcache.__all__ if name.endswith("Error")}
    assert known >= set(hybridcache.__all__) - errors
    assert all(f"<code>{name}</code>" in text for name in errors)
    assert {f"hybridcache.Geometry.{name}" for name in hybridcache.Geometry._fields} <= ids
    assert {
        "hybridcache.Lease.commit",
        "hybridcache.HybridCache.reserve",
        "hybridcache.hf.CachedModel",
    } <= ids
    lists = re.findall(r"<li><em>(\w+)</em>: ", text)
    assert {"memory_bytes", "run_ahead", "draft_tokens", "policy"} <= set(lists)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(
            r'<(?:script|img)[^>]+src="https?:|<link[^>]+stylesheet[^>]+https?:', page.read_text()
        )


def test_the_figures_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    results = ROOT / "benchmarks" / "results" / "data_plane_h200.txt"
    measured = set(re.findall(r"[\d,.]+ / [\d,.]+|[\d.]+ %", results.read_text()))
    rows = re.findall(r"^\| (?:restore|zero) .*", page, re.MULTILINE)
    figures = {figure for row in rows for figure in re.findall(r"[\d,.]+ / [\d,.]+|[\d.]+ %", row)}
    assert len(rows) == 5 and len(figures) >= 19 and figures <= measured
    counted = json.loads((ROOT / "benchmarks" / "instructions.json").read_text())["instructions"].values()
    part = page[page.index("| instructions |") : page.index("## The policy")]
    quoted = [int(each.replace(",", "")) for each in re.findall(r"\d[\d,]{4,}", part)]
    embedding = (ROOT / "docs" / "embedding.md").read_text()
    quoted += [int(re.findall(r"costs the core ([\d,]+)", embedding)[0].replace(",", ""))]
    assert len(quoted) == 7 and set(quoted) <= set(counted)


def test_warnings_fail_the_build() -> None:
    make = (ROOT / "Makefile").read_text()
    assert "mkdocs build --strict" in make
    assert "make docs" in (ROOT / ".ci" / "run").read_text()
