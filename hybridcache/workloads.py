"""Workloads: what a replay reads. Requests made of symbols, their files, and generators of synthetic traffic.

Owns the types `Request` and `Workload`, the native format (gzip JSON lines), the loader of Mooncake's traces
and the generators. Knows neither cache nor policy; numpy only.

A symbol stands for `unit` tokens: token j of symbol s is `s * unit + j`. A run `(first, count)` is the
symbols first .. first + count - 1, and a prompt is a few runs, so that a trace of millions of tokens is small
until `Workload.tokens` expands one prompt.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Run = tuple[int, int]
Runs = tuple[Run, ...]
Int32 = npt.NDArray[np.int32]
TOKEN_LIMIT = 2**31  # token ids are int32


@dataclass(frozen=True, slots=True)
class Request:
    """One request: a prompt arrives at `t` seconds, and the model answers with `output`.

    `session` groups the turns of one conversation. `breakpoints`: symbols from the prompt's start at which a
    caller would ask for checkpoints (ends of the system prompt and of messages); a hint, used if asked for.
    """

    session: int | str
    t: float
    input: Runs
    output: Runs = ()
    breakpoints: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival. ValueError if they are not, or a run does not fit int32 tokens."""

    name: str
    unit: int
    requests: tuple[Request, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keys of the file's header

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"unit: {self.unit}, expected at least 1")
        if not self.requests:
            raise ValueError("requests: none, expected at least one")
        before = self.requests[0].t
        for index, request in enumerate(self.requests):
            if not request.t >= before:  # a NaN is not in order either
                raise ValueError(f"request {index}: t = {request.t}, expected at least {before}")
            before = request.t
            self._check(index, request)

    def _check(self, index: int, request: Request) -> None:
        if not request.input:
            raise ValueError(f"request {index}: an empty input, expected at least one symbol")
        for first, count in (*request.input, *request.output):
            if first < 0 or count < 1 or (first + count) * self.unit > TOKEN_LIMIT:
                raise ValueError(
                    f"request {index}: run [{first}, {count}] of {self.unit} tokens each, "
                    "expected first >= 0, count >= 1, tokens below 2**31"
                )
        symbols = sum(count for _, count in request.input)
        if not all(1 <= point <= symbols for point in request.breakpoints):
            raise ValueError(
                f"request {index}: breakpoints {request.breakpoints}, expected 1 to {symbols} symbols"
            )

    def __len__(self) -> int:
        return len(self.requests)

    def tokens(self, runs: Runs) -> Int32:
        """The token ids of `runs`, int32; one numpy range a run."""
        unit = self.unit
        ranges = [np.arange(first * unit, (first + n) * unit, dtype=np.int32) for first, n in runs]
        return ranges[0] if len(ranges) == 1 else np.concatenate([EMPTY, *ranges])

    def length(self, runs: Runs) -> int:
        """Tokens of `runs`."""
        return self.unit * sum(count for _, count in runs)

    @cached_property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.length(request.input) for request in self.requests)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest request, output included."""
        return max(self.length((*request.input, *request.output)) for request in self.requests)

    def save(self, path: str | Path) -> None:
        """Writes the native format; the same workload gives the same bytes."""
        head = {"name": self.name, "unit": self.unit, "requests": len(self.requests), **self.extra}
        lines = [json.dumps(head), *map(_line, self.requests)]
        text = "".join(f"{line}\n" for line in lines)
        Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))


EMPTY = np.zeros(0, dtype=np.int32)


def merge(*pieces: Runs | Run) -> Runs:
    """Runs one after the other; one that goes on where the last ended joins it, an empty one is left out."""
    merged: list[Run] = []
    for piece in pieces:
        for first, count in _runs_of(piece):
            if count and merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            elif count:
                merged.append((first, count))
    return tuple(merged)


def _runs_of(piece: Any) -> Iterable[Run]:
    return (piece,) if piece and isinstance(piece[0], int) else piece


# --- files ---


def load(path: str | Path) -> Workload:
    """A workload from a file: the native format (gzip or plain), or Mooncake's JSONL, told apart by the first
    line. ValueError names the line that is wrong."""
    path = Path(path)
    with _open(path) as file:
        head = _parse(path, 1, file.readline())
        if "hash_ids" in head:
            file.seek(0)
            return _mooncake(path.name.split(".")[0], _records(path, file, 1), 512, None)
        for key in ("name", "unit"):
            if key not in head:
                raise ValueError(f"{path.name}, line 1: no {key!r}, expected the header of a workload")
        requests = tuple(_request(path, n, record) for n, record in _records(path, file, 2))
    if head.get("requests", len(requests)) != len(requests):
        raise ValueError(f"{path.name}: {len(requests)} requests, the header says {head['requests']}")
    extra = {key: value for key, value in head.items() if key not in ("name", "unit", "requests")}
    return Workload(str(head["name"]), int(head["unit"]), requests, extra)


def load_mooncake(path: str | Path, *, unit: int = 512, limit: int | None = None) -> Workload:
    """Mooncake's trace: JSON lines of timestamp (ms), input_length, output_length and hash_ids, one for each
    `unit` tokens of the prompt.

    What the trace does not say is not made up: outputs are empty (no ids are known), each request is its own
    session, and the tokens behind the last whole unit are left out; a request with none is skipped. `limit`:
    the first so many requests.
    """
    path = Path(path)
    with _open(path) as file:
        return _mooncake(path.name.split(".")[0], _records(path, file, 1), unit, limit)


def _mooncake(
    name: str, records: Iterator[tuple[int, dict[str, Any]]], unit: int, limit: int | None
) -> Workload:
    requests: list[Request] = []
    for number, record in records:
        if limit is not None and len(requests) == limit:
            break
        try:
            whole = int(record["input_length"]) // unit
            ids = [int(each) for each in record["hash_ids"][:whole]]
            t = float(record["timestamp"]) / 1000
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}, line {number}: {error!r}, expected a record of Mooncake") from None
        if ids:
            requests.append(Request(len(requests), t, merge(*((each, 1) for each in ids))))
    return Workload(name, unit, tuple(requests))


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name}, line {number}: {record!r}, expected an object")
    return record


def _records(path: Path, file: IO[str], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, first):
        if line.strip():
            yield number, _parse(path, number, line)


def _request(path: Path, number: int, record: dict[str, Any]) -> Request:
    try:
        runs = [tuple((int(first), int(n)) for first, n in record[key]) for key in ("input", "output")]
        points = tuple(int(each) for each in record.get("breakpoints", ()))
        return Request(record["session"], float(record["t"]), runs[0], runs[1], points)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name}, line {number}: {error!r}, expected session, t, input, output"
        ) from None


def _line(request: Request) -> str:
    record = {
        "session": request.session,
        "t": request.t,
        "input": request.input,
        "output": request.output,
        **({"breakpoints": request.breakpoints} if request.breakpoints else {}),
    }
    return json.dumps(record, separators=(",", ":"))


# --- generators: the same seed and sizes give the same workload; lengths are in tokens (unit 1) ---


class _Symbols:
    """Hands out fresh symbols, run after run."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> Run:
        run = (self.next, count)
        self.next += count
        return run


