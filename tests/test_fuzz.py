"""The fuzzer's corpus through the Python model, and the proof that both sides decode an input alike.

tests/fuzz/replay.py describes the format; `make fuzz` looks for more.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.choose import MOMENTS
from tests.fuzz.replay import HEADER, Replay
from tests.harness import Harness

FOLDER = Path(__file__).parent / "fuzz"
CORPUS = sorted((FOLDER / "corpus").iterdir())
WALK = FOLDER.parent.parent / "build" / "walk"


@pytest.fixture(scope="module")
def building() -> Iterator[subprocess.Popen[bytes] | None]:
    """The C++ walk, built while the corpus is replayed; in the tree's build/, where only what has changed is
    compiled the next time."""
    if shutil.which("g++") is None:
        yield None
        return
    core = max(WALK.parent.glob("temp*/csrc"), default="")  # what setup.py has compiled
    build = subprocess.Popen(
        [FOLDER / "build.sh", WALK, "g++", "-O0", "walk"], env={**os.environ, "CORE_OBJECTS": str(core)}
    )
    yield build
    build.wait()


@pytest.fixture(scope="module")
def replayed(building: object) -> dict[Path, Harness]:
    """Every input of the corpus beside the oracle, compared after each op."""
    found = {}
    for path in CORPUS:
        try:
            found[path] = Replay(path.read_bytes()).run()
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from error
    return found


def test_the_corpus_brings_about_every_rare_moment(replayed: dict[Path, Harness]) -> None:
    events: Counter[str] = Counter()
    for h in replayed.values():
        events += h.total_events()
    assert not [name for name in MOMENTS if not events[name]], events
    assert sum(h.steps for h in replayed.values()) > 20 * len(CORPUS)


def test_the_corpus_covers_the_options(replayed: dict[Path, Harness]) -> None:
    configs = [h.config for h in replayed.values()]
    for name in ("run_ahead", "inner_checkpoints", "alignment", "policy"):
        assert len({config.options[name] for config in configs}) == 2, name
    assert {config.options["draft_tokens"] for config in configs} == set(range(8))
    assert {config.lookahead for config in configs} == {0, 1}
    assert len({config.page_size for config in configs}) == 6
    assert {bool(config.pages) for config in configs} == {False, True}
    assert {"max_cached_bytes" in config.options for config in configs} == {False, True}


def test_the_corpus_is_small() -> None:
    assert 50 <= len(CORPUS) <= 200 and sum(path.stat().st_size for path in CORPUS) < 200_000


def test_an_input_may_end_anywhere() -> None:
    data = random.Random(3).randbytes(60)
    for length in range(len(data)):
        h = Replay(data[:length]).run()
        assert (h.steps > 2) == (length > HEADER)


@pytest.fixture(scope="module")
def walk(building: subprocess.Popen[bytes] | None) -> Path:
    if building is None:
        pytest.skip("no g++ here: the fuzzer's walk cannot be built")
    assert building.wait() == 0
    return WALK / "walk"


def test_both_sides_decode_an_input_alike(replayed: dict[Path, Harness], walk: Path, tmp_path: Path) -> None:
    """The digest hashes every decision: it is equal only if the calls were."""
    digests = {path: h.core.digest for path, h in replayed.items()}
    draw = random.Random(4)
    for number in range(60):
        path = tmp_path / str(number)
        path.write_bytes(draw.randbytes(draw.randrange(300)))
        digests[path] = Replay(path.read_bytes()).run().core.digest
    done = subprocess.run([walk, "--digest", *digests], check=True, capture_output=True, text=True)
    theirs = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    assert theirs == {str(path): str(digest) for path, digest in digests.items()}
    assert len(set(theirs.values())) > len(CORPUS) / 2
