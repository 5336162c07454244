"""States advanced from slot to slot: torch beside transformers' own functions, the kernels beside torch.

On CUDA the kernels run there (`make test-gpu`), elsewhere in Triton's interpreter where it can be imported;
else they are skipped. Arenas are poisoned and compared whole: a number written too much is seen as well.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hybridcache import HybridCache, LayerSpec, ModelLayout, Pools, TensorSpec, gated_delta  # noqa: E402
from hybridcache.gated_delta import (  # noqa: E402
    ThroughCopies,
    convolve,
    convolve_by_torch,
    decode,
    decode_by_torch,
)

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("one_thread")
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`decode` and `convolve` through Triton, on this machine's device or interpreted."""
    if not CUDA and not INTERPRETED:
        pytest.skip("no CUDA device, and Triton does not interpret in this process")
    module = import_module("hybridcache._decode")
    monkeypatch.setattr(gated_delta, "_kernels", lambda device: module)
    return module


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels are tested in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of their own: Triton must know before it is imported."""
    if find_spec("triton") is None:
        pytest.skip("no Triton: the kernels were not tested")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def slab(slots: int, shape: tuple[int, ...], dtype: Any = torch.float32, gap: int = 4) -> Any:
    """Poisoned memory and the slots in it, as one layer's part of a slab."""
    size = torch.Size(shape).numel()
    memory = torch.full((gap + slots * (size + gap),), NAN, dtype=dtype, device=DEVICE)
    view = memory[gap:].as_strided((slots, *shape), (size + gap, *torch.empty(shape).stride()), gap)
    return memory, view


class Case:
    """Random inputs of a layer, most of them slices of something larger; slots read, some of them twice or
    missing; slots written, some of them padded, some the one that is read."""

    def __init__(self, seed: int, **fixed: Any) -> None:
        chosen = self.chosen = random.Random(seed)
        self.generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self.rows, self.tokens = chosen.randint(1, 5), chosen.choice([1, 1, 2, 5])
        self.heads = chosen.choice([1, 2, 3])
        self.value_heads = self.heads * chosen.choice([1, 2, 4])
        self.dim, self.value_dim = chosen.choice([(16, 24), (8, 8), (5, 9), (32, 16), (12, 17)])
        self.dtype = chosen.choice([torch.float32, torch.bfloat16])
        self.state_dtype, self.beside = torch.float32, chosen.choice([3, 16])
        self.gap = chosen.choice([4, 4, 3, 0])
        vars(self).update(fixed)
        self.slots = 4 + self.rows * (2 + self.tokens)
        self.inputs()
        self.ids(chosen)

    def inputs(self) -> None:
        keys, values = self.heads * self.dim, self.value_heads * self.value_dim
        mixed = self.normal(self.rows, self.tokens, 2 * keys + values + self.beside).to(self.dtype)
        q, k, v, _ = mixed.split([keys, keys, values, self.beside], dim=-1)
        self.q, self.k = (each.unflatten(-1, (self.heads, self.dim)) for each in (q, k))
        self.v = v.unflatten(-1, (self.value_heads, self.value_dim))
        self.g = -self.normal(self.rows, self.tokens, self.value_heads).abs() * 0.1
        self.beta = self.normal(self.rows, self.tokens, 2 * self.value_heads).sigmoid().to(self.dtype)
        self.beta = self.beta[..., : self.value_heads]

    def ids(self, chosen: random.Random) -> None:
        order = chosen.sample(range(self.slots), self.slots)
        self.shared, order = order[:2], order[2:]
        reads = [chosen.choice([order.pop(), *self.shared, -1]) for _ in range(self.rows)]
        writes = []
        for read in reads:
            own = [read] if read >= 0 and read not in self.shared else [-1]
            places = [chosen.choice([order.pop(), -1]) for _ in range(self.tokens)]
            places[chosen.randrange(self.tokens)] = chosen.choice([*own, places[0]])
            writes.append([slot if places.index(slot) == at else -1 for at, slot in enumerate(places)])
        self.reads, self.writes = self.ints(reads), self.ints(writes)

    def normal(self, *shape: int) -> Any:
        return torch.randn(shape, generator=self.generator, device=DEVICE)

    def ints(self, values: Any) -> Any:
        return torch.tensor(values, dtype=self.chosen.choice([torch.int32, torch.int64]), device=DEVICE)

    def slab(self) -> Any:
        memory, state = slab(
            self.slots, (self.value_heads, self.dim, self.value_dim), self.state_dtype, self.gap
        )
        for slot in self.reads[self.reads >= 0].tolist():
            state[slot] = self.normal(*state.shape[1:]).to(self.state_dtype)
        return memory, state

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def written(self) -> list[int]:
        return sorted(self.writes[self.writes >= 0].tolist())


