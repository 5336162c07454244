"""A feasible clairvoyant schedule: which hit each request gets, and what that keeps between requests.

Owns one `Packing`: the hits, the bytes that they keep in each gap (a function of the hits alone), and the
moves that change them. It knows no prices: what is worth trying is up to `_search`. Imports numpy and
`_paths` only.

Gap `g` lies between request `g` and request `g + 1`. A hit of `p` tokens of request `j` keeps, all to the
end of gap `j - 1`: each whole page below `p` from the last request that read all of it at this prefix; the
state at `p`, and the page that `p` cuts if it cuts one (a tail, here never shared), from the last request
that *could leave it*: one that has read `p` tokens of this prefix and itself hit no more than `p` of them,
so that it computed the state or resumed from it. Hits in between that go deeper neither need it nor make
it: it is kept across them.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from hybridcache._paths import Paths


class Sizes(NamedTuple):
    """Bytes of the KV of one token and of one state; tokens of a page."""

    token: int
    state: int
    page_size: int

    @property
    def page(self) -> int:
        return self.token * self.page_size

    def state_and_tail(self, position: int) -> int:
        return self.state + (self.page if position % self.page_size else 0)


class Packing:
    """The hits of all requests, at first none, and the bytes that they keep."""

    def __init__(self, paths: Paths, sizes: Sizes, budget: int) -> None:
        count = len(paths.prompt_tokens)
        self.paths, self.sizes, self.budget = paths, sizes, budget
        self.total = 0  # tokens hit
        self.hits = np.zeros(count, np.int64)
        self.used = np.zeros(count, np.int64)  # bytes kept in each gap
        self.origins = np.arange(count)  # who left the state that a request resumes from; itself: nobody
        self.lowest = np.arange(count)  # the first gap in which its hit keeps anything
        self._hits = [0] * count  # the same as `hits`, faster to read one by one
        self._log: list[tuple[int, int]] = []

    def _book_pages(self, request: int, sign: int) -> None:
        """Add or take away the whole pages of a hit."""
        hit, page_size, below = self._hits[request], self.sizes.page_size, 0
        for since, end in self.paths.stretches[request]:
            pages = min(end, hit) // page_size
            if pages > below:
                self.used[since:request] += sign * (pages - below) * self.sizes.page
                below = pages
            if end >= hit:
                break

    def _readers(self, request: int, position: int) -> list[int]:
        """Who ever reads the first `position` tokens of a request's path, ascending."""
        return self.paths.readers[
            self.paths.nodes[request][bisect_left(self.paths.depths[request], position)]
        ]

    def origin(self, request: int, position: int) -> int:
        """Who leaves the state: the last earlier reader of `position` that hits no more than that."""
        readers = self._readers(request, position)
        index = bisect_left(readers, request) - 1
        while self._hits[readers[index]] > position:
            index -= 1
        return readers[index]

    def _book_state(self, request: int, sign: int) -> None:
        """Add (finding its origin) or take away the state of a hit."""
        position = self._hits[request]
        if sign > 0:
            origin = self.origin(request, position)
            self.origins[request] = origin
            ends = (since for since, end in self.paths.stretches[request] if end >= position)
            self.lowest[request] = min(origin, next(ends))
        self.used[self.origins[request] : request] += sign * self.sizes.state_and_tail(position)

    def move(self, request: int, hit: int) -> bool:
        """Give a request another hit; True if everything still fits. Logged: `undo` takes it back."""
        old = self._hits[request]
        self._log.append((request, old))
        low = int(self.lowest[request])
        if old:
            self._book_pages(request, -1)
            self._book_state(request, -1)
        self._hits[request] = hit
        self.hits[request] = hit
        self.total += hit - old
        self.origins[request] = self.lowest[request] = request
        if hit:
            self._book_pages(request, 1)
            self._book_state(request, 1)
        low = min(low, int(self.lowest[request]))
        for other in self._disturbed(request, old, hit):
            self._book_state(other, -1)
            self._book_state(other, 1)
            low = min(low, int(self.origins[other]))
        return not hit or int(self.used[low:].max(initial=0)) <= self.budget

    def _disturbed(self, request: int, old: int, new: int) -> list[int]:
        """The requests whose state has another origin now that `request` hits `new` and not `old`."""
        hits, origins = self.hits[request + 1 :], self.origins[request + 1 :]
        moved = origins == request if new > old else origins < request
        between = (hits > 0) & (hits >= min(old, new)) & (hits < max(old, new))
        found = np.flatnonzero(moved & between) + request + 1
        return [other for other in found.tolist() if self._has_read(request, other)]

    def _has_read(self, request: int, other: int) -> bool:
        """Whether `request` reads all that `other` hits."""
        readers = self._readers(other, self._hits[other])
        index = bisect_left(readers, request)
        return index < len(readers) and readers[index] == request

    def passing(self, request: int, position: int) -> list[int]:
        """The requests across which a state at `position` would be kept for `request`, ascending."""
        readers = self._readers(request, position)
        end = begin = bisect_left(readers, request)
        while self._hits[readers[begin - 1]] > position:
            begin -= 1
        return readers[begin:end]

    def served(self, request: int) -> list[int]:
        """The hits of later requests whose state this one leaves."""
        served = self.hits[request + 1 :][self.origins[request + 1 :] == request]
        return [int(hit) for hit in served]

    def covering(self, gap: int) -> list[int]:
        """The requests whose hits keep something in a gap."""
        return (
            np.flatnonzero((self.lowest[gap + 1 :] <= gap) & (self.hits[gap + 1 :] > 0)) + gap + 1
        ).tolist()

    def mark(self) -> int:
        return len(self._log)

    def undo(self, mark: int) -> None:
        """Take back the moves since `mark`."""
        while len(self._log) > mark:
            request, hit = self._log[-1]
            self.move(request, hit)
            del self._log[-2:]

    def settle(self) -> None:
        """What was moved stays."""
        self._log.clear()

    def choices(self, request: int) -> list[int]:
        """The deepest hit in each stretch that there seems to be room for, deepest first.

        `move` has the last word: a state may have to be kept from further back than the stretch's last
        reader. Only for a request that has no hit.
        """
        page_size, page, found = self.sizes.page_size, self.sizes.page, list[int]()
        until, begin, room = request, 0, 1 << 62
        for since, end in self.paths.stretches[request]:
            free = self.budget - self.sizes.state - int(self.used[since:until].max())
            room = min(
                room, begin // page_size * page + free
            )  # bytes of pages and tail, from the path's start
            if room < 0:
                break
            fits = -(-end // page_size) * page <= room
            deepest = end if fits else room // page * page_size  # not all of the stretch: end on a page
            if deepest > begin:
                found.append(deepest)
            until, begin = since, end
        return found[::-1]


def pack_all(paths: Paths, sizes: Sizes) -> Packing:
    """Every request gets the longest hit that any cache could give; without a budget."""
    packing = Packing(paths, sizes, 1 << 62)
    for request in np.flatnonzero(paths.ideal).tolist():
        packing.move(request, int(paths.ideal[request]))
    packing.settle()
    return packing
