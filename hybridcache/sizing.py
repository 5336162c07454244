"""How much fits: from GPU memory, weights and traffic to slabs, pages, states and conversations.

Owns the arithmetic and what it advises in words. Pure: it knows the layout's bytes, and the arena's rule of
whole slabs (docs/design.md, section 2), but no cache, no tensor and no option of the command line. A
conversation is counted as what the cache keeps of it between two turns: the pages of its tokens, and one slot
for each state at which it, or a branch of it, could go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hybridcache._specs import check_positive
from hybridcache.config import ModelLayout


@dataclass(frozen=True)
class Machine:
    """`gpus` GPUs of `gpu_bytes` each, in groups of `tp_size`; each group is one replica of the model.

    weight_bytes: of the whole model, spread evenly over a group. reserve: the share of a GPU's memory that
    the engine keeps for activations, graphs and kernels.
    """

    gpu_bytes: int
    gpus: int = 1
    tp_size: int = 1
    weight_bytes: int = 0
    reserve: float = 0.1

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "gpus", "tp_size"):
            check_positive(name, getattr(self, name))
        if self.gpus % self.tp_size:
            raise ValueError(f"gpus: {self.gpus}, expected a multiple of tp_size {self.tp_size}")
        if self.weight_bytes < 0:
            raise ValueError(f"weight_bytes: {self.weight_bytes}, expected at least 0")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve: {self.reserve}, expected 0 <= reserve < 1")

    @property
    def replicas(self) -> int:
        return self.gpus // self.tp_size

    @property
    def rank_weight_bytes(self) -> int:
        """Weights on one GPU."""
        return -(-self.weight_bytes // self.tp_size)

    @property
    def reserve_bytes(self) -> int:
        """What the engine keeps of one GPU."""
        return round(self.reserve * self.gpu_bytes)

    @property
    def cache_bytes(self) -> int:
        """What is left of one GPU for pages and states; negative if the weights do not fit."""
        return self.gpu_bytes - self.rank_weight_bytes - self.reserve_bytes


@dataclass(frozen=True)
class Traffic:
    """What conversations look like: `context` tokens each, `turn` new ones a turn (prompt and output
    together), `states` checkpoints kept of each; `running` requests in a step, each of which may verify
    `draft_tokens` drafts; `sessions`: how many conversations should stay (None: as many as fit)."""

    context: int = 50_000
    turn: int = 800
    states: int = 2
    running: int = 8
    draft_tokens: int = 0
    run_ahead: int = 1
    sessions: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "turn", "states", "running"):
            check_positive(name, getattr(self, name))
        for name in ("draft_tokens", "run_ahead"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 0")
        if self.sessions is not None:
            check_positive("sessions", self.sessions)

    @property
    def slots_per_request(self) -> int:
        """A live slot, and for each verify step in flight a row for each token that it may read."""
        rows = self.draft_tokens + 1 if self.draft_tokens else 0
        return 1 + rows * (1 + self.run_ahead)


@dataclass(frozen=True)
class Sizing:
    """One replica's cache, as each of its ranks holds it: all ranks have the same slabs, pages and slots.

    kv_copies: how often the ranks of a replica together keep each token's KV.
    """

    layout: ModelLayout
    machine: Machine
    traffic: Traffic
    kv_copies: float = 1.0

    @cached_property
    def pages_per_slab(self) -> int:
        return -(-self.layout.slot_bytes // self.layout.page_bytes)

    @cached_property
    def slab_bytes(self) -> int:
        return self.pages_per_slab * self.layout.page_bytes

    @cached_property
    def num_slabs(self) -> int:
        """Slabs of the arena, each of them one state or `pages_per_slab` pages."""
        return max(self.machine.cache_bytes, 0) // self.slab_bytes

    @property
    def num_pages(self) -> int:
        """Pages, if nothing else were held."""
        return self.num_slabs * self.pages_per_slab

    @property
    def memory_bytes(self) -> int:
        """What to give to `HybridCache(memory_bytes=)` on each rank: whole slabs."""
        return self.num_slabs * self.slab_bytes

    @property
    def state_tokens(self) -> float:
        """Tokens whose KV weighs as much on a rank as one state does."""
        return self.layout.slot_bytes * self.layout.page_size / self.layout.page_bytes

    @property
    def slab_tokens(self) -> int:
        """The same with what a slab, being whole pages, leaves unused beside a state."""
        return self.pages_per_slab * self.layout.page_size

    @property
    def padding(self) -> float:
        """The share of a slab that a state leaves unused, since slabs are whole pages."""
        return 1 - self.layout.slot_bytes / self.slab_bytes

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.layout.page_size)

    @cached_property
    def running_slabs(self) -> int:
        """Slabs that the running requests take beside what is cached: slots, and pages of their new turns."""
        traffic = self.traffic
        pages = traffic.running * self.pages(traffic.turn)
        return traffic.running * traffic.slots_per_request + -(-pages // self.pages_per_slab)

    def slabs(self, sessions: int, context: int | None = None, states: int | None = None) -> int:
        """Slabs that so many conversations take. Pages of different ones share slabs."""
        pages = sessions * self.pages(self.traffic.context if context is None else context)
        slots = sessions * (self.traffic.states if states is None else states)
        return slots + -(-pages // self.pages_per_slab)

    def sessions(self, context: int | None = None, states: int | None = None) -> int:
        """Conversations of `context` tokens and `states` states (the traffic's) that fit beside the running
        requests."""
        room = self.num_slabs - self.running_slabs
        low, high = 0, max(room, 0) * self.pages_per_slab
        while low < high:
            middle = (low + high + 1) // 2
            if self.slabs(middle, context, states) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def states_each(self, sessions: int) -> int:
        """States that each of so many conversations can keep; 0: not even one."""
        room = self.num_slabs - self.running_slabs
        pages = sessions * self.pages(self.traffic.context)
        return max((room - -(-pages // self.pages_per_slab)) // sessions, 0)

    @property
    def state_share(self) -> float:
        """The share of a conversation's memory that its states take."""
        states = self.traffic.states * self.slab_bytes
        return states / (states + self.pages(self.traffic.context) * self.layout.page_bytes)

    @property
    def turn_saved(self) -> float:
        """The share of a next turn's prefill FLOPs that a hit at exactly `context` saves."""
        end = self.traffic.context + self.traffic.turn
        return 1 - self.layout.flops(self.traffic.context, end) / self.layout.flops(0, end)

    @property
    def fits(self) -> bool:
        """Whether one conversation does, and with `sessions` all of them."""
        return self.sessions() >= (self.traffic.sessions or 1)


def size(
    layout: ModelLayout,
    machine: Machine,
    traffic: Traffic | None = None,
    *,
    whole: ModelLayout | None = None,
) -> Sizing:
    """What `layout` (of one rank of `machine.tp_size`) comes to on `machine` under `traffic`.

    whole: the layout of the same model on one rank; from both follows how often KV heads are replicated.

    Bytes, tokens and counts of each rank of one replica; whole numbers are exact, by the rules of the arena:
    `HybridCache(layout, memory_bytes=sizing.memory_bytes)` has `sizing.num_slabs` slabs of
    `sizing.pages_per_slab` pages. `sizing.sessions()` conversations of `traffic.context` tokens stay whole
    while `traffic.running` requests run. ValueError names an argument that is wrong. O(1).
    """
    one = whole or layout
    copies = layout.kv_bytes_per_token * machine.tp_size / one.kv_bytes_per_token if whole else 1.0
    return Sizing(layout, machine, traffic or Traffic(), copies)


def advice(sizing: Sizing) -> list[str]:
    """What follows, in sentences."""
    machine, traffic = sizing.machine, sizing.traffic
    if sizing.num_slabs < 2:
        return [_no_room(machine)]
    said = [_about_sessions(sizing) if sizing.sessions() else _too_long(sizing)]
    said.append(
        f"On a rank a state weighs as much as the KV of {sizing.state_tokens:,.0f} tokens: of "
        f"{traffic.context:,} tokens, {_states(traffic.states)} take {100 * sizing.state_share:.0f} %. A hit "
        f"at their end saves {100 * sizing.turn_saved:.1f} % of the next turn's prefill."
    )
    if sizing.kv_copies > 1:
        half = machine.tp_size // 2
        fits = replace(machine, tp_size=half).cache_bytes > 0
        said.append(
            f"With TP {machine.tp_size} the ranks keep each token's KV {sizing.kv_copies:.3g} times: KV "
            "heads are replicated, states are not. "
            + (
                "More replicas of a smaller TP hold more, if the weights leave them room."
                if fits
                else f"At TP {half}, which would hold more, the weights do not fit."
            )
        )
    if sizing.padding > 0.02:
        said.append(
            f"A state leaves {100 * sizing.padding:.1f} % of its slab unused: smaller pages than "
            f"{sizing.layout.page_size} tokens would waste less."
        )
    share = sizing.running_slabs / sizing.num_slabs
    if share > 0.2:
        said.append(
            f"{traffic.running} running requests take {100 * share:.0f} % of the cache for themselves"
            + (f", {traffic.slots_per_request} slots each" if traffic.slots_per_request > 1 else "")
            + "."
        )
    return said


def _no_room(machine: Machine) -> str:
    return (
        f"No room: of a GPU's {machine.gpu_bytes / 1e9:,.1f} GB the weights take "
        f"{machine.rank_weight_bytes / 1e9:,.1f} and the engine {machine.reserve_bytes / 1e9:,.1f}. Spread "
        "the weights over more GPUs (tp), or keep them in fewer bits."
    )


def _too_long(sizing: Sizing) -> str:
    return (
        f"Not one conversation of {sizing.traffic.context:,} tokens fits beside {sizing.traffic.running} "
        f"running requests: {sizing.num_slabs:,} slabs, {sizing.running_slabs:,} of them for the requests, "
        f"{sizing.slabs(1):,} for a conversation."
    )


def _about_sessions(sizing: Sizing) -> str:
    fit, traffic = sizing.sessions(), sizing.traffic
    give = f"Give each rank memory_bytes={sizing.memory_bytes}:"
    if traffic.sessions is None:
        return f"{give} {_conversations(fit, traffic)} {'stays' if fit == 1 else 'stay'}."
    if fit >= traffic.sessions:
        return (
            f"{give} all of {_conversations(traffic.sessions, traffic)} stay; there is room for "
            f"{_states(sizing.states_each(traffic.sessions))} of each."
        )
    fewer = sizing.states_each(traffic.sessions)
    rest = f"with {_states(fewer)} each all would" if fewer else "nor would all with one state each"
    return (
        f"{give} of {_conversations(traffic.sessions, traffic)}, {fit:,} stay "
        f"({100 * fit / traffic.sessions:.0f} %; {rest}). The policy decides which; `hybridcache replay` on "
        "your traffic says what that costs."
    )


def _conversations(count: int, traffic: Traffic) -> str:
    name = "conversation" if count == 1 else "conversations"
    return f"{count:,} {name} of {traffic.context:,} tokens with {_states(traffic.states)} each"


def _states(count: int) -> str:
    return "1 state" if count == 1 else f"{count:,} states"
