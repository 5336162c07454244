"""Which positions requests share, and when: the radix trie over all requests of a workload, read offline.

Owns no bytes and takes no decision. `Paths` is what `optimum` and `_packing` compute on: for each request
its *stretches*, that is the prefix that earlier requests have read, cut where the last of its earlier
readers changes. Depths are in tokens. Imports numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Runs = Sequence[Sequence[int]]  # [first, count]: the symbols first .. first + count - 1


class Paths(NamedTuple):
    """The requests of a workload as paths through one trie.

    A stretch is a run of tokens of one request's prompt that were last read, at the same prefix, by the same
    earlier request. Its `since` falls strictly from one stretch of a request to the next: who read further in
    has read what lies before.
    """

    prompt_tokens: Int  # of each request
    owner: Int  # of each stretch: its request
    since: Int  # of each stretch: its last reader before the owner
    begin: Int  # of each stretch: where it starts, in tokens
    end: Int  # of each stretch: where it ends; the last of a request ends at the longest hit possible
    nodes: list[list[int]]  # of each request: the nodes on its path, from the root on
    depths: list[list[int]]  # of each request: the tokens from the root to the end of each of these nodes
    readers: list[list[int]]  # of each node: the requests that read all of it, ascending
    stretches: list[list[tuple[int, int]]]  # of each request: (since, end) of its stretches

    @property
    def ideal(self) -> Int:
        """The longest hit of each request that any cache could give."""
        longest = np.zeros(len(self.prompt_tokens), np.int64)
        longest[self.owner] = self.end  # the last stretch of a request wins: it comes last
        return longest


class _Node:
    """An edge of the trie with the node at its end."""

    __slots__ = ("children", "number", "runs")

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self.runs = runs
        self.children: dict[int, _Node] = {}
        self.number = -1


def _common(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> int:
    """How many leading symbols two lists of runs share."""
    shared = i = j = 0
    skip_left = skip_right = 0
    while i < len(left) and j < len(right):
        first, count = left[i][0] + skip_left, left[i][1] - skip_left
        other, others = right[j][0] + skip_right, right[j][1] - skip_right
        if first != other:
            break
        step = min(count, others)
        shared += step
        i, skip_left = (i + 1, 0) if step == count else (i, skip_left + step)
        j, skip_right = (j + 1, 0) if step == others else (j, skip_right + step)
    return shared


def _cut(runs: list[tuple[int, int]], at: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The runs before and after the first `at` symbols."""
    for index, (first, count) in enumerate(runs):
        if at < count:
            head = [*runs[:index], (first, at)] if at else runs[:index]
            return head, [(first + at, count - at), *runs[index + 1 :]]
        at -= count
    return runs, []


def _length(runs: list[tuple[int, int]]) -> int:
    return sum(count for _, count in runs)


def _insert(root: _Node, runs: list[tuple[int, int]]) -> None:
    node = root
    while runs:
        child = node.children.get(runs[0][0])
        if child is None:
            node.children[runs[0][0]] = _Node(runs)
            return
        shared = _common(child.runs, runs)
        if shared < _length(child.runs):
            head, tail = _cut(child.runs, shared)
            upper = _Node(head)
            upper.children[tail[0][0]] = child
            child.runs = tail
            node.children[runs[0][0]] = child = upper
        node, runs = child, _cut(runs, shared)[1]


def _walk(root: _Node, runs: list[tuple[int, int]], readers: list[list[int]]) -> tuple[list[int], list[int]]:
    """The numbers of the nodes on a path, and how many symbols end at each; gives numbers to new ones."""
    nodes, depths, depth, node = [], [], 0, root
    while runs:
        node = node.children[runs[0][0]]
        if node.number < 0:
            node.number = len(readers)
            readers.append([])
        step = _length(node.runs)
        depth += step
        nodes.append(node.number)
        depths.append(depth)
        runs = _cut(runs, step)[1]
    return nodes, depths


def _stretches(
    nodes: list[int], depths: list[int], readers: list[list[int]], limit: int
) -> list[tuple[int, int]]:
    """(last earlier reader, end) of each stretch of one path, up to `limit`."""
    found: list[tuple[int, int]] = []
    for node, depth in zip(nodes, depths, strict=True):
        if limit <= (found[-1][1] if found else 0) or not readers[node]:
            break
        last, end = readers[node][-1], min(depth, limit)
        if found and found[-1][0] == last:
            found.pop()
        found.append((last, end))
    return found


def read_paths(requests: Sequence[tuple[Runs, Runs]], unit: int = 1, whole: bool = False) -> Paths:
    """The trie over (prompt, output) of all requests, in the order of arrival.

    A symbol is `unit` tokens. A request can hit at most its prompt less one token, or, with `whole`, all of
    it. O(runs x nodes on the path) a request.
    """
    root, readers = _Node([]), list[list[int]]()
    texts = [[(int(first), int(count)) for first, count in (*prompt, *output)] for prompt, output in requests]
    for text in texts:
        _insert(root, text)
    prompt_tokens = np.array([unit * sum(int(run[1]) for run in prompt) for prompt, _ in requests], np.int64)
    nodes, depths, stretches = list[list[int]](), list[list[int]](), list[list[tuple[int, int]]]()
    for request, text in enumerate(texts):
        path, symbols = _walk(root, text, readers)
        nodes.append(path)
        depths.append([unit * each for each in symbols])
        limit = int(prompt_tokens[request]) - (not whole)
        stretches.append(_stretches(path, depths[-1], readers, limit))
        for node in path:
            readers[node].append(request)
    rows = [
        (request, since, begin, end)
        for request, found in enumerate(stretches)
        for begin, (since, end) in zip([0, *(each[1] for each in found)], found, strict=False)
    ]
    owner, since, begin, end = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    return Paths(prompt_tokens, owner, since, begin, end, nodes, depths, readers, stretches)
