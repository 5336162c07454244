"""The wire: what a router decodes with a schema of its own, over real ZMQ, is what the tree holds.

The structs here are written after the format that consumers document, not imported from the publisher: a
message is [topic, 8 bytes big-endian, msgpack], the msgpack an array [ts, events, data_parallel_rank], an
event a map with its name under "type".
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from hybridcache.values import Cleared, PagesStored
from tests.actions import random_walk
from tests.conftest import Driver, tokens
from tests.event_mirror import symbols
from tests.harness import Harness
from tests.test_events import ACTIONS, holdings, make_core

msgspec = pytest.importorskip("msgspec")
zmq = pytest.importorskip("zmq")

from hybridcache.events import Announcer, KVEventBatch, Publisher  # noqa: E402

Hash = int | bytes
PATIENCE_S = 30.0


class Stored(msgspec.Struct, tag="BlockStored", forbid_unknown_fields=True):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", forbid_unknown_fields=True):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllCleared(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
    pass


class Batch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    ts: float
    events: list[Stored | Removed | AllCleared]
    data_parallel_rank: int | None = None


decode = msgspec.msgpack.Decoder(Batch).decode


def over_the_wire(events: list[Any]) -> list[Any]:
    return decode(msgspec.msgpack.encode(KVEventBatch(0.0, events, 0))).events


class Router:
    """Hashes of both groups with the path that each stands for; nothing is known but what was decoded."""

    def __init__(self) -> None:
        self.groups: tuple[dict[Hash, Any], dict[Hash, Any]] = ({}, {})

    def apply(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, AllCleared):
                for group in self.groups:
                    group.clear()
            elif isinstance(event, Removed):
                assert event.block_hashes and event.medium == "GPU"
                for each in event.block_hashes:
                    del self.groups[event.group_idx][each]
            else:
                self.store(event)

    def store(self, event: Any) -> None:
        group, pages = self.groups[event.group_idx], self.groups[0]
        assert event.kv_cache_spec_kind == ("full_attention", "mamba")[event.group_idx]
        assert (event.lora_id, event.lora_name, event.medium) == (None, None, "GPU")
        assert len(event.token_ids) == event.block_size * len(event.block_hashes)
        assert len(event.extra_keys) == len(event.block_hashes)
        salt, path = ("", ()) if event.parent_block_hash is None else pages[event.parent_block_hash]
        for number, (each, extra) in enumerate(zip(event.block_hashes, event.extra_keys, strict=True)):
            extra = list(extra or ())
            if not path and extra and isinstance(extra[-1], str):
                salt = extra.pop()
            own = event.token_ids[number * event.block_size : (number + 1) * event.block_size]
            path += symbols(own, {at: text.encode() for text, at in extra})
            assert each not in group, "announced twice"
            group[each] = (salt, path)


def test_a_routers_index_equals_the_tree_at_every_step() -> None:
    seen: Counter[str] = Counter()
    """Also where events are taken so seldom that most of them are dropped, and all is told anew."""
    for seed in range(300, 340):
        router, announcer = Router(), Announcer(whole_digests=bool(seed % 2))
        draw, seldom = random.Random(seed), seed % 4 == 3

        def compare(
            h: Harness,
            router: Router = router,
            announcer: Announcer = announcer,
            draw: random.Random | None = draw if seldom else None,
        ) -> None:
            if draw is not None and draw.randrange(6):
                return
            events = h.core.take_events()
            seen["anew"] += draw is not None and len(events) > 1 and events[0] == Cleared()
            router.apply(over_the_wire(announcer.announce(events)))
            pages, checkpoints = holdings(h)
            told = [{(salt.encode(), path) for salt, path in group.values()} for group in router.groups]
            assert told == [set(pages.values()), set(checkpoints.values())]
            assert len(router.groups[1]) == len(checkpoints)
            seen["alike"] += len(told[0]) < len(pages)
            seen["pages"] += len(pages)
            seen["states"] += len(checkpoints)

        core = partial(make_core, event_capacity=30 if seldom else None)
        random_walk(seed, 150, core, after=compare, actions=ACTIONS)
    assert min(seen.values()) > 30, seen


# ---- the format


def announced(driver: Driver, **options: Any) -> list[Any]:
    return Announcer(**options).announce(driver.cache.take_events())


def test_the_bytes_of_a_message() -> None:
    """Key by key as a consumer prints them: what has no default is there even if it is nil."""
    driver = Driver(events=True)
    driver.turn([11, 12, 13, 14, 15])
    driver.cache.clear()
    wire = announced(driver)
    payload = msgspec.msgpack.encode(KVEventBatch(1.5, wire, 3))
    ts, events, rank = msgspec.msgpack.decode(payload)
    assert (ts, rank) == (1.5, 3)
    assert events[-1] == {"type": "AllBlocksCleared"}
    assert events[0] == {
        "type": "BlockStored",
        "block_hashes": wire[0].block_hashes,
        "parent_block_hash": None,
        "token_ids": [11, 12, 13, 14],
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    assert list(events[0]) == [
        *("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id"),
        *("medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"),
    ]
    assert events[1]["group_idx"] == 1 and events[1]["kv_cache_spec_kind"] == "mamba"
    driver.turn([11, 12, 13, 14, 15])
    driver.turn([21, 22, 23, 24, 25])
    announcer = Announcer()
    announcer.announce(driver.cache.take_events())
    driver.cache.pin([21, 22, 23, 24, 25])
    driver.cache.clear()
    gone = msgspec.msgpack.decode(
        msgspec.msgpack.encode(KVEventBatch(0.0, announcer.announce(driver.cache.take_events())))
    )
    assert gone[2] is None
    assert {tuple(event) for event in gone[1]} == {("type", "block_hashes", "medium", "group_idx")}
    assert sorted(event["group_idx"] for event in gone[1]) == [0, 1]


def by_hand(path: list[int], salt: bytes, size: int, contents: dict[int, bytes]) -> list[bytes]:
    """The chained hashes, written after docs/events.md."""
    found, before = [], b""
    for begin in range(0, len(path), size):
        inside = [[at - begin, c] for at, c in sorted(contents.items()) if begin <= at < begin + size]
        head = msgspec.msgpack.encode([None if before else salt, inside])
        own = struct.pack(f"<{len(path[begin : begin + size])}i", *path[begin : begin + size])
        before = hashlib.sha256((before or b"\0" * 32) + head + own).digest()
        found.append(before)
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_hashes_are_chained_and_salted(salt: bytes, whole: bool) -> None:
    driver, path, contents = Driver(events=True), tokens(18).tolist(), {3: b"x", 9: b"y", 10: b"\xff"}
    driver.turn(path, salt=salt, content_keys=sorted(contents.items()))
    wire = announced(driver, whole_digests=whole)
    expected = by_hand(path, salt, 4, contents)
    numbers = expected if whole else [int.from_bytes(each, "big") % 2**64 for each in expected]
    assert [h for event in wire if event.group_idx == 0 for h in event.block_hashes] == numbers[:4]
    [end] = [e for e in wire if e.group_idx == 1 and len(e.token_ids) == 2 and e.token_ids == path[16:]]
    assert (end.block_hashes, end.parent_block_hash, end.block_size) == ([numbers[4]], numbers[3], 2)
    stored = [event for event in wire if event.group_idx == 0]
    assert stored[0].extra_keys[0] == (("x", 3),) + ((salt.decode(),) if salt else ())
    assert [keys for event in stored for keys in event.extra_keys][2] == (("y", 1), ("hex:ff", 2))


def test_two_salts_share_no_hash_and_look_different() -> None:
    driver = Driver(events=True)
    salts = [b"", b"a", b"hex:ff", b"\xff", b"hex:6865783a6666"]
    for salt in salts:
        driver.turn([1, 2, 3, 4, 5], salt=salt)
    stored = [event for event in announced(driver) if event.group_idx == 0]
    assert len({event.block_hashes[0] for event in stored}) == len(salts)
    assert len({event.extra_keys[0] for event in stored}) == len(salts)


def test_the_kinds_and_the_medium_are_the_callers() -> None:
    driver = Driver(events=True)
    driver.turn([1, 2, 3, 4, 5])
    wire = announced(driver, attention_kind="mla_attention", recurrent_kind="linear", medium="CPU")
    assert {event.kv_cache_spec_kind for event in wire} == {"mla_attention", "linear"}
    assert {event.medium for event in wire} == {"CPU"}


def test_pages_without_a_state_are_never_announced_as_resumable() -> None:
    """24 tokens, of which a lease has computed the first 16 in one step: KV, and no state."""
    driver = Driver(events=True, interior_spacing=10**6)
    lease = driver.cache.reserve(tokens(40))
    assert lease is not None
    driver.step(lease, 16)
    wire = announced(driver)
    assert wire and {event.group_idx for event in wire} == {0}
    assert driver.cache.match(tokens(40)).length == 0


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(TypeError, match="events: 'x', expected what take_events"):
        Announcer().announce(["x"])  # type: ignore[list-item]


# ---- over ZMQ


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def events_of(count: int, first: int = 0) -> Iterator[list[Any]]:
    """So many calls' worth of events, a page each."""
    for number in range(first, first + count):
        yield [PagesStored(b"", -1, [number], np.full(4, number, np.int32), {})]


