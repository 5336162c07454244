"""The kernels of the pools on a GPU, against torch on the CPU and against bytes: `make test-gpu`.

Every test compares whole arenas, so that a byte written too much is seen as well as one that is missing.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.config import ITEMSIZE, LayerSpec, ModelLayout, TensorSpec
from hybridcache.pools import Pools
from tests.test_pools import (
    GEOMETRIES,
    LAYOUT,
    Geometry,
    Plan,
    expected_bytes,
    fixed,
    geometries_and_plans,
    ids,
    poisoned,
    unified,
    view_of,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: the kernels were not tested", allow_module_level=True)
pytest.importorskip("triton", reason="no Triton: the kernels were not tested")

from hybridcache import _kernels

CHUNK = _kernels._CHUNK
SLEEP = 200_000_000  # GPU cycles, about a tenth of a second


# Rows: the kernel alone -------------------------------------------------------------------------------------


def run_kernel(rows: torch.Tensor, *moves: Any, count: int | None = None) -> None:
    """The pairs stand somewhere in the ids, between others that would do harm."""
    beside = [(-1, 0), (0, len(rows) - 1), (1, 0)]
    header = (len(moves) if count is None else count, 0)
    ids = (
        torch.tensor([*beside, header, *moves, *beside], dtype=torch.int32).view(torch.int64).flatten().cuda()
    )
    _kernels.move(rows, ids, len(beside), len(moves))


def random_rows(count: int, words: int, stride: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of random bytes and the rows in it; NaNs of all kinds are among them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (2 + count * stride + 6,)
    buffer = torch.randint(-(2**62), 2**62, shape, dtype=torch.int64, device="cuda", generator=generator)
    return buffer, buffer[2:].as_strided((count, words), (stride, 1), 2)


@pytest.mark.parametrize("count", [1, 2, 7, 63])
@pytest.mark.parametrize(
    "words",
    [2, 4, 6, 62, CHUNK - 2, CHUNK, CHUNK + 2, 3 * CHUNK + 10, 64 * CHUNK, 200 * CHUNK + 1022],
)
def test_rows_of_any_size(words: int, count: int) -> None:
    """Sizes, strides and addresses are multiples of 16 bytes, and of nothing larger."""
    total = 3 * count
    for stride in (words, words + 2, words + 14):
        buffer, rows = random_rows(total, words, stride, seed=words + count)
        expected = buffer.clone()
        wanted = expected.as_strided(rows.shape, rows.stride(), 2)
        order = random.Random(count).sample(range(total), total)
        copies = list(zip(order[:count], order[count : 2 * count], strict=True))
        zeroes = order[2 * count :: 2]
        for source, target in copies:
            wanted[target] = wanted[source]
        wanted[zeroes] = 0
        moves = [*copies, *((-1, target) for target in zeroes)]
        random.Random(words).shuffle(moves)
        run_kernel(rows, *moves)
        assert torch.equal(buffer, expected), (words, stride, count)


@pytest.mark.parametrize("count", range(1, _kernels.FEW + 1))
@pytest.mark.parametrize("words", [2, 6, CHUNK, CHUNK + 2, 200 * CHUNK + 1022])
def test_few_moves_are_arguments(words: int, count: int) -> None:
    buffer, rows = random_rows(3 * count, words, words + 14, seed=words + count)
    expected = buffer.clone()
    wanted = expected.as_strided(rows.shape, rows.stride(), 2)
    order = random.Random(count).sample(range(3 * count), 2 * count)
    sources = [source if number % 3 else -1 for number, source in enumerate(order[:count], count)]
    for source, target in zip(sources, order[count:], strict=True):
        wanted[target] = wanted[source] if source >= 0 else 0
    _kernels.move_few(rows, sources, order[count:])
    assert torch.equal(buffer, expected)


def test_many_more_rows_than_programs() -> None:
    count = 40_000
    buffer, rows = random_rows(2 * count, 2, 4, seed=1)
    expected = buffer.clone()
    order = torch.randperm(2 * count, device="cuda")
    moves = torch.stack((order[:count], order[count:]), 1)
    moves[::3, 0] = -1
    wanted = expected.as_strided(rows.shape, rows.stride(), 2)
    wanted[moves[:, 1]] = torch.where((moves[:, :1] < 0), 0, wanted[moves[:, 0].clamp(min=0)])
    run_kernel(rows, *moves.tolist())
    assert torch.equal(buffer, expected)


def test_padded_entries_write_nothing_and_what_lies_behind_the_count_is_not_looked_at() -> None:
    for words in (2, CHUNK, 5 * CHUNK + 2):
        buffer, rows = random_rows(8, words, words + 2, seed=words)
        expected = buffer.clone()
        run_kernel(rows, (0, -1), (-1, -1), (3, -1))  # padded, with and without a source
        run_kernel(rows, (0, 1), (-1, 2), count=0)
        run_kernel(rows)
        assert torch.equal(buffer, expected)
        run_kernel(rows, (-1, -1), (0, 1), (5, -1), (-1, 2), (6, 7), (-1, 4), count=4)
        wanted = expected.as_strided(rows.shape, rows.stride(), 2)
        wanted[1], wanted[2] = wanted[0], 0
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("words", [2, 2 * CHUNK + 2])
def test_addresses_beyond_two_to_the_31_words(words: int) -> None:
    """Offsets that fit into 32 bits neither as bytes nor as words."""
    stride = 2**30 + 2
    needed = 8 * (2 * stride + words)
    if torch.cuda.mem_get_info()[0] < needed + (1 << 30):
        pytest.skip(f"{needed >> 30} GiB of GPU memory are not free")
    buffer = torch.empty(2 * stride + words, dtype=torch.int64, device="cuda")
    rows = buffer.as_strided((3, words), (stride, 1))
    for row in range(3):
        rows[row] = row + 1
    _kernels.move_few(rows, [2], [0])
    assert bool((rows[0] == 3).all())
    rows[0] = 1
    run_kernel(rows, (2, 0))
    assert rows.cpu()[:, 0].tolist() == [3, 2, 3] and bool((rows[0] == 3).all())
    run_kernel(rows, (-1, 2), (0, 1))
    assert bool((rows[1] == 3).all()) and not bool(rows[2].any())
    assert 2 * stride >= 2**31


# Pools: any layout, any plan --------------------------------------------------------------------------------


def random_layout(seed: int) -> ModelLayout:
    """Ragged parts of every dtype; from a few bytes to a few hundred KiB a row."""
    chosen = random.Random(seed)
    largest = chosen.choice([3, 9, 40, 130])

    def spec(name: str) -> TensorSpec:
        shape = [chosen.randint(1, largest) for _ in range(chosen.randint(1, 3))]
        return TensorSpec(
            name, tuple(shape[:2] + [min(each, 9) for each in shape[2:]]), chosen.choice(list(ITEMSIZE))
        )

    kinds = ["attention", "recurrent", *(chosen.choice(["attention", "recurrent"]) for _ in range(4))]
    names = {"attention": ("k", "v"), "recurrent": ("conv", "recurrent")}
    layers = [LayerSpec(i, kind, tuple(map(spec, names[kind]))) for i, kind in enumerate(kinds)]
    extra = tuple(spec(f"extra{i}") for i in range(chosen.randint(0, 2)))
    return ModelLayout(chosen.choice([1, 3, 16, 64]), tuple(layers), extra)


def random_plan(chosen: random.Random, pages: list[int], slots: list[int]) -> Plan:
    def kind(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = chosen.sample(rows, len(rows))
        cut = chosen.randint(0, len(rows))
        end = chosen.randint(cut, len(rows))
        targets, zeroes, sources = rows[:cut], rows[cut:end], rows[end:]
        if not sources:
            return ids([], 2), ids(targets + zeroes)
        return ids([(chosen.choice(sources), target) for target in targets], 2), ids(zeroes)

    copy_pages, zero_pages = kind(pages)
    copy_slots, zero_slots = kind(slots)
    return Plan(copy_slots, zero_slots, copy_pages, zero_pages)


def roles(chosen: random.Random, geometry: Geometry) -> tuple[list[int], list[int]]:
    """Pages and slots that may be used at the same time: in a unified arena those of different slabs."""
    pages, slots = list(range(geometry.num_pages)), list(range(geometry.num_slots))
    if geometry.slot_offset:
        return pages, slots
    per_slab = geometry.num_pages // geometry.num_slots
    slots = [slot for slot in slots if chosen.random() < 0.5]
    return [page for page in pages if page // per_slab not in slots], slots


def beside_torch(layout: ModelLayout, geometry: Geometry, seed: int, **options: Any) -> tuple[Pools, Pools]:
    """Two pools of the same random bytes: the kernels', and the oracle on the CPU."""
    raw = np.random.default_rng(seed).integers(0, 256, geometry.total_bytes, dtype=np.uint8)
    oracle = Pools(layout, geometry, buffer=torch.from_numpy(raw), **options)
    ours = Pools(layout, geometry, device="cuda", buffer=torch.from_numpy(raw.copy()).cuda(), **options)
    assert ours._kernels is _kernels and oracle._kernels is None
    return ours, oracle