def clones(memory: Any, state: Any) -> tuple[Any, Any]:
    copied = memory.clone()
    return copied, copied.as_strided(state.shape, state.stride(), state.storage_offset())


def assert_same_but(memory: Any, state: Any, other_memory: Any, other: Any, slots: list[int]) -> None:
    """Equal bits wherever no slot of `slots` lies; those are close, and numbers."""
    for slot in slots:
        assert not state[slot].isnan().any() and not other[slot].isnan().any()
        torch.testing.assert_close(state[slot], other[slot], rtol=2e-4, atol=2e-5)
        state[slot] = other[slot] = 0
    bits = torch.int32 if memory.dtype == torch.float32 else torch.int16
    assert torch.equal(memory.view(bits), other_memory.view(bits))


def of_transformers(name: str) -> Any:
    """Its function in torch, also where flash-linear-attention stands in for it."""
    code = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    function = getattr(code, name)
    return getattr(function, "__wrapped__", function)


def repeated(case: Case) -> tuple[Any, ...]:
    """A key head for each value head, as older transformers want them."""
    groups = case.value_heads // case.heads
    return *(each.repeat_interleave(groups, dim=2) for each in (case.q, case.k)), case.v, case.g, case.beta


# The maths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_torch_does_what_transformers_does(seed: int) -> None:
    case = Case(seed)
    _, state = case.slab()
    initial = torch.stack(
        [state[slot] if slot >= 0 else torch.zeros_like(state[0]) for slot in case.reads.tolist()]
    )
    lengths = range(1, case.tokens + 1)
    function = of_transformers("torch_recurrent_gated_delta_rule")
    expected, finals = [], {}
    for length in lengths:
        first = [each[:, :length].float() for each in repeated(case)]
        rows, final = function(
            *first[:3],
            g=first[3],
            beta=first[4],
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        expected.append(rows[:, -1])
        finals.update({int(slot): final[row] for row, slot in enumerate(case.writes[:, length - 1])})
    found = decode_by_torch(*case.arguments(), state, case.reads, case.writes)
    assert found.dtype == case.dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found.float(), torch.stack(expected, 1), **tolerance)
    for slot in case.written():
        torch.testing.assert_close(state[slot], finals[slot], rtol=1e-4, atol=1e-5)


def test_no_norm_and_another_scale() -> None:
    case = Case(3, dtype=torch.float32, rows=2, tokens=1)
    case.reads, case.writes = case.ints([-1, -1]), case.ints([[0], [1]])
    _, state = case.slab()
    found = decode(*case.arguments(), state, case.reads, case.writes, scale=0.5, normalise=False)
    groups = case.value_heads // case.heads
    q, k = (each[:, 0].repeat_interleave(groups, 1) for each in (case.q, case.k))
    weight = 0.5 * (q * k).sum(-1) * case.beta[:, 0]  # from nothing, S = beta k v'
    torch.testing.assert_close(found[:, 0], weight.unsqueeze(-1) * case.v[:, 0], rtol=1e-4, atol=1e-5)


# The kernel beside torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60 if CUDA else 20))
def test_the_kernel_does_what_torch_does(seed: int, kernels: Any) -> None:
    case = Case(seed, state_dtype=torch.bfloat16 if seed % 10 == 9 else torch.float32)
    memory, state = case.slab()
    other_memory, other = clones(memory, state)
    columns = case.chosen.choice([8, 16, 32, 32, 64])
    found = decode(*case.arguments(), state, case.reads, case.writes, columns=columns)
    expected = decode_by_torch(*case.arguments(), other, case.reads, case.writes)
    rough = case.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if rough else 2e-4, atol=1e-2 if rough else 2e-5, equal_nan=False
    )
    if case.state_dtype == torch.bfloat16:
        for slot in case.written():
            torch.testing.assert_close(state[slot], other[slot], rtol=2e-2, atol=2e-2)
            other[slot] = state[slot]
    assert_same_but(memory, state, other_memory, other, case.written())


