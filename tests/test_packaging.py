"""sdist and wheel build, hold what they should, and serve a newcomer in a clean environment without torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PARTS = (
    "csrc",
    "hybridcache",
    "examples",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
PROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = {"hf", "gpu", "cli", "events", "metrics", "docs", "dev"}


class Built(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of a clean copy, and the wheel that is built from that sdist alone."""
    if find_spec("build") is None:
        pytest.skip("building a wheel needs pip install build")
    folder = tmp_path_factory.mktemp("packages")
    copy, out = folder / "copy", folder / "out"
    copy.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def newcomer(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel and the extra `cli`, and nothing else."""
    home = tmp_path_factory.mktemp("newcomer")
    venv.create(home / "env", with_pip=True)
    programs = home / "env" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", f"{built.wheel}[cli]"]
    done = subprocess.run(install, capture_output=True, text=True, env=clean())
    if done.returncode and re.search(r"No matching distribution|Connection|Temporary failure", done.stderr):
        pytest.skip(f"numpy, rich and matplotlib could not be fetched: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return programs


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.mark.slow
def test_the_sdist_has_what_a_build_needs_and_no_half_of_the_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources <= names and {"LICENSE", "CHANGELOG.md", "examples/tiny_engine.py"} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]


@pytest.mark.slow
def test_the_wheel_has_every_module_the_types_and_the_core(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    modules = {f"hybridcache/{path.name}" for path in (ROOT / "hybridcache").glob("*.py")}
    assert modules | {"hybridcache/py.typed", "hybridcache/_core.pyi"} <= names
    (core,) = (name for name in names if name.endswith(".so"))
    assert core.startswith("hybridcache/_core.")
    rest = {name for name in names - modules if ".dist-info/" not in name}
    assert rest == {"hybridcache/py.typed", "hybridcache/_core.pyi", core}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (
            "size qwen3.5-397b --memory 8x141GB --tp 8",
            0,
            "33 conversations of 50,000 tokens with 2 states each stay",
        ),
        ("replay agentic --memory 10GB,50GB", 0, "agentic: 960 requests, 53.4 M prompt tokens"),
        ("show agentic:sessions=3 --memory 10GB --svg tree.svg", 0, "svg: tree.svg"),
        ("demo", 2, "hybridcache demo needs pip install 'hybrid-prefix-cache[hf,cli]'"),
        ("bench", 2, "the benchmarks are part of the repository, not of the installed package"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_newcomer(command: str, status: int, said: str, newcomer: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [newcomer / "hybridcache", *shlex.split(command)],
        cwd=tmp_path,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == status, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
def test_without_torch_the_cache_works_and_pools_say_what_is_missing(newcomer: Path, tmp_path: Path) -> None:
    code = """
from hybridcache import HybridCache, ModelLayout
cache = HybridCache(ModelLayout.preset("qwen3.5-9b"), memory_bytes=1 << 30)
with cache.reserve([1, 2, 3]) as lease:
    lease.launch(3)
    cache.applied(cache.plan())
    lease.commit()
assert cache.match([1, 2, 3, 4]).length == 3
try:
    from hybridcache import Pools
except ImportError as error:
    assert "pip install 'hybrid-prefix-cache[gpu]'" in str(error)
else:
    raise AssertionError("torch is there")
"""
    subprocess.run([newcomer / "python", "-c", code], cwd=tmp_path, env=clean(), check=True)


def test_the_extras_are_there_and_dev_has_what_docs_has() -> None:
    project = pytest.importorskip("tomllib").loads(PROJECT)["project"]  # from Python 3.11 on
    extras = project["optional-dependencies"]
    assert set(extras) >= EXTRAS
    assert set(extras["docs"]) <= set(extras["dev"])
    assert any(each.startswith("torch>") for each in extras["gpu"]) and extras["gpu"][0] in extras["hf"]
    assert not [each for each in project["dependencies"] if each.startswith("torch")]
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "hybridcache/py.typed"):
        assert (ROOT / name).is_file()


def test_the_linters_check_the_stubs_and_let_only_metaclasses_differ() -> None:
    assert "mypy.stubtest hybridcache._core --allowlist tests/stubtest.txt" in (ROOT / "Makefile").read_text()
    lines = (ROOT / "tests" / "stubtest.txt").read_text().splitlines()
    allowed = [line for line in lines if not line.startswith("#")]
    assert allowed == ["hybridcache._core.Core", "hybridcache._core.Options"]
