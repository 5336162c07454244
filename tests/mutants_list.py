"""What the mutation run (mutants.py) breaks: reads the mutants, what each stands for, and checks them.

The mutants are data, in mutants_life.py, mutants_steps.py, mutants_policy.py, mutants_store.py and
mutants_outer.py, each as

    name: what it breaks, invariants and names of BUGS
    - the exact snippet of the file, which occurs once
    + what stands there instead; nothing: the snippet is deleted

Each must be observable: one that no test could ever notice has no place here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import mutants_life, mutants_outer, mutants_policy, mutants_steps, mutants_store

ROOT = Path(__file__).resolve().parents[1]
INVARIANTS = tuple(f"I{n}" for n in range(1, 13))

# What really happened in other caches.
BUGS = {
    "live-published": "the moving live state is published in place of the checkpoint",
    "other-depth": "a state attached to, or published at, a node of another depth",
    "state-too-far": "a state that has read more than was accepted is published for a boundary inside it",
    "longer-index": "the match is capped shorter, the state or length of the longer one is used",
    "into-children": "after a partial match inside a child the walk goes on into that child's children",
    "not-written": "a slot is published before, or without, being written",
    "not-zeroed": "a recycled page is read before it is zeroed",
    "zero-state": "a step starts from a zero state, or from what a slot held before",
    "late-write": "a late write lands in a slot or page that already belongs to another request",
    "duplicates-freed": "duplicates are freed, or page ids change, while a page table names them",
    "donated-written": "a donated slot is still written by its old owner",
    "dangling-order": "the order of eviction points at a node that has gone, or misplaces it",
    "leak-on-refusal": "something leaks where admission fails",
    "leftovers": "leftovers of a cancelled or ended request",
    "tail-evicted": "a tail is freed although its page lives on, or the other way round",
    "optional-fails": "an optional checkpoint fails a request",
    "no-spare-slot": "a request alone in the cache hangs for want of a spare slot",
    "more-than-owned": "more pages or slots are taken than there are",
    "two-budgets": "states and KV starve each other",
    "reserved-slots": "more slots are reserved for a request than it needs",
    "chunk-grain": "a chunk size off the grain makes no reusable boundary",
    "first-branch": "a shared prefix with another suffix hits nothing until the third sighting",
    "identical-prompt": "an identical prompt hits nothing",
    "deep-fork": "a fork deep inside a long prompt hits nothing",
    "whole-path": "the whole path is refreshed on a hit",
    "wrong-victim": "states that forks need, or that are newer, leave first",
    "pointer-order": "ties are broken by addresses, or equal calls need not give equal decisions",
    "key-dropped": "salt or content is missing from a key",
    "learned": "a kind of checkpoint is made, or not made, against what its use says",
    "cap": "the cap on cached bytes or the caller's wish to keep nothing is ignored",
    "order-of-calls": "a call out of order is accepted",
    "drafts": "a step that verifies drafts begins, ends, reads or writes where it should not, or is refused",
    "uncounted": "times or counts are not those of what was called",
    "mirror": "what routers are told is not what the tree holds",
    "wrong-bytes": "a view or a copy touches other bytes than it should",
}


class Mutant(NamedTuple):
    name: str
    breaks: tuple[str, ...]  # of INVARIANTS and BUGS
    file: str
    old: str
    new: str

    def applied_to(self, text: str) -> str:
        """The file's text with this mutant in it. ValueError unless `old` occurs exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: occurs {text.count(self.old)} times in {self.file}, expected once"
            )
        return text.replace(self.old, self.new)


def read(file: str, text: str) -> Iterator[Mutant]:
    """The mutants of one file, from the form above."""
    found: list[tuple[str, list[str], list[str]]] = []
    for line in text.strip().splitlines():
        if line[0] in "-+":
            found[-1][1 + (line[0] == "+")].append(line[2:])
        else:
            found.append((line, [], []))
    for head, old, new in found:
        name, breaks = head.split(": ")
        yield Mutant(name, tuple(breaks.split()), file, "\n".join(old), "\n".join(new))


def all_mutants() -> list[Mutant]:
    sources = (mutants_store, mutants_life, mutants_steps, mutants_policy, mutants_outer)
    files = {file: text for source in sources for file, text in source.FILES.items()}
    return [mutant for file, text in files.items() for mutant in read(file, text)]


def mistakes(mutants: list[Mutant]) -> Iterator[str]:
    """What is wrong with the list itself: snippets that no longer apply, names, gaps."""
    known = {*INVARIANTS, *BUGS}
    for mutant in mutants:
        try:
            mutant.applied_to((ROOT / mutant.file).read_text())
        except ValueError as error:
            yield str(error)
        if unknown := set(mutant.breaks) - known:
            yield f"{mutant.name}: breaks {sorted(unknown)}, expected an invariant or a name of BUGS"
    names = [m.name for m in mutants]
    yield from (f"{name}: appears twice" for name in sorted({n for n in names if names.count(n) > 1}))
    covered = {each for m in mutants for each in m.breaks}
    yield from (f"{each}: no mutant breaks it" for each in sorted(known - covered))


def table(mutants: list[Mutant]) -> str:
    """What is broken, and by which mutants, in markdown."""
    rows = ["| what is broken | mutants |", "|---|---|"]
    for key in (*INVARIANTS, *BUGS):
        names = ", ".join(f"`{m.name}`" for m in mutants if key in m.breaks)
        rows.append(f"| {BUGS.get(key, key)} | {names} |")
    return "\n".join(rows)
