"""Time to first token of a conversation, cold, cached and ideal: `python -m benchmarks.ttft [--tiny]
[--json FILE] [--plot FILE]`.

The profile of an agent: a long first turn, then turns that add little, of which a part is generated. One
conversation alone, then several that take turns. Everything runs through `hybridcache.hf`, and beside it on a
plain transformers cache that never leaves; every turn is compared bit by bit before its time counts for
anything. Exits with 0 also where a bound fails: it measures, the last table says what holds.
benchmarks/README.md explains the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import ttft_report as report
from benchmarks.gpu_clock import describe
from benchmarks.ttft_inner import measure_inner
from benchmarks.ttft_model import (
    NeverLeft,
    build,
    memory,
    peak_memory,
    plain_copy,
    same,
    short_steps,
    timed,
    versions,
)
from benchmarks.ttft_talk import ARTICLE, TINY, Profile, Talk, first_token, go_on
from hybridcache.hf import CachedModel, Request

RUNS = 9  # of each turn, cached and ideal by turns: medians count
PARTS = ("alone", "inner", "together")


def cold(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[float, int]:
    """No cache at all: one forward pass over the prompt. Milliseconds, and bytes taken for it."""

    def run() -> Any:
        return timed(model.device, lambda: NeverLeft(model).first_token(prompt, [0, len(prompt)])[0])

    (_, took), taken = peak_memory(model.device, run)
    return took, taken


def cached(engine: CachedModel, prompt: torch.Tensor, generated: int) -> tuple[Request, int, dict[str, Any]]:
    """A turn through the cache, to its first token. `computed`: prompt tokens that steps have read."""
    ((request, token), took), taken = peak_memory(
        engine.model.device,
        lambda: timed(engine.model.device, lambda: first_token(engine, prompt, generated)),
    )
    row = {
        "prompt": len(prompt),
        "reused": request.lease.start,
        "passes": len(request.steps),
        "cached_ms": took,
        "cached_bytes": taken,
        "computed": sum(step.end - step.begin for step in request.steps),
    }
    return request, token, row


def ideal(left: NeverLeft, request: Request, prompt: torch.Tensor, row: dict[str, Any]) -> None:
    """The same steps on a state that never left; adds what it takes, and whether logits, states and KV of the
    turn are the same bits."""
    cuts = [request.steps[0].begin, *(step.end for step in request.steps)]
    device = left.model.device
    ((_, logits), row["ideal_ms"]), row["ideal_bytes"] = peak_memory(
        device, lambda: timed(device, lambda: left.first_token(prompt, cuts))
    )
    assert request.last_logits is not None and request._cache is not None
    row["exact"] = torch.equal(logits, request.last_logits) and same(
        request._cache, left.cache, begin=row["reused"]
    )


def rehearse(engine: CachedModel, talk: Talk, prompt: torch.Tensor, generated: int) -> dict[str, Any]:
    """A turn like it, cached and ideal, in which the user says something else, and which leaves nothing."""
    assert talk.never_left is not None
    other = talk.instead_of(prompt)
    request, _, row = cached(engine, other, generated)
    ideal(talk.never_left.copy(), request, other, row)
    request.close(discard=True)
    return row


def take_turn(
    engine: CachedModel, talk: Talk, prompt: torch.Tensor, generated: int, rows: list[dict[str, Any]]
) -> tuple[Request, int, dict[str, Any]]:
    """The turn, cached and ideal, with the medians of it and of its rehearsals, `rows`."""
    assert talk.never_left is not None
    request, token, row = cached(engine, prompt, generated)
    ideal(talk.never_left, request, prompt, row)
    rows = [*rows, row]
    for name in ("cached_ms", "ideal_ms"):
        row[name.replace("_ms", "_runs_ms")] = runs = [each[name] for each in rows]
        row[name] = statistics.median(runs)
    row["exact"] = all(each["exact"] for each in rows)
    row["computed"] = max(each["computed"] for each in rows)
    return request, token, row


def rehearsals(talk: Talk) -> int:
    return RUNS - 1 if talk.read else 0  # a first turn is run once: it takes long


def alone(engine: CachedModel, model: PreTrainedModel, profile: Profile) -> list[dict[str, Any]]:
    """One conversation. What it is compared with is a plain cache that has read everything itself, from the
    first token on; at the end of each turn all that pages and slot hold is compared too."""
    talk, rows = Talk(0, profile, model.config.vocab_size), []
    talk.never_left = NeverLeft(model)
    for turn in range(profile.turns):
        prompt = talk.prompt(turn)
        meet_lengths(talk, prompt)
        rows_before = [rehearse(engine, talk, prompt, profile.generated) for _ in range(rehearsals(talk))]
        request, token, row = take_turn(engine, talk, prompt, profile.generated, rows_before)
        start = time.perf_counter()
        generated, decoded = go_on(request, token, profile.generated)
        row["decode_ms"] = (time.perf_counter() - start) * 1e3 / max(1, len(decoded))
        with short_steps():
            for each, ours in zip(generated, decoded, strict=False):
                row["exact"] &= torch.equal(talk.never_left.read(torch.tensor([each])), ours)
        lease = request.lease
        kept = engine.bridge.load(lease.pages, lease.live_slot, lease.committed)
        row["exact"] &= same(kept, talk.never_left.cache)
        del kept
        cold(model, prompt)  # what is tuned or planned for its length is, before it is timed
        row["cold_ms"], row["cold_bytes"] = cold(model, prompt)
        rows.append(finish(talk, request, prompt, generated, row, turn))
    return rows


def meet_lengths(talk: Talk, prompt: torch.Tensor) -> None:
    """Kernels that are planned for each length they meet are planned before anybody is timed: who comes first
    would pay for all others."""
    assert talk.never_left is not None
    cuts = [talk.read, len(prompt)] if talk.read else [0, len(prompt) - 8, len(prompt)]
    talk.never_left.copy().first_token(prompt, cuts)


def together(
    engine: CachedModel, model: PreTrainedModel, profile: Profile, talks: int, until: float
) -> list[dict[str, Any]]:
    """Several conversations in turn, also in what is timed: run by run through all of them, so that a slow
    spell of the host is no turn's alone. What never left is a copy of what each request held before it
    closed. No round of turns begins after `until`."""
    rows = []
    everyone = [Talk(1 + number, profile, model.config.vocab_size) for number in range(talks)]
    for talk in everyone:
        talk.never_left = NeverLeft(model)
    for turn in range(profile.turns):
        if time.monotonic() > until:
            break
        prompts = [talk.prompt(turn) for talk in everyone]
        meet_lengths(everyone[0], prompts[0])
        rehearsed: list[list[dict[str, Any]]] = [[] for _ in everyone]
        for _ in range(rehearsals(everyone[0])):
            for talk, prompt, rows_before in zip(everyone, prompts, rehearsed, strict=True):
                rows_before.append(rehearse(engine, talk, prompt, profile.generated))
        for talk, prompt, rows_before in zip(everyone, prompts, rehearsed, strict=True):
            request, token, row = take_turn(engine, talk, prompt, profile.generated, rows_before)
            generated, _ = go_on(request, token, profile.generated)
            assert request._cache is not None
            talk.never_left = None  # its memory first
            talk.never_left = NeverLeft(model, plain_copy(model, request._cache))
            rows.append(finish(talk, request, prompt, generated, row, turn))
    return rows


def finish(
    talk: Talk, request: Request, prompt: torch.Tensor, generated: list[int], row: dict[str, Any], turn: int
) -> dict[str, Any]:
    """Close the turn; `beyond_ideal`: tokens computed though earlier steps had read them."""
    row |= {
        "talk": talk.number,
        "turn": turn,
        "suffix": row["prompt"] - talk.read,
        "beyond_ideal": row["computed"] - (row["prompt"] - talk.read),
        "allocated_bytes": memory(request.last_logits.device),
    }
    talk.tokens, talk.read = torch.cat((prompt, torch.tensor(generated))), request.lease.committed
    request.close()
    return row


def engine_for(model: PreTrainedModel, profile: Profile, talks: int) -> CachedModel:
    """An arena that holds all conversations at their ends, and a dozen states for each."""
    longest = profile.prompt_length(profile.turns)
    pages = talks * (-(-longest // 64) + 2)
    return CachedModel(model, num_pages=pages, num_slots=12 * talks)


def warm_up(model: PreTrainedModel, profile: Profile) -> None:
    """Kernels are compiled, tuned and loaded for every shape of step before anything is timed."""
    small = profile._replace(first=min(profile.first, 4096), turns=3, generated=4)
    alone(engine_for(model, small, 1), model, small)
    cold(model, Talk(99, profile, model.config.vocab_size).prompt(profile.turns - 1))
    gc.collect()
    gc.freeze()  # what is there now need not be looked at again and again


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ttft", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a short profile, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--talks", type=int, default=4, help="conversations that take turns (0: none)")
    parser.add_argument("--turns", type=int, default=None, metavar="N", help="fewer turns than the profile")
    parser.add_argument("--talk-turns", type=int, default=None, metavar="N", help="of those that take turns")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="only these; others stay as FILE has them"
    )
    parser.add_argument("--minutes", type=float, default=60, help="begin no more rounds of turns after that")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, if matplotlib is installed")
    options = parser.parse_args(argv)
    options.device = torch.device("cpu" if options.tiny else options.device)
    profile = TINY if options.tiny else ARTICLE
    options.profile = profile._replace(turns=options.turns or profile.turns)
    options.talk_profile = options.profile._replace(turns=options.talk_turns or options.profile.turns)
    return options


def save(result: dict[str, Any], path: str | None) -> None:
    """After each part: a machine that is taken away leaves what it has measured."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def begun(options: argparse.Namespace, about: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The figures of no part yet; of some, if the file has them from the same kind of machine and profile."""
    result = {
        "machine": about,
        "profile": options.profile._asdict(),
        "weights_bytes": memory(model.device),
        "alone": [],
        "inner": {},
        "together": [],
        "dates": {},
    }
    if options.json and len(options.parts) < len(PARTS) and Path(options.json).exists():
        before = json.loads(Path(options.json).read_text())
        for name in ("profile", "machine"):
            found, expected = ({**each[name], "date": None} for each in (before, result))
            if found != expected:
                raise ValueError(f"--json {options.json}: {name} {found}, expected {expected}")
        result |= {name: before[name] for name in PARTS}
        result["dates"] = before.get("dates") or {
            name: before["machine"]["date"] for name in PARTS if before[name]
        }
    return result


