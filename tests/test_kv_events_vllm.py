"""The wire beside vLLM's own: its classes decode what we publish, and have the fields that our tests assume.

vLLM's file of the wire format is loaded alone, from an installed vLLM or the environment that `make
bench-peers` sets up: it needs msgspec and zmq, what else it imports does not matter to it and is stood in
for. Where there is no vLLM, the committed schema of test_kv_events.py, written after 0.33.0, is what holds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import Driver, tokens

msgspec = pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from hybridcache import events as ours  # noqa: E402
from tests import test_kv_events as schema  # noqa: E402

ROOT = Path(__file__).parent.parent
PAIRS = (("BlockStored", schema.Stored), ("BlockRemoved", schema.Removed), ("KVEventBatch", schema.Batch))
NEEDED = {  # what the file takes from the rest of vLLM
    "vllm.config.kv_events": {"KVEventsConfig": object},
    "vllm.logger": {"init_logger": lambda name: None},
    "vllm.utils.network_utils": dict.fromkeys(
        ("get_ip", "get_tcp_uri", "is_valid_ipv6_address", "split_zmq_path")
    ),
    "vllm.v1.core.kv_cache_utils": {"ExternalBlockHash": bytes | int},
}


def folder_of_vllm() -> Path | None:
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    return next((ROOT / "build" / "peers" / "vllm").glob("lib/python*/site-packages/vllm"), None)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = folder_of_vllm()
    if folder is None:
        pytest.skip("no vLLM here (make bench-peers): its own classes decode nothing")
    for name, entries in NEEDED.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        for entry, value in entries.items():
            monkeypatch.setattr(sys.modules[name], entry, value, raising=False)
    spec = importlib.util.spec_from_file_location("kv_events_of_vllm", folder / "distributed/kv_events.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def fields(of: Any) -> list[tuple[str, Any]]:
    """Name and default (NODEFAULT if it has to be there), in order."""
    return [(each.name, each.default) for each in msgspec.structs.fields(of)]


def test_we_send_the_first_of_the_fields_in_the_same_order_with_the_same_defaults() -> None:
    for name, theirs in PAIRS:
        sent = fields(getattr(ours, name))
        assert sent == fields(theirs)[: len(sent)], name
        assert all(default is None for _, default in fields(theirs)[len(sent) :]), name
        config = getattr(ours, name).__struct_config__
        assert (config.array_like, config.tag, config.omit_defaults) == (
            name == "KVEventBatch",
            None if name == "KVEventBatch" else name,
            True,
        )
    assert fields(ours.AllBlocksCleared) == [] == fields(schema.AllCleared)


def test_the_committed_schema_is_vllms(vllm: Any) -> None:
    for name, theirs in (*PAIRS, ("AllBlocksCleared", schema.AllCleared)):
        assert fields(getattr(vllm, name)) == fields(theirs), name
        for each in ("array_like", "tag", "tag_field", "omit_defaults"):
            found = getattr(getattr(vllm, name).__struct_config__, each)
            assert getattr(getattr(ours, name).__struct_config__, each) == found, (name, each)
    assert vllm.MEDIUM_GPU == "GPU" and vllm.ZmqEventPublisher.END_SEQ == ours.END_SEQ


@pytest.mark.parametrize("whole", [False, True])
def test_vllms_own_classes_decode_what_we_send_and_would_send_the_same(vllm: Any, whole: bool) -> None:
    driver, announcer = Driver(events=True, slabs=24), ours.Announcer(whole_digests=whole)
    decode = msgspec.msgpack.Decoder(vllm.KVEventBatch).decode
    plain = msgspec.msgpack.decode
    seen: set[str] = set()
    for turn in range(30):
        driver.turn(tokens(20, seed=turn % 12), [1, 2], salt=b"s" * (turn % 2), content_keys=[(3, b"cat")])
        if turn % 10 == 9:
            driver.cache.clear()
        wire = announcer.announce(driver.cache.take_events())
        sent = msgspec.msgpack.encode(ours.KVEventBatch(1.0 + turn, wire, 3))
        batch = decode(sent)
        assert (batch.ts, batch.data_parallel_rank, len(batch.events)) == (1.0 + turn, 3, len(wire))
        for mine, its in zip(wire, batch.events, strict=True):
            assert isinstance(its, getattr(vllm, type(mine).__name__))
            seen.add(type(its).__name__)
        again = msgspec.msgpack.encode(batch)  # a longer map header, since its struct has more fields
        assert plain(again) == plain(sent)
    assert seen == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
