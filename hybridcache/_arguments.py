"""Arguments of HybridCache: what is accepted, and the sizes that follow from them.

Owns the messages of the errors that name an argument, its value and what was expected. Tokens are checked by
the core, where they are read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from hybridcache import _core
from hybridcache.values import Geometry, Layout

ContentKeys = Iterable[tuple[int, bytes]]


def check_integer(name: str, value: Any, *, low: int, high: int = 2**62) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {value!r}, expected an integer") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}: {value!r}, expected an integer")
    if not low <= number <= high:
        raise ValueError(f"{name}: {number}, expected {low} <= {name} <= {high}")
    return number


def check_salt(salt: Any) -> bytes:
    if not isinstance(salt, bytes):
        raise TypeError(f"salt: {salt!r}, expected bytes")
    return salt


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {value!r}, expected True or False")
    return value


def check_each(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name}: {values!r}, expected a sequence") from None


def check_integers(name: str, values: Any, *, low: int = -(2**62)) -> list[int]:
    values = check_each(name, values)
    numbers: list[int] = values
    if set(map(type, values)) == {int} and low <= min(values) and max(values) <= 2**62:  # a batch, at speed
        return numbers
    return [check_integer(name, each, low=low) for each in values]


def check_rows(rows: int | None) -> int:
    return -1 if rows is None else check_integer("rows", rows, low=0)


def check_time(name: str, value: int | None) -> int:
    return -1 if value is None else check_integer(name, value, low=0, high=2**61)


def check_content_keys(keys: ContentKeys) -> list[tuple[int, bytes]]:
    checked = []
    for key in check_each("content_keys", keys):
        if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], bytes)):
            raise TypeError(f"content_keys: {key!r}, expected (position, bytes)")
        checked.append((check_integer("content_keys", key[0], low=0), key[1]))
    return checked


def ids_of(leases: Any, kind: type[Any], core: _core.Core) -> list[int]:
    """Those of leases of this core, in order; `kind` is their class."""
    leases = check_each("leases", leases)
    ids = [lease._id for lease in leases if type(lease) is kind and lease._core is core]
    if len(ids) == len(leases):
        return ids
    wrong = next(lease for lease in leases if type(lease) is not kind or lease._core is not core)
    raise ValueError(f"leases: {wrong!r}, expected leases of this cache")


def set_layout(options: _core.Options, layout: Layout) -> None:
    for name in ("page_size", "page_bytes", "slot_bytes"):
        if not hasattr(layout, name):
            raise TypeError(f"layout: {layout!r} has no {name}, expected a ModelLayout or the like")
    options.page_size = check_integer("layout.page_size", layout.page_size, low=1, high=2**20)
    options.page_bytes = check_integer("layout.page_bytes", layout.page_bytes, low=1)
    options.slot_bytes = check_integer("layout.slot_bytes", layout.slot_bytes, low=1)
    options.lookahead = check_integer("layout.lookahead", getattr(layout, "lookahead", 0), low=0, high=1)


PARTS = ("ghosts", "flow", "stages", "gaps", "horizon", "forks")


def parts_off(without: Sequence[str]) -> int:
    """A bit for each part of the default policy, in the order of PARTS."""
    bits = 0
    for part in check_each("without", without):
        if part not in PARTS:
            raise ValueError(f"without: {part!r}, expected some of {PARTS}")
        bits |= 1 << PARTS.index(part)
    return bits


def size_arena(
    options: _core.Options, memory_bytes: int | None, num_pages: int | None, num_slots: int | None
) -> None:
    if memory_bytes is None and num_pages is not None and num_slots is not None:
        options.num_pages = check_integer("num_pages", num_pages, low=1, high=2**31 - 1)
        options.num_slots = check_integer("num_slots", num_slots, low=1, high=2**31 - 1)
        total = options.num_pages * options.page_bytes + options.num_slots * bytes_of_slab(options)
        if total >= 2**62:
            raise ValueError(
                f"num_pages: {num_pages}, num_slots: {num_slots}, expected less than 2**62 bytes"
            )
        return
    if memory_bytes is None or num_pages is not None or num_slots is not None:
        raise ValueError(
            f"memory_bytes: {memory_bytes}, num_pages: {num_pages}, num_slots: {num_slots}, "
            "expected memory_bytes alone, or both others"
        )
    slab_bytes = bytes_of_slab(options)
    options.num_slabs = check_integer("memory_bytes", memory_bytes, low=0, high=2**62) // slab_bytes
    if options.num_slabs < 2:
        raise ValueError(
            f"memory_bytes: {memory_bytes}, expected at least {2 * slab_bytes}: "
            f"a slab of {slab_bytes} bytes for one slot and one for pages"
        )
    if options.num_slabs * (slab_bytes // options.page_bytes) >= 2**31:
        raise ValueError(
            f"memory_bytes: {memory_bytes}, expected less than 2**31 pages of {options.page_bytes} bytes"
        )


def bytes_of_slab(options: _core.Options) -> int:
    return -(-options.slot_bytes // options.page_bytes) * options.page_bytes


def arena_geometry(options: _core.Options, core: _core.Core) -> Geometry:
    pages_per_slab, num_pages, num_slots = core.arena()
    fixed = options.num_slabs == 0
    slab_bytes = bytes_of_slab(options)
    slot_offset = num_pages * options.page_bytes if fixed else 0
    total = slot_offset + num_slots * slab_bytes
    return Geometry(
        page_size=options.page_size,
        page_bytes=options.page_bytes,
        slot_bytes=options.slot_bytes,
        pages_per_slab=pages_per_slab,
        slab_bytes=slab_bytes,
        num_slabs=options.num_slabs,
        num_pages=num_pages,
        num_slots=num_slots,
        slot_offset=slot_offset,
        slot_stride=slab_bytes,
        total_bytes=total,
    )
