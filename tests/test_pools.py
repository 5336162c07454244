"""Pools: the views lie where geometry and layout say, and plans move exactly the bytes they name."""

from __future__ import annotations

import ast
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache import HybridCache, _moves, pools
from hybridcache.config import LayerSpec, ModelLayout, Part, TensorSpec
from hybridcache.pools import Pools

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


class Geometry(NamedTuple):
    """What Pools reads of a geometry, and no more."""

    page_size: int
    page_bytes: int
    slot_bytes: int
    num_pages: int
    num_slots: int
    slot_offset: int
    slot_stride: int
    total_bytes: int


class Plan(NamedTuple):
    """What Pools reads of a plan, and no more."""

    copy_slots: Any = ()
    zero_slots: Any = ()
    copy_pages: Any = ()
    zero_pages: Any = ()


def tiny_layout(page_size: int = 3, **changes: Any) -> ModelLayout:
    """Two layers of each kind, every part of another size and most of them in need of padding."""
    conv = TensorSpec("conv", (5, 3), "bfloat16")
    layers = (
        LayerSpec(0, "recurrent", (conv, TensorSpec("recurrent", (2, 3, 5), "float32"))),
        LayerSpec(
            1, "attention", (TensorSpec("k", (1, 5), "bfloat16"), TensorSpec("v", (1, 7), "float8_e4m3fn"))
        ),
        LayerSpec(2, "recurrent", (conv, TensorSpec("ssm", (1, 3, 5), "float64"))),
        LayerSpec(5, "attention", (TensorSpec("latent", (9,), "float16"),)),
    )
    extra = (TensorSpec("hidden", (7,), "float16"), TensorSpec("count", (), "int64"))
    return ModelLayout(page_size, layers, **{"extra_state": extra} | changes)


