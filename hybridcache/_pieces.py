"""Where a scan over several sequences is cut so that states stay at inner positions. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens [begin, end) of the packed ones, from slot to slot."""

    begin: int
    end: int
    read_slot: int
    write_slot: int


def rounds(
    inner: Sequence[tuple[int, int, int]], begins: list[int], reads: list[int], writes: list[int]
) -> list[list[Piece]]:
    """What is scanned at once: the first pieces of all sequences, then the second ones, and so on."""
    lengths = [end - begin for begin, end in pairwise(begins)]
    if len(lengths) != len(writes):
        raise ValueError(f"cu_seqlens: {len(begins)} numbers, expected {len(writes) + 1}")
    cuts = [{length: slot} for length, slot in zip(lengths, writes, strict=True)]  # position: slot
    for sequence, position, slot in inner:
        if not 0 <= sequence < len(cuts):
            raise ValueError(f"inner: sequence {sequence}, expected one of {len(cuts)}")
        if not 0 < position < lengths[sequence] or position in cuts[sequence]:
            raise ValueError(
                f"inner: position {position} of sequence {sequence}, expected each once, and in "
                f"[1, {lengths[sequence] - 1}]"
            )
        if slot < 0:
            raise ValueError(f"inner: slot {slot}, expected at least 0")
        cuts[sequence][position] = slot
    found: list[list[Piece]] = [[] for _ in range(max(map(len, cuts)))]
    for begin, read, ends in zip(begins, reads, cuts, strict=False):
        at = begin
        for number, (position, slot) in enumerate(sorted(ends.items())):
            found[number].append(Piece(at, begin + position, read, slot))
            at, read = begin + position, slot
    return found
