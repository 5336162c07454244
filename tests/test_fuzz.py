"""The fuzzer's corpus through the Python model, and the proof that both sides decode an input alike.

tests/fuzz/replay.py describes the format; `make fuzz` looks for more.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.replay import HEADER, Replay
from tests.harness import Harness
from tests.test_state_machine import EVENTS

FOLDER = Path(__file__).parent / "fuzz"
CORPUS = sorted((FOLDER / "corpus").iterdir())


@pytest.fixture(scope="module")
def replayed() -> dict[Path, Harness]:
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
    assert not [name for name in EVENTS if not events[name]], events
    assert sum(h.steps for h in replayed.values()) > 20 * len(CORPUS)


def test_the_corpus_covers_the_options(replayed: dict[Path, Harness]) -> None:
    configs = [h.config for h in replayed.values()]
    for name in ("run_ahead", "inner_checkpoints", "alignment", "policy"):
        assert len({config.options[name] for config in configs}) == 2, name
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
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: the fuzzer's walk cannot be built")
    out = tmp_path_factory.mktemp("walk")
    subprocess.run([FOLDER / "build.sh", out, "g++", "-O0", "walk"], check=True)
    return out / "walk"


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