@pytest.mark.parametrize("make", GEOMETRIES)
@pytest.mark.parametrize("seed", range(24))
def test_the_kernels_do_what_torch_does(seed: int, make: Any) -> None:
    """Slabs change their role between the plans, over bytes of which many are NaN."""
    chosen = random.Random(seed)
    layout = random_layout(seed)
    sizes = (chosen.randint(2, 12),) if make is unified else (chosen.randint(1, 40), chosen.randint(1, 12))
    geometry = make(layout, *sizes)
    ours, oracle = beside_torch(layout, geometry, seed, copies=chosen.choice(["eager", "eager", "indirect"]))
    moves = ours.captured(max_pages=geometry.num_pages, max_slots=geometry.num_slots)
    for number in range(8):
        plan = random_plan(chosen, *roles(chosen, geometry))
        oracle.apply(plan)
        if number % 2:
            moves.fill(plan)
            moves.run()
        else:
            ours.apply(plan)
        assert torch.equal(ours.arena.cpu(), oracle.arena), (seed, number)


@pytest.mark.parametrize("copies", ["eager", "indirect"])
@settings(max_examples=60, deadline=None)
@given(case=geometries_and_plans(), seed=st.integers(0, 2**32 - 1))
def test_a_plan_changes_exactly_the_bytes_that_it_names(
    case: tuple[Geometry, Plan], seed: int, copies: Any
) -> None:
    geometry, plan = case
    before = np.random.default_rng(seed).integers(0, 256, geometry.total_bytes, dtype=np.uint8)
    pool = Pools(
        LAYOUT, geometry, device="cuda", copies=copies, buffer=torch.from_numpy(before.copy()).cuda()
    )
    expected = expected_bytes(before.tobytes(), geometry, plan, copies)[: pool.arena.numel()]
    for _ in range(2):  # applying it again is harmless
        pool.apply(plan)
        assert pool.arena.cpu().numpy().tobytes() == expected


