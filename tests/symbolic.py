"""Symbolic memory: stands for the tensors, so that a wrong read is seen the moment it happens.

Owns one value per page cell and one per slot. A cell's KV value is the id of the exact (salt, path up to and
including its position), a slot's value the id of the exact path that its state has read. It executes Plans
and forwards and knows nothing of how the cache decides: of the store it reads only what must hold
(checkpoints, pages). `guard` is called before any write of a plan or a forward: I5, nothing that the tree can
serve is written. In the unified arena writing a slot turns the cells of the pages under it into STATE bytes,
and writing a cell ruins the slot.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ZERO = 0  # a zeroed cell, or the state after no token
NEVER_WRITTEN, STATE_BYTES, RUINED = -1, -2, -3


class Paths:
    """Gives every (salt, path) its own positive id."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.cached: dict[Any, np.ndarray] = {}

    def ids(self, salt: bytes, path: Sequence[Any]) -> np.ndarray:
        """int64 [len(path) + 1], an id a prefix: entry n is the state after n tokens, n+1 the KV at n."""
        key = (salt, tuple(path))
        if key not in self.cached:
            parent, found = self.known.setdefault(salt, len(self.known) + 1), [ZERO]
            for symbol in path:
                parent = self.known.setdefault((parent, symbol), len(self.known) + 1)
                found.append(parent)
            self.cached[key] = np.array(found, dtype=np.int64)
        return self.cached[key]


