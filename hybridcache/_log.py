"""What the package writes to the log: one line a request, at debug level of the logger "hybridcache".

    logging.getLogger("hybridcache").setLevel(logging.DEBUG)

Owns its wording and nothing else; no line is made where nobody listens.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, TypeVar

from hybridcache.values import Match

LOG = logging.getLogger("hybridcache")


class _Lease(Protocol):
    @property
    def prompt_length(self) -> int: ...
    @property
    def match(self) -> Match: ...


Admitted = TypeVar("Admitted", bound=_Lease | None)


def logged(lease: Admitted, tokens: Any) -> Admitted:
    """What came of `reserve(tokens)`: how much is skipped, why not more, and what would have helped."""
    if LOG.isEnabledFor(logging.DEBUG):
        if lease is None:
            LOG.debug("reserve: no room now for a prompt of %s tokens", f"{len(tokens):,}")
        else:
            LOG.debug("reserve: a prompt of %s tokens %s", f"{lease.prompt_length:,}", lease.match.explain())
    return lease