def _build(name: str, seed: int, requests: list[Request]) -> Workload:
    return Workload(name, 1, tuple(sorted(requests, key=lambda each: each.t)), {"seed": seed})


def agentic(
    seed: int = 0,
    sessions: int = 64,
    turns: int = 15,
    shared: int = 10_000,
    first: int = 50_000,
    turn_tokens: int = 800,
    output: int = 300,
    think: float = 30.0,
    arrival: float = 4.0,
) -> Workload:
    """Agents: a system prompt that all share, a long first turn, then `turn_tokens` more a turn, `output` of
    them generated the turn before. Sessions start every `arrival` seconds and pause `think` seconds between
    turns, both exponential."""
    rng, symbols, requests = np.random.default_rng(seed), _Symbols(), list[Request]()
    system, start = symbols.take(shared), 0.0
    for session in range(sessions):
        start += rng.exponential(arrival)
        t, grown, (base, _) = start, first - shared, symbols.take(first - shared + turns * turn_tokens)
        for turn in range(turns):
            prompt = merge(system, (base, grown))
            points = (shared,) if turn == 0 else (shared, shared + grown - turn_tokens + output)
            requests.append(Request(session, round(t, 3), prompt, ((base + grown, output),), points))
            t, grown = t + rng.exponential(think), grown + turn_tokens
    return _build("agentic", seed, requests)


def think(
    seed: int = 0,
    sessions: int = 64,
    turns: int = 15,
    shared: int = 10_000,
    first: int = 50_000,
    turn_tokens: int = 800,
    output: int = 300,
    thinking: int = 400,
    template: int = 2,
    pause: float = 30.0,
    arrival: float = 5.0,
) -> Workload:
    """`agentic` where each answer follows `thinking` tokens and each prompt ends in `template` tokens; the
    next prompt has neither: it leaves this one `template` tokens before its end."""
    rng, symbols, requests = np.random.default_rng(seed), _Symbols(), list[Request]()
    ending, system, start = symbols.take(template), symbols.take(shared), 0.0
    for session in range(sessions):
        start += rng.exponential(arrival)
        t, history = start, merge(system, symbols.take(first - shared))
        said = first
        for _ in range(turns):
            answer, thoughts = symbols.take(output), symbols.take(thinking)
            points = (shared, said)
            prompt = merge(history, ending)
            requests.append(Request(session, round(t, 3), prompt, merge(thoughts, answer), points))
            history = merge(history, answer, symbols.take(turn_tokens - output))
            t, said = t + rng.exponential(pause), said + turn_tokens
    return _build("think", seed, requests)


