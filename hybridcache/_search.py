"""Looks for a good feasible schedule: greedy packing by worth per price, then removing and packing again.

Owns the order in which requests are tried, and the pseudo-random numbers (a fixed seed: same workload, same
schedule). `_packing` says what fits, `_dual` what memory costs in each gap. Imports numpy and these two only.
"""

from __future__ import annotations

import numpy as np

from hybridcache._packing import Packing
from hybridcache._paths import Int

TARGETS = 12  # removals before the request that is to be improved is given up
PASSING = 8  # requests, at most, that give up a deeper hit to hand a state on
OTHERS = 25  # requests without their ideal hit that are tried again after a removal


class Search:
    """Improves one packing. `prices`: tokens of hits per byte and gap."""

    def __init__(self, packing: Packing, prices: list[float]) -> None:
        self.packing, self.paths = packing, packing.paths
        self.sums = np.concatenate(([0.0], np.cumsum(prices))).tolist()
        self.random = np.random.default_rng(0)
        self.ideal: Int = packing.paths.ideal
        self.deepest = np.array([each[-1][0] if each else len(self.ideal) for each in self.paths.stretches])
        self.rate = np.array([self._rate(request) for request in range(len(self.ideal))])

    def _price(self, request: int, hit: int) -> float:
        """What a hit pays for the memory that it keeps, as if its state came from the last reader."""
        sums, sizes, pay, begin = self.sums, self.packing.sizes, 0.0, 0
        for since, end in self.paths.stretches[request]:
            held = sums[request] - sums[since]
            pay += (min(end, hit) - begin) * sizes.token * held
            if end >= hit:
                return float(pay + sizes.state * held)
            begin = end
        raise AssertionError("a hit lies within the stretches of its request")

    def _rate(self, request: int) -> float:
        """Tokens hit per price paid, at best; bounded where memory is free."""
        hits = [end for _, end in self.paths.stretches[request]]
        return max((hit / (self._price(request, hit) + 1e-3 * hit) for hit in hits), default=0.0)

    def insert(self, request: int, greedy: bool) -> bool:
        """Give a request without a hit the deepest (`greedy`) or the most profitable one that fits."""
        packing = self.packing
        hits = packing.choices(request)
        if not greedy:
            profit = [(hit - self._price(request, hit), hit) for hit in hits]
            hits = [hit for worth, hit in sorted(profit, reverse=True) if worth > 0.0]
        mark = packing.mark()
        for hit in hits:
            below = [served for served in packing.served(request) if served < hit]
            if packing.move(request, hit):
                return True
            packing.undo(mark)
            if below:  # whose states it would no longer leave: deeper than they need is what does not fit
                if packing.move(request, max(below)):
                    return True
                packing.undo(mark)
        return False

    def fill(self) -> None:
        """The first packing: the best rate first, what is profitable, then whatever fits."""
        order = np.flatnonzero(self.ideal)
        order = order[np.argsort(-self.rate[order], kind="stable")]
        for greedy in (False, True):
            for request in order.tolist():
                if not self.packing.hits[request]:
                    self.insert(request, greedy)
        self.packing.settle()

    def improve(self, rounds: int, enough: int) -> None:
        """Make room for one more request at a time; keep what does not lose tokens. Stops at `enough`."""
        packing = self.packing
        for _ in range(rounds):
            if packing.total >= enough:
                return
            before = packing.total
            request = self._short()
            removed = self._make_room(request)
            if removed is not None:
                self._pack_again(request, removed)
            if removed is None or packing.total < before:
                packing.undo(0)
            packing.settle()

    def _short(self) -> int:
        """A request without its ideal hit, more likely one that lacks much of it."""
        weight = np.cumsum(np.sqrt(self.ideal - self.packing.hits))
        return int(np.searchsorted(weight, self.random.random() * weight[-1], side="right"))

    def _make_room(self, request: int) -> list[int] | None:
        """Remove hits until this request gets the one it should have; whose, or None where it does not."""
        packing, random, removed = self.packing, self.random, list[int]()
        packing.move(request, 0)
        stretches = self.paths.stretches[request]
        index = len(stretches) - 1
        if random.random() < 0.2:
            index = int(random.integers(len(stretches)))
        since, want = stretches[index]
        if random.random() < 0.2:
            self._hand_on(request, want, removed)
        for _ in range(TARGETS):
            hits = packing.choices(request)
            if hits and (hits[0] >= want or random.random() < 0.1):
                return removed if packing.move(request, min(hits[0], want)) else None
            tight = since + int(np.argmax(packing.used[since:request]))
            others = packing.covering(tight)
            if not others:
                return None
            least = int(np.argmin(random.random(len(others)) * self.rate[others]))
            packing.move(others[least], 0)
            removed.append(others[least])
        return None

    def _hand_on(self, request: int, want: int, removed: list[int]) -> None:
        """Let those that would pass the wanted state by resume from it too, and so leave it again."""
        passing = self.packing.passing(request, want)
        if len(passing) > PASSING:
            return
        for other in passing:
            self.packing.move(other, 0)
        for other in passing:
            mark = self.packing.mark()
            if not self.packing.move(other, want):
                self.packing.undo(mark)
                removed.append(other)

    def _pack_again(self, request: int, removed: list[int]) -> None:
        """Use the room that is left: for the removed, and for others that overlap with them."""
        packing, random = self.packing, self.random
        low = min(self.deepest[[request, *removed]])
        overlap = (np.arange(len(self.ideal)) > low) & (self.deepest < max([request, *removed]))
        others = np.flatnonzero(overlap & (packing.hits < self.ideal))
        others = others[np.argsort(random.random(len(others)), kind="stable")][:OTHERS]
        again = np.array(sorted({*others.tolist(), *removed} - {request}), np.int64)
        again = again[np.argsort(-self.rate[again] * random.random(len(again)), kind="stable")]
        greedy = bool(random.random() < 0.5)
        for other in again.tolist():
            mark, before = packing.mark(), packing.total
            packing.move(other, 0)
            self.insert(other, greedy)
            if packing.total < before:
                packing.undo(mark)
