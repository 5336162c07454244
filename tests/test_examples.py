"""The examples run as they stand, answer as a run without a cache does, and notice a wrong cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridcache import Pools

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports one by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def script(name: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    run = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_engine_as_a_script() -> None:
    out = script("tiny_engine.py")
    assert out.count("every answer is that of a run without a cache") == 2


def test_the_engine_reuses_preempts_and_decides_alike_in_every_run(example) -> None:
    engine = example("tiny_engine")
    conversations, crowd = engine.main()
    assert conversations.tokens_read < 1300 and conversations.preempted == 0
    assert crowd.preempted >= 1
    for each in (conversations, crowd):
        stats = each.cache.stats()
        assert stats["open_leases"] == stats["resting_leases"] == 0 and stats["launches"] > 0
    assert [each.cache.digest for each in engine.main()] == [conversations.cache.digest, crowd.cache.digest]


def test_the_engine_overlaps_steps_and_a_cancelled_request_rests(example) -> None:
    module = example("tiny_engine")
    engine = module.Engine(module.TinyHybrid(), 1 << 20)
    request, other = (module.Request(module.text(40, seed), 20) for seed in (1, 2))
    engine.run([request, other], until=lambda: len(request.output) == 3)
    lease = request.lease
    assert lease.computed == lease.committed + 1 == 43  # two of the answer are read, the third is being read
    engine.cancel(request)
    assert engine.cache.stats()["resting_leases"] == 1
    follower = module.Request(module.text(40, 1), 20)
    engine.run([follower])
    assert engine.cache.stats()["resting_leases"] == 0 and follower.output[:3] == request.output


@pytest.mark.parametrize("broken", ["copy_slots", "zero_slots", "copy_pages"])
def test_a_plan_that_is_not_carried_out_is_noticed(
    example, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("tiny_engine")
    apply = Pools.apply

    def skip(pools, plan):
        """Leaves what memory may hold in the places that it does not write."""
        ids = getattr(plan, broken)
        apply(pools, plan._replace(**{broken: ids[:0]}))
        views = pools.kv if broken == "copy_pages" else pools.state
        for layer in (2,) if broken == "copy_pages" else (0, 1, 3):
            for part in views(layer):
                part[torch.tensor(ids[:, 1] if ids.ndim == 2 else ids).long()] = 0.5

    monkeypatch.setattr(Pools, "apply", skip)
    with pytest.raises(AssertionError):
        module.main()


def test_branches_read_what_they_share_once(example) -> None:
    out = script("branches.py")
    assert "13 forks" in out
    cached, uncached = example("branches").main()
    own = 4 * 12 + 3 * 4 + 2 * (6 * 4)  # of the samples, of the first level of the tree, of the other two
    assert cached.tokens_read <= 120 + own + 8  # the second search resumes the cut before the prompt's end
    assert uncached.tokens_read > 40 * cached.tokens_read
    assert cached.cache.stats()["open_leases"] == 0


# --- chat ---


@pytest.fixture
def chat(example):
    pytest.importorskip("transformers")
    module = example("chat")
    return module.Chat(*module.tiny(), 1 << 26, "You are brief.")


@torch.inference_mode()
def greedy(model, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    """What the model itself answers, read anew for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens


def test_a_chat_answers_as_the_model_does_and_reuses_all_that_was_read(chat) -> None:
    before = 0
    for text in ("hello", "and who are you?", "thanks\nbye"):
        _, result = chat.turn(text, max_new_tokens=12)
        prompt = result.sequence[: result.reused + result.computed]
        assert result.sequence == greedy(chat.engine.model, prompt, 12, chat.stops)
        assert result.reused == before
        before = len(result.sequence) - 1  # the last one was sampled, not read
    assert len(chat.messages) == 7


def test_the_ends_of_messages_are_where_an_edited_chat_goes_on(chat) -> None:
    for text in ("hello", "who?", "why?"):
        chat.turn(text, max_new_tokens=12)
    prompt = chat.render(chat.messages[:-1], add_generation_prompt=True)
    messages, chat.messages = chat.messages, chat.messages[:-1]
    ends = chat.message_ends(prompt)
    assert len(ends) == 6 and all(prompt[end - 2] == chat.tokenizer.eos_token_id for end in ends)
    for kept in (3, 1):
        chat.messages = messages[:kept]
        _, result = chat.turn("something else", max_new_tokens=2)
        assert result.reused == ends[kept - 1] and result.match.reason == "no_checkpoint"


def test_the_chat_as_a_script() -> None:
    pytest.importorskip("transformers")
    out = script("chat.py", "--tiny", "--max-new-tokens", "5", stdin="hello\nagain\n")
    first, second = (line for line in out.splitlines() if line.startswith("[turn"))
    assert " 0 reused, " in first and " 0 reused, " not in second
