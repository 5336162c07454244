"""What is timed: each call of a turn at a context of L tokens, batches of decoding leases, evictions.

Each function builds its own cache, times call by call and adds the samples to a Recorder. A measured turn
is a real one: the conversation grows by it, so many conversations are measured in turn, and none of the
long ones grows by more than a few percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from benchmarks.chains import (
    TURN,
    VOCABULARY,
    Chain,
    Tokens,
    apply,
    make_cache,
    make_chains,
    prefill,
    reserve,
    take_turn,
)
from benchmarks.clock import Recorder, timed
from benchmarks.floor import Caches, Memcmp
from hybridcache import HybridCache, Lease, Transcript

DECODED = 8  # steps of a measured turn
EVICTION = "eviction: the difference"
RESERVE_BESIDE, MEMCMP_BESIDE = "reserve beside memcmp", "memcmp beside reserve"
MOST_TOKENS = 6 << 20  # of all conversations of a cache
ROUNDS = 10
OPEN, IDLE = 8, 8  # leases and conversations of a cache that is full


class Stopwatch:
    """Times calls at one size and one state of the caches, and adds them up in `total`."""

    def __init__(self, recorder: Recorder, size: int, caches: Caches, prefix: str = "") -> None:
        self.recorder, self.size, self.caches, self.prefix = recorder, size, caches, prefix
        self.total = 0

    def __call__(self, operation: str, call: Callable[[], Any]) -> Any:
        self.caches.settle()
        nanoseconds, result = timed(call)
        self.add(operation, nanoseconds)
        self.total += nanoseconds
        return result

    def add(self, operation: str, nanoseconds: int) -> None:
        self.recorder.add(self.prefix + operation, self.size, self.caches.name, nanoseconds)


def how_many_chains(length: int, repetitions: int) -> int:
    return max(4, min(repetitions, MOST_TOKENS // length))


class Size:
    """Conversations of one length in a cache of their own."""

    def __init__(self, recorder: Recorder, length: int, caches: Caches, repetitions: int) -> None:
        self.recorder, self.length, self.caches = recorder, length, caches
        self.cache, self.chains = conversations(length, repetitions)

    @cached_property
    def floors(self) -> list[Memcmp]:
        return [Memcmp(chain.tokens) for chain in self.chains]

    @cached_property
    def transcripts(self) -> list[Transcript]:
        return [self.cache.transcript() for _ in self.chains]

    def clock(self) -> Stopwatch:
        return Stopwatch(self.recorder, self.length, self.caches)

    def clock_of_turn(self, each: int, prefix: str = "") -> Stopwatch:
        """The first turn of each conversation settles what the policy learns, and is not kept."""
        keep = self.recorder if each >= len(self.chains) else Recorder()
        return Stopwatch(keep, self.length, self.caches, prefix)

    def compare(self, each: int) -> None:
        which = each % len(self.chains)
        compare(self.cache, self.chains[which], self.floors[which], self.clock())

    def beside_memcmp(self, each: int) -> None:
        which, memcmp_first = each % len(self.chains), each // len(self.chains) % 2 == 0
        reserve_beside_memcmp(
            self.cache, self.chains[which], self.floors[which], self.clock(), memcmp_first=memcmp_first
        )

    def turn(self, each: int) -> None:
        turn(self.cache, self.chains[each % len(self.chains)], self.clock_of_turn(each))

    def turn_through_transcript(self, each: int) -> None:
        which = each % len(self.chains)
        clock = self.clock_of_turn(each, prefix="transcript: ")
        turn_through(self.cache, self.chains[which], self.transcripts[which], clock)

    def wide(self, each: int) -> None:
        reserve_wide(self.cache, self.chains[each % len(self.chains)], self.clock())


def in_rounds(sizes: Sequence[Size], repetitions: int, part: Callable[[Size, int], None]) -> None:
    """A tenth of the repetitions at each size, ten times: a slow spell of the machine is no size's alone."""
    for round_ in range(ROUNDS):
        for size in sizes:
            count = repetitions + len(size.chains)
            for each in range(count * round_ // ROUNDS, count * (round_ + 1) // ROUNDS):
                part(size, each)


def measure_turns(recorder: Recorder, lengths: Sequence[int], caches: Caches, repetitions: int) -> None:
    """Every call of a turn at so many tokens of cached context, with a memcmp of those tokens beside it.

    Turns are measured with nothing between them, so that each finds the CPU's caches as turns leave them.
    """
    sizes = [Size(recorder, length, caches, repetitions) for length in lengths]
    for part in (Size.compare, Size.beside_memcmp, Size.turn, Size.wide):
        in_rounds(sizes, repetitions, part)


def measure_transcripts(recorder: Recorder, lengths: Sequence[int], caches: Caches, repetitions: int) -> None:
    """The same turns through transcripts, which say only what is new."""
    sizes = [Size(recorder, length, caches, repetitions) for length in lengths]
    in_rounds(sizes, repetitions, Size.turn_through_transcript)


def conversations(length: int, repetitions: int) -> tuple[Any, list[Chain]]:
    """A cache with room for all of them, and many conversations, each of them cached up to `length`."""
    count = how_many_chains(length, repetitions)
    room = (-(-repetitions // count) + 2) * (TURN + DECODED)
    turns = count * (length // TURN + room // TURN)
    cache = make_cache(tokens=count * (length + room), checkpoints=2 * turns)
    return cache, make_chains(cache, length, count, room)


def compare(cache: HybridCache, chain: Chain, floor: Memcmp, clock: Stopwatch) -> None:
    """memcmp and match over the same tokens. If warm, each goes over them once before it is timed."""
    prompt = chain.prompt()
    wide = prompt.astype(np.int64)
    calls = {
        "memcmp": lambda: floor.run(chain.length),
        "ctypes call": lambda: floor.run(0),
        "match": lambda: cache.match(prompt),
        "match int64": lambda: cache.match(wide),
    }
    for operation, call in calls.items():
        call()
        clock(operation, call)


def turn(cache: HybridCache, chain: Chain, clock: Stopwatch) -> None:
    """reserve, prefill of 832, decode steps, close."""
    prompt = chain.prompt()
    cache.match(prompt)
    clock.total = 0
    lease = clock("reserve", lambda: reserve(cache, prompt, max_new_tokens=64))
    clock.add("turn", clock.total + rest_of_turn(chain, cache, lease, clock))


def reserve_beside_memcmp(
    cache: HybridCache, chain: Chain, floor: Memcmp, clock: Stopwatch, *, memcmp_first: bool
) -> None:
    """One after the other, so that both meet the machine as it is then; each after an untimed pass."""
    prompt = chain.prompt()

    def reserve_it() -> None:
        cache.match(prompt)
        clock(RESERVE_BESIDE, lambda: reserve(cache, prompt, max_new_tokens=64)).close(discard=True)

    def memcmp_it() -> None:
        floor.run(chain.length)
        clock(MEMCMP_BESIDE, lambda: floor.run(chain.length))

    for run in (memcmp_it, reserve_it) if memcmp_first else (reserve_it, memcmp_it):
        run()


def reserve_wide(cache: HybridCache, chain: Chain, clock: Stopwatch) -> None:
    """reserve of the same prompt as int64; nothing is computed."""
    prompt = chain.prompt().astype(np.int64)
    cache.match(prompt)
    clock("reserve int64", lambda: reserve(cache, prompt, max_new_tokens=64)).close(discard=True)


def rest_of_turn(chain: Chain, cache: HybridCache, lease: Lease, clock: Stopwatch) -> int:
    """Prefill of 832, decode steps, close. Returns the nanoseconds of these, with one decode step."""
    length = chain.length + TURN
    clock.total = 0
    step = clock("launch 832", lambda: lease.launch(TURN))
    if (step.begin, step.end) != (chain.length, length):
        raise AssertionError(f"a turn ran over {step.begin}..{step.end}, expected {chain.length}..{length}")
    clock("plan + applied", lambda: apply(cache))
    clock("commit 832", lease.commit)
    total = clock.total
    steps = DECODED if clock.caches.name == "warm" else 2
    for at in range(length, length + steps):
        name = "first decode step" if at == length else "decode step"  # the first leaves a boundary behind
        nanoseconds = decode_step(cache, lease, chain.tokens[at : at + 1], clock, name)
        total += nanoseconds if at == length else 0
    clock("pages", lambda: lease.pages)
    clock.total = 0
    clock("close", lease.close)
    chain.length = length + steps
    return total + clock.total


def decode_step(cache: HybridCache, lease: Lease, token: Tokens, clock: Stopwatch, name: str) -> int:
    clock.total = 0
    clock(f"{name}: launch", lambda: lease.launch(1))
    launched = clock.total
    clock(f"{name}: plan + applied", lambda: apply(cache))
    applied = clock.total
    clock(f"{name}: commit", lambda: lease.commit(token))
    clock.add(name, clock.total - (applied - launched))
    return clock.total


def turn_through(cache: HybridCache, chain: Chain, transcript: Transcript, clock: Stopwatch) -> None:
    transcript.extend(chain.tokens[len(transcript) : chain.length])  # what the last turn generated
    new = chain.tokens[chain.length : chain.length + TURN]
    clock("extend 832", lambda: transcript.extend(new))
    lease = clock("reserve", lambda: reserve(cache, transcript, max_new_tokens=64))
    before = clock.total
    clock.add("turn", before + rest_of_turn(chain, cache, lease, clock))


def measure_batches(
    recorder: Recorder, length: int, sizes: list[int], caches: Caches, repetitions: int
) -> None:
    """launch + plan + commit of batches that decode one token a step, each lease at `length` tokens."""
    most = max(sizes)
    cache = make_cache(tokens=most * (length + 2 * repetitions * len(sizes) + 64), checkpoints=4 * most)
    leases = []
    for each in range(most):
        chain = Chain(length, 0, seed=each)
        leases.append(reserve(cache, chain.prompt(length), max_new_tokens=repetitions * len(sizes) + 64))
        prefill(cache, leases[-1], length)
    for size in sizes:
        batch, counts, tokens = leases[:size], [1] * size, np.arange(size, dtype=np.int32)
        for each in range(repetitions + 2):
            clock = Stopwatch(recorder if each >= 2 else Recorder(), size, caches)
            decode_batch(cache, batch, counts, tokens, clock)


def decode_batch(
    cache: HybridCache, leases: list[Lease], counts: list[int], tokens: Tokens, clock: Stopwatch
) -> None:
    clock("batch launch", lambda: cache.launch(leases, counts))
    launched = clock.total
    clock("batch plan + applied", lambda: apply(cache))
    applied = clock.total
    clock("batch commit", lambda: cache.commit(leases, tokens))
    clock.add("batch launch + commit", clock.total - (applied - launched))


def measure_evictions(recorder: Recorder, length: int, caches: Caches, repetitions: int) -> None:
    """A request of one token in a full arena of conversations of `length` tokens."""
    count = max(1, (1 << 18) // length)
    room = (repetitions // count + 8) * TURN
    cache = make_cache(tokens=count * length, checkpoints=count * max(length // TURN, 1), slack=0)
    chains = [Chain(length, room, seed=each) for each in range(count)]
    for chain in chains:
        chain.build(cache)
    evict_one_by_one(recorder, cache, chains, length, caches, repetitions)


def evict_one_by_one(
    recorder: Recorder, cache: HybridCache, chains: list[Chain], size: int, caches: Caches, repetitions: int
) -> None:
    """Forks of a lease on one token: one that has to evict a checkpoint, then one that finds its slab free.

    A fork needs a slot as a request does, but the policy's clock, which counts requests, does not tick.
    """
    clock = Stopwatch(recorder, size, caches)
    parent = reserve(cache, np.array([VOCABULARY], dtype=np.int32))
    ballast = until_one_evicts(cache, parent, Caches("warm"))
    for each in range(repetitions):
        take_turn(cache, chains[each % len(chains)])
        forks = until_one_evicts(cache, parent, caches)
        forks[-1].lease.close(discard=True)
        beside = fork(cache, parent, caches)
        if forks[-1].evictions == 1 and beside.evictions == 0:
            clock.add("fork that evicts one", forks[-1].nanoseconds)
            clock.add("fork beside it that evicts none", beside.nanoseconds)
            clock.add(EVICTION, forks[-1].nanoseconds - beside.nanoseconds)
        for one in (*forks[:-1], beside):
            one.lease.close(discard=True)
    for one in ballast:
        one.lease.close(discard=True)
    parent.close(discard=True)


def measure_shortage(recorder: Recorder, length: int, caches: Caches, repetitions: int) -> None:
    """What a refusal costs beside open leases at `length` tokens of context each, restored turn by turn.

    A request that asks for all memory, where idle conversations could leave; then a decode step that needs a
    page where nothing can.
    """
    cache = make_cache(
        tokens=(OPEN + IDLE) * (length + TURN), checkpoints=OPEN * (length // TURN + 2), slack=0
    )
    make_chains(cache, TURN, IDLE, 0, seed=1)
    leases = [reserve(cache, chain.prompt()) for chain in make_chains(cache, length, OPEN, TURN)]
    clock = Stopwatch(recorder, length, caches)
    prompt = Chain(TURN, 0, seed=0).prompt(TURN)
    all_but_a_slab = cache.geometry.num_pages - cache.geometry.pages_per_slab
    more = all_but_a_slab * cache.geometry.page_size - TURN
    for _ in range(repetitions):
        refused(clock("refused reserve", lambda: cache.reserve(prompt, max_new_tokens=more)))
    while (lease := cache.reserve(prompt)) is not None:
        leases.append(lease)
    prefill(cache, leases[-1], TURN)
    while leases[-1].launch(1) is not None:
        apply(cache)
        leases[-1].commit(prompt[:1])
    for _ in range(repetitions):
        refused(clock("refused launch", lambda: leases[-1].launch(1)))


def refused(found: object) -> None:
    if found is not None:
        raise AssertionError(f"{found!r}: expected that there is no room")


class Fork(NamedTuple):
    lease: Lease
    evictions: int
    nanoseconds: int


def fork(cache: HybridCache, parent: Lease, caches: Caches) -> Fork:
    before = evicted(cache)
    caches.settle()
    nanoseconds, lease = timed(parent.fork)
    if lease is None:
        raise RuntimeError("fork: no room, expected that a checkpoint can be evicted")
    return Fork(lease, evicted(cache) - before, nanoseconds)


def until_one_evicts(cache: HybridCache, parent: Lease, caches: Caches) -> list[Fork]:
    """Fills the slabs that are free (a turn leaves one or two); the last fork had to evict."""
    forks = [fork(cache, parent, caches)]
    while forks[-1].evictions == 0:
        forks.append(fork(cache, parent, caches))
    return forks


def evicted(cache: HybridCache) -> int:
    return sum(count for name, count in cache.stats().items() if name.startswith("evicted_"))
