"""A transcript as the oracle knows it: a list of symbols under a salt, and nothing remembered about the tree.

Asking for a transcript is asking for its list (docs/design.md, "Transcripts"), so whatever the core remembers
of one must never show. A part of Oracle (oracle.py), which counts the open ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.oracle_store import Symbol


@dataclass(eq=False)
class Transcript:
    salt: bytes
    symbols: list[Symbol] = field(default_factory=list)
    closed: bool = False

    def extend(self, tokens: Iterable[int], *, content_keys: Iterable[Any] = ()) -> None:
        before = len(self.symbols)
        keys = [(position - before, content) for position, content in content_keys]
        self.symbols += symbols(tokens, keys)

    def truncate(self, length: int) -> None:
        del self.symbols[length:]

    @property
    def tokens(self) -> list[int]:
        """As given: without what some of them stand for."""
        return [s[0] if isinstance(s, tuple) else s for s in self.symbols]


class Transcripts:
    transcripts: list[Transcript]  # the open ones

    def transcript(self, *, salt: bytes = b"") -> Transcript:
        self.transcripts.append(Transcript(salt))
        return self.transcripts[-1]

    def close_transcript(self, transcript: Transcript) -> None:
        self.transcripts.remove(transcript)
        transcript.closed = True


def asked(
    prompt: Transcript | Sequence[int], salt: bytes, content_keys: Iterable[Any]
) -> tuple[tuple[Symbol, ...], bytes]:
    """The path and the salt that a caller asks for: in a transcript, or token by token."""
    if not isinstance(prompt, Transcript):
        return symbols(prompt, content_keys), salt
    if not prompt.symbols:
        raise ValueError("tokens")
    return tuple(prompt.symbols), prompt.salt


def symbols(tokens: Iterable[int], content_keys: Iterable[Any]) -> tuple[Symbol, ...]:
    found: list[Symbol] = [int(t) for t in tokens]
    for position, content in content_keys:
        found[position] = (found[position], content)
    return tuple(found)
