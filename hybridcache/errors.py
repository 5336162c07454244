"""The errors of hybridcache that are not ValueError or TypeError.

StateError (a RuntimeError)        a call out of order: commit without launch, closed twice, use after close
ConcurrencyError (a RuntimeError)  a second thread, or a callback, inside a call
InvariantError (an AssertionError) the core found itself inconsistent; the tree is printed
"No room" is no error: it is None.
"""

from __future__ import annotations

from hybridcache._core import ConcurrencyError, InvariantError, StateError

__all__ = ["ConcurrencyError", "InvariantError", "StateError"]