@pytest.mark.parametrize("seed", range(6))
def test_several_tokens_at_once_are_the_same_bits_as_one_by_one(seed: int, kernels: Any) -> None:
    """So a verify step leaves what decoding would have left, wherever it is cut."""
    case = Case(seed, tokens=4, dtype=torch.float32)
    slots = case.chosen.sample(range(case.slots), case.rows * 4)
    case.writes = case.ints(slots).reshape(case.rows, 4)
    case.reads = torch.full_like(case.reads, -1)
    _, at_once = case.slab()
    _, one_by_one = case.slab()
    found = decode(*case.arguments(), at_once, case.reads, case.writes)
    reads = case.reads
    for token in range(4):
        part = [each[:, token : token + 1] for each in case.arguments()]
        writes = case.writes[:, token].contiguous()
        assert torch.equal(decode(*part, one_by_one, reads, writes), found[:, token : token + 1])
        reads = writes.to(reads.dtype)
    assert all(torch.equal(at_once[slot], one_by_one[slot]) for slot in slots)


@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_the_state_is_that_of_the_chosen_slot(form: str, request: pytest.FixtureRequest) -> None:
    """As behind a verify step in overlap, where the device knows how many drafts have stayed."""
    if form == "kernel":
        request.getfixturevalue("kernels")
    case = Case(1, rows=3, tokens=2, dtype=torch.float32)
    memory, state = case.slab()
    candidates = case.ints([[0, 1, 2], [3, -1, -1], [5, 4, 6]])
    case.writes = case.ints([[7, 8], [9, -1], [10, 11]])
    for slot in range(7):
        state[slot] = case.normal(*state.shape[1:])
    other_memory, other = clones(memory, state)
    found = decode(*case.arguments(), state, candidates, case.writes, chosen=case.ints([2, 1, 0]))
    expected = decode_by_torch(*case.arguments(), other, case.ints([2, -1, 5]), case.writes)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    assert_same_but(memory, state, other_memory, other, case.written())


def test_a_batch_of_padding_writes_nothing(kernels: Any) -> None:
    case = Case(2, tokens=3, rows=4)
    memory, state = case.slab()
    before = memory.clone()
    nowhere = torch.full((4, 3), -1, device=DEVICE)
    found = decode(*case.arguments(), state, nowhere[:, 0].contiguous(), nowhere)
    assert torch.equal(memory.view(torch.int32), before.view(torch.int32)) and not found.isnan().any()
    empty = [each[:0] for each in case.arguments()]
    assert decode(*empty, state, nowhere[:0, 0].contiguous(), nowhere[:0]).shape == case.v[:0].shape


# The convolution --------------------------------------------------------------------------------------------


def convolution(case: Case, channels: int = 37) -> tuple[Any, ...]:
    """Inputs, weight, bias, and a poisoned slab with states where some are read."""
    x = case.normal(case.rows, case.tokens, channels + 5).to(case.dtype)[..., :channels]
    weight, bias = case.normal(channels, 4).to(case.dtype), case.normal(channels).to(case.dtype)
    memory, state = slab(case.slots, (channels, 3), torch.bfloat16, case.gap)
    for slot in case.reads[case.reads >= 0].tolist():
        state[slot] = case.normal(channels, 3).bfloat16()
    return (x, weight, bias if case.chosen.random() < 0.5 else None), memory, state


@pytest.mark.parametrize("seed", range(12))
def test_the_convolution_is_that_of_transformers(seed: int) -> None:
    torch_conv = torch.nn.functional.conv1d
    case = Case(seed, dtype=torch.float32)
    (x, weight, bias), _, state = convolution(case)
    before = torch.stack(
        [state[slot] if slot >= 0 else torch.zeros_like(state[0]) for slot in case.reads.tolist()]
    )
    columns = torch.cat((before.float(), x.transpose(1, 2)), -1)
    expected = torch_conv(columns, weight.unsqueeze(1), bias, groups=len(weight)).transpose(1, 2)
    found = convolve_by_torch(x, weight, bias, state, case.reads, case.writes)
    torch.testing.assert_close(found, torch.nn.functional.silu(expected), rtol=1e-4, atol=1e-5)
    for row, slots in enumerate(case.writes.tolist()):
        for token, slot in enumerate(slots):
            if slot >= 0:
                assert torch.equal(state[slot], columns[row, :, token + 1 : token + 4].bfloat16())


