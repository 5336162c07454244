"""What an all-knowing cache could hit: a feasible schedule, a proven bound, the clairvoyant working set.

Owns the public face of the offline optimum and the command `python -m hybridcache.optimum`. `_paths` says
what the requests share, `_packing` what a hit keeps, `_search` finds a schedule, `_dual` prices and bounds.
No torch.

The model. Requests run one at a time, in order. The memory of the running request is not charged; what is
kept in the gap between two requests must fit the budget. A request reads its whole prompt and its whole
output, and may leave in memory any of its KV and the state at any position that it computes. A request
whose prompt has L tokens hits p <= L - 1 of them (p <= L with `whole`) if the state at p and the KV of all
p tokens are in memory. What left memory comes back only through a request that computes it. A gap has no
other work: no prefetch, no second tier. All hits are tokens; all bytes are those given for a token and for
a state (a compressed state is another model).

The bound holds for every policy of that model, whatever it keeps and leaves: any page size, any position as
a checkpoint, KV kept without a state or without the KV before it, and also where the running request is
charged.

Theorem. Let a(j, p, g) be the bytes that request j, hitting p tokens, holds in gap g: for each of the p
tokens its KV, if g lies between the last earlier request that read this token at this prefix and j; and one
state, if g lies between the last earlier request that read at least these p tokens and j. Then for all
prices y(g) >= 0, per byte, no schedule within the budget B hits more tokens than

    D(y)  =  B sum_g y(g)  +  sum_j max(0, max_p [ p - sum_g y(g) a(j, p, g) ]).

Proof. (1) Take any schedule, with hits h(j). KV of a token at a prefix, and the state at a prefix, are made
only by requests that read them; so what j uses was in memory in all the gaps that a(j, h(j), .) counts, at
the least. (2) No byte is counted for two requests: who hits a token or a state reads it, so the interval of
a later user starts no earlier than there. Hence sum_j a(j, h(j), g) <= B in every gap g. (3) So sum_j h(j)
<= sum_j h(j) + sum_g y(g) (B - sum_j a(j, h(j), g)) = B sum_g y(g) + sum_j [h(j) - sum_g y(g) a(j, h(j),
g)] <= D(y), with h(j) = 0 worth 0. []

Which p. The last reader of the first p tokens of j's prompt can only be earlier where p is larger: the
prompt falls into stretches with one last reader each (`_paths`). Within a stretch the bracket is linear in
p. If it rises, the stretch's end is best; if it falls, the end of the stretch before is at least as good: a
token more has a last reader no later, so its state costs no less, and its KV costs more than the token that
it wins. So the ends of stretches are all candidates that D needs: where earlier requests left this one's
path or end, and the longest possible hit. This is also why prices separate the requests, and D(y) takes
O(stretches). D is convex in y; its minimum is the linear programming relaxation. `_dual` searches it in
float and evaluates D in integers of any size: no rounding error.

What the bound relaxes: hits may be split among fractions of a request; pages may be cut; and a state may be
taken up again by every request that reads past it, even one that resumed deeper and never computed it. The
feasible schedule (`_packing`) does none of this: whole pages, a page more for each state that cuts one, and
each state kept from a request that could leave it. At or above the working set lower bound, upper bound and
ideal are one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hybridcache._arguments import check_each, check_flag, check_integer
from hybridcache._dual import Dual, pooled
from hybridcache._packing import Packing, Sizes, pack_all
from hybridcache._paths import Int, Paths, Runs, read_paths
from hybridcache._search import Search

DUAL_STEPS = 2400
ROUNDS = 4000


class Schedule(NamedTuple):
    """A feasible clairvoyant schedule; an entry a request (int64).

    Request `j` hits `hits[j]` tokens, resuming from the state that request `origins[j]` left (`j` itself:
    no hit). It keeps that state, and its cut page, over gaps origins[j] .. j - 1, and each whole page below
    from the last request that read it. gap_bytes: what all of them keep between request j and the next, at
    most the budget.
    """

    hits: Int
    origins: Int
    gap_bytes: Int


class Bounds(NamedTuple):
    """What an all-knowing cache of `budget` bytes hits, in tokens: at least `lower`, at most `upper`."""

    budget: int
    lower: int
    upper: int
    ideal: int  # tokens hit without a budget
    prompt_tokens: int
    schedule: Schedule

    @property
    def percent(self) -> tuple[float, float, float]:
        """lower, upper and ideal in percent of all prompt tokens."""
        each = 100.0 / max(self.prompt_tokens, 1)
        return self.lower * each, self.upper * each, self.ideal * each


def _check(
    requests: Any, unit: Any, page_size: Any, whole: Any, token: Any, state: Any
) -> tuple[Paths, Sizes]:
    """The workload and the sizes, or an error that names the argument."""
    sizes = Sizes(
        check_integer("kv_bytes_per_token", token, low=1, high=2**31),
        check_integer("state_bytes", state, low=0, high=2**40),
        check_integer("page_size", page_size, low=1, high=2**20),
    )
    check_integer("unit", unit, low=1, high=2**20)
    check_flag("whole", whole)
    pairs = [tuple(check_each("requests", each)) for each in check_each("requests", requests)]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"requests: {pair!r}, expected (prompt, output)")
        for run in (*check_each("requests", pair[0]), *check_each("requests", pair[1])):
            _check_run(run)
    return read_paths(pairs, unit, whole), sizes


def _check_run(run: Any) -> None:
    ends = check_each("requests", run)
    if len(ends) != 2:
        raise ValueError(f"requests: {run!r}, expected runs of symbols [first, count]")
    check_integer("first", ends[0], low=0, high=2**40)
    check_integer("count", ends[1], low=1, high=2**40)


def working_set(
    requests: Sequence[tuple[Runs, Runs]],
    kv_bytes_per_token: int,
    state_bytes: int,
    *,
    unit: int = 1,
    page_size: int = 64,
    whole: bool = False,
) -> int:
    """The smallest budget, in bytes, with which an all-knowing cache takes every possible hit.

    Arguments as in `optimum`. Exact for its pages and states: every hit is the longest possible, so what
    has to be kept is determined.
    """
    paths, sizes = _check(requests, unit, page_size, whole, kv_bytes_per_token, state_bytes)
    return int(pack_all(paths, sizes).used.max(initial=0))


def optimum(
    requests: Sequence[tuple[Runs, Runs]],
    kv_bytes_per_token: int,
    state_bytes: int,
    budgets: Sequence[int],
    *,
    unit: int = 1,
    page_size: int = 64,
    whole: bool = False,
    rounds: int = ROUNDS,
) -> list[Bounds]:
    """Bounds on what any cache can hit, one for each budget (bytes), in the order of the budgets.

    requests: (prompt, output) in order of arrival, each as runs of symbols [first, count]; a symbol is `unit`
    tokens. page_size: of the feasible schedule; the upper bound holds for all. whole: a hit may be the whole
    prompt. rounds: of the search for a schedule, about 2 to 10 ms each; more can only raise the lower bounds.
    The same arguments give the same result; within a call both bounds rise with the budget.
    """
    paths, sizes = _check(requests, unit, page_size, whole, kv_bytes_per_token, state_bytes)
    amounts = [check_integer("budgets", each, low=1) for each in check_each("budgets", budgets)]
    check_integer("rounds", rounds, low=0)
    everything = pack_all(paths, sizes)
    uppers = _uppers(paths, sizes, amounts, everything)
    found: dict[int, Bounds] = {}
    best = Packing(paths, sizes, 1)
    for budget in sorted(set(amounts)):
        upper, prices = uppers[budget]
        packing = everything
        if budget < int(everything.used.max(initial=0)):
            packing = _schedule(paths, sizes, budget, prices, rounds, upper)
        best = max(best, packing, key=lambda each: each.total)
        found[budget] = _bounds(budget, upper, best)
    return [found[budget] for budget in amounts]


def _uppers(
    paths: Paths, sizes: Sizes, budgets: list[int], everything: Packing
) -> dict[int, tuple[int, list[float]]]:
    """For each budget the upper bound, and good prices per byte: those of all budgets are tried for each."""
    if not len(paths.owner):
        return {budget: (0, []) for budget in budgets}
    enough = int(everything.used.max())
    duals = {budget: Dual(paths, sizes, budget) for budget in sorted(set(budgets))}
    pool = [[0] * len(paths.prompt_tokens)]  # these prove the ideal
    own: dict[int, list[float]] = {}
    for budget, dual in duals.items():
        if budget < enough:
            prices = dual.search(DUAL_STEPS)
            own[budget] = (prices / budget).tolist()
            pool.append(dual.exact(prices))
    return {budget: (pooled(pool, dual), own.get(budget, [])) for budget, dual in duals.items()}


def _schedule(
    paths: Paths, sizes: Sizes, budget: int, prices: list[float], rounds: int, enough: int
) -> Packing:
    search = Search(Packing(paths, sizes, budget), prices)
    search.fill()
    search.improve(rounds, enough)
    return search.packing


def _bounds(budget: int, upper: int, packing: Packing) -> Bounds:
    paths = packing.paths
    if packing.total > upper or int(packing.used.max(initial=0)) > budget:
        raise AssertionError(f"{packing.total} tokens in {budget} bytes, at most {upper} can be")
    schedule = Schedule(packing.hits.copy(), packing.origins.copy(), packing.used.copy())
    ideal, prompts = int(paths.ideal.sum()), int(paths.prompt_tokens.sum())
    return Bounds(budget, packing.total, upper, ideal, prompts, schedule)
