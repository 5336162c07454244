"""A whole inference engine in one file, on a tiny hybrid model: how hybridcache is embedded.

Continuous batching, chunked prefill, overlap (step i + 1 is launched before the host has seen what step i
sampled), cancelling, preemption. Every answer is compared with that of a run without a cache. Needs torch.

    python examples/tiny_engine.py
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from tiny_model import LAYERS, STOP, VOCAB, Paged, TinyHybrid, answer_without_cache

from hybridcache import HybridCache, Lease, ModelLayout, Pools


@dataclass(eq=False)
class Request:
    prompt: list[int]
    max_new_tokens: int
    output: list[int] = field(default_factory=list)
    lease: Lease | None = None
    latest: torch.Tensor | None = None  # the last sampled token, on the device: the host may not know it yet
    done: bool = False
    reused: int = 0

    def left(self) -> int:
        """Tokens that could be read now. The last sampled one need not be."""
        lease = self.lease
        if lease.computed < lease.prompt_length:
            return lease.prompt_length - lease.computed
        return 0 if self.done else min(1, len(self.prompt) + self.max_new_tokens - 1 - lease.computed)

    def tokens(self, begin: int, end: int) -> list[int]:
        return (self.prompt + self.output)[begin:end]


@dataclass
class Part:
    """What one request does in a step. The lease is noted: a preempted request gets another one."""

    request: Request
    lease: Lease
    begin: int
    end: int
    slot: int

    def first_unknown(self) -> int:
        """Where the tokens begin that the cache does not know from the prompt."""
        return max(self.begin, self.lease.prompt_length)


class Engine:
    def __init__(
        self, model: TinyHybrid, memory_bytes: int, *, page_size=8, chunk=48, batch_tokens=64, at_once=4
    ) -> None:
        layout = ModelLayout(page_size, LAYERS)
        self.cache = HybridCache(layout, memory_bytes=memory_bytes, run_ahead=1, pass_cost=64)
        self.pools = Pools(layout, self.cache.geometry)
        self.model, self.chunk, self.batch_tokens, self.at_once = model, chunk, batch_tokens, at_once
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.flight: tuple[list[Part], torch.Tensor] | None = None  # launched, not committed
        self.crowded: list[Request] = []  # found no room for their next step
        self.preempted, self.tokens_read = 0, 0

    def run(self, requests, until=lambda: False) -> None:
        """Until all are answered, or `until()`."""
        self.waiting.extend(requests)
        while (self.waiting or self.running or self.flight) and not until():
            launched = self.launch()  # step i + 1 is on its way to the device ...
            self.finish()  # ... while the host waits for what step i has sampled
            self.flight = launched
            self.preempt()

    def cancel(self, request: Request) -> None:
        """At any time: what a step in flight can still touch rests until that step is past."""
        request.lease.close()
        self.running.remove(request)

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            request = self.waiting[0]
            request.lease = self.cache.reserve(request.prompt + request.output)
            if request.lease is None:
                return  # no room now: another request will close
            request.reused = request.lease.start
            self.running.append(self.waiting.popleft())

    def launch(self) -> tuple[list[Part], torch.Tensor] | None:
        if not self.crowded:
            self.admit()
        self.crowded = []
        batch, counts = [], []
        for request in self.running:
            count = min(request.left(), self.chunk, self.batch_tokens - sum(counts))
            if count > 0:
                batch.append(request)
                counts.append(count)
        if not batch:
            return None
        steps = self.cache.launch([request.lease for request in batch], counts)
        plan = self.cache.plan()
        self.pools.apply(plan)  # on a GPU: enqueued, on the stream of the forward, before it
        self.cache.applied(plan)
        parts = []
        columns = (each.tolist() for each in (steps.ready, steps.begin, steps.end, steps.write_slots))
        for request, ready, *row in zip(batch, *columns, strict=True):
            if ready:
                parts.append(Part(request, request.lease, *row))
            else:
                self.crowded.append(request)
        return (parts, self.forward(parts)) if parts else None

    def forward(self, parts: list[Part]) -> torch.Tensor:
        """One forward pass over all parts; what it sampled, as a tensor that nobody waits for here."""
        ids, memories = [], []
        for part in parts:
            known = torch.tensor(part.request.tokens(part.begin, part.end))
            ids.append(known if part.begin < part.lease.prompt_length else part.request.latest)
            pages = torch.tensor(part.lease.pages)
            memories.append(Paged(self.pools, part.begin, part.end, part.slot, pages))
        counts = [part.end - part.begin for part in parts]
        self.tokens_read += sum(counts)
        sampled = self.model(torch.cat(ids), counts, memories).argmax(1)
        for part, token in zip(parts, sampled.split(1), strict=True):
            part.request.latest = token
        return sampled

    def finish(self) -> None:
        """Step i: what it has read is committed, what it sampled joins the answers."""
        if self.flight is None:
            return
        parts, sampled = self.flight
        pairs = zip(parts, sampled.tolist(), strict=True)  # here the host waits for the device
        flown = [(part, token) for part, token in pairs if not part.lease.closed]  # cancelled, preempted
        read = [id_ for part, _ in flown for id_ in part.request.tokens(part.first_unknown(), part.end)]
        self.cache.commit([part.lease for part, _ in flown], read)
        for part, token in flown:
            request, lease = part.request, part.lease
            if part.end >= lease.prompt_length and not request.done:
                request.output.append(token)
                request.done = token == STOP or len(request.output) == request.max_new_tokens
            if request.done and lease.computed == lease.committed:
                lease.close()  # with a step in flight, which reads the last token, only after that one
                self.running.remove(request)

    def preempt(self) -> None:
        """The youngest that found no room gives its memory back. What it has read stays cached for now."""
        if self.crowded and not self.crowded[-1].lease.closed:
            self.cancel(self.crowded[-1])
            self.waiting.appendleft(self.crowded[-1])
            self.preempted += 1


def text(count: int, seed: int) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def conversations(engine: Engine) -> list[Request]:
    """Six of two turns, on one system prompt; and a request that is cancelled under way and sent again."""
    first = [Request(text(150, 0) + text(30, seed), 12) for seed in range(1, 7)]
    engine.run(first)
    gone = Request(first[0].prompt + first[0].output + text(90, 7), 30)
    engine.run([gone], until=lambda: len(gone.output) == 2)
    engine.cancel(gone)
    second = [Request(each.prompt + each.output + text(25, 8), 12) for each in first]
    again = Request(gone.prompt, 30)
    engine.run([again, *second])
    return [*first, again, *second]


def crowd(engine: Engine) -> list[Request]:
    """Four that find room for their prompts, but not for all of their answers at once."""
    requests = [Request(text(40, seed), 48) for seed in (15, 16, 17, 19)]
    engine.run(requests)
    return requests


def main() -> list[Engine]:
    torch.set_num_threads(1)
    model, engines = TinyHybrid(), []
    for scene, memory_bytes in ((conversations, 1 << 20), (crowd, 84 << 10)):
        engine = Engine(model, memory_bytes)
        requests = scene(engine)
        for request in requests:
            assert request.output == answer_without_cache(model, request.prompt, request.max_new_tokens)
        engine.cache.check()
        engines.append(engine)
        prompts = sum(len(request.prompt) for request in requests)
        answers = sum(len(request.output) for request in requests)
        print(f"{scene.__name__}: {len(requests)} requests in {memory_bytes >> 10} KiB")
        print(f"  {prompts} tokens of prompts, {answers} answered; {engine.tokens_read} tokens read")
        print(f"  reused: {[request.reused for request in requests]}; {engine.preempted} times preempted")
        print("  every answer is that of a run without a cache")
    return engines


if __name__ == "__main__":
    main()