@pytest.mark.parametrize("name", ["qwen3.5-397b", "qwen3-next-80b", "qwen3.5-9b"])
@pytest.mark.parametrize("tp_size", [1, 8])
def test_states_of_real_models(name: str, tp_size: int) -> None:
    """Poisoned memory: what is restored or zeroed holds no NaN, what is beside it nothing else."""
    layout = ModelLayout.preset(name, tp_size=tp_size)
    pool = poisoned(layout, fixed(layout, num_pages=6, num_slots=4), "cuda")
    for number, part in enumerate(layout.slot_parts, 1):
        view_of(pool, part)[0] = number
    for number, part in enumerate(layout.page_parts, 1):
        view_of(pool, part)[1] = number
    pool.apply(Plan([(0, 2)], [3], [(1, 4)], [5, 0]))
    for number, part in enumerate(layout.slot_parts, 1):
        first, beside, copied, zeroed = view_of(pool, part).float()
        assert bool((first == number).all()) and bool((copied == number).all())
        assert not bool(zeroed.any()) and bool(beside.isnan().all())
    for number, part in enumerate(layout.page_parts, 1):
        view = view_of(pool, part).float()
        assert bool((view[1] == number).all()) and bool((view[4] == number).all())
        assert not bool(view[5].any()) and not bool(view[0].any()) and bool(view[2:4].isnan().all())


