"""The prefix cache for hybrid language models: paged KV and recurrent-state checkpoints in one radix tree.

HybridCache decides (tokens, positions, ids), Pools moves bytes, ModelLayout says how large they are.
Importing this package imports no torch: Pools does, when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridcache._handles import Pin, Transcript
from hybridcache.cache import HybridCache, Lease
from hybridcache.config import LayerSpec, ModelLayout, TensorSpec
from hybridcache.errors import ConcurrencyError, InvariantError, StateError
from hybridcache.values import Geometry, Match, Missed, Plan, Step, Steps

if TYPE_CHECKING:
    from hybridcache.pools import Pools

__all__ = [
    "ConcurrencyError",
    "Geometry",
    "HybridCache",
    "InvariantError",
    "LayerSpec",
    "Lease",
    "Match",
    "Missed",
    "ModelLayout",
    "Pin",
    "Plan",
    "Pools",
    "StateError",
    "Step",
    "Steps",
    "TensorSpec",
    "Transcript",
]


def __getattr__(name: str) -> Any:
    if name == "Pools":
        try:
            from hybridcache.pools import Pools
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError("Pools needs torch: pip install 'hybrid-prefix-cache[gpu]'") from error

        return Pools
    raise AttributeError(f"module 'hybridcache' has no attribute {name!r}")
