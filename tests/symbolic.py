"""Symbolic memory: stands for the tensors, so that a wrong read is seen the moment it happens.

Owns one value per page cell and one per slot. A cell's KV value is the id of the exact (salt, path up to and
including its position), a slot's value the id of the exact path that its state has read. With `lookahead=1`
a cell has a second value, the draft layer's entry, which depends on one token more. It executes Plans and
forwards and knows nothing of how the cache decides: of the store it reads only what must hold (checkpoints,
pages). `guard` is called before any write of a plan or a forward: I5, nothing that the tree can serve is
written. In the unified arena writing a slot turns the cells of the pages under it into STATE bytes, and
writing a cell ruins the slot.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ZERO = 0  # a zeroed cell, or the state after no token
NEVER_WRITTEN, STATE_BYTES, RUINED = -1, -2, -3
PROVISIONAL = 2**61  # a draft entry whose next token was not read yet
LOST = 2**62  # what a void step leaves that started from a slot which is another's by now


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
        self.lookahead = store.lookahead
        self.cells = np.full((num_pages, page_size, 1 + self.lookahead), NEVER_WRITTEN, dtype=np.int64)
        self.slots = np.full(num_slots, NEVER_WRITTEN, dtype=np.int64)
        self.paths = Paths()
        self.served_slots: set[int] = set()
        self.served_cells: dict[int, int] = {}  # page -> how many of its leading positions the tree serves
        self.served_drafts: dict[int, int] = {}  # the same of the draft layer's entries
        self.events: Counter[str] = Counter()

    # ---- writes

    def guard(self) -> None:
        """Notes what the tree can serve now: between publication and eviction none of it may be written."""
        checkpoints = self.store.checkpoints
        self.served_slots = {c.slot for c in checkpoints.values()}
        self.served_cells = dict.fromkeys(self.store.pages.values(), self.page_size)
        self.served_drafts = dict(self.served_cells)
        for (_, path), checkpoint in checkpoints.items():
            if (page := checkpoint.tail) is not None:
                inside = len(path) - max(len(path) - self.lookahead, 0) // self.page_size * self.page_size
                self.served_cells[page] = max(inside, self.served_cells.get(page, 0))
                self.served_drafts[page] = max(inside - self.lookahead, self.served_drafts.get(page, 0))

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

    def forward(
        self,
        salt: bytes,
        path: Sequence[Any],
        step: Any,
        table: Sequence[int],
        owned: Any,
        begin: int | None = None,
        lost: bool = False,
    ) -> None:
        """What the kernels do for the last tokens of `path`, from where the step really begins.

        `owned(space, id)`: is it the lease's alone; `lost`: a void step, nobody needs what it reads."""
        self.guard()
        begin, table = int(step.begin) if begin is None else begin, np.asarray(table)
        end = begin + int(step.end) - int(step.begin)
        assert step.begin <= begin <= step.begin_max and len(path) >= end
        ids = self.paths.ids(salt, path)
        right = self.read_state(step, begin, ids[begin], lost)
        self.read_kv(table, ids, begin)
        if not right:
            ids = np.concatenate([ids[: begin + 1], np.full(len(ids) - begin - 1, LOST)])
        self.write_kv(step, table, ids, begin, end, owned)
        rows = zip(range(end - len(step.write_slots) + 1, end + 1), step.write_slots, strict=True)
        for position, slot in [*step.checkpoints, *rows]:
            assert owned("slot", int(slot)), (
                f"I5: step {step} writes slot {slot}, which it does not own alone"
            )
            self.write_slot(int(slot), int(ids[position]))

    def read_state(self, step: Any, begin: int, expected: int, lost: bool) -> bool:
        """Eager kernels start from the write slot, but for a verify step whose state no plan could copy;
        indirect ones from the read slot (-1: from zero)."""
        copied = len(step.write_slots) == 1 and step.begin == step.begin_max
        slot = step.write_slot if self.eager and copied else step.read_slots[begin - step.begin]
        found = self.slots[slot] if slot >= 0 else ZERO
        assert lost or found == expected, f"I2: step {step} starts from state {found}, not {expected}"
        return bool(found == expected)

    def read_kv(self, table: np.ndarray, ids: np.ndarray, begin: int) -> None:
        whole = self.cells[table]
        assert (whole >= ZERO).all(), f"a page of {table.tolist()} was never scrubbed: {whole.tolist()}"
        self.compare_kv(table, ids, begin, "I11")

    def compare_kv(self, table: Any, ids: np.ndarray, depth: int, name: str) -> None:
        """All that lies below `depth`, but for a draft entry that depends on the next token."""
        cells = self.cells[table].reshape(-1, 1 + self.lookahead)
        found, expected = cells[:depth, 0], ids[1 : depth + 1]
        assert (found == expected).all(), f"{name}: KV {found.tolist()}, not {expected.tolist()}"
        if self.lookahead and depth:
            found, expected = cells[: depth - 1, 1], ids[2 : depth + 1]
            assert (found == expected).all(), f"{name}: drafts {found.tolist()}, not {expected.tolist()}"

    def write_kv(
        self, step: Any, table: np.ndarray, ids: np.ndarray, begin: int, end: int, owned: Any
    ) -> None:
        positions = np.arange(begin, end)
        pages, cells = table[positions // self.page_size], positions % self.page_size
        self.may_write(step, table, begin, end, self.served_cells, owned)
        if self.unified:
            ruined = self.served_slots & {int(p) // self.per_slab for p in pages}
            assert not ruined, f"I5: step {step} writes KV over checkpoint slots {sorted(ruined)}"
            self.slots[pages // self.per_slab] = RUINED
        self.cells[pages, cells, 0] = ids[begin + 1 : end + 1]
        if self.lookahead:
            self.may_write(step, table, max(begin - 1, 0), end, self.served_drafts, owned)
            self.cells[pages, cells, 1] = [*ids[begin + 2 : end + 1], PROVISIONAL]
            if begin:
                before = (table[(begin - 1) // self.page_size], (begin - 1) % self.page_size, 1)
                self.events["lookahead_provisional"] += int(self.cells[before] == PROVISIONAL)
                self.events["lookahead_rejected"] += int(
                    self.cells[before] not in (PROVISIONAL, ids[begin + 1])
                )
                self.cells[before] = ids[begin + 1]

    def may_write(
        self, step: Any, table: np.ndarray, begin: int, end: int, served: dict[int, int], owned: Any
    ) -> None:
        """I5: only pages that the lease holds alone, and in them only what the tree does not serve."""
        for index in range(begin // self.page_size, (end - 1) // self.page_size + 1):
            page, first = int(table[index]), max(begin - index * self.page_size, 0)
            assert owned("page", page), f"I5: step {step} writes page {page}, which it does not own alone"
            assert first >= served.get(page, 0), (
                f"I5: step {step} writes page {page} from {first}, the tree serves {served[page]}"
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
            self.compare_kv(table, ids, depth, f"I5/I11 {key} in {table}")
        for (salt, path), page in store.pages.items():
            self.compare_page(page, self.paths.ids(salt, path))

    def compare_page(self, page: int, ids: np.ndarray) -> None:
        """A node's page: `ids` end where it is whole."""
        first = len(ids) - self.lookahead - self.page_size
        for entry in range(1 + self.lookahead):
            found, expected = self.cells[page, :, entry], ids[first + entry :][: self.page_size]
            assert (found == expected).all(), (
                f"I5: page {page} holds {found.tolist()}, not {expected.tolist()}"
            )
