"""A router's view of one cache: which pages and checkpoints it holds, built from its events alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hybridcache.values import (
    CheckpointRemoved,
    CheckpointStored,
    Cleared,
    Event,
    PagesRemoved,
    PagesStored,
)

Path = tuple[bytes, tuple[Any, ...]]  # salt, tokens; those with content as (token, content)


def symbols(tokens: Iterable[int], contents: dict[int, bytes]) -> tuple[Any, ...]:
    return tuple(
        (token, contents[i]) if i in contents else token
        for i, token in enumerate(np.asarray(tokens).tolist())
    )


def plain(events: Iterable[Event]) -> list[Any]:
    """With tokens as lists, which can be compared."""
    return [e._replace(tokens=e.tokens.tolist()) if hasattr(e, "tokens") else e for e in events]


class Mirror:
    """Fails where an event cannot be: a page stored twice, removed but not there, without the one above."""

    def __init__(self) -> None:
        self.pages: dict[int, Path] = {}
        self.checkpoints: dict[int, Path] = {}
        self.above: dict[int, int] = {}

    def apply(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, PagesStored):
                self.store_pages(event)
            elif isinstance(event, PagesRemoved):
                for page in event.pages:
                    assert page not in self.above.values(), "it has one below it"
                    del self.pages[page], self.above[page]
            elif isinstance(event, CheckpointStored):
                assert event.slot not in self.checkpoints
                self.checkpoints[event.slot] = self.path(event)
                assert len(self.checkpoints[event.slot][1]) == event.position
            elif isinstance(event, CheckpointRemoved):
                del self.checkpoints[event.slot]
            else:
                assert isinstance(event, Cleared)
                for each in (self.pages, self.checkpoints, self.above):
                    each.clear()

    def path(self, event: PagesStored | CheckpointStored) -> Path:
        """Down to the last token of the event."""
        salt, above = (event.salt, ()) if event.before < 0 else self.pages[event.before]
        assert salt == event.salt
        return salt, above + symbols(event.tokens, event.contents)

    def store_pages(self, event: PagesStored) -> None:
        salt, path = self.path(event)
        size, left = divmod(len(event.tokens), len(event.pages))
        assert not left
        for number, page in enumerate(event.pages):
            assert page not in self.pages
            self.above[page] = event.pages[number - 1] if number else event.before
            self.pages[page] = (salt, path[: len(path) - (len(event.pages) - 1 - number) * size])