class SymbolicMemory:
    def __init__(
        self,
        *,
        page_size: int,
        num_pages: int,
        num_slots: int,
        pages_per_slab: int,
        unified: bool,
        eager: bool,
        store: Any,
    ) -> None:
        self.store = store
        self.page_size, self.per_slab, self.unified, self.eager = page_size, pages_per_slab, unified, eager
        self.cells = np.full((num_pages, page_size), NEVER_WRITTEN, dtype=np.int64)
        self.slots = np.full(num_slots, NEVER_WRITTEN, dtype=np.int64)
        self.paths = Paths()
        self.served_slots: set[int] = set()
        self.served_cells: dict[int, int] = {}  # page -> how many of its leading positions the tree serves
        self.events: Counter[str] = Counter()

    # ---- writes

    def guard(self) -> None:
        """Notes what the tree can serve now: between publication and eviction none of it may be written."""
        checkpoints = self.store.checkpoints
        self.served_slots = {c.slot for c in checkpoints.values()}
        self.served_cells = dict.fromkeys(self.store.pages.values(), self.page_size)
        for (_, path), checkpoint in checkpoints.items():
            if checkpoint.tail is not None:
                served = max(len(path) % self.page_size, self.served_cells.get(checkpoint.tail, 0))
                self.served_cells[checkpoint.tail] = served

    def write_slot(self, slot: int, value: int) -> None:
        assert slot not in self.served_slots, f"I5: slot {slot} is a checkpoint's and is written"
        self.slots[slot] = value
        if self.unified:
            under = slice(slot * self.per_slab, (slot + 1) * self.per_slab)
            ruined = self.served_cells.keys() & range(under.start, under.stop)
            assert not ruined, f"I5: slot {slot} is written over the tree's pages {sorted(ruined)}"
            self.events["page_to_slot"] += bool((self.cells[under] >= ZERO).any())
            self.cells[under] = STATE_BYTES

    def write_page(self, page: int, cells: Any) -> None:
        assert page not in self.served_cells, f"I5: page {page} is the tree's and is written"
        if self.unified:
            slot = page // self.per_slab
            assert slot not in self.served_slots, f"I5: page {page} is written over checkpoint slot {slot}"
            self.events["slot_to_page"] += bool((self.cells[page] == STATE_BYTES).any())
            self.slots[slot] = RUINED
        self.cells[page] = cells

    # ---- plans

    def apply(self, plan: Any, rng: random.Random) -> None:
        """Executes a plan in any order, sometimes twice: neither may matter."""
        self.validate(plan)
        self.guard()
        work = [("page", int(dst), int(src)) for src, dst in plan.copy_pages]
        work += [("page", int(dst), None) for dst in plan.zero_pages]
        if self.eager:
            work += [("slot", int(dst), int(src)) for src, dst in plan.copy_slots]
            work += [("slot", int(dst), None) for dst in plan.zero_slots]
        for _ in range(1 + (rng.random() < 0.2)):
            rng.shuffle(work)
            for space, dst, src in work:
                self.move(space, dst, src)
        self.events["tails_copied"] += len(plan.copy_pages)
        self.events["slots_copied"] += len(plan.copy_slots)
        self.events["pages_zeroed"] += len(plan.zero_pages)

    def move(self, space: str, dst: int, src: int | None) -> None:
        if space == "page":
            self.write_page(dst, ZERO if src is None else self.cells[src].copy())
        else:
            self.write_slot(dst, ZERO if src is None else int(self.slots[src]))

    def validate(self, plan: Any) -> None:
        """Each id a destination at most once over copies and zeroes, never also a source; no alias."""
        for copies, zeroes in ((plan.copy_slots, plan.zero_slots), (plan.copy_pages, plan.zero_pages)):
            targets = [int(dst) for _, dst in copies] + [int(dst) for dst in zeroes]
            assert len(targets) == len(set(targets)), f"a destination twice: {plan}"
            assert not set(targets) & {int(src) for src, _ in copies}, (
                f"a destination that is a source: {plan}"
            )
        if self.unified:
            slots = {int(x) for pair in plan.copy_slots for x in pair} | {int(s) for s in plan.zero_slots}
            pages = {int(x) for pair in plan.copy_pages for x in pair} | {int(p) for p in plan.zero_pages}
            assert not slots & {p // self.per_slab for p in pages}, f"one slab as slot and as pages: {plan}"

    # ---- forward

    def forward(self, salt: bytes, path: Sequence[Any], step: Any, table: Sequence[int], owned: Any) -> None:
        """What the kernels do for `path[begin:end]`; `owned(space, id)`: is it the lease's alone."""
        self.guard()
        ids = self.paths.ids(salt, path)
        begin, end, table = int(step.begin), int(step.end), np.asarray(table)
        self.read_state(step, ids[begin])
        self.read_kv(table, ids, begin)
        positions = np.arange(begin, end)
        for index in range(begin // self.page_size, (end - 1) // self.page_size + 1):
            page, first = int(table[index]), max(begin - index * self.page_size, 0)
            assert owned("page", page), f"I5: step {step} writes page {page}, which it does not own alone"
            served = self.served_cells.get(page, 0)
            assert first >= served, (
                f"I5: step {step} writes page {page} from {first}, the tree serves {served}"
            )
        if self.unified:
            ruined = self.served_slots & {int(p) // self.per_slab for p in table[positions // self.page_size]}
            assert not ruined, f"I5: step {step} writes KV over checkpoint slots {sorted(ruined)}"
            self.slots[table[positions // self.page_size] // self.per_slab] = RUINED
        self.cells[table[positions // self.page_size], positions % self.page_size] = ids[begin + 1 : end + 1]
        for position, slot in [*step.checkpoints, (end, step.write_slot)]:
            assert owned("slot", int(slot)), (
                f"I5: step {step} writes slot {slot}, which it does not own alone"
            )
            self.write_slot(int(slot), int(ids[position]))

    def read_state(self, step: Any, expected: int) -> None:
        """Eager kernels start from the write slot, indirect ones from the read slot (-1: from zero)."""
        slot = step.write_slot if self.eager else step.read_slot
        found = self.slots[slot] if slot >= 0 else ZERO
        assert found == expected, f"I2: step {step} starts from state {found}, not {expected}"

    def read_kv(self, table: np.ndarray, ids: np.ndarray, begin: int) -> None:
        whole = self.cells[table]
        assert (whole >= ZERO).all(), f"a page of {table.tolist()} was never scrubbed: {whole.tolist()}"
        found = whole.reshape(-1)[:begin]
        assert (found == ids[1 : begin + 1]).all(), (
            f"I11: KV {found.tolist()}, not {ids[1 : begin + 1].tolist()}"
        )

    # ---- what must hold at all times

    def verify(self) -> None:
        """I2, I5, I8, I11: every checkpoint's slot, pages and tail hold exactly its path."""
        store = self.store
        for key, checkpoint in store.checkpoints.items():
            ids = self.paths.ids(*key)
            depth = len(key[1])
            found = self.slots[checkpoint.slot]
            assert found == ids[depth], (
                f"I2/I5: slot {checkpoint.slot} of {key} holds {found}, not {ids[depth]}"
            )
            table = [store.pages[k] for k in store.page_keys(key)]
            table += [checkpoint.tail] if checkpoint.tail is not None else []
            assert len(table) == -(-depth // self.page_size), f"I11: {key} has pages {table}"
            kv = self.cells[table].reshape(-1)[:depth]
            assert (kv == ids[1:]).all(), (
                f"I5/I11: KV of {key} in {table} is {kv.tolist()}, not {ids[1:].tolist()}"
            )