def unified(layout: ModelLayout, slabs: int = 5) -> Geometry:
    """One arena: slot `s` is slab `s`."""
    slab_bytes = -(-layout.slot_bytes // layout.page_bytes) * layout.page_bytes
    total = slabs * slab_bytes
    sizes = layout.page_size, layout.page_bytes, layout.slot_bytes
    return Geometry(*sizes, total // layout.page_bytes, slabs, 0, slab_bytes, total)


def fixed(layout: ModelLayout, num_pages: int = 6, num_slots: int = 5) -> Geometry:
    """Two regions, the slots behind the pages."""
    stride = -(-layout.slot_bytes // layout.page_bytes) * layout.page_bytes
    offset = num_pages * layout.page_bytes
    sizes = layout.page_size, layout.page_bytes, layout.slot_bytes
    return Geometry(*sizes, num_pages, num_slots, offset, stride, offset + num_slots * stride)


GEOMETRIES = [unified, fixed]
LAYOUT = tiny_layout()


def poisoned(layout: ModelLayout, geometry: Geometry, device: str = "cpu", **options: Any) -> Pools:
    """Pools over an arena of 0xFF, which is NaN in every floating-point dtype used here."""
    buffer = torch.full((geometry.total_bytes,), 0xFF, dtype=torch.uint8, device=device)
    return Pools(layout, geometry, device=device, buffer=buffer, **options)


def places(layout: ModelLayout, geometry: Geometry) -> list[tuple[Part, int, int, int]]:
    """Every part of every page and slot: (part, page or slot, first byte, bytes)."""
    found = [
        (part, page, page * geometry.page_bytes + part.offset, part.nbytes)
        for page in range(geometry.num_pages)
        for part in layout.page_parts
    ]
    found += [
        (part, slot, geometry.slot_offset + slot * geometry.slot_stride + part.offset, part.nbytes)
        for slot in range(geometry.num_slots)
        for part in layout.slot_parts
    ]
    return found


def no_kernels(device: torch.device) -> None:
    """In the place of `pools._kernels`: the plain path, also on CUDA."""


def view_of(pool: Pools, part: Part) -> torch.Tensor:
    """The public view of a part, found by its name."""
    if part.layer < 0:
        names, views = [spec.name for spec in pool.layout.extra_state], pool.extra()
    else:
        layer = next(layer for layer in pool.layout.layers if layer.index == part.layer)
        names = [spec.name for spec in layer.parts]
        views = pool.kv(layer.index) if layer.kind == "attention" else pool.state(layer.index)
    assert len(views) == len(names)
    return views[names.index(part.spec.name)]


# Views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", GEOMETRIES)
def test_views_have_the_shapes_and_dtypes_of_the_layout(make: Any, device: str) -> None:
    geometry = make(LAYOUT)
    pool = Pools(LAYOUT, geometry, device=device)
    assert pool.arena.device.type == pool.device.type == device
    for part in LAYOUT.page_parts:
        view = view_of(pool, part)
        assert view.shape == (geometry.num_pages, LAYOUT.page_size, *part.spec.shape)
        assert view.dtype == getattr(torch, part.spec.dtype)
        assert view[0].is_contiguous()
    for part in LAYOUT.slot_parts:
        view = view_of(pool, part)
        assert view.shape == (geometry.num_slots, *part.spec.shape)
        assert view.dtype == getattr(torch, part.spec.dtype)
        assert view[0].is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", GEOMETRIES)
def test_a_write_through_a_view_lands_on_its_own_bytes_and_no_others(make: Any, device: str) -> None:
    geometry = make(LAYOUT)
    pool = Pools(LAYOUT, geometry, device=device)
    for part, index, first, nbytes in places(LAYOUT, geometry):
        pool.arena.fill_(0xA5)
        view_of(pool, part)[index].view(-1).view(torch.uint8).fill_(0x3C)
        expected = torch.full((geometry.total_bytes,), 0xA5, dtype=torch.uint8)
        expected[first : first + nbytes] = 0x3C
        assert torch.equal(pool.arena.cpu(), expected[: pool.arena.numel()]), (part, index)


@pytest.mark.parametrize("make", GEOMETRIES)
def test_elements_lie_in_order(make: Any) -> None:
    """Through a view [page or slot, ...] the raw bytes are those of the contiguous tensor."""
    geometry = make(LAYOUT)
    pool = poisoned(LAYOUT, geometry)
    generator = torch.Generator().manual_seed(0)
    for part, index, first, nbytes in places(LAYOUT, geometry):
        target = view_of(pool, part)[index]
        raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        target.copy_(raw.view(target.dtype).view(target.shape))
        assert torch.equal(pool.arena[first : first + nbytes], raw)


@pytest.mark.parametrize("make", GEOMETRIES)
def test_no_two_views_overlap(make: Any) -> None:
    """Brute force: every byte belongs to at most one part of one page, and to at most one of one slot."""
    geometry = make(LAYOUT)
    pool = Pools(LAYOUT, geometry)
    base = pool.arena.data_ptr()
    for parts in (LAYOUT.page_parts, LAYOUT.slot_parts):
        owners: set[int] = set()
        for part in parts:
            view = view_of(pool, part)
            for row in view:
                first = row.data_ptr() - base
                taken = range(first, first + row.numel() * row.element_size())
                assert owners.isdisjoint(taken), part
                owners.update(taken)
        assert max(owners) < geometry.total_bytes
    if make is fixed:
        last_page_byte = geometry.num_pages * geometry.page_bytes - 1
        assert last_page_byte < geometry.slot_offset <= view_of(pool, LAYOUT.slot_parts[0]).data_ptr() - base


def test_views_of_a_real_model_lie_where_they_should() -> None:
    layout = ModelLayout.preset("qwen3.5-35b", tp_size=8, page_size=16)
    geometry = unified(layout, slabs=3)
    pool = Pools(layout, geometry)
    base = pool.arena.data_ptr()
    for part in (*layout.page_parts, *layout.slot_parts):
        view = view_of(pool, part)
        stride = geometry.page_bytes if part in layout.page_parts else geometry.slot_stride
        assert [row.data_ptr() - base for row in view] == [i * stride + part.offset for i in range(len(view))]
        assert all(row.data_ptr() % 16 == 0 for row in view)
    assert pool.kv(3)[0].shape == (geometry.num_pages, 16, 1, 256)
    conv, recurrent = pool.state(0)
    assert conv.shape == (3, 1024, 3) and recurrent.shape == (3, 4, 128, 128)


@pytest.mark.parametrize("make", GEOMETRIES)
def test_addresses_beyond_four_gibibytes(make: Any) -> None:
    """Byte offsets above 2**32 and bfloat16 element offsets above 2**31, in mostly unwritten memory."""
    layout = ModelLayout.preset("qwen3.5-35b", tp_size=8)
    slabs = 5 * 2**30 // unified(layout, 1).slot_stride
    geometry = (
        unified(layout, slabs)
        if make is unified
        else fixed(layout, 4 * 2**30 // layout.page_bytes, slabs // 4)
    )
    pool = Pools(layout, geometry)
    page, slot = geometry.num_pages - 1, geometry.num_slots - 1
    if make is unified:
        slot -= 1  # the page lies in the last slab
    keys = pool.kv(39)[1]
    keys[page, -1] = 3.0
    part = next(part for part in layout.page_parts if part.layer == 39 and part.spec.name == "v")
    first = page * geometry.page_bytes + part.offset + 63 * part.spec.nbytes
    assert torch.equal(
        pool.arena[first : first + part.spec.nbytes].view(torch.bfloat16), torch.full((256,), 3.0).bfloat16()
    )
    state = pool.state(38)[1]
    state[slot - 1] = 7.0
    pool.apply(Plan(copy_slots=[[slot - 1, slot]], copy_pages=[[page, 0]]))
    part = next(part for part in layout.slot_parts if part.layer == 38 and part.spec.name == "recurrent")
    first = geometry.slot_offset + slot * geometry.slot_stride + part.offset
    assert max(first, page * geometry.page_bytes) > 2**32
    assert bool((pool.arena[first : first + part.nbytes].view(torch.float32) == 7.0).all())
    assert bool((keys[0, -1] == 3.0).all())


def test_a_layer_of_the_other_kind_is_refused() -> None:
    pool = Pools(LAYOUT, unified(LAYOUT))
    with pytest.raises(ValueError, match=r"layer_index: 0, expected .* attention layers \[1, 5\]"):
        pool.kv(0)
    with pytest.raises(ValueError, match=r"layer_index: 5, expected .* recurrent layers \[0, 2\]"):
        pool.state(5)
    with pytest.raises(ValueError, match="layer_index: 3"):
        pool.kv(3)


def test_a_layout_without_extra_state() -> None:
    layout = tiny_layout(extra_state=())
    pool = Pools(layout, unified(layout))
    assert pool.extra() == ()
    assert [view.dtype for view in pool.state(2)] == [torch.bfloat16, torch.float64]


@pytest.mark.parametrize(("num_pages", "num_slots"), [(0, 2), (2, 0), (0, 0)])
def test_regions_may_be_empty(num_pages: int, num_slots: int) -> None:
    geometry = fixed(LAYOUT, num_pages, num_slots)
    pool = poisoned(LAYOUT, geometry)
    assert pool.kv(1)[0].shape[0] == num_pages and pool.state(0)[0].shape[0] == num_slots
    pool.apply(Plan(zero_pages=range(num_pages), zero_slots=range(num_slots)))
    with pytest.raises(ValueError, match="zero_slots"):
        pool.apply(Plan(zero_slots=[num_slots]))


def test_views_made_in_inference_mode_can_be_written_outside() -> None:
    with torch.inference_mode():
        pool = Pools(LAYOUT, unified(LAYOUT))
    pool.kv(1)[0].zero_()
    pool.apply(Plan(zero_pages=[0], zero_slots=[1]))
    with torch.inference_mode():
        pool.apply(Plan(copy_pages=[[0, 1]], copy_slots=[[0, 1]]))


# The caller's buffer --------------------------------------------------------------------------------------


def test_a_buffer_of_the_caller_is_used_as_it_is() -> None:
    geometry = fixed(LAYOUT)
    whole = torch.full((geometry.total_bytes + 100,), 7, dtype=torch.uint8)
    pool = Pools(LAYOUT, geometry, buffer=whole[32:])
    pool.kv(1)[0][0, 0, 0, 0] = 0.0
    assert whole[31:36].tolist() == [7, 0, 0, 7, 7]
    pool.apply(Plan(zero_pages=range(geometry.num_pages), zero_slots=range(geometry.num_slots)))
    assert bool((whole[:32] == 7).all()) and bool((whole[32 + geometry.total_bytes :] == 7).all())


def aligned(size: int) -> np.ndarray:
    """`size` bytes at an address that is a multiple of 16."""
    raw = np.empty(size + 16, dtype=np.uint8)
    return raw[-raw.ctypes.data % 16 :][:size]


@pytest.mark.parametrize(
    ("buffer", "match"),
    [
        (lambda size: torch.empty(size, dtype=torch.int8), "buffer: torch.int8"),
        (lambda size: torch.empty((2, size), dtype=torch.uint8), "of one dimension"),
        (lambda size: torch.empty(2 * size, dtype=torch.uint8)[::2], "contiguous"),
        (lambda size: torch.empty(size - 1, dtype=torch.uint8), "bytes, expected at least"),
        (
            lambda size: torch.empty(size + 8, dtype=torch.uint8)[8:],
            "address .*, storage offset 8, expected multiples of 16",
        ),
        (
            lambda size: torch.from_numpy(aligned(size + 16)[8:])[8:],
            "0, storage offset 8, expected multiples of 16",
        ),
        (lambda size: torch.empty(size, dtype=torch.uint8, device="meta"), "on meta, expected device cpu"),
    ],
)
def test_a_bad_buffer_is_refused(buffer: Any, match: str) -> None:
    geometry = unified(LAYOUT)
    with pytest.raises(ValueError, match=match):
        Pools(LAYOUT, geometry, buffer=buffer(geometry.total_bytes))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"page_size": 4}, "geometry.page_size: 4, expected the layout's 3"),
        ({"page_bytes": 16}, "geometry.page_bytes: 16"),
        ({"slot_bytes": 16}, "geometry.slot_bytes: 16"),
        ({"slot_offset": 8}, "geometry.slot_offset: 8, expected a multiple of 16"),
        ({"slot_offset": -16}, "geometry.slot_offset: -16"),
        ({"slot_stride": LAYOUT.slot_bytes + 4}, "geometry.slot_stride: .* multiple of 16"),
        ({"slot_stride": 16}, "geometry.slot_stride: 16, expected at least"),
        ({"total_bytes": 100}, "geometry.total_bytes: 100, expected at least"),
        ({"num_slots": 99}, "geometry.total_bytes: .*, expected at least"),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(change: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Pools(LAYOUT, unified(LAYOUT)._replace(**change))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="copies: 'lazy', expected 'eager' or 'indirect'"):
        Pools(LAYOUT, unified(LAYOUT), copies="lazy")
    with pytest.raises(ValueError, match="device: 'meta', expected cpu or cuda"):
        Pools(LAYOUT, unified(LAYOUT), device="meta")


# Plans ----------------------------------------------------------------------------------------------------


def ids(values: Any, columns: int = 1) -> np.ndarray:
    """As the core hands them out: int32, read-only."""
    array = np.array(values, dtype=np.int32).reshape((-1, 2) if columns == 2 else (-1,))
    array.flags.writeable = False
    return array


def expected_bytes(before: bytes, geometry: Geometry, plan: Plan, copies: str) -> bytes:
    """The plan byte by byte, from the bytes before it."""
    after = bytearray(before)

    def page(number: int) -> range:
        return range(number * geometry.page_bytes, (number + 1) * geometry.page_bytes)

    def slot(number: int) -> range:
        first = geometry.slot_offset + number * geometry.slot_stride
        return range(first, first + geometry.slot_bytes)

    work = [(page, plan.copy_pages, plan.zero_pages)]
    if copies == "eager":
        work.append((slot, plan.copy_slots, plan.zero_slots))
    for where, copied, zeroed in work:
        for source, target in copied:
            for read, written in zip(where(int(source)), where(int(target)), strict=True):
                after[written] = before[read]
        for number in zeroed:
            for written in where(int(number)):
                after[written] = 0
    return bytes(after)


@st.composite
def geometries_and_plans(draw: Any) -> tuple[Geometry, Plan]:
    """A plan as the core would make it: in a unified arena, pages and slots lie in different slabs."""
    make = draw(st.sampled_from(GEOMETRIES))
    geometry = make(LAYOUT)
    pages, slots = list(range(geometry.num_pages)), list(range(geometry.num_slots))
    if make is unified:
        roles = draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        per_slab = geometry.num_pages // geometry.num_slots
        slots = [slab for slab, is_slot in enumerate(roles) if is_slot]
        pages = [page for page in pages if not roles[page // per_slab]]

    def kinds(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = draw(st.permutations(rows))
        cut, end = sorted((draw(st.integers(0, len(rows))), draw(st.integers(0, len(rows)))))
        targets, zeroed, sources = rows[:cut], rows[cut:end], rows[end:]
        if not sources:
            return ids([], 2), ids(targets + zeroed)
        return ids([(draw(st.sampled_from(sources)), target) for target in targets], 2), ids(zeroed)

    copy_slots, zero_slots = kinds(slots)
    copy_pages, zero_pages = kinds(pages)
    return geometry, Plan(copy_slots, zero_slots, copy_pages, zero_pages)


@pytest.mark.parametrize(
    ("large_row", "gathered"),
    [(1, 0), (1 << 20, 1 << 20), (1 << 20, 400)],
    ids=["row by row", "gathered", "gathered in rounds"],
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copies", ["eager", "indirect"])
@settings(max_examples=60, deadline=None)
@given(case=geometries_and_plans(), seed=st.integers(0, 2**32 - 1))
def test_a_plan_changes_exactly_the_bytes_that_it_names(
    case: tuple[Geometry, Plan], seed: int, copies: Any, device: str, large_row: int, gathered: int
) -> None:
    geometry, plan = case
    before = np.random.default_rng(seed).integers(0, 256, geometry.total_bytes, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_moves, "_LARGE_ROW", {device: large_row})
        patch.setattr(_moves, "_GATHERED", gathered)
        patch.setattr(pools, "_kernels", no_kernels)
        pool = Pools(
            LAYOUT, geometry, device=device, copies=copies, buffer=torch.from_numpy(before.copy()).to(device)
        )
    expected = expected_bytes(before.tobytes(), geometry, plan, copies)[: pool.arena.numel()]
    for _ in range(2):  # applying it again is harmless
        pool.apply(plan)
        assert pool.arena.cpu().numpy().tobytes() == expected
    backwards = Plan(*(kind[::-1] for kind in plan))
    pool.arena.copy_(torch.from_numpy(before)[: pool.arena.numel()])
    pool.apply(backwards)
    assert pool.arena.cpu().numpy().tobytes() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", GEOMETRIES)
def test_zeroed_pages_and_slots_hold_no_nan(make: Any, device: str) -> None:
    geometry = make(LAYOUT)
    pool = poisoned(LAYOUT, geometry, device)
    page = geometry.num_pages - 1 if make is fixed else 1
    slot = geometry.num_slots - 1
    floats = [part for part in (*LAYOUT.page_parts, *LAYOUT.slot_parts) if part.spec.name != "count"]
    assert all(bool(view_of(pool, part).float().isnan().all()) for part in floats)
    pool.apply(Plan(zero_pages=ids([page]), zero_slots=ids([slot])))
    for part in LAYOUT.page_parts:
        assert not bool(view_of(pool, part)[page].float().any())
        assert bool(view_of(pool, part)[0].float().isnan().all())
    for part in LAYOUT.slot_parts:
        assert not bool(view_of(pool, part)[slot].float().any())
        assert part.spec.name == "count" or bool(view_of(pool, part)[1].float().isnan().all())


@pytest.mark.parametrize("copies", ["eager", "indirect"])
def test_copies_carry_the_state_of_every_layer(copies: Any) -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), copies=copies)
    for number, part in enumerate(LAYOUT.slot_parts, 1):
        view_of(pool, part)[2] = number
    for number, part in enumerate(LAYOUT.page_parts, 1):
        view_of(pool, part)[3] = number
    pool.apply(Plan(copy_slots=ids([(2, 0), (2, 4)], 2), copy_pages=ids([(3, 5)], 2)))
    for number, part in enumerate(LAYOUT.slot_parts, 1):
        for slot in (0, 4):
            assert bool((view_of(pool, part)[slot].double() == number).all()) == (copies == "eager")
    for number, part in enumerate(LAYOUT.page_parts, 1):
        assert bool((view_of(pool, part)[5].double() == number).all())


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_plan_runs_nothing(device: str) -> None:
    pool = poisoned(LAYOUT, unified(LAYOUT), device)
    empty = Plan(ids([], 2), ids([]), ids([], 2), ids([]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        pool.apply(empty)
        pool.apply(Plan())
    assert not [event.name for event in profile.events() if event.name.startswith(("aten::", "cuda"))]


@pytest.mark.parametrize("copies", ["eager", "indirect"])
@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(copy_slots=[[0, 5]]), r"plan.copy_slots, plan.zero_slots: \[5\], expected ids in \[0, 5\)"),
        (Plan(copy_slots=[[-1, 2]]), r"slots: \[-1\], expected ids in \[0, 5\)"),
        (Plan(zero_slots=[0, 7, 9]), r"slots: \[7, 9\], expected ids"),
        (Plan(copy_pages=[[6, 0]]), r"plan.copy_pages, plan.zero_pages: \[6\], expected ids in \[0, 6\)"),
        (Plan(zero_pages=[-6]), r"pages: \[-6\], expected ids"),
        (Plan(zero_pages=[1, 2, 1]), r"pages: \[1\], expected no destination twice"),
        (Plan(copy_pages=[[0, 3], [1, 3]]), r"pages: \[3\], expected no destination twice"),
        (Plan(copy_slots=[[0, 3]], zero_slots=[3]), r"slots: \[3\], expected no destination twice"),
        (Plan(copy_slots=[[0, 1], [1, 2]]), r"slots: \[1\], expected no source that is also a destination"),
        (Plan(copy_pages=[[2, 1]], zero_pages=[2]), r"pages: \[2\], expected no source that is"),
        (Plan(copy_pages=[[2, 2]]), r"pages: \[2\], expected no source that is"),
        (Plan(copy_slots=[0, 1]), r"plan.copy_slots: shape \(2,\), expected \[n, 2\]"),
        (Plan(zero_pages=[[0, 1]]), r"plan.zero_pages: shape \(1, 2\), expected \[n\]"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_changes(plan: Plan, match: str, copies: Any) -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT, num_pages=6, num_slots=5), copies=copies)
    good = {"zero_pages": [5], "zero_slots": [4]}
    mixed = plan._replace(**{name: value for name, value in good.items() if not len(getattr(plan, name))})
    for bad in (plan, mixed):
        with pytest.raises(ValueError, match=match):
            pool.apply(bad)
    assert bool((pool.arena == 0xFF).all())
    pool.apply(Plan(**good))


def test_many_ids_are_checked_like_few() -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT, num_pages=600, num_slots=1))
    right = Plan(copy_pages=[(i, 599 - i) for i in range(200)], zero_pages=range(200, 400))
    wrong = [
        (
            right._replace(zero_pages=[*range(200, 399), 599]),
            r"pages: \[599\], expected no destination twice",
        ),
        (right._replace(zero_pages=range(199, 400)), r"pages: \[199\], expected no source that is also"),
        (Plan(zero_pages=range(601)), r"pages: \[600\], expected ids in \[0, 600\)"),
    ]
    for plan, match in wrong:
        with pytest.raises(ValueError, match=match):
            pool.apply(plan)
    assert bool((pool.arena == 0xFF).all())
    pool.apply(right)
    zeroed = [page for page in range(600) if not bool(pool.pages()[page].any())]
    assert zeroed == list(range(200, 400))


def test_ids_must_be_integers() -> None:
    with pytest.raises(TypeError, match=r"plan.zero_pages: dtype float64, expected integers"):
        Pools(LAYOUT, unified(LAYOUT)).apply(Plan(zero_pages=[1.0]))


def test_checks_of_one_plan_leave_nothing_behind_for_the_next() -> None:
    """A page may be a destination in one plan and a source in the next, in any position of either."""
    pool = poisoned(LAYOUT, fixed(LAYOUT))
    pool.apply(Plan(zero_pages=[0, 1, 2, 3]))
    pool.apply(Plan(copy_pages=[[3, 4], [0, 5]]))
    pool.apply(Plan(copy_pages=[[4, 0], [5, 1], [4, 2]]))
    pool.apply(Plan(copy_pages=[[0, 4]]))
    assert not bool(pool.kv(1)[0].float().any())


@pytest.mark.parametrize("make", GEOMETRIES)
def test_whole_pages_and_slots_are_their_bytes(make: Any) -> None:
    geometry = make(LAYOUT)
    pool = Pools(LAYOUT, geometry, buffer=torch.arange(geometry.total_bytes).to(torch.uint8))
    assert pool.pages().shape == (geometry.num_pages, LAYOUT.page_bytes)
    assert pool.slots().shape == (geometry.num_slots, LAYOUT.slot_bytes)
    for page in range(geometry.num_pages):
        first = page * geometry.page_bytes
        assert torch.equal(pool.pages()[page], pool.arena[first : first + geometry.page_bytes])
    for slot in range(geometry.num_slots):
        first = geometry.slot_offset + slot * geometry.slot_stride
        assert torch.equal(pool.slots()[slot], pool.arena[first : first + geometry.slot_bytes])
    pool.slots()[1] = 9
    assert bool((pool.arena[geometry.slot_offset + geometry.slot_stride] == 9).all())


# Captured: fixed room for any plan; on the CPU it does what it would do in a graph --------------------------


@pytest.mark.parametrize("copies", ["eager", "indirect"])
@settings(max_examples=60, deadline=None)
@given(case=geometries_and_plans(), seed=st.integers(0, 2**32 - 1))
def test_captured_moves_are_those_of_the_last_plan(
    case: tuple[Geometry, Plan], seed: int, copies: Any
) -> None:
    geometry, plan = case
    before = np.random.default_rng(seed).integers(0, 256, geometry.total_bytes, dtype=np.uint8)
    pool = Pools(LAYOUT, geometry, copies=copies, buffer=torch.from_numpy(before.copy()))
    moves = pool.captured(
        max_pages=len(plan.copy_pages) + len(plan.zero_pages),
        max_slots=len(plan.copy_slots) + len(plan.zero_slots) if copies == "eager" else 0,
    )
    moves.run()
    assert pool.arena.numpy().tobytes() == before.tobytes()[: pool.arena.numel()]
    moves.fill(plan)
    assert pool.arena.numpy().tobytes() == before.tobytes()[: pool.arena.numel()]
    for _ in range(2):
        moves.run()
        after = expected_bytes(before.tobytes(), geometry, plan, copies)
        assert pool.arena.numpy().tobytes() == after[: pool.arena.numel()]
    moves.fill(Plan())
    pool.arena.fill_(3)
    moves.run()
    assert bool((pool.arena == 3).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_that_captured_moves_cannot_take_changes_nothing(device: str) -> None:
    pool = poisoned(LAYOUT, fixed(LAYOUT), device)
    moves = pool.captured(max_pages=2, max_slots=1)
    moves.fill(Plan(zero_pages=[1, 2], zero_slots=[3]))
    bad = [
        (
            Plan(zero_slots=[0], zero_pages=[0, 1], copy_pages=[[2, 3]]),
            r"pages: 3 moves, expected at most the 2",
        ),
        (Plan(copy_slots=[[0, 1], [0, 2]]), r"plan.zero_slots: 2 moves, expected at most the 1 of max_slots"),
        (Plan(zero_pages=[4], zero_slots=[5]), r"slots: \[5\], expected ids in \[0, 5\)"),
    ]
    for plan, match in bad:
        with pytest.raises(ValueError, match=match):
            moves.fill(plan)
    moves.run()
    found = pool.pages().cpu()
    assert [bool(page.any()) for page in found] == [True, False, False, True, True, True]
    assert [bool(slot.any()) for slot in pool.slots().cpu()] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("bounds", "error", "match"),
    [
        ({"max_pages": -1, "max_slots": 0}, ValueError, "max_pages: -1, expected at least 0"),
        ({"max_pages": 0, "max_slots": 1.0}, TypeError, "max_slots: 1.0, expected an int"),
        ({"max_pages": True, "max_slots": 0}, TypeError, "max_pages: True, expected an int"),
    ],
)
def test_bad_bounds_of_captured_moves_are_refused(bounds: Any, error: Any, match: str) -> None:
    for copies in ("eager", "indirect"):
        with pytest.raises(error, match=match):
            Pools(LAYOUT, unified(LAYOUT), copies=copies).captured(**bounds)


# With the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"memory_bytes": 60_000}, {"num_pages": 40, "num_slots": 9}])
def test_the_geometry_and_the_plans_of_a_cache_fit(options: dict[str, int]) -> None:
    """Two turns over a poisoned arena: the second starts from the bytes that the first left, tail too."""
    layout = tiny_layout(page_size=4)
    cache = HybridCache(layout, **options)
    buffer = torch.full((cache.geometry.total_bytes,), 0xFF, dtype=torch.uint8)
    pool = Pools(layout, cache.geometry, buffer=buffer)

    def step(lease: Any, count: int, tokens: Any = ()) -> None:
        launched = lease.launch(count)
        plan = cache.plan()
        pool.apply(plan)
        cache.applied(plan)
        conv, recurrent = pool.state(0)
        assert bool((recurrent[launched.write_slot] == launched.begin).all())
        for position in range(launched.begin, launched.end):
            page = lease.pages[position // 4]
            pool.kv(5)[0][page, position % 4] = position
        for view in (*pool.state(0), *pool.state(2), *pool.extra()):
            view[launched.write_slot] = launched.end
        assert conv.shape[0] == cache.geometry.num_slots
        lease.commit(tokens)

    prompt = list(range(100, 110))
    first = cache.reserve(prompt, max_new_tokens=4)
    step(first, 10)
    step(first, 1, [7])
    first.close()
    second = cache.reserve([*prompt, 7, 8, 9], max_new_tokens=4)
    assert second.start == 11
    step(second, 2)
    step(second, 1, [6])  # its plan copies the page that the end of the prompt cut
    positions = [pool.kv(5)[0][second.pages[i // 4], i % 4] for i in range(14)]
    assert all(bool((row == position).all()) for position, row in enumerate(positions))
    second.close()
    cache.check()


def test_pools_imports_no_more_than_it_may() -> None:
    tree = ast.parse(pathlib.Path(pools.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    known = {name for name in names if name.startswith("hybridcache")}
    assert known == {"hybridcache.config", "hybridcache._moves"}


# On a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("large_row", [1, 1 << 40], ids=["row by row", "gathered"])
def test_addresses_beyond_four_gibibytes_on_a_gpu(large_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moves, "_LARGE_ROW", {"cuda": large_row})
    monkeypatch.setattr(pools, "_kernels", no_kernels)
    layout = ModelLayout.preset("qwen3.5-35b", tp_size=8)
    geometry = unified(layout, 9 * 2**30 // unified(layout, 1).slot_stride)
    pool = Pools(layout, geometry, device="cuda")
    per_slab = geometry.num_pages // geometry.num_slots
    slot, page = geometry.num_slots - 1, (geometry.num_slots - 2) * per_slab
    pool.arena[: 2 * geometry.slot_stride].fill_(0xFF)
    for part in layout.slot_parts:
        view_of(pool, part)[slot - 2] = 3
    for part in layout.page_parts:
        view_of(pool, part)[per_slab] = 5
    pool.apply(
        Plan(
            copy_slots=[[slot - 2, slot]],
            zero_slots=[0],
            copy_pages=[[per_slab, page]],
            zero_pages=[page + 1],
        )
    )
    assert page * geometry.page_bytes > 2**33
    for part in layout.slot_parts:
        assert bool((view_of(pool, part)[slot] == 3).all()) and not bool(view_of(pool, part)[0].any())
    for part in layout.page_parts:
        assert bool((view_of(pool, part)[page] == 5).all()) and not bool(view_of(pool, part)[page + 1].any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_without_kernels_a_plan_costs_one_transfer_and_one_operation_per_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "_kernels", no_kernels)
    pool = poisoned(LAYOUT, fixed(LAYOUT), "cuda")
    plan = Plan(ids([(0, 1), (0, 2)], 2), ids([3, 4]), ids([(0, 1), (0, 2)], 2), ids([3, 4]))
    pool.apply(plan)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        pool.apply(plan)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names.count("aten::index_copy_") == names.count("aten::index_fill_") == 2
    assert sum("Memcpy HtoD" in name for name in names) == 1
    assert not any("Memcpy DtoH" in name for name in names)


def test_a_slot_copy_moves_whole_words() -> None:
    pool = Pools(LAYOUT, unified(LAYOUT))
    words = pool._slots.words
    assert words.dtype == torch.int64 and words.shape[1] * 8 == LAYOUT.slot_bytes
    assert math.prod(pool._pages.words.shape) * 8 == unified(LAYOUT).total_bytes