@pytest.mark.parametrize("seed", range(60 if CUDA else 20))
def test_the_kernel_convolves_as_torch_does(seed: int, kernels: Any) -> None:
    case = Case(seed)
    arguments, memory, state = convolution(case, channels=case.chosen.choice([1, 37, 256, 300]))
    other_memory, other = clones(memory, state)
    silu = seed % 3 > 0
    found = convolve(*arguments, state, case.reads, case.writes, silu=silu)
    expected = convolve_by_torch(*arguments, other, case.reads, case.writes, silu=silu)
    rough = case.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2 if rough else 1e-5, atol=1e-2 if rough else 1e-5)
    for slot in case.written() if INTERPRETED else ():  # the interpreter cuts off what a GPU rounds
        torch.testing.assert_close(state[slot], other[slot], rtol=1 / 128, atol=0)
        other[slot] = state[slot]
    assert torch.equal(memory.view(torch.int16), other_memory.view(torch.int16))


# With the cache: nothing is copied, and everything is there -------------------------------------------------


def tiny_layout() -> ModelLayout:
    state = (TensorSpec("conv", (64, 3), "bfloat16"), TensorSpec("recurrent", (4, 16, 24), "float32"))
    kv = (TensorSpec("k", (1, 8), "bfloat16"), TensorSpec("v", (1, 8), "bfloat16"))
    return ModelLayout(4, (LayerSpec(0, "recurrent", state), LayerSpec(1, "attention", kv)))


def inputs_of(tokens: list[int]) -> tuple[Any, ...]:
    """What the layer is given for these tokens: [1, T, ...], the same for the same ids."""
    rows: list[list[Any]] = [[], [], [], [], []]
    shapes = ((2, 16), (2, 16), (4, 24), (4,), (4,))
    for token in tokens:
        generator = torch.Generator().manual_seed(token)
        for row, shape in zip(rows, shapes, strict=True):
            row.append(torch.randn(shape, generator=generator))
    q, k, v, g, beta = (torch.stack(row).unsqueeze(0).to(DEVICE) for row in rows)
    return q, k, v, -g.abs() * 0.05, beta.sigmoid()


def outputs_of(tokens: list[int]) -> Any:
    """Of a state that never left: one token after the other."""
    state = torch.zeros((1, 4, 16, 24), device=DEVICE)
    slot, rows = torch.zeros(1, dtype=torch.int32, device=DEVICE), []
    for token in tokens:
        rows.append(decode(*inputs_of([token]), state, slot, slot))
    return torch.cat(rows, 1)


