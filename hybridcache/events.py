"""KV events in vLLM's wire format, for cache-aware routers. Extra `events` (msgspec, pyzmq).

Owns the translation of `HybridCache.take_events()` into that format, chained hashes in place of page ids, and
a publisher over ZMQ with sequence numbers and replay (docs/events.md). Knows no tree: what it is told is all
it has. Pages are group 0, states group 1: a prompt resumes where group 1 has its hash, nowhere else.

    cache = HybridCache(layout, memory_bytes=..., events=True)
    with Publisher("tcp://*:5557", replay="tcp://*:5558") as publisher:
        ...                                       # an engine step
        publisher.publish(cache.take_events())
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from hybridcache.values import (
    CheckpointRemoved,
    CheckpointStored,
    Cleared,
    Event,
    Int32,
    PagesRemoved,
    PagesStored,
)

ATTENTION, RECURRENT = 0, 1  # group_idx
END_SEQ = b"\xff" * 8  # in place of a sequence number: the replay is over
_ROOT = bytes(32)
_SEND_TIMEOUT_MS = 10_000
_LINGER_MS = 1_000
_pack = msgspec.msgpack.Encoder().encode
_PLAIN = _pack((None, ()))  # msgpack says where it ends, so what follows it cannot be taken for it
_log = logging.getLogger(__name__)

Hash = int | bytes
ExtraKeys = tuple[Any, ...] | None


# ---- the wire format


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """Pages or a state that can be had from now on. What has no default is sent even if it is None.

    Of vLLM's fields those that have something to say here; it has more behind them, all None by default.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[ExtraKeys] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    """Pages or a state that have gone."""

    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, tag=True):
    """Nothing is left, of any group."""


WireEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one message carries: an array of these three."""

    ts: float
    events: list[WireEvent]
    data_parallel_rank: int | None = None


# ---- hashes


def chained(before: bytes, salt: bytes, tokens: bytes, contents: Sequence[tuple[int, bytes]]) -> bytes:
    """The sha256 of what one page or state stands for, and of all above it.

    before: the digest of the page above; of the first of a path b"", and only there the salt counts. tokens:
    little-endian int32. contents: (index in these tokens, bytes).
    """
    head = _pack((None if before else salt, contents)) if contents or not before else _PLAIN
    return hashlib.sha256((before or _ROOT) + head + tokens).digest()


def _text(raw: bytes) -> str:
    """Bytes as text, different ones differently: as they are if that is possible, else in hexadecimal."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "hex:" + raw.hex()
    return "hex:" + raw.hex() if text.startswith("hex:") else text


def _extra_keys(first: bool, salt: bytes, contents: Sequence[tuple[int, bytes]]) -> ExtraKeys:
    keys = (*((_text(each), at) for at, each in contents), *([_text(salt)] if first and salt else []))
    return keys or None


# ---- translation


def _part(contents: dict[int, bytes], begin: int, size: int) -> list[tuple[int, bytes]]:
    """Those of `size` tokens, by index in them."""
    return [(at - begin, each) for at, each in contents.items() if begin <= at < begin + size]


