"""Prices for the memory of each gap between requests, and the bound on all hits that prices prove.

Owns `Dual`: the relaxed problem of `optimum` at given prices, in float (fast, to search with) and in
integers of any size (exact, to prove with). Imports numpy and the other parts of the optimum only.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hybridcache._packing import Sizes
from hybridcache._paths import Paths

Float = npt.NDArray[np.float64]
SCALE = 1 << 64  # exact prices are integers: tokens of hits per byte and gap, times this


class Dual:
    """`optimum` says what it computes. Prices here are of the whole budget: tokens of hits per gap."""

    def __init__(self, paths: Paths, sizes: Sizes, budget: int) -> None:
        self.paths, self.sizes, self.budget = paths, sizes, budget
        self.gaps = len(paths.prompt_tokens)
        self.begins = np.flatnonzero(np.diff(paths.owner, prepend=-1))  # the first stretch of each request
        self.ends = np.append(self.begins[1:], len(paths.owner)) - 1
        self.group = np.cumsum(np.diff(paths.owner, prepend=-1) > 0) - 1
        self.gain = paths.end.astype(float)
        self.kv = (paths.end - paths.begin) * (sizes.token / budget)
        self.state = sizes.state / budget

    def bound(self, prices: list[int]) -> int:
        """Proven: no schedule hits more tokens. In whole numbers; `prices` are per byte, times SCALE."""
        sums = np.array([0, *np.cumsum(np.array(prices, object)).tolist()], object)
        paths = self.paths
        held = sums[paths.owner] - sums[paths.since]
        pay = np.cumsum((paths.end - paths.begin).astype(object) * self.sizes.token * held)
        before = np.array([0, *pay[self.ends[:-1]].tolist()], object)
        worth = paths.end.astype(object) * SCALE - (pay - before[self.group]) - held * self.sizes.state
        best = sum(max(0, each) for each in np.maximum.reduceat(worth, self.begins).tolist())
        return int((int(sums[-1]) * self.budget + best) // SCALE)

    def exact(self, prices: Float) -> list[int]:
        """Prices as `bound` takes them."""
        return [int(math.ldexp(price, 64)) // self.budget for price in prices.tolist()]

    def smoothed(self, prices: Float, temperature: float) -> tuple[float, float, Float]:
        """The dual, its smoothed value, and the smoothed value's gradient.

        Each maximum is replaced by `temperature * log sum exp(. / temperature)`, whose gradient exists and
        varies slowly: Nesterov, Smooth minimization of non-smooth functions, 2005.
        """
        paths = self.paths
        sums = np.concatenate(([0.0], np.cumsum(prices)))
        held = sums[paths.owner] - sums[paths.since]
        pay = np.cumsum(self.kv * held)
        before = np.concatenate(([0.0], pay[self.ends[:-1]]))
        worth = self.gain - (pay - before[self.group]) - self.state * held
        best = np.maximum(np.maximum.reduceat(worth, self.begins), 0.0)
        share = np.exp((worth - best[self.group]) / temperature)
        whole = np.add.reduceat(share, self.begins) + np.exp(-best / temperature)
        share /= whole[self.group]
        until = np.cumsum(share)
        needed = (
            until[self.ends][self.group] - until + share
        )  # how much of a stretch: by all that end here or deeper
        kept = self.kv * needed + self.state * share
        used = np.bincount(paths.since, kept, self.gaps + 1) - np.bincount(paths.owner, kept, self.gaps + 1)
        value = float(prices.sum())
        smooth = value + float((best + temperature * np.log(whole)).sum())
        return value + float(best.sum()), smooth, 1.0 - np.cumsum(used)[: self.gaps]

    def search(self, steps: int) -> Float:
        """Good prices: accelerated projected gradient steps, restarted, while the temperature falls.

        Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; O'Donoghue and Candes,
        Adaptive restart for accelerated gradient schemes, 2015.
        """
        mean = float(self.paths.ideal.mean())
        descent = _Descent(self, np.zeros(self.gaps))
        for temperature in np.geomspace(0.25 * mean, 2.5e-4 * mean, 12).tolist():
            descent.run(temperature, steps // 12)
        return descent.best


class _Descent:
    """The state of a search: where it is, the curvature that it has met, the best prices so far."""

    def __init__(self, dual: Dual, prices: Float) -> None:
        self.dual, self.prices, self.best = dual, prices, prices
        self.value = math.inf
        self.curvature = 1e-3

    def _ask(self, prices: Float, temperature: float) -> tuple[float, Float]:
        value, smooth, gradient = self.dual.smoothed(prices, temperature)
        if value < self.value:
            self.value, self.best = value, prices
        return smooth, gradient

    def _step(self, at: Float, temperature: float) -> tuple[Float, Float]:
        """One projected gradient step, short enough to do what the gradient promises."""
        smooth, gradient = self._ask(at, temperature)
        while True:
            new = np.maximum(0.0, at - gradient / self.curvature)
            way = new - at
            promised = smooth + float(gradient @ way) + 0.5 * self.curvature * float(way @ way)
            if self._ask(new, temperature)[0] <= promised + 1e-9 * abs(smooth):
                return new, gradient
            self.curvature *= 2.0

    def run(self, temperature: float, steps: int) -> None:
        at, momentum = self.prices, 1.0
        for _ in range(steps):
            new, gradient = self._step(at, temperature)
            self.curvature *= 0.95
            following = (1.0 + math.sqrt(1.0 + 4.0 * momentum * momentum)) / 2.0
            if float(gradient @ (new - self.prices)) > 0.0:  # it overshoots: restart
                following, at = 1.0, new
            else:
                at = np.maximum(0.0, new + (momentum - 1.0) / following * (new - self.prices))
            self.prices, momentum = new, following


def pooled(pool: list[list[int]], dual: Dual) -> int:
    """The lowest bound that any of these prices, per byte and exact, proves."""
    return min(dual.bound(prices) for prices in pool)