class Engine:
    """Steps over one cache with `copies="indirect"`: the layer reads and writes the slots that they name."""

    def __init__(self) -> None:
        self.cache = HybridCache(tiny_layout(), memory_bytes=1 << 19, draft_tokens=3, policy="lru")
        arena = torch.full((self.cache.geometry.total_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.pools = Pools(tiny_layout(), self.cache.geometry, device=DEVICE, copies="indirect", buffer=arena)

    def read(self, lease: Any, tokens: list[int]) -> Any:
        """A step that reads these tokens; what the layer gives."""
        step = lease.launch(len(tokens))
        assert step is not None and step.end - step.begin == len(tokens)
        plan = self.cache.plan()
        self.pools.apply(plan)
        self.cache.applied(plan)
        writes = [-1] * (len(tokens) - len(step.write_slots)) + step.write_slots
        if not step.write_slots:
            writes = [-1] * (len(tokens) - 1) + [step.write_slot]
        (_, state) = self.pools.state(0)
        ids = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([step.read_slot], [writes])]
        return decode(*inputs_of(tokens), state, *ids)


@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_turns_forks_and_drafts_read_and_write_slots_and_are_those_of_a_state_that_never_left(
    form: str, request: pytest.FixtureRequest
) -> None:
    if form == "kernel":
        request.getfixturevalue("kernels")

    def assert_right(found: Any, wanted: Any) -> None:
        """On a GPU the kernel rounds the same wherever a step is cut; torch and numpy sum otherwise."""
        exact = {"rtol": 0, "atol": 0} if CUDA and form == "kernel" else {}
        torch.testing.assert_close(found, wanted, **exact)

    engine, prompt = Engine(), list(range(100, 110))
    cache = engine.cache
    expected = outputs_of([*prompt, 7, 8, 9])
    first = cache.reserve(prompt, max_new_tokens=12)
    assert_right(engine.read(first, prompt), expected[:, :10])
    first.commit()
    other = first.fork()  # two leases read one slot
    assert other is not None
    found = engine.read(first, [7, 8, 50, 51])  # three drafts, of which one stays
    assert_right(found[:, :2], expected[:, 10:12])
    first.commit([7, 8])
    assert_right(engine.read(other, [60]), outputs_of([*prompt, 60])[:, -1:])
    other.commit([60])
    assert_right(engine.read(first, [9]), expected[:, 12:])
    first.commit([9])
    first.close()
    other.close()
    turn = [*prompt, 7, 8, 9, 30, 31]
    later = cache.reserve(turn, max_new_tokens=2)
    assert later is not None and later.start == 13
    assert_right(engine.read(later, [30, 31]), outputs_of(turn)[:, 13:])
    later.commit()
    later.close()
    cache.check()


# Through flash-linear-attention's form ----------------------------------------------------------------------


def test_what_is_gathered_and_scattered_is_counted() -> None:
    case = Case(5, rows=3, tokens=5, dtype=torch.float32)
    memory, state = case.slab()
    for slot in (1, 2):
        state[slot] = case.normal(*state.shape[1:])
    other_memory, other = clones(memory, state)
    through = ThroughCopies(of_transformers("torch_chunk_gated_delta_rule"))
    reads, writes = case.ints([1, -1, 2]), case.ints([1, 4, 5])
    found = through(*repeated(case), state, reads, writes)
    last = torch.full((3, 5), -1, device=DEVICE)
    last[:, 4] = writes
    expected = decode_by_torch(*case.arguments(), other, reads, last)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for slot in (1, 4, 5):
        torch.testing.assert_close(state[slot], other[slot], rtol=1e-3, atol=1e-4)
        state[slot] = other[slot] = 0
    assert torch.equal(memory.view(torch.int32), other_memory.view(torch.int32))
    assert through.gathered_bytes == through.scattered_bytes == 3 * state[0].numel() * 4
    through(*repeated(case), state, reads, writes)
    assert through.gathered_bytes == 6 * state[0].numel() * 4


def one_by_one(q: Any, k: Any, v: Any, *, g: Any, beta: Any, initial_state: Any, **options: Any) -> Any:
    """transformers' chunked function for sequences that lie one after the other, as FLA's has it."""
    chunked = of_transformers("torch_chunk_gated_delta_rule")
    bounds = options.pop("cu_seqlens", None)
    bounds = [0, q.shape[1]] if bounds is None else bounds.tolist()
    found = []
    for number, (a, b) in enumerate(pairwise(bounds)):
        pieces = [each[:, a:b] for each in (q, k, v)]
        state = initial_state[number : number + 1]
        found.append(chunked(*pieces, g=g[:, a:b], beta=beta[:, a:b], initial_state=state, **options))
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def chunked_functions() -> list[Any]:
    rule = find_spec("fla") and DEVICE == "cuda"
    return [one_by_one, *([import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule] if rule else [])]


LENGTHS, BEGINS = (150, 3, 200), (0, 150, 153)
INNER = ((2, 128, 9), (0, 64, 7), (2, 64, 8), (1, 1, 10))  # (sequence, position, slot)


@pytest.mark.parametrize("function", chunked_functions())
def test_a_prefill_leaves_states_at_inner_positions(function: Any) -> None:
    """Those of prefills that end there, bit for bit, and whoever goes on there gets the same, too. (FLA's
    kernels do not promise that it makes no difference who else is in the batch.)"""
    dtype = torch.float32 if function is one_by_one else torch.bfloat16
    case = Case(6, rows=1, tokens=sum(LENGTHS), heads=2, value_heads=2, dim=16, value_dim=16, dtype=dtype)
    case.slots, case.reads, case.writes = 12, case.ints([1, -1, 2]), case.ints([1, 4, 5])
    memory, state = case.slab()
    other_memory, other = clones(memory, state)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], device=DEVICE)
    through, by_hand = ThroughCopies(function), ThroughCopies(function)
    found = through(*case.arguments(), state, case.reads, case.writes, inner=INNER, cu_seqlens=bounds)
    expected = torch.empty_like(found)
    for number, (begin, length) in enumerate(zip(BEGINS, LENGTHS, strict=True)):
        at, read = 0, int(case.reads[number])
        ends = sorted((position, slot) for sequence, position, slot in INNER if sequence == number)
        for position, slot in [*ends, (length, int(case.writes[number]))]:
            span = slice(begin + at, begin + position)
            piece = [each[:, span].contiguous() for each in case.arguments()]
            expected[:, span] = by_hand(*piece, other, case.ints([read]), case.ints([slot]))
            at, read = position, slot
    written = [1, 4, 5, 7, 8, 9, 10]
    if function is one_by_one:
        assert torch.equal(found, expected)
        assert all(torch.equal(state[slot], other[slot]) for slot in written)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    assert_same_but(memory, state, other_memory, other, written)
    assert through.scattered_bytes == 7 * state[0].numel() * 4 == by_hand.scattered_bytes


