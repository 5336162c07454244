"""TokenSpeed's scheduler: `python -m benchmarks.peers.measure_tokenspeed` in its environment.

One conversation of 832-token turns on one full-attention and one state group, 64-token pages, no tensors.
Timed: submitting the request, the plan that finds its prefix and admits it, the plan of each decode step,
finishing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import tokenspeed_scheduler as ts

from benchmarks.clock import timed
from benchmarks.peers.peer import PAGE, TURN, Add, main

DECODED = 8


def make_scheduler(tokens: int) -> ts.Scheduler:
    pages = 2 * tokens // PAGE + 4096
    config = ts.SchedulerConfig()
    config.prefix_granularity = PAGE
    config.num_device_pages = pages
    config.max_scheduled_tokens = 2 * tokens
    config.max_batch_size = 8
    config.disable_l2_cache = True
    config.num_snapshot_pages = 2  # the fewest that it accepts; nothing is retracted here
    config.max_retracted_requests = 1
    config.decode_input_tokens = 1
    config.cache_groups = [
        ts.CacheGroupConfig("full_attention", PAGE, pages, ts.AttnKind.Full),
        ts.CacheGroupConfig("linear_attention", 0, pages, ts.AttnKind.State),
    ]
    return ts.Scheduler(config)


def tell(scheduler: ts.Scheduler, event: Any) -> None:
    events = ts.ExecutionEvent()
    events.add_event(event)
    scheduler.advance(events)


def extended(request: str, tokens: list[int]) -> Any:
    event = ts.ForwardEvent.ExtendResult()
    event.request_id, event.tokens = request, tokens
    return event


def finished(request: str) -> Any:
    event = ts.ForwardEvent.Finish()
    event.request_id = request
    return event


def reserving(request: str) -> Any:
    event = ts.ForwardEvent.UpdateReserveNumTokens()
    event.request_id, event.reserve_num_tokens_in_next_schedule_event = request, 1
    return event


def batch(plan: ts.ExecutionPlan) -> Any:
    batches = [each for each in plan.forward if list(each.request_ids)]
    if len(batches) != 1:
        raise RuntimeError(f"tokenspeed: a plan of {len(batches)} batches, expected one")
    return batches[0]


class Conversation:
    def __init__(self, tokens: array[int]) -> None:
        self.tokens, self.length = tokens.tolist(), 0
        self.scheduler = make_scheduler(len(tokens))

    def turn(self, add: Add, new: int = TURN) -> None:
        prompt, name = self.tokens[: self.length + new], f"request at {self.length}"
        request = ts.RequestSpec()
        request.request_id, request.tokens, request.max_new_tokens = name, prompt, DECODED + 2
        add("submit", timed(lambda: self.scheduler.submit_requests([request]))[0])
        nanoseconds, plan = timed(self.scheduler.next_execution_plan)
        add("plan on a hit", nanoseconds)
        prefill = batch(plan)
        hit, computed = prefill.extend_prefix_lens[0], prefill.input_lengths[0]
        if (hit, computed) != (self.length, new):
            raise RuntimeError(f"tokenspeed: {hit} + {computed} tokens, expected {self.length} + {new}")
        for step in range(DECODED):
            tell(self.scheduler, extended(name, [step]))
            if step > 0:
                tell(self.scheduler, reserving(name))
            nanoseconds, plan = timed(self.scheduler.next_execution_plan)
            batch(plan)
            add("decode plan" if step > 1 else "first two decode plans", nanoseconds)
        tell(self.scheduler, extended(name, [DECODED]))
        add("finish", timed(lambda: tell(self.scheduler, finished(name)))[0])
        self.length += new


def make(tokens: array[int], length: int) -> Callable[[Add], None]:
    conversation = Conversation(tokens)
    conversation.turn(lambda *_: None, length)
    return conversation.turn


if __name__ == "__main__":
    main("tokenspeed", "tokenspeed-scheduler", make)
