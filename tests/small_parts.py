"""To import this makes the edges of every cache stand in parts of 8 tokens, not of 512: the short prompts of
the tests would never see a second part. `parts_of(512)` makes them as they are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hybridcache import _core


class SmallParts(_core.Options):
    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.small_part = SmallParts.size


@contextmanager
def parts_of(size: int) -> Iterator[None]:
    """Caches made within have parts of so many tokens."""
    before, SmallParts.size = SmallParts.size, size
    try:
        yield
    finally:
        SmallParts.size = before


vars(_core)["Options"] = SmallParts