def test_inner_positions_of_one_sequence_and_of_a_batch_of_equal_ones() -> None:
    for rows in (1, 3):
        case = Case(7, rows=rows, tokens=70, heads=2, value_heads=2, dim=8, value_dim=8, dtype=torch.float32)
        case.reads, case.writes = case.ints([-1] * rows), case.ints(list(range(rows)))
        _, state = case.slab()
        _, other = case.slab()
        through = ThroughCopies(one_by_one)
        inner = [(row, 64, 10 + row) for row in range(rows)]
        found = through(*case.arguments(), state, case.reads, case.writes, inner=inner)
        packed = [each.reshape(1, -1, *each.shape[2:]) for each in case.arguments()]
        bounds = torch.arange(0, 70 * rows + 1, 70, device=DEVICE)
        expected = through(*packed, other, case.reads, case.writes, cu_seqlens=bounds)
        assert found.shape == case.v.shape
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
        for row in range(rows):
            torch.testing.assert_close(state[row], other[row], rtol=1e-4, atol=1e-5)
            assert not torch.equal(state[10 + row], state[row])


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ((1, 2, 3), "inner: sequence 1, expected one of 1"),
        ((0, 0, 3), r"inner: position 0 of sequence 0, expected each once, and in \[1, 4\]"),
        ((0, 5, 3), "inner: position 5 of sequence 0"),
        ((0, 2, -1), "inner: slot -1, expected at least 0"),
    ],
)
def test_inner_positions_lie_inside(inner: tuple[int, int, int], message: str) -> None:
    case = Case(5, rows=1, tokens=5, dtype=torch.float32)
    memory, state = case.slab()
    before = memory.clone()
    through = ThroughCopies(one_by_one)
    for positions in ([inner], [(0, 2, 3), (0, 2, 3)]):
        with pytest.raises(ValueError, match=message if positions == [inner] else "inner: position 2"):
            through(*repeated(case), state, case.ints([-1]), case.ints([0]), inner=positions)
    bounds = torch.tensor([0, 2, 5], device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens: 3 numbers, expected 2"):
        through(*repeated(case), state, case.ints([-1]), case.ints([0]), inner=[(0, 1, 3)], cu_seqlens=bounds)
    assert torch.equal(memory.view(torch.int32), before.view(torch.int32))
    assert through.gathered_bytes == 0


def test_columns_are_some_that_the_kernel_has() -> None:
    case = Case(1)
    for columns in (0, 12, 4, 256):
        with pytest.raises(ValueError, match=f"columns: {columns}, expected 8, 16"):
            decode(*case.arguments(), case.slab()[1], case.reads, case.writes, columns=columns)


def spoilt(name: str, change: Any) -> Any:
    """`decode` of a right case in which one argument is changed."""
    case = Case(4, rows=2, tokens=3, heads=2, value_heads=4, dim=8, value_dim=6)
    _, state = case.slab()
    names = ("q", "k", "v", "g", "beta", "state", "read_slots", "write_slots")
    arguments = dict(zip(names, (*case.arguments(), state, case.reads, case.writes), strict=True))
    arguments["chosen"] = None
    arguments[name] = change(arguments[name])
    chosen = arguments.pop("chosen")
    return decode(*arguments.values(), chosen=chosen)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda q: q.tolist(), TypeError, "q: a list, expected a tensor"),
        ("q", lambda q: q.int(), TypeError, "q: dtype torch.int32, expected float32"),
        ("q", lambda q: q[0], ValueError, r"q: shape \(3, 2, 8\), expected \[N, T, heads, K\]"),
        ("q", lambda q: torch.cat((q, q[:, :, :1]), 2), ValueError, "q: 3 heads, expected a divisor of"),
        ("k", lambda k: k[:1], ValueError, r"k: shape \(1, 3, 2, 8\), expected \(2, 3, 2, 8\)"),
        ("v", lambda v: v[..., :5], ValueError, r"v: shape \(2, 3, 4, 5\), expected \(2, 3, 4, 6\)"),
        ("g", lambda g: g[:, :1], ValueError, r"g: shape \(2, 1, 4\), expected \(2, 3, 4\)"),
        ("beta", lambda b: b.double(), TypeError, "beta: dtype torch.float64"),
        ("k", lambda k: k.transpose(2, 3).contiguous().transpose(2, 3), ValueError, "k: strides"),
        ("state", lambda s: s[0], ValueError, r"state: shape \(4, 8, 6\), expected \[slots, heads, K, V\]"),
        ("state", lambda s: s.transpose(2, 3).contiguous().transpose(2, 3), ValueError, "state: strides"),
        ("read_slots", lambda r: r.float(), TypeError, "read_slots: dtype torch.float32, expected int32"),
        ("read_slots", lambda r: r[:1], ValueError, r"read_slots: shape \(1,\), expected \(2,\)"),
        ("write_slots", lambda w: w[:, 0], ValueError, r"write_slots: shape \(2,\), expected \(2, 3\)"),
        ("write_slots", lambda w: w.T.contiguous().T, ValueError, "write_slots: strides"),
        ("chosen", lambda _: torch.zeros(2), TypeError, "chosen: dtype torch.float32"),
        ("chosen", lambda _: torch.zeros(3, dtype=torch.int32), ValueError, r"chosen: shape \(3,\)"),
        ("read_slots", lambda r: r.to("meta"), ValueError, "read_slots: on meta, expected the state's"),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        spoilt(name, change)


