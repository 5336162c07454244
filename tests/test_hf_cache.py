"""The adapter's own cache layers: KV that grows in place, and states that live in the arena.

Owns what the exactness tests cannot see: that nothing is copied needlessly, and that a model which updates
its state in place never reaches a checkpoint.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hybridcache._core")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

from hybridcache._hf_cache import RoomyLayer, with_slack  # noqa: E402
from hybridcache.hf import CachedModel  # noqa: E402
from tests.tiny_models import random_tokens, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(5))
def test_kv_that_grows_in_place_is_that_of_transformers(seed: int) -> None:
    """Any sizes of steps, cut back now and then, with too little room at first."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours, theirs = RoomyLayer(capacity=20), DynamicLayer()
    for _ in range(25):
        count = chance.choice([1, 1, 2, 7])
        new = [torch.randn(1, 3, count, dim, generator=generator) for dim in (8, 5)]
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if chance.random() < 0.2:
            cut = chance.randint(0, ours.get_seq_length() - 1)
            for layer in (ours, theirs):
                layer.keys, layer.values = (
                    layer.keys[..., : -cut or None, :],
                    layer.values[..., : -cut or None, :],
                )
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_nothing_moves_while_there_is_room() -> None:
    layer, row = RoomyLayer(capacity=30), torch.ones(1, 2, 10, 4)
    addresses = [layer.update(row, row)[0].data_ptr() for _ in range(4)]
    assert addresses[0] == addresses[1] == addresses[2] != addresses[3]
    assert layer.get_seq_length() == 40


def test_slack_is_an_eighth_at_most_and_leaves_few_sizes() -> None:
    sizes = {with_slack(count) for count in range(32768, 65537)}
    assert len(sizes) == 9
    assert all(count <= with_slack(count) <= count * 9 / 8 for count in range(1, 3000))


def _address(state: Any) -> int:
    return int(state.data_ptr())


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "nemotron_h"])
def test_recurrent_states_are_updated_where_they_lie(name: str) -> None:
    """In the live slot, as soon as the dtype of the model's states is known; the next turn's as well."""
    engine = CachedModel(tiny_model(name), num_pages=60, num_slots=6, page_size=7)
    spec = next(spec for spec in engine.layout.layers if spec.kind == "recurrent")
    pool = engine.pools.state(spec.index)[1]
    first = engine.generate(random_tokens(20, seed=1), max_new_tokens=3)
    request = engine.open(first.sequence + random_tokens(9, seed=2), max_new_tokens=4)
    assert request is not None and request.lease.start == len(first.sequence) - 1
    while not request.prefilled:
        request.prefill()
    for token in (1, 2, 3):
        request.decode(token)
        cache: Any = request._cache
        assert _address(cache.layers[spec.index].recurrent_states[0]) == _address(
            pool[request.lease.live_slot]
        )


@pytest.mark.parametrize("copies", ["eager", "indirect"])
@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "nemotron_h"])
def test_a_checkpoint_is_never_written(name: str, copies: Any) -> None:
    """Not by the request that left it and goes on, not by one that resumes there, not by a fork."""
    engine = CachedModel(tiny_model(name), num_pages=90, num_slots=20, page_size=7, copies=copies)
    engine.generate(random_tokens(9, seed=0), max_new_tokens=1)  # the dtypes of the states are known
    prompt = random_tokens(30, seed=1)
    kept: dict[int, Any] = {}
    request = engine.open(prompt, max_new_tokens=8, breakpoints=(11, 30, 32))
    assert request is not None

    def look(slot: int, committed: int) -> None:
        """A slot that a boundary has just taken from the request holds a checkpoint."""
        if request.lease.live_slot != slot:
            kept[slot] = engine.pools.slots()[slot].clone()
            positions.append(committed)

    positions: list[int] = []
    while not request.prefilled:
        slot = request.lease.live_slot
        request.prefill()
        look(slot, request.lease.committed)
    child = request.fork()
    assert child is not None
    for token in range(6):
        for branch in (request, child):
            slot = branch.lease.live_slot
            branch.decode(token if branch is request else 100 - token)
            if branch is request:
                look(slot, request.lease.committed)
    assert positions == [11, 30, 32]
    request.close()
    child.close()
    for length in (11, 30):
        again = engine.generate(prompt[:length] + random_tokens(6, seed=length), max_new_tokens=3)
        assert again.reused == length
    for slot, bytes_then in kept.items():
        assert torch.equal(engine.pools.slots()[slot], bytes_then), slot
    engine.cache.check()


class Copies(TorchDispatchMode):
    """Counts, within, the copies from one slot of an arena to another, and from elsewhere into a slot."""

    def __init__(self, engine: CachedModel) -> None:
        super().__init__()
        slots = engine.pools.slots()
        self._first, self._stride = slots.data_ptr(), slots.stride(0)
        self._end = self._first + len(slots) * self._stride
        self._state_bytes = {pool[0].nbytes for pool in engine.pools.state(0)[1:]}
        self.between = self.into = 0

    def _slot(self, tensor: Any) -> int | None:
        address = tensor.data_ptr()
        return (address - self._first) // self._stride if self._first <= address < self._end else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].nbytes in self._state_bytes:
            target, source = self._slot(args[0]), self._slot(args[1])
            if target is not None and source != target:
                self.between += source is not None
                self.into += source is None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "between"), [("qwen3_5", 0), ("kimi_linear", 0), ("nemotron_h", 2)])
def test_indirect_moves_no_state_but_what_a_kernel_returns(name: str, between: int) -> None:
    """From slot to slot nothing, but for layers that update in place; one copy a layer of what comes out."""
    engine = CachedModel(tiny_model(name), num_pages=90, num_slots=20, page_size=7, copies="indirect")
    recurrent = sum(spec.kind == "recurrent" for spec in engine.layout.layers)
    first = engine.generate(random_tokens(20, seed=1), max_new_tokens=3)
    with Copies(engine) as copies:
        request = engine.open(first.sequence + random_tokens(9, seed=2), max_new_tokens=4)
        assert request is not None and request.lease.start == len(first.sequence) - 1
        request.prefill()
    assert (copies.between, copies.into) == (between, recurrent)
    for token in (1, 2, 3):
        with Copies(engine) as copies:
            request.decode(token)
        fresh = token == 1  # the prompt's end is a boundary: it is read from there
        assert (copies.between, copies.into) == (between * fresh, recurrent)
