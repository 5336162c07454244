"""The clock of a replay with several requests at once: who arrives, waits, runs and finishes when.

Owns the events and the queue; what a request does to the cache is `replay.Replay`'s matter. Every request
holds its lease for as long as its steps take. Who finds no room, or `concurrency` running, waits, first come,
first served: nobody overtakes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridcache.replay import Job, Replay


class Clock:
    """Runs one `Replay` through its events."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []  # time, number, what happens
        self.numbers = 0
        self.waiting: deque[tuple[float, int]] = deque()  # since when, which request
        self.running = 0
        self.held_back: dict[int, list[int]] = defaultdict(list)  # request -> those that hold its output

    def run(self) -> None:
        """Until no event is left."""
        for index, origin in enumerate(self.replay.facts.origins):
            if origin is None:
                self.arrive_at(self.replay.workload.requests[index].t, index)
            else:
                self.held_back[origin].append(index)
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
            self.admit()
        self.replay.result.ends_at = self.now

    def at(self, when: float, event: Callable[[], None]) -> None:
        self.numbers += 1
        heapq.heappush(self.events, (max(when, self.now), self.numbers, event))

    def arrive_at(self, when: float, index: int) -> None:
        self.at(when, lambda: self.waiting.append((self.now, index)))

    def admit(self) -> None:
        """Starts as many as there is room for."""
        replay = self.replay
        while self.waiting and self.running < replay.settings.concurrency:
            since, index = self.waiting[0]
            job = None if replay.too_large(index) else replay.admit(index, self.now)
            if job is None and self.running and not replay.too_large(index):
                return
            self.waiting.popleft()
            if self.now > since:
                replay.result.waits += 1
                replay.result.waited_seconds += self.now - since
            if job is None:
                replay.miss(index)
                self.finished(index)
            else:
                self.running += 1
                self.step(job)

    def step(self, job: Job) -> None:
        """The next step of a running request, or its end."""
        seconds = self.replay.launch(job)
        if seconds is None:
            self.replay.close(job, self.now)
            self.running -= 1
            self.finished(job.index)
        else:
            self.at(self.now + seconds, lambda: self.stepped(job))

    def stepped(self, job: Job) -> None:
        self.replay.commit(job, self.now)
        self.step(job)

    def finished(self, index: int) -> None:
        """Those whose prompts hold its output may come now."""
        replay, requests = self.replay, self.replay.workload.requests
        for later in self.held_back.pop(index, ()):
            gap = requests[later].t - requests[index].t
            closed = replay.settings.arrivals == "closed"
            self.arrive_at(self.now + replay.thinking(index, gap) if closed else requests[later].t, later)
