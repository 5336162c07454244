"""Chooses the committed corpus out of what the fuzzer found: few inputs that reach most.

Asks main_edges.cpp which edges of the core each input reaches, and replays it for the rare moments that it
brings about (MOMENTS). Rewrites tests/fuzz/corpus. Used by `tests/fuzz/run.sh corpus`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.fuzz.replay import Replay
from tests.test_state_machine import EVENTS
from tests.walk_events import TRANSCRIPT_EVENTS

CORPUS = Path(__file__).parent / "corpus"
MOST = 180  # files
BYTES_A_FILE = 1000  # what a file costs beside its bytes
MOMENT = 10  # what a rare moment counts beside an edge
# Those of the walk, and what only drafts bring about.
MOMENTS = tuple(dict.fromkeys((*EVENTS, "lost", "rows_passed_on", "forked", *TRANSCRIPT_EVENTS)))
OPTIONS = ("run_ahead", "draft_tokens", "inner_checkpoints", "alignment", "policy")


def edges(program: str, paths: list[Path]) -> dict[Path, set[object]]:
    done = subprocess.run([program, *map(str, paths)], check=True, capture_output=True, text=True)
    return {path: set(line.split()) for path, line in zip(paths, done.stdout.splitlines(), strict=True)}


def moments(path: Path) -> set[object]:
    """The rare moments, each up to 32 times, and the options."""
    h = Replay(path.read_bytes()).run()
    events, chosen = h.total_events(), h.config
    options = {(name, chosen.options[name]) for name in OPTIONS}
    options |= {
        ("page_size", chosen.page_size),
        ("lookahead", chosen.lookahead),
        ("fixed", bool(chosen.pages)),
    }
    return options | {(name, 2**n) for name in MOMENTS for n in range(6) if events[name] >= 2**n}


def worth(reached: set[object]) -> int:
    return sum(MOMENT if isinstance(each, tuple) else 1 for each in reached)


def choose(reached: dict[Path, set[object]]) -> list[Path]:
    """Greedy: whatever adds most for its size, first."""
    left, chosen = set().union(*reached.values()), []
    sizes = {path: BYTES_A_FILE + path.stat().st_size for path in reached}
    while left and len(chosen) < MOST:
        best = max(sorted(reached), key=lambda path: worth(reached[path]) / sizes[path])
        left -= reached.pop(best)
        chosen.append(best)
        reached = {path: more for path, has in reached.items() if (more := has & left)}
    size = sum(path.stat().st_size for path in chosen)
    print(f"{len(chosen)} inputs, {size:,} bytes; not reached: {len(left)}")
    return chosen


def main() -> None:
    program, *folders = sys.argv[1:]
    paths = sorted(path for folder in (CORPUS, *map(Path, folders)) for path in folder.iterdir())
    reached = {path: has | moments(path) for path, has in edges(program, paths).items()}
    contents = [path.read_bytes() for path in choose(reached)]
    for path in CORPUS.iterdir():
        path.unlink()
    for content in contents:
        (CORPUS / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)


if __name__ == "__main__":
    main()