class Announcer:
    """Turns the events of one cache into those of the wire, and remembers the hash of each page and state.

    attention_kind, recurrent_kind: `kv_cache_spec_kind` of the two groups; "mla_attention" for a model with
    MLA. whole_digests: hashes are 32 bytes, not the integer in the last 8 of them. medium: of the arena.
    """

    def __init__(
        self,
        *,
        attention_kind: str = "full_attention",
        recurrent_kind: str = "mamba",
        whole_digests: bool = False,
        medium: str = "GPU",
    ) -> None:
        self._kinds = (attention_kind, recurrent_kind)
        self._whole_digests = whole_digests
        self._medium = medium
        self._pages: dict[int, bytes] = {}
        self._states: dict[int, bytes] = {}  # by slot
        self._alike: Counter[bytes] = Counter()  # pages by digest; with lookahead, two may be alike

    def announce(self, events: Iterable[Event]) -> list[WireEvent]:
        """The same in the words of the wire, in order. O(tokens)."""
        found: list[WireEvent] = []
        for event in events:
            if isinstance(event, PagesStored):
                self._pages_stored(event, found)
            elif isinstance(event, PagesRemoved):
                self._removed(ATTENTION, [d for page in event.pages for d in self._forgotten(page)], found)
            elif isinstance(event, CheckpointStored):
                self._checkpoint_stored(event, found)
            elif isinstance(event, CheckpointRemoved):
                self._removed(RECURRENT, [self._states.pop(event.slot)], found)
            elif isinstance(event, Cleared):
                for each in (self._pages, self._states, self._alike):
                    each.clear()
                found.append(AllBlocksCleared())
            else:
                raise TypeError(f"events: {event!r}, expected what take_events() returns")
        return found

    def _pages_stored(self, event: PagesStored, found: list[WireEvent]) -> None:
        size = len(event.tokens) // len(event.pages)
        raw = event.tokens.astype("<i4", copy=False).tobytes()
        above = before = self._above(event.before)
        digests, extra, known = list[bytes](), list[ExtraKeys](), 0
        for number, page in enumerate(event.pages):
            begin = number * size
            inside = _part(event.contents, begin, size) if event.contents else []
            extra.append(_extra_keys(not before, event.salt, inside))
            before = chained(before, event.salt, raw[4 * begin : 4 * (begin + size)], inside)
            self._pages[page] = before
            self._alike[before] += 1
            digests.append(before)
            if self._alike[before] > 1:  # only the first of these pages: where two paths part
                known, above = number + 1, before
        if known < len(digests):
            new = slice(known, None)
            self._stored(ATTENTION, digests[new], above, event.tokens[known * size :], extra[new], found)

    def _checkpoint_stored(self, event: CheckpointStored, found: list[WireEvent]) -> None:
        above = self._above(event.before)
        contents = sorted(event.contents.items())
        raw = event.tokens.astype("<i4", copy=False).tobytes()
        digest = self._states[event.slot] = chained(above, event.salt, raw, contents)
        extra = _extra_keys(not above, event.salt, contents)
        self._stored(RECURRENT, [digest], above, event.tokens, [extra], found)

    def _above(self, page: int) -> bytes:
        return b"" if page < 0 else self._pages[page]

    def _forgotten(self, page: int) -> list[bytes]:
        """Its digest, if no other page has the same."""
        digest = self._pages.pop(page)
        self._alike[digest] -= 1
        if self._alike[digest]:
            return []
        del self._alike[digest]
        return [digest]

    def _hash(self, digest: bytes) -> Hash:
        return digest if self._whole_digests else int.from_bytes(digest[-8:], "big")

    def _stored(
        self,
        group: int,
        digests: list[bytes],
        above: bytes,
        tokens: Int32,
        extra: list[ExtraKeys],
        found: list[WireEvent],
    ) -> None:
        stored = BlockStored(
            [self._hash(each) for each in digests],
            self._hash(above) if above else None,
            tokens.tolist(),
            len(tokens) // len(digests),
            lora_id=None,
            medium=self._medium,
            lora_name=None,
            extra_keys=extra,
            group_idx=group,
            kv_cache_spec_kind=self._kinds[group],
        )
        found.append(stored)

    def _removed(self, group: int, digests: list[bytes], found: list[WireEvent]) -> None:
        if digests:
            found.append(BlockRemoved([self._hash(each) for each in digests], self._medium, group))


# ---- publishing


