"""Workloads: their tokens, their files, the generators' structure, and what the whole trace knows of them.

Small sizes throughout. The ideal of every request is compared with a brute-force search for the longest
common prefix.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcache import workloads
from hybridcache.foresight import Foresight, Known
from hybridcache.workloads import GENERATORS, Request, Workload, load, load_mooncake, merge

SMALL: dict[str, dict[str, int]] = {
    "agentic": {"shared": 100},
    "think": {"shared": 100, "thinking": 20},
    "roundrobin": {},
    "fewshot": {"requests": 80, "templates": 6, "shared": 20, "shortest": 50, "longest": 90},
    "tot": {"problems": 4, "shared": 60, "problem": 30, "thought": 9, "verdict": 2, "suffix": 5},
}
SMALL["tot"] |= {"together": 2, "depth": 3}
for name in ("agentic", "think", "roundrobin"):
    SMALL[name] |= {"sessions": 5, "turns": 4, "first": 300, "turn_tokens": 40, "output": 15}


def small(name: str, seed: int = 0) -> Workload:
    return GENERATORS[name](seed=seed, **SMALL[name])


def whole(workload: Workload, index: int) -> list[int]:
    """Prompt and output, token by token, the slow way."""
    request = workload.requests[index]
    symbols = [s for first, n in (*request.input, *request.output) for s in range(first, first + n)]
    return [s * workload.unit + j for s in symbols for j in range(workload.unit)]


def random_workload(rng: random.Random) -> Workload:
    """Few symbols, so that prompts share prefixes, end inside each other and repeat."""
    made = []
    for index in range(rng.randrange(1, 25)):
        runs = [
            tuple((rng.randrange(3), rng.randrange(1, 4)) for _ in range(rng.randrange(1, 5))) for _ in "ab"
        ]
        made.append(Request(rng.randrange(4), float(index), runs[0], rng.choice([(), runs[1]])))
    return Workload("random", rng.choice([1, 3]), tuple(made))


# --- tokens ---


def test_token_j_of_symbol_s() -> None:
    workload = Workload("w", 3, (Request(0, 0.0, ((5, 2), (0, 1)), ((9, 1),)),))
    tokens = workload.tokens(workload.requests[0].input)
    assert tokens.tolist() == [15, 16, 17, 18, 19, 20, 0, 1, 2] and tokens.dtype == np.int32
    assert workload.tokens(()).tolist() == [] and workload.tokens(()).dtype == np.int32
    assert workload.length(workload.requests[0].input) == workload.input_tokens == 9
    assert workload.longest == 12


def test_merge_joins_what_goes_on() -> None:
    assert merge((0, 2), (2, 3), ((5, 1), (7, 1)), (), (8, 0), ((8, 2),)) == ((0, 6), (7, 3))
    assert merge((4, 1), (4, 1)) == ((4, 1), (4, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": 0}, "unit: 0, expected at least 1"),
        ({"requests": ()}, "requests: none"),
        ({"requests": (Request(0, 1.0, ((0, 1),)), Request(0, 0.5, ((0, 1),)))}, "request 1: t = 0.5"),
        ({"requests": (Request(0, float("nan"), ((0, 1),)),)}, "request 0: t = nan"),
        ({"requests": (Request(0, 0.0, ()),)}, "request 0: an empty input"),
        ({"requests": (Request(0, 0.0, ((-1, 1),)),)}, r"run \[-1, 1\]"),
        ({"requests": (Request(0, 0.0, ((0, 0),)),)}, r"run \[0, 0\]"),
        ({"requests": (Request(0, 0.0, ((0, 1),), ((2**31 - 1, 2),)),)}, "below 2"),
        ({"requests": (Request(0, 0.0, ((0, 2),), (), (3,)),)}, "breakpoints"),
    ],
)
def test_a_wrong_workload_is_named(change: dict[str, object], message: str) -> None:
    good = {"name": "w", "unit": 1, "requests": (Request(0, 0.0, ((2**31 - 1, 1),)),)}
    Workload(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Workload(**{**good, **change})  # type: ignore[arg-type]


# --- files ---


@pytest.mark.parametrize("name", GENERATORS)
def test_a_file_holds_all_of_a_workload(name: str, tmp_path: Path) -> None:
    workload = small(name)
    workload.save(tmp_path / "a.jsonl.gz")
    workload.save(tmp_path / "b.jsonl.gz")
    assert load(tmp_path / "a.jsonl.gz") == workload
    assert (tmp_path / "a.jsonl.gz").read_bytes()[4:8] == bytes(4)  # no time of writing
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()))
    assert load(plain) == workload


def test_the_native_format(tmp_path: Path) -> None:
    """The lines as the documentation has them."""
    workload = Workload("w", 64, (Request("s/1", 0.5, ((0, 3), (7, 1)), ((9, 2),)),), {"symbols": 11})
    workload.save(tmp_path / "w.gz")
    head, line = gzip.decompress((tmp_path / "w.gz").read_bytes()).decode().splitlines()
    assert json.loads(head) == {"name": "w", "unit": 64, "requests": 1, "symbols": 11}
    assert line == '{"session":"s/1","t":0.5,"input":[[0,3],[7,1]],"output":[[9,2]]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1"),
        ("[1]\n", "line 1: .*expected an object"),
        ('{"name": "w"}\n', "line 1: no 'unit'"),
        (
            '{"name": "w", "unit": 1, "requests": 2}\n{"session":0,"t":0,"input":[[0,1]],"output":[]}\n',
            "says 2",
        ),
        ('{"name": "w", "unit": 1}\n{"session":0,"t":0,"input":[[0]],"output":[]}\n', "line 2: "),
        ('{"name": "w", "unit": 1}\n\n{"session":0,"t":0,"input":[[0,1]]}\n', "line 3: KeyError"),
        ('{"name": "w", "unit": 1}\n{"session":0,"t"\n', "line 2: "),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.jsonl")


MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]},
    {"timestamp": 500, "input_length": 300, "output_length": 7, "hash_ids": [8]},
    {"timestamp": 2500, "input_length": 1536, "output_length": 1, "hash_ids": [4, 5, 9]},
]


def test_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "conversation_trace.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in MOONCAKE))
    workload = load(path)
    assert workload == load_mooncake(path) and workload.unit == 512
    assert workload.name == "conversation_trace"
    assert [(r.t, r.input, r.output) for r in workload.requests] == [
        (0.0, ((4, 2),), ()),  # 76 tokens make no unit
        (2.5, ((4, 2), (9, 1)), ()),  # and a prompt of none is no request
    ]
    assert len({request.session for request in workload.requests}) == 2
    assert Foresight(workload).ideals == [0, 1024]
    assert len(load_mooncake(path, limit=1)) == 1
    assert load_mooncake(path, unit=100).requests[1].input == ((8, 1),)
    path.write_text(json.dumps({"timestamp": 0, "hash_ids": [1]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: KeyError.*Mooncake"):
        load(path)


# --- generators ---


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_decides(name: str) -> None:
    assert small(name) == small(name)
    assert small(name, 1).requests != small(name).requests
    assert small(name).name == name and small(name).unit == 1


@pytest.mark.parametrize("name", ["agentic", "roundrobin", "think"])
def test_a_turn_goes_on_where_the_last_one_left(name: str) -> None:
    workload, sizes = small(name), SMALL[name]
    facts = Foresight(workload)
    template = 2 if name == "think" else 0
    for index, later in enumerate(facts.followers):
        request = workload.requests[index]
        tokens, read = whole(workload, index), workload.length(request.input)
        if later is None:
            continue
        following = whole(workload, later)[: workload.length(workload.requests[later].input)]
        assert len(following) == read + sizes["turn_tokens"]
        kept = len(tokens) if name != "think" else read - template
        assert following[:kept] == tokens[:kept]
        assert facts.ideals[later] == kept
        assert facts.keep(index) == ("prompt" if name == "think" else "all")
        assert facts.origins[later] == index
    assert sum(later is None for later in facts.followers) == sizes["sessions"]


def test_thoughts_are_dropped_and_answers_come_back() -> None:
    workload = small("think")
    (first, second) = [r for r in workload.requests if r.session == 0][:2]
    prompt, output, following = (
        workload.tokens(r).tolist() for r in (first.input, first.output, second.input)
    )
    assert len(prompt) == 302 and len(output) == 20 + 15
    history, template = prompt[:-2], prompt[-2:]
    assert following[: 300 + 15] == history + output[20:]
    assert following[-2:] == template and not set(output[:20]) & set(following)


def test_sessions_share_the_system_prompt_only() -> None:
    for name in ("agentic", "think"):
        workload = small(name)
        heads = {r.session: whole(workload, i) for i, r in reversed(list(enumerate(workload.requests)))}
        assert len({tuple(tokens[:100]) for tokens in heads.values()}) == 1
        assert len({tokens[100] for tokens in heads.values()}) == len(heads) == 5
    apart = small("roundrobin")
    assert [request.session for request in apart.requests] == [0, 1, 2, 3, 4] * 4
    assert sum(Foresight(apart).ideals[:5]) == 0


def test_popular_templates() -> None:
    workload = workloads.fewshot(requests=4000, templates=20, zipf=1.1)
    counts = Counter(request.breakpoints[1] for request in workload.requests)
    ranked = [n for _, n in counts.most_common()]
    weights = np.arange(1, 21) ** -1.1
    assert abs(ranked[0] / 4000 - weights[0] / weights.sum()) < 0.03
    assert len(counts) == 20 and ranked[0] > 8 * ranked[-1]
    for request in workload.requests[:50]:
        question = sum(n for _, n in request.input) - request.breakpoints[1]
        assert 100 <= question < 500 and 50 <= request.output[0][1] < 200


def test_trees_of_thoughts() -> None:
    workload = small("tot")
    lengths = Counter(workload.length(request.output) for request in workload.requests)
    per_problem = 4 + 2 * 3 * 4  # one root, then a beam of three, four wide
    assert lengths == {9: 4 * per_problem, 2: 4 * per_problem}
    facts = Foresight(workload)
    for index, request in enumerate(workload.requests):
        prompt = workload.length(request.input)
        if prompt > 90:  # not a root: all but the suffix was read, by the request that made the last thought
            assert facts.ideals[index] >= prompt - 5 - 1
            assert facts.origins[index] is not None
    starts = {s: min(r.t for r in workload.requests if r.session == s) for s in range(4)}
    assert max(starts[0], starts[1]) < 26 and min(starts[2], starts[3]) >= 1000


# --- what the whole trace knows ---


@pytest.mark.parametrize("read_all", [True, False])
def test_ideals_by_brute_force(read_all: bool) -> None:
    rng, found = random.Random(1), 0
    for _ in range(60):
        workload = random_workload(rng)
        read: list[list[int]] = []
        for index, ideal in enumerate(Foresight(workload, read_all).ideals):
            tokens = whole(workload, index)
            prompt = workload.length(workload.requests[index].input)
            best = max((shared(tokens[:prompt], each) for each in read), default=0)
            assert ideal == min(best, prompt - 1)
            found += ideal > 0
            read.append(tokens if read_all else tokens[: max(len(tokens) - 1, prompt)])
    assert found > 200


def shared(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def test_known_asks_without_learning() -> None:
    rng, known, read = random.Random(2), Known(), list[list[int]]()
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
        best = max((shared(tokens, each) for each in read), default=0)
        array = np.array(tokens, dtype=np.int32)
        assert known.match(array) == best == known.match(array)
        if rng.random() < 0.3:
            assert known.read(array) == best
            read.append(tokens)
    assert len(read) > 50


def test_what_comes_back() -> None:
    made = (
        Request("a", 0.0, ((0, 4),), ((10, 2),)),
        Request("b", 1.0, ((0, 4),), ((20, 2),)),
        Request("a", 3.0, ((0, 4), (30, 1)), ((40, 1),)),  # without the output 10, 11
        Request("b", 7.5, ((0, 4), (20, 2), (50, 1))),
        Request("a", 8.0, ((0, 4), (10, 2), (60, 1))),  # with it
    )
    facts = Foresight(Workload("w", 1, made))
    assert facts.followers == [2, 3, 4, None, None]
    assert facts.output_returns == [True, True, False, False, False]
    assert [facts.keep(index) for index in range(5)] == ["all", "all", "prompt", "all", "all"]
    assert [facts.gap(index) for index in range(5)] == [3.0, 6.5, 5.0, None, None]
    assert facts.origins == [None, None, None, 1, 0]
    assert facts.breakpoints(3) == [4, 6] and facts.breakpoints(0) == []
    partly = ((10, 2), (0, 2)), ((0, 4), (10, 1), (30, 1))  # the later one drops the output's last symbol
    made = (Request(0, 0.0, partly[0]), Request(0, 1.0, ((0, 4),), ((10, 2),)), Request(0, 2.0, partly[1]))
    facts = Foresight(Workload("w", 1, made))
    assert facts.origins == [None, None, 1]  # what an earlier prompt held is no answer to a later request
    assert facts.output_returns == [False, False, False] and facts.keep(1) == "prompt"
    asked = Workload("w", 8, (Request(0, 0.0, ((0, 4),), (), (1, 3, 4)),))
    assert Foresight(asked).breakpoints(0) == [8, 24]  # the end of the prompt is one anyway


def test_a_prompt_is_expanded_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One range a run: a million tokens in two symbols ask numpy twice."""
    asked: list[int] = []
    arange = np.arange

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(1)
        return arange(*args, **options)

    monkeypatch.setattr(np, "arange", counted)
    workload = Workload("w", 500_000, (Request(0, 0.0, ((7, 1), (3, 1))),))
    assert len(workload.tokens(workload.requests[0].input)) == 1_000_000 and len(asked) == 2