def roundrobin(
    seed: int = 0,
    sessions: int = 32,
    turns: int = 15,
    first: int = 50_000,
    turn_tokens: int = 800,
    output: int = 300,
) -> Workload:
    """Sessions strictly in turn, one request a second: the worst case of recency. The seed shuffles nothing
    that matters: it permutes the order of the sessions, which then stays."""
    order = np.random.default_rng(seed).permutation(sessions) if seed else np.arange(sessions)
    symbols, requests = _Symbols(), list[Request]()
    history = [merge(symbols.take(first)) for _ in range(sessions)]
    for turn in range(turns):
        for place, session in enumerate(int(each) for each in order):
            answer, rest = symbols.take(output), symbols.take(turn_tokens - output)
            t, said = float(turn * sessions + place), first + turn * turn_tokens
            points = (said - turn_tokens + output,) if turn else ()
            requests.append(Request(session, t, history[session], (answer,), points))
            history[session] = merge(history[session], answer, rest)
    return _build("roundrobin", seed, requests)


def fewshot(
    seed: int = 0,
    requests: int = 2_000,
    templates: int = 64,
    shared: int = 500,
    shortest: int = 2_000,
    longest: int = 8_000,
    zipf: float = 1.1,
) -> Workload:
    """Few-shot prompts: a short system prompt, one of the templates (popularity of rank r: r ** -zipf), and a
    question of 100 to 499 tokens that never comes back. One request a second."""
    rng, symbols = np.random.default_rng(seed), _Symbols()
    system = symbols.take(shared)
    bodies = [symbols.take(int(n)) for n in rng.integers(shortest, longest, templates)]
    weights = np.arange(1, templates + 1, dtype=np.float64) ** -zipf
    made = []
    for index, choice in enumerate(rng.choice(templates, requests, p=weights / weights.sum())):
        body = bodies[int(choice)]
        question, answer = (symbols.take(int(rng.integers(*span))) for span in ((100, 500), (50, 200)))
        points = (shared, shared + body[1])
        made.append(Request(index, float(index), merge(system, body, question), (answer,), points))
    return _build("fewshot", seed, made)


def tot(
    seed: int = 0,
    problems: int = 48,
    beam: int = 3,
    width: int = 4,
    depth: int = 4,
    shared: int = 4_000,
    problem: int = 1_000,
    thought: int = 300,
    verdict: int = 20,
    suffix: int = 60,
    together: int = 12,
    group: float = 1_000.0,
) -> Workload:
    """Trees of thoughts: at each of `depth` levels every kept path gets `width` thoughts, each new path is
    judged (a fixed `suffix` follows it), and `beam` of them are kept. `together` problems start at about the
    same time, the next ones `group` seconds later; requests of one level arrive within five seconds."""
    rng, symbols, requests = np.random.default_rng(seed), _Symbols(), list[Request]()
    system, question = symbols.take(shared), symbols.take(suffix)

    def ask(number: int, stage: float, path: Runs, more: Runs, length: int) -> Run:
        """One request about `path`, and `more` behind it; returns its output."""
        answer, known = symbols.take(length), sum(count for _, count in path)
        points = tuple(sorted({shared, shared + problem, known}))
        t = round(stage + rng.uniform(0, 5), 3)
        requests.append(Request(number, t, merge(path, more), (answer,), points))
        return answer

    for number in range(problems):
        stage = group * (number // together) + rng.uniform(0, 20)
        kept = [merge(system, symbols.take(problem))]
        for _ in range(depth):
            grown = [
                merge(path, ask(number, stage, path, (), thought)) for path in kept for _ in range(width)
            ]
            stage += 20 + rng.exponential(10)
            for path in grown:
                ask(number, stage, path, (question,), verdict)
            stage += 9 + rng.exponential(12)
            chosen = rng.choice(len(grown), min(beam, len(grown)), replace=False)
            kept = [grown[int(each)] for each in sorted(chosen)]
    return _build("tot", seed, requests)


GENERATORS: dict[str, Callable[..., Workload]] = {
    "agentic": agentic,
    "think": think,
    "roundrobin": roundrobin,
    "fewshot": fewshot,
    "tot": tot,
}
"""By name, as the command line knows them."""