def test_a_slab_that_changes_role_holds_nothing_of_what_it_was() -> None:
    geometry = unified(LAYOUT)
    pool = poisoned(LAYOUT, geometry, "cuda")
    per_slab = geometry.num_pages // geometry.num_slots
    pages = range(3 * per_slab, 4 * per_slab)
    for _ in range(3):
        pool.apply(Plan(zero_pages=ids(pages)))
        assert not any(bool(view[part].float().any()) for view in pool.kv(1) for part in pages)
        for view in pool.kv(1):
            view[pages.start : pages.stop] = float("nan")
        pool.apply(Plan(zero_slots=ids([3])))
        states = (*pool.state(0), *pool.state(2), *pool.extra())
        assert not any(bool(view[3].float().any()) for view in states)
        for view in pool.state(0):
            view[3] = float("nan")
    outside = torch.ones_like(pool.arena, dtype=torch.bool)
    outside[3 * geometry.slot_stride : 4 * geometry.slot_stride] = False
    assert bool((pool.arena[outside] == 0xFF).all())


# Streams: the current one, and no waiting -------------------------------------------------------------------


def many_plans(geometry: Geometry, count: int, seed: int) -> list[Plan]:
    chosen = random.Random(seed)
    pages, slots = list(range(geometry.num_pages)), list(range(geometry.num_slots))
    return [random_plan(chosen, pages, slots) for _ in range(count)]


@pytest.mark.parametrize("form", ["apply", "captured"])
def test_plans_queue_up_behind_a_busy_gpu_and_the_host_does_not_wait(form: str) -> None:
    """Ids that are still on their way are not overwritten by those of the next plan."""
    ours, oracle = beside_torch(LAYOUT, fixed(LAYOUT, 30, 20), seed=5)
    plans = many_plans(ours.geometry, 200, seed=6)
    moves = ours.captured(max_pages=30, max_slots=20)
    graph = captured(moves)
    ours.apply(plans[0])  # the pinned memory and the kernel are there
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans:
            if form == "apply":
                ours.apply(plan)
            else:
                moves.fill(plan)
                graph.replay()
            if plan is plans[20]:
                assert not slept.query(), "the host waited"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    oracle.apply(plans[0])
    for plan in plans:
        oracle.apply(plan)
    assert torch.equal(ours.arena.cpu(), oracle.arena)


def test_plans_are_carried_out_on_the_current_stream() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    pool.apply(Plan(zero_slots=[4]))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        pool.slots()[0] = 7  # late
        pool.apply(Plan(copy_slots=[(0, 1)]))
    side.synchronize()
    assert bool((pool.slots()[1] == 7).all())


def test_one_transfer_and_one_launch_per_kind() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT, 20, 6), "cuda")
    both = Plan(ids([(0, 1), (0, 2)], 2), ids([3, 4]), ids([(0, 1), (0, 2)], 2), ids([3, 4]))
    moves = pool.captured(max_pages=8, max_slots=8)
    few = _kernels.FEW
    many = Plan(zero_pages=ids(range(few + 1)), copy_slots=ids([(0, 1)], 2))
    pool.apply(both)
    pool.apply(many)
    moves.fill(both)
    cases = [
        (lambda: pool.apply(both), 0, 2),
        (lambda: pool.apply(many), 1, 2),
        (lambda: pool.apply(Plan(zero_pages=ids(range(few)))), 0, 1),
        (lambda: pool.apply(Plan(copy_slots=[(0, 1)])), 0, 1),
        (lambda: moves.fill(both), 1, 0),
        (moves.run, 0, 2),
        (pool.captured(max_pages=4, max_slots=0).run, 0, 1),
        (
            poisoned(LAYOUT, fixed(LAYOUT), "cuda", copies="indirect").captured(max_pages=4, max_slots=9).run,
            0,
            1,
        ),
    ]
    for call, transfers, launches in cases:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        assert sum("Memcpy HtoD" in name for name in on_device) == transfers, on_device
        assert sum("_move" in name for name in on_device) == launches, on_device
        assert len(on_device) == transfers + launches, on_device


