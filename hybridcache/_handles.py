"""What a caller holds beside leases: a Pin on a checkpoint, and a Transcript of a session's tokens.

Owns an id of the core each, and the checking of arguments that are not tokens. Both belong to one cache.
"""

from __future__ import annotations

from typing import Any

from hybridcache import _core
from hybridcache._arguments import ContentKeys, check_content_keys, check_integer
from hybridcache.errors import StateError
from hybridcache.values import Int32


class Pin:
    """Keeps one checkpoint and the path to it from being evicted, until `release` or the end of a `with`."""

    def __init__(self, core: _core.Core, pin_id: int, length: int) -> None:
        self._core = core
        self._id = pin_id
        self.length = length  # position of the checkpoint, tokens
        self.released = False

    def release(self) -> None:
        """Lets go. StateError if it was released."""
        self._core.release(self._id)
        self.released = True

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.released:
            self.release()


class Transcript:
    """An append-only log of one session's tokens, from `HybridCache.transcript` until `close`.

    `cache.match(t)` and `cache.reserve(t)` give what they give for its tokens, and cost what was appended
    since the last time. It keeps no page and nothing from being evicted, and follows no lease: what `commit`
    told a lease, `extend` has to tell it.

    >>> from hybridcache import HybridCache
    >>> from types import SimpleNamespace
    >>> cache = HybridCache(SimpleNamespace(page_size=4, page_bytes=64, slot_bytes=128), memory_bytes=4096)
    >>> t = cache.transcript()
    >>> t.extend([1, 2, 3])
    >>> len(t), cache.match(t).length
    (3, 0)
    """

    def __init__(self, core: _core.Core, number: int, salt: bytes) -> None:
        self._core = core
        self._id = number
        self._length = 0
        self.salt = salt
        self.closed = False

    def __len__(self) -> int:
        if self.closed:
            raise StateError(f"transcript: number {self._id} is closed, an open one was expected")
        return self._length

    @property
    def tokens(self) -> Int32:
        """All of its ids, int32 [L], a copy."""
        return self._core.transcript_tokens(self._id)

    def extend(self, tokens: Any, *, content_keys: ContentKeys = ()) -> None:
        """Appends.

        tokens: as for `HybridCache.match`, or none. content_keys: (position in the transcript, bytes) of what
        is appended, ascending. ValueError, and nothing appended, if one is wrong. O(tokens).
        """
        self._length = self._core.extend(self._id, tokens, check_content_keys(content_keys))

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens. ValueError unless 0 <= length <= len. O(tokens that go)."""
        self._length = self._core.truncate(self._id, check_integer("length", length, low=-(2**62)))

    def close(self) -> None:
        """Ends it. StateError if it was closed."""
        self._core.close_transcript(self._id)
        self.closed = True

    def __enter__(self) -> Transcript:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.closed:
            self.close()

    def of(self, core: _core.Core, salt: bytes, content_keys: ContentKeys) -> int:
        """Its number, for a call on `core` that was given nothing else beside it."""
        if core is not self._core:
            raise ValueError(f"tokens: transcript {self._id} of another cache, expected one of this cache")
        if salt != b"" or tuple(content_keys):
            raise ValueError(
                f"salt, content_keys: {salt!r}, {content_keys!r}, expected none beside a transcript"
            )
        return self._id