def measure(
    options: argparse.Namespace, model: PreTrainedModel, until: float
) -> Iterator[tuple[str, Any, str]]:
    """Part after part: its name, its figures, its table."""
    profile, talks = options.profile, options.talk_profile
    if "alone" in options.parts:
        rows = alone(engine_for(model, profile, 1), model, profile)
        yield "alone", rows, report.turns(rows)
    if "inner" in options.parts:
        costs = measure_inner(model, profile)
        yield "inner", costs, report.inner(costs)
    if "together" in options.parts and options.talks:
        engine = engine_for(model, talks, options.talks)
        rows = together(engine, model, talks, options.talks, until)
        yield "together", rows, report.talks(rows)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    until = time.monotonic() + 60 * options.minutes
    device, profile = options.device, options.profile
    about = {**describe(device), **versions()}
    model = build(device, tiny=options.tiny)
    result = begun(options, about, model)
    print(report.heading(about, model), flush=True)
    warm_up(model, profile)
    for name, figures, table in measure(options, model, until):
        result[name], result["dates"][name] = figures, about["date"]
        print(table, flush=True)
        save(result, options.json)
    gc.unfreeze()
    result["bounds"] = report.bounds(result)
    print(report.bounds_table(result["bounds"]), flush=True)
    save(result, options.json)
    if options.plot and not report.plot(result, options.plot):
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