class Publisher:
    """Publishes the events of one cache (of one data-parallel rank; of its tensor-parallel ranks one).

    endpoint: of the PUB socket: [topic, sequence number (8 bytes, big-endian), msgpack of a KVEventBatch].
        Bound if it has a `*` or `::`, or is ipc or inproc; else connected to. `rank` is added to a port.
    replay: of a ROUTER socket, always bound. A request [empty, first sequence number] is answered with the
        messages from there on that are among the last `buffer` ones, and [empty, empty, END_SEQ, empty].
    announcer: how events are put; a plain `Announcer` if None.

    All work is done in a thread of its own; what goes wrong there is raised by the next `publish`.
    """

    def __init__(
        self,
        endpoint: str = "tcp://*:5557",
        *,
        replay: str | None = None,
        topic: str = "",
        rank: int = 0,
        buffer: int = 10_000,
        announcer: Announcer | None = None,
    ) -> None:
        if buffer < 1:
            raise ValueError(f"buffer: {buffer!r}, expected at least 1 message")
        if rank < 0:
            raise ValueError(f"rank: {rank!r}, expected at least 0")
        self._announcer = announcer or Announcer()
        self._topic, self._rank = topic.encode(), rank
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer)
        self._sequence = 0
        self._waiting: deque[Sequence[Event] | None] = deque()
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._closed = False
        self._context = zmq.Context()
        try:
            self._open(endpoint, replay, buffer)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="hybridcache-events", daemon=True)
        self._thread.start()

    def _open(self, endpoint: str, replay: str | None, buffer: int) -> None:
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(100_000)
        self.endpoint = _attach(self._publisher, _of_rank(endpoint, self._rank), _is_bound(endpoint))
        self._router: zmq.Socket[bytes] | None = None
        self.replay_endpoint: str | None = None
        if replay is not None:
            self._router = self._context.socket(zmq.ROUTER)
            # A ROUTER drops what does not fit, and hears of what was read at every half of the mark only.
            self._router.set_hwm(2 * (buffer + 1))
            self.replay_endpoint = _attach(self._router, _of_rank(replay, self._rank), True)
        self._bell, self._ring = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._ring.connect("inproc://bell")
        self._ring.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)

    def publish(self, events: Sequence[Event]) -> None:
        """Hands over what `take_events` gave; one message, or none if there is nothing to say. O(1); waits
        only where the thread is a thousand calls behind. RuntimeError if an earlier one could not be sent:
        routers are then to be told to start over, by a new cache and publisher."""
        with self._lock:
            if self._closed:
                raise RuntimeError("publish: the publisher is closed, expected an open one")
            if self._failed is not None:
                raise RuntimeError(f"publish: an earlier message failed: {self._failed!r}") from self._failed
            if events:
                self._hand_over(events)

    def close(self) -> None:
        """Sends what is left, and ends. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while self._thread.is_alive():
                with suppress(RuntimeError):  # it is far behind
                    self._hand_over(None)
                    break
        self._thread.join()
        self._ring.close(linger=0)
        self._context.term()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _hand_over(self, events: Sequence[Event] | None) -> None:
        self._waiting.append(events)
        try:
            self._ring.send(b"")
        except zmq.Again as error:
            self._waiting.pop()  # nobody was told of it
            self._failed = self._failed or error
            raise RuntimeError(f"publish: the thread does not get on: {self._failed!r}") from self._failed

    # ---- in the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._router is not None and self._router in ready:
                    self._replay(self._router)
                if self._bell in ready:
                    self._bell.recv()
                    events = self._waiting.popleft()
                    if events is None:
                        return
                    self._send(self._announcer.announce(events))
        except Exception as error:
            self._failed = error
            _log.exception("events: the publisher stops")
        finally:
            self._bell.close(linger=0)
            self._publisher.close(linger=_LINGER_MS)
            if self._router is not None:
                self._router.close(linger=_LINGER_MS)

    def _send(self, events: list[WireEvent]) -> None:
        if not events:
            return
        number = self._sequence.to_bytes(8, "big")
        payload = _pack(KVEventBatch(time.time(), events, self._rank))
        self._sequence += 1
        self._buffer.append((number, payload))
        self._publisher.send_multipart((self._topic, number, payload))

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        frames = router.recv_multipart()
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            _log.warning("events: a replay request of %s bytes, expected 0 and 8", [*map(len, frames[1:])])
            return
        client, _, first = frames
        for number, payload in self._buffer:
            if number >= first:  # big-endian: ordered as the numbers are
                router.send_multipart((client, b"", self._topic, number, payload))
        router.send_multipart((client, b"", b"", END_SEQ, b""))


def _is_bound(endpoint: str) -> bool:
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _of_rank(endpoint: str, rank: int) -> str:
    """Where this rank publishes: the port and `rank`, or the name with `_dp` and `rank`."""
    if rank == 0 or endpoint.endswith(":*"):
        return endpoint
    port = re.fullmatch(r"(tcp://.+:)(\d+)", endpoint)
    return f"{port[1]}{int(port[2]) + rank}" if port else f"{endpoint}_dp{rank}"


def _attach(socket: zmq.Socket[bytes], endpoint: str, bound: bool) -> str:
    """Binds or connects; the address, with its port where that was the system's to choose."""
    if not bound:
        socket.connect(endpoint)
        return endpoint
    socket.bind(endpoint)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