def test_a_wrong_argument_of_the_convolution_is_named() -> None:
    case = Case(4, rows=2, tokens=3)
    (x, weight, bias), _, state = convolution(case)
    for arguments, message in (
        ((x[0], weight, bias, state), "x: shape"),
        ((x, weight[:, :3], bias, state), "weight: shape"),
        ((x, weight.T.contiguous().T, bias, state), "weight: strides"),
        ((x, weight, weight[0], state), "bias: shape"),
        ((x, weight, bias, state[..., :2]), r"state: shape \(\d+, 37, 2\), expected \[slots, channels, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            convolve(*arguments, case.reads, case.writes)


# On a GPU only ----------------------------------------------------------------------------------------------


@needs_cuda
def test_addresses_beyond_two_to_the_31_numbers(kernels: Any) -> None:
    stride, case = 2**30 + 4, Case(7, rows=1, tokens=1, dtype=torch.float32)
    shape = (case.value_heads, case.dim, case.value_dim)
    size = torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < 4 * (2 * stride + size) + (1 << 30):
        pytest.skip("9 GiB of GPU memory are not free")
    memory = torch.empty(2 * stride + size, device=DEVICE)
    state = memory.as_strided((3, *shape), (stride, *torch.empty(shape).stride()))
    state[2] = case.normal(*shape)
    _, small = slab(3, shape)
    small[2] = state[2]
    ids = torch.tensor([2], device=DEVICE), torch.tensor([1], device=DEVICE)
    found = decode(*case.arguments(), state, *ids)
    assert torch.equal(found, decode(*case.arguments(), small, *ids)) and torch.equal(state[1], small[1])
    back = torch.tensor([1], device=DEVICE), torch.tensor([2], device=DEVICE)
    decode(*case.arguments(), state, *back)
    decode(*case.arguments(), small, *back)
    assert torch.equal(state[2], small[2])


@needs_cuda
def test_a_graph_reads_and_writes_other_slots_at_each_replay_and_the_host_does_not_wait(kernels: Any) -> None:
    case = Case(8, rows=4, tokens=2, dtype=torch.float32)
    memory, state = case.slab()
    state.copy_(case.normal(*state.shape))
    reads = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    writes = torch.full((4, 2), -1, dtype=torch.int32, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(*case.arguments(), state, reads, writes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode(*case.arguments(), state, reads, writes)
    for number in range(6):
        order = random.Random(number).sample(range(case.slots), 11)
        reads.copy_(torch.tensor([order[0], order[0], -1, order[1]]))
        writes.copy_(torch.tensor([[order[2], -1], [order[3], order[4]], [-1, order[5]], [-1, -1]]))
        other_memory, other = clones(memory, state)
        graph.replay()
        expected = decode_by_torch(*case.arguments(), other, reads, writes)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
        kept = [state[slot].clone() for slot in order[2:6]]
        assert_same_but(memory, state, other_memory, other, order[2:6])
        for slot, held in zip(order[2:6], kept, strict=True):
            state[slot] = held


@needs_cuda
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rows", [1, 7])
def test_states_of_a_real_model_beside_flash_linear_attention(rows: int, tokens: int, kernels: Any) -> None:
    rule = pytest.importorskip("fla.ops.gated_delta_rule")
    case = Case(
        9,
        rows=rows,
        tokens=tokens,
        heads=16,
        value_heads=64,
        dim=128,
        value_dim=128,
        dtype=torch.bfloat16,
        gap=4,
        beside=16,
    )
    slots = list(range(2 * rows))
    case.reads, last = case.ints(slots[:rows]), case.ints(slots[rows:])
    case.writes = torch.full((rows, tokens), -1, dtype=last.dtype, device=DEVICE)
    case.writes[:, -1] = last
    memory, state = case.slab()
    other_memory, other = clones(memory, state)
    whole = [each.contiguous() for each in case.arguments()]
    through = ThroughCopies(rule.fused_recurrent_gated_delta_rule)
    expected = through(*whole, other, case.reads, last)
    exact = decode(*case.arguments(), state, case.reads, case.writes, columns=8)
    if version("fla-core") == "0.6.0":
        assert torch.equal(exact, expected)
        assert all(torch.equal(state[slot], other[slot]) for slot in slots[rows:])
    torch.testing.assert_close(
        decode(*case.arguments(), state, case.reads, case.writes), expected, rtol=2e-2, atol=1e-3
    )
    assert_same_but(memory, state, other_memory, other, slots[rows:])


def test_a_batch_of_nobody_is_nobody() -> None:
    for reads, chosen in (([0], None), ([0, 3], torch.zeros(0, dtype=torch.int32, device=DEVICE))):
        _, state = slab(3, (2, 8, 6))
        q, v, g = (torch.zeros(0, 1, 2, *last, device=DEVICE) for last in ((8,), (6,), ()))
        ids = torch.zeros(reads, dtype=torch.int32, device=DEVICE)
        write = torch.zeros(0, dtype=torch.int32, device=DEVICE)
        for function in (decode, decode_by_torch):
            assert function(q, q, v, g, g, state, ids, write, chosen=chosen).shape == (0, 1, 2, 6)
        _, columns = slab(3, (8, 3))
        x, weight = torch.zeros(0, 1, 8, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
        for function in (convolve, convolve_by_torch):
            assert function(x, weight, None, columns, ids, write, chosen=chosen).shape == (0, 1, 8)


def test_no_candidate_to_choose_from_and_more_rows_than_a_grid_has_are_refused() -> None:
    _, columns = slab(3, (8, 3))
    weight, one = torch.zeros(8, 4, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    none = one.reshape(1, 1)[:, :0].contiguous()
    x, wide = torch.zeros(1, 1, 8, device=DEVICE), torch.zeros(65_536, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"read_slots: shape \(1, 0\), expected \(1, 1\)"):
        convolve(x, weight, None, columns, none, one, chosen=one)
    many = one.expand(65_536).contiguous()
    with pytest.raises(ValueError, match="x: 65536 sequences, expected at most 65535"):
        convolve(wide, weight, None, columns, many, many)
