"""How the data plane is timed: events on a GPU, graph replays, and the ceilings of this device in this run.

Owns the clocks and the ceilings. Knows nothing of pages and slots. On a machine without a GPU the host's
clock takes the place of events, and nothing is replayed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
ROUNDS = 5
ROUND_US = 6_000  # a round of calls takes about this long, and at least every call once
WARM_UP_US = 15_000  # clocks that fell while results were compared are up again


class Ceilings(NamedTuple):
    """Bytes a second, by the best of several plain operations of torch. A copy counts what it reads and what
    it writes, a fill what it writes, a host copy what crosses the link."""

    copy: float
    fill: float
    to_host: float
    to_device: float


def describe(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        import triton

        of = torch.cuda.get_device_properties(device)
        found |= {
            "device": of.name,
            "capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "l2_bytes": l2_bytes(device),
            "memory_bytes": of.total_memory,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return found


def l2_bytes(device: torch.device) -> int:
    """0 on the CPU, where nothing is made of how the caches are used."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def ceilings(device: torch.device, nbytes: int) -> Ceilings:
    """Plain copies and fills of `nbytes`, host copies of a quarter of that."""
    source, target = (torch.empty(nbytes // 8, dtype=torch.int64, device=device) for _ in range(2))
    source.random_()
    copy = _best(device, [lambda: target.copy_(source)], 2 * nbytes)
    fill = _best(device, [lambda: target.zero_(), lambda: target.fill_(7)], nbytes)
    part = target[: len(target) // 4]
    host = torch.empty_like(part, device="cpu", pin_memory=device.type == "cuda")
    host.zero_()
    to_host = _best(device, [lambda: host.copy_(part, non_blocking=True)], nbytes // 4)
    to_device = _best(device, [lambda: part.copy_(host, non_blocking=True)], nbytes // 4)
    return Ceilings(copy, fill, to_host, to_device)


def _best(device: torch.device, calls: Sequence[Call], nbytes: int) -> float:
    times = [_elapsed_us(device, call, 1) for call in calls for _ in range(12)]
    return nbytes / min(times) * 1e6


def launched_us(device: torch.device, calls: Sequence[Call]) -> float:
    """Microseconds a call, launched one after the other as an engine would: median of several rounds."""
    return _median(device, lambda: [call() for call in calls], len(calls))


def replayed_us(device: torch.device, calls: Sequence[Call]) -> float | None:
    """The same, all calls captured into one graph, so that the host costs nothing. None without a GPU."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median(device, graph.replay, len(calls))


def _median(device: torch.device, cycle: Call, calls: int) -> float:
    first = min(_elapsed_us(device, cycle, 1) for _ in range(2))
    _elapsed_us(device, cycle, int(WARM_UP_US / first))
    repeats = max(1, int(ROUND_US / first))
    return statistics.median(_elapsed_us(device, cycle, repeats) for _ in range(ROUNDS)) / calls


def _elapsed_us(device: torch.device, call: Call, repeats: int) -> float:
    """Of one call, from a device at rest, without what was queued before."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e6 / max(1, repeats)
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / max(1, repeats)