def replayed(context: Any, publisher: Publisher, first: int) -> list[tuple[bytes, int, bytes]]:
    """Asks for all messages from `first` on, as a router does that has missed some."""
    with context.socket(zmq.DEALER) as client:
        client.set_hwm(0)
        client.connect(publisher.replay_endpoint)
        client.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        while client.poll(int(1000 * PATIENCE_S)):
            empty, topic, number, payload = client.recv_multipart()
            assert empty == b""
            if number == (-1).to_bytes(8, "big", signed=True):
                assert (topic, payload) == (b"", b"")
                return found
            found.append((topic, int.from_bytes(number, "big"), payload))
        raise AssertionError("the replay did not end")


def until_sent(context: Any, publisher: Publisher, count: int) -> list[tuple[bytes, int, bytes]]:
    """All messages, once so many have been sent."""
    until = time.monotonic() + PATIENCE_S
    while len(found := replayed(context, publisher, 0)) < count:
        assert time.monotonic() < until
    return found


def test_subscribers_get_messages_in_sequence_and_the_missed_by_replay(context: Any) -> None:
    driver, router, rng, sent = Driver(events=True, slabs=24), Router(), random.Random(0), 0

    def turn(publisher: Publisher, seed: int) -> None:
        nonlocal sent
        driver.turn(tokens(20, seed=seed), [1, 2])
        publisher.publish(driver.cache.take_events())
        sent += 1

    with (
        Publisher("tcp://127.0.0.1:*", replay="tcp://127.0.0.1:*", topic="kv@a", rank=2) as publisher,
        context.socket(zmq.SUB) as subscriber,
    ):
        for seed in range(3):
            turn(publisher, seed)
        until_sent(context, publisher, 3)
        subscriber.connect(publisher.endpoint)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        until = time.monotonic() + PATIENCE_S
        while not subscriber.poll(20):  # a subscription takes a while to arrive
            assert time.monotonic() < until
            turn(publisher, rng.randrange(10**6))
        for seed in range(40):
            turn(publisher, 10**6 + seed)
        publisher.publish(driver.cache.take_events())  # nothing: no message
        turn(publisher, 2 * 10**6)
        live: list[tuple[int, bytes]] = []
        while not live or live[-1][0] < sent - 1:
            assert subscriber.poll(int(1000 * PATIENCE_S))
            topic, number, payload = subscriber.recv_multipart()
            assert topic == b"kv@a" and len(number) == 8
            live.append((int.from_bytes(number, "big"), payload))
        assert live[0][0] >= 3, "the first three were published before it connected"
        missed = [(n, payload) for topic, n, payload in replayed(context, publisher, 0) if n < live[0][0]]
        assert [n for n, _ in (*missed, *live)] == list(range(sent))
        assert len(missed) >= 3
        for _, payload in (*missed, *live):
            batch = decode(payload)
            assert batch.data_parallel_rank == 2 and abs(batch.ts - time.time()) < 600 and batch.events
            router.apply(batch.events)
    assert len(router.groups[1]) == driver.cache.stats()["checkpoints"] > 0
    assert driver.cache.stats()["evicted_turn_end"] > 0


