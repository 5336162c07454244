"""A whole engine around real pools, small enough to be right by inspection; its tensor operations can fail.

Owns the toy model (the state is a rolling hash of all tokens, KV at a position is the state there), the
engine's loop over several requests, and what it does about a failure: a plan is applied again, a failed
forward closes its request with discard. `verify` compares all that the cache can serve, byte for byte, with
what a run from nothing computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridcache import HybridCache
from hybridcache.cache import Lease, Step
from hybridcache.config import LayerSpec, ModelLayout, TensorSpec
from hybridcache.pools import Pools

LAYERS = (
    LayerSpec(0, "attention", (TensorSpec("k", (2,), "int64"),)),
    LayerSpec(1, "recurrent", (TensorSpec("recurrent", (3,), "int64"),)),
)


class InjectedError(RuntimeError):
    """What a device would raise."""


class Faults(TorchDispatchMode):
    """Counts tensor operations and makes the one of the given number fail, before it does anything."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen, self.armed = at, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed:
            self.seen += 1
            if self.seen == self.at:
                raise InjectedError(f"operation {self.at}: {func}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def sites(self) -> Iterator[None]:
        """Operations in here may fail."""
        self.armed = True
        try:
            yield
        finally:
            self.armed = False


def run_model(tokens: Sequence[int], state: int = 1) -> list[int]:
    """The state after each token."""
    states = []
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
        states.append(state)
    return states


class ToyEngine:
    """Runs requests of known output side by side, one step of each in turn."""

    def __init__(self, *, copies: Any = "eager", fault: int = 0, page_size: int = 4, **options: Any) -> None:
        layout = ModelLayout(page_size, LAYERS)
        options.setdefault("memory_bytes", 96 * layout.page_bytes)
        self.cache = HybridCache(layout, **{"pass_cost": 4, "interior_spacing": 8, **options})
        self.pools = Pools(layout, self.cache.geometry, copies=copies)
        self.pools.arena.random_()  # what was never written is no zero
        self.faults = Faults(fault)
        self.failures = 0
        (self.kv,), (self.state,) = self.pools.kv(0), self.pools.state(1)

    def run(
        self, requests: Sequence[tuple[list[int], list[int]]], *, chunk: int = 5, drafts: int = 0
    ) -> None:
        """(prompt, output) pairs: each is read and generated; failed ones are closed."""
        leases = [self.cache.reserve(prompt, max_new_tokens=len(output)) for prompt, output in requests]
        running = [
            (lease, [*prompt, *output])
            for lease, (prompt, output) in zip(leases, requests, strict=True)
            if lease
        ]
        with self.faults:
            while running:
                running = self.step(running, chunk, drafts)

    def step(
        self, running: list[tuple[Lease, list[int]]], chunk: int, drafts: int
    ) -> list[tuple[Lease, list[int]]]:
        """One step of each; returns those that go on."""
        launched = []
        for lease, tokens in running:
            decodes = lease.computed >= lease.prompt_length
            count = min(1 + drafts if decodes else chunk, len(tokens) - lease.computed)
            step = lease.launch(count)
            assert step is not None, "the arena is large enough"
            launched.append((lease, tokens, step))
        self.apply()
        for lease, tokens, step in launched:
            try:
                with self.faults.sites():
                    self.forward(lease, tokens, step)
            except InjectedError:
                self.failures += 1
                lease.close(discard=True)
                continue
            verifies = len(step.write_slots) > 1
            stay = 1 + (step.begin * 7) % len(step.write_slots) if verifies else step.end - step.begin
            lease.commit(tokens[max(step.begin, lease.prompt_length) : step.begin + stay])
            if lease.committed == len(tokens):
                lease.close()
        return [(lease, tokens) for lease, tokens, _ in launched if not lease.closed]

    def apply(self) -> None:
        plan = self.cache.plan()
        try:
            with self.faults.sites():
                self.pools.apply(plan)
        except InjectedError:
            self.failures += 1
            self.cache.check()
            self.pools.apply(plan)  # again, from wherever it broke off
        self.cache.applied(plan)

    def forward(self, lease: Lease, tokens: list[int], step: Step) -> None:
        """Reads the state and all KV before, writes KV and states."""
        read = step.read_slot if len(step.write_slots) > 1 else step.write_slot
        if self.pools.copies == "indirect":
            read = step.read_slot
        before = int(self.state[read, 0]) if read >= 0 else 0
        before = before or 1  # a zeroed state stands for no tokens
        table = torch.tensor(lease.pages).long()
        context = self.kv[table].flatten(0, 1)[: step.begin, 0].tolist()
        if context != run_model(tokens[: step.begin]) or before != ([1, *context])[-1]:
            raise AssertionError(f"{step} starts from {before} after {context}")
        states = run_model(tokens[step.begin : step.end], before)
        positions = torch.arange(step.begin, step.end)
        where = table[positions // self.kv.shape[1]], positions % self.kv.shape[1]
        self.kv[where] = torch.tensor(states)[:, None].expand(-1, 2)
        for position, slot in step.checkpoints:
            self.state[slot] = states[position - step.begin - 1]
        for slot, state in zip(reversed(step.write_slots), reversed(states), strict=False):
            self.state[slot] = state

    def verify(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[int]:
        """Of each request how far it could resume now; what would be served there is right."""
        self.cache.check()
        reached = []
        for prompt, output in requests:
            path = [*prompt, *output, 0]
            lease = self.cache.reserve(path)
            assert lease is not None
            if lease.start:
                step = lease.launch(1)
                assert step is not None
                plan = self.cache.plan()
                self.pools.apply(plan)
                self.cache.applied(plan)
                self.forward(lease, path, step)
            reached.append(lease.start)
            lease.close(discard=True)
            self.cache.check()
        return reached