# Graphs -----------------------------------------------------------------------------------------------------


def captured(moves: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moves.run()
    return graph


@pytest.mark.parametrize("make", GEOMETRIES)
@pytest.mark.parametrize("seed", range(6))
def test_a_graph_carries_out_another_plan_at_each_replay(seed: int, make: Any) -> None:
    chosen = random.Random(seed)
    layout = random_layout(100 + seed)
    geometry = make(layout)
    ours, oracle = beside_torch(layout, geometry, seed)
    moves = ours.captured(max_pages=geometry.num_pages + 5, max_slots=geometry.num_slots + 3)
    graph = captured(moves)
    graph.replay()  # nothing is filled in
    assert torch.equal(ours.arena.cpu(), oracle.arena)
    for number in range(12):
        plan = Plan() if number % 4 == 3 else random_plan(chosen, *roles(chosen, geometry))
        moves.fill(plan)
        graph.replay()
        oracle.apply(plan)
        if number % 3 == 0:
            graph.replay()  # again: harmless
        assert torch.equal(ours.arena.cpu(), oracle.arena), (seed, number)


def test_a_graph_with_room_for_much_more_than_it_moves() -> None:
    ours, oracle = beside_torch(LAYOUT, fixed(LAYOUT, 50, 40), seed=3)
    moves = ours.captured(max_pages=100_000, max_slots=100_000)
    graph = captured(moves)
    plan = Plan([(3, 39)], [1], [(0, 49)], [7])
    moves.fill(plan)
    graph.replay()
    oracle.apply(plan)
    assert torch.equal(ours.arena.cpu(), oracle.arena)


def test_the_moves_come_before_what_is_captured_after_them() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    moves = pool.captured(max_pages=0, max_slots=2)
    (_, recurrent) = pool.state(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moves.run()
        recurrent[2] += 1
    for value in (5.0, 8.0):
        recurrent[0] = value
        moves.fill(Plan(copy_slots=[(0, 2)]))
        graph.replay()
        assert bool((recurrent[2] == value + 1).all())
    moves.fill(Plan(zero_slots=[2]))
    graph.replay()
    assert bool((recurrent[2] == 1).all())


def test_only_run_may_be_captured() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    moves = pool.captured(max_pages=2, max_slots=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="apply: called while a CUDA graph is captured"):
            pool.apply(Plan(zero_slots=[0]))
        with pytest.raises(RuntimeError, match="fill: called while a CUDA graph is captured"):
            moves.fill(Plan(zero_slots=[0]))
        pool.apply(Plan())
        moves.run()
    graph.replay()
    assert bool((pool.arena == 0xFF).all())


def test_captured_moves_made_in_inference_mode_can_be_filled_outside() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    with torch.inference_mode():
        moves = pool.captured(max_pages=1, max_slots=1)
    moves.fill(Plan(zero_slots=[0]))
    moves.run()
    assert not bool(pool.slots()[0].any())


def test_without_triton_captured_moves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridcache.pools.find_spec", lambda name: None)
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    pool.apply(Plan(zero_slots=[0]))
    assert not bool(pool.slots()[0].any())
    with pytest.raises(RuntimeError, match="captured: torch alone cannot do this on CUDA"):
        pool.captured(max_pages=1, max_slots=1)