def test_a_replay_goes_back_as_far_as_the_buffer(context: Any) -> None:
    with Publisher("inproc://events", replay="tcp://127.0.0.1:*", buffer=5) as publisher:
        for events in events_of(12):
            publisher.publish(events)
        until = time.monotonic() + PATIENCE_S
        found: list[int] = []
        while 11 not in found:
            assert time.monotonic() < until
            found = [n for _, n, _ in replayed(context, publisher, 0)]
        assert found == [7, 8, 9, 10, 11]
        assert [n for _, n, _ in replayed(context, publisher, 10)] == [10, 11]
        assert replayed(context, publisher, 12) == []


def test_a_long_replay_loses_nothing(context: Any) -> None:
    with Publisher("inproc://events", replay="tcp://127.0.0.1:*") as publisher:
        for events in events_of(4000):
            publisher.publish(events)
        assert [n for _, n, _ in until_sent(context, publisher, 4000)] == list(range(4000))


def test_one_client_may_ask_for_all_again_and_again(context: Any) -> None:
    """ZMQ tells the sender of what was read at every half of the mark only, and a ROUTER drops beyond it."""
    with Publisher("inproc://events", replay="tcp://127.0.0.1:*", buffer=100) as publisher:
        for events in events_of(100):
            publisher.publish(events)
        until_sent(context, publisher, 100)
        with context.socket(zmq.DEALER) as client:
            client.set_hwm(0)
            client.connect(publisher.replay_endpoint)
            for _ in range(40):
                client.send_multipart([b"", bytes(8)])
                for number in range(101):
                    assert client.poll(int(1000 * PATIENCE_S)), f"message {number} of a replay is missing"
                    found = client.recv_multipart()[2]
                    assert found == (number.to_bytes(8, "big") if number < 100 else b"\xff" * 8)


