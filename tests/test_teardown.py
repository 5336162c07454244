"""Whatever of a cache goes first: what is left works or says so, nothing crashes, nothing stays for ever.

The core's own teardown, in the middle of everything, is tests/fuzz/main_teardown.cpp, under valgrind.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridcache import HybridCache
from hybridcache.config import LayerSpec, ModelLayout, TensorSpec
from hybridcache.pools import Pools

LAYERS = (
    LayerSpec(0, "recurrent", (TensorSpec("recurrent", (2, 4), "float32"),)),
    LayerSpec(1, "attention", (TensorSpec("k", (1, 4), "float32"),)),
)
LAYOUT = ModelLayout(4, LAYERS)
PROMPT = list(range(1, 14))
CONTENT = [(2, b"a picture")]


def use_cache(cache: HybridCache) -> None:
    cache.check()
    assert cache.match(PROMPT, content_keys=CONTENT).kv_length == len(PROMPT)


def use_lease(lease: Any) -> None:
    assert not lease.closed and len(lease.pages) == lease.capacity // 4


def use_plan(plan: Any) -> None:
    assert plan.number == 2 and plan.copy_slots.tolist() and plan.copy_pages.tolist()


def use_pin(pin: Any) -> None:
    assert pin.length == len(PROMPT) and not pin.released


def use_pools(pools: Pools) -> None:
    assert pools.kv(1)[0][0, 0].tolist() == [[7.0] * 4]


def use_views(views: list[torch.Tensor]) -> None:
    assert views[0][0, 0].tolist() == [[7.0] * 4] and views[1].shape[1:] == (2, 4)


USES: dict[str, Callable[[Any], None]] = {
    "cache": use_cache,
    "lease": use_lease,
    "plan": use_plan,
    "pin": use_pin,
    "pools": use_pools,
    "views": use_views,
}


def scene() -> dict[str, Any]:
    """A lease with a step that a pending plan carries, a forgotten one that never closes, a pin, content,
    views."""
    cache = HybridCache(LAYOUT, memory_bytes=64 * LAYOUT.slot_bytes, run_ahead=1)
    pools = Pools(LAYOUT, cache.geometry)
    first = cache.reserve(PROMPT, content_keys=CONTENT)
    assert first is not None
    first.launch(len(PROMPT))
    plan = cache.plan()
    pools.apply(plan)
    cache.applied(plan)
    pools.kv(1)[0][0].fill_(7)
    first.commit()
    pin = cache.pin(PROMPT, content_keys=CONTENT)
    lease = cache.reserve([*PROMPT, 5], content_keys=CONTENT)
    assert lease is not None and lease.start == len(PROMPT) and pin is not None
    assert lease.launch(1) is not None
    held = (cache, lease, cache.plan(), pin, pools, [pools.kv(1)[0], pools.state(0)[0]])
    return dict(zip(USES, held, strict=True))


@pytest.fixture
def no_collector() -> Any:
    """Objects die when the last name goes, or not at all: a cycle would keep them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_what_is_left_works_in_whatever_order_the_others_go() -> None:
    for order in itertools.permutations(USES):
        held = scene()
        caches = [weakref.ref(held["cache"]), weakref.ref(held["cache"]._core)]
        for name in order:
            del held[name]
            for left, use in USES.items():
                if left in held:
                    use(held[left])
        assert [ref() for ref in caches] == [None, None], f"after {order} the cache is still there"


@pytest.mark.usefixtures("no_collector")
def test_a_lease_or_a_pin_that_outlives_its_cache_can_still_be_ended() -> None:
    held = scene()
    core = weakref.ref(held["cache"]._core)
    held = {name: held[name] for name in ("lease", "pin")}
    held["lease"].close()
    held["pin"].release()
    assert core() is not None and held["lease"].closed and held["pin"].released
    held.clear()
    assert core() is None


@pytest.mark.usefixtures("no_collector")
def test_arrays_that_were_handed_out_outlive_everything() -> None:
    held = scene()
    arrays = [held["lease"].pages, held["plan"].copy_slots, held["plan"].copy_pages]
    copies = [array.copy() for array in arrays]
    held.clear()
    scene()  # whatever was freed is used again
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, copies, strict=True))


def test_a_cache_in_a_cycle_is_collected() -> None:
    held = scene()
    core = weakref.ref(held["cache"]._core)
    held["itself"] = held
    del held
    gc.collect()
    assert core() is None


EXIT = """
    import sys, threading
    from tests.test_teardown import scene
    at_exit = scene()
    sys.modules["kept"] = scene()
    in_thread, started = {}, threading.Event()

    def hold():
        in_thread.update(scene())
        mine = dict(in_thread)
        started.set()
        threading.Event().wait()

    threading.Thread(target=hold, daemon=True).start()
    assert started.wait(30)
"""


def test_the_interpreter_ends_quietly_with_everything_open() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", textwrap.dedent(EXIT)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
