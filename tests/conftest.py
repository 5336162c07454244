"""What the tests of the core share: a tiny layout and the engine's loop without tensors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tests.small_parts  # noqa: F401
from hybridcache.cache import HybridCache, Lease, Step


class Driver:
    """A cache with the engine's loop around it, and no tensors."""

    def __init__(
        self,
        *,
        page_size: int = 4,
        pages_per_slab: int = 2,
        slabs: int = 64,
        lookahead: int = 0,
        **options: Any,
    ) -> None:
        layout = SimpleNamespace(
            page_size=page_size, page_bytes=64, slot_bytes=64 * pages_per_slab, lookahead=lookahead
        )
        if "num_pages" not in options:
            options["memory_bytes"] = slabs * layout.slot_bytes
        self.cache = HybridCache(
            layout, **{"pass_cost": 4, "interior_spacing": 8, "policy": "supersede", **options}
        )
        self.plans: list[Any] = []

    def step(self, lease: Lease, count: int, tokens: Any = ()) -> Step | None:
        """One whole step: launch, plan, applied, commit, check."""
        step = lease.launch(count)
        if step is None:
            return None
        self.apply()
        lease.commit(tokens)
        self.cache.check()
        return step

    def apply(self) -> Any:
        plan = self.cache.plan()
        self.plans.append(plan)
        self.cache.applied(plan)
        return plan

    def prefill(self, lease: Lease, chunk: int = 1 << 20) -> list[Step]:
        steps = []
        while lease.computed < lease.prompt_length:
            step = self.step(lease, chunk)
            assert step is not None
            steps.append(step)
        return steps

    def decode(self, lease: Lease, tokens: Any) -> None:
        for token in tokens:
            assert self.step(lease, 1, [token]) is not None

    def turn(
        self, prompt: Any, output: Any = (), *, chunk: int = 1 << 20, close: Any = None, **options: Any
    ) -> Lease:
        """A whole request. Returns the closed lease's start and extra passes through the `Turn` attributes of
        the driver."""
        lease = self.cache.reserve(prompt, **options)
        assert lease is not None
        self.start, self.match = lease.start, lease.match
        self.steps = self.prefill(lease, chunk)
        self.decode(lease, output)
        self.extra_passes = lease.extra_passes
        lease.close(**(close or {}))
        self.cache.check()
        return lease


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: small models are faster so, and the machine may be busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """`count` distinct-looking ids that depend on the seed."""
    return np.random.default_rng(seed).integers(0, 2**31 - 1, count, dtype=np.int32)