def test_a_bad_replay_request_is_ignored(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Publisher("inproc://events", replay="tcp://127.0.0.1:*") as publisher:
        for events in events_of(1):
            publisher.publish(events)
        with context.socket(zmq.DEALER) as client:
            client.connect(publisher.replay_endpoint)
            for frames in ([b"x"], [b"", b"short"], [b"x", bytes(8)], [b"", bytes(8), b""]):
                client.send_multipart(frames)
            client.send_multipart([b"", bytes(8)])
            answers = []
            while not answers or answers[-1][2] != b"\xff" * 8:
                assert client.poll(int(1000 * PATIENCE_S))
                answers.append(client.recv_multipart())
        assert len(answers) <= 2, "the message, if it was sent by then, and the end"
    assert caplog.text.count("a replay request") == 4


def test_close_sends_what_is_left_and_ends(context: Any) -> None:
    with context.socket(zmq.SUB) as subscriber:
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        publisher = Publisher(f"tcp://127.0.0.1:{port}")  # no wildcard: it connects
        until, first = time.monotonic() + PATIENCE_S, 0
        while not subscriber.poll(20):
            assert time.monotonic() < until
            for events in events_of(1, first):
                publisher.publish(events)
            first += 1
        for events in events_of(500, first):
            publisher.publish(events)
        publisher.close()
        publisher.close()
        numbers = []
        while subscriber.poll(1000) and first + 499 not in numbers[-1:]:
            numbers.append(int.from_bytes(subscriber.recv_multipart()[1], "big"))
        assert numbers == list(range(numbers[0], first + 500))
    with pytest.raises(RuntimeError, match="the publisher is closed"):
        publisher.publish([Cleared()])


def test_what_cannot_be_announced_is_raised_at_the_next_call(caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher("inproc://events")
    publisher.publish(
        [PagesStored(b"", 77, [1], np.arange(4, dtype=np.int32), {})]
    )  # below a page that nobody knows
    publisher._thread.join(PATIENCE_S)
    with pytest.raises(RuntimeError, match=r"an earlier message failed: KeyError\(77\)"):
        publisher.publish([])
    publisher.close()
    assert "the publisher stops" in caplog.text


@pytest.mark.parametrize(("options", "said"), [({"buffer": 0}, "buffer: 0"), ({"rank": -1}, "rank: -1")])
def test_bad_arguments(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Publisher("inproc://events", **options)  # type: ignore[arg-type]


def test_an_endpoint_that_cannot_be_bound_leaves_nothing_open() -> None:
    with pytest.raises(zmq.ZMQError):
        Publisher("tcp://*:nothing")


def test_each_rank_has_a_port_of_its_own(context: Any) -> None:
    with context.socket(zmq.SUB) as subscriber:
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
    with Publisher(f"tcp://127.0.0.1:{port}", rank=3) as publisher:
        assert publisher.endpoint == f"tcp://127.0.0.1:{port + 3}"
    with Publisher("inproc://events", rank=3) as publisher:
        assert publisher.endpoint == "inproc://events_dp3"


# ---- a real router's index


def test_a_real_routers_radix_tree_scores_prefixes_rightly() -> None:
    """What ai-dynamo's router keeps: its own hash of a page's tokens, under the hashes that we publish."""
    core = pytest.importorskip("dynamo._core", reason="ai-dynamo-runtime is not installed")
    size, driver, announcer = 4, Driver(events=True, slabs=40), Announcer()
    index, number = core.RadixTree(), 0

    def keys(path: list[int]) -> list[int]:
        return core.compute_block_hash_for_seq(path, size)

    def feed(worker: int = 7) -> None:
        nonlocal number
        for event in over_the_wire(announcer.announce(driver.cache.take_events())):
            if isinstance(event, AllCleared):
                data: Any = "cleared"
            elif event.group_idx != 0:
                continue  # its index is of pages
            elif isinstance(event, Removed):
                data = {"removed": {"block_hashes": event.block_hashes}}
            else:
                hashes = zip(event.block_hashes, keys(event.token_ids), strict=True)
                pages = [{"block_hash": ours, "tokens_hash": theirs} for ours, theirs in hashes]
                data = {"stored": {"parent_hash": event.parent_block_hash, "blocks": pages}}
            index.apply_event(worker, json.dumps({"event_id": number, "dp_rank": 0, "data": data}).encode())
            number += 1

    rng, prompts, scores = random.Random(5), [], Counter[int]()
    base = tokens(24).tolist()
    for turn in range(60):
        prompt = base[: rng.randrange(25)] + tokens(1 + rng.randrange(20), seed=turn).tolist()
        driver.turn(prompt, [5, 6, 7])
        prompts.append([*prompt, 5, 6, 7, 8])
        feed()
        for asked in prompts[-8:]:
            known = driver.cache.match(asked).kv_length // size
            score = index.find_matches(keys(asked)).scores.get((7, 0), 0)
            assert score == known
            scores[score] += 1
    assert scores[0] < sum(scores.values()) / 2 and len(scores) > 5, scores
    assert driver.cache.stats()["evicted_turn_end"] > 0
    driver.cache.clear()
    feed()
    assert not index.find_matches(keys(prompts[-1])).scores
