"""What only the whole trace knows: the ideal hit of each request, who follows whom, what will come back.

Owns the facts that a replay measures against and that hints tell the cache. Derived from a `Workload` alone,
never from the core: the ideal is the check on what the core reports. Knows neither cache nor policy.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybridcache.workloads import Int32, Request, Runs, Workload, merge

NEVER = 2**60
"""Milliseconds: `expected_return` of a session that has ended."""


@dataclass(frozen=True)
class Foresight:
    """Facts about the requests of one workload, by index.

    `read_all`: the whole output counts as read; else the last sampled token has not been read, as in an
    engine without overlap.
    """

    workload: Workload
    read_all: bool = True

    @cached_property
    def ideals(self) -> list[int]:
        """Tokens that a cache without bounds would hit: the longest prefix that earlier requests have read,
        at most the prompt's length minus one. One pass with numpy over all tokens."""
        known, found = Known(), []
        for request in self.workload.requests:
            prompt = self.workload.tokens(request.input)
            output = self.workload.tokens(request.output)
            read = output if self.read_all else output[:-1]
            shared = known.read(np.concatenate((prompt, read)))
            found.append(min(shared, len(prompt) - 1))
        return found

    @cached_property
    def followers(self) -> list[int | None]:
        """The next request of the same session; None: the session ends here."""
        following: dict[int | str, int] = {}
        found: list[int | None] = []
        for index in range(len(self.workload) - 1, -1, -1):
            session = self.workload.requests[index].session
            found.append(following.get(session))
            following[session] = index
        return found[::-1]

    @cached_property
    def output_returns(self) -> list[bool]:
        """Whether a later request of the session begins with this prompt and all of its output."""
        found = []
        for index, request in enumerate(self.workload.requests):
            whole = merge(request.input, request.output)
            later, returns = self.followers[index], False
            while later is not None and not returns:
                returns = _begins(merge(self.workload.requests[later].input), whole)
                later = self.followers[later]
            found.append(returns)
        return found

    @cached_property
    def origins(self) -> list[int | None]:
        """The latest earlier request of whose output something stands in this prompt: it must be finished
        first. An output's run counts if its first symbol is here."""
        ends = sorted(
            (first, index)
            for index, request in enumerate(self.workload.requests)
            for first, _ in request.output
        )
        symbols, indices = [symbol for symbol, _ in ends], [index for _, index in ends]
        found = []
        for number, request in enumerate(self.workload.requests):
            inside = (
                index
                for first, count in request.input
                for index in indices[bisect_left(symbols, first) : bisect_left(symbols, first + count)]
                if index < number
            )
            found.append(max(inside, default=None))
        return found

    def keep(self, index: int) -> str:
        """What `close(keep=)` should be told: "prompt" where the session goes on without this output."""
        return "prompt" if self.followers[index] is not None and not self.output_returns[index] else "all"

    def gap(self, index: int) -> float | None:
        """Seconds from this request's arrival to that of the session's next one; None: it ends here."""
        later = self.followers[index]
        requests = self.workload.requests
        return None if later is None else requests[later].t - requests[index].t

    def breakpoints(self, index: int) -> list[int]:
        """Positions, in tokens, where a caller would ask for checkpoints: the request's own, or else the ends
        of the runs that its prompt is made of, but for the last."""
        request, unit = self.workload.requests[index], self.workload.unit
        symbols = request.breakpoints or _inner_ends(request)
        length = self.workload.length(request.input)
        return sorted({unit * each for each in symbols if 0 < unit * each < length})


def _inner_ends(request: Request) -> list[int]:
    ends = np.cumsum([count for _, count in merge(request.input)])
    return [int(each) for each in ends[:-1]]


def _begins(longer: Runs, start: Runs) -> bool:
    """Whether the symbols of `longer` begin with those of `start`; both are merged."""
    if not start or len(longer) < len(start) or longer[: len(start) - 1] != start[:-1]:
        return not start
    (first, count), (other, least) = longer[len(start) - 1], start[-1]
    return first == other and count >= least


class _Node:
    __slots__ = ("children", "edge")

    def __init__(self, edge: Int32) -> None:
        self.edge = edge
        self.children: dict[int, _Node] = {}


class Known:
    """All token sequences read so far, as a radix tree of numpy edges: nothing in common with the core's."""

    def __init__(self) -> None:
        self.root = _Node(np.zeros(0, dtype=np.int32))

    def match(self, tokens: Int32) -> int:
        """How many leading tokens are known."""
        node, position = self.root, 0
        while position < len(tokens):
            child = node.children.get(int(tokens[position]))
            if child is None:
                return position
            shared = _common(child.edge, tokens[position:])
            position += shared
            if shared < len(child.edge):
                return position
            node = child
        return position

    def read(self, tokens: Int32) -> int:
        """How many leading tokens were known; now all are. One comparison of each known token."""
        node, position = self.root, 0
        while position < len(tokens):
            first = int(tokens[position])
            child = node.children.get(first)
            if child is None:
                node.children[first] = _Node(tokens[position:].copy())
                return position
            shared = _common(child.edge, tokens[position:])
            position += shared
            if shared < len(child.edge) and position < len(tokens):
                upper, child.edge = _Node(child.edge[:shared]), child.edge[shared:]
                upper.children[int(child.edge[0])] = child
                node.children[first] = child = upper
            node = child
        return len(tokens)


def _common(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> int:
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    at = int(differs.argmax())
    return at if differs[at] else shorter
