"""The code of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hybridcache import ModelLayout
from tests.conftest import Driver, tokens

README = (Path(__file__).parent.parent / "README.md").read_text()
EMBEDDING, WRAPPER, DRAFTS, METRICS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def toy_forward(token_ids, step, pages, pools):
    """Adds each token to its state, and keeps it as KV: what a lease reads is what it must have written."""
    (state,) = (part for part in pools.state(0) if part.dtype == torch.float32)
    total = float(state[step.write_slot].flatten()[0]) + sum(token_ids)
    state[step.write_slot].fill_(total)
    keys = pools.kv(1)[0]
    for position, token in enumerate(token_ids, step.begin):
        keys[int(pages[position // 64]), position % 64].fill_(token % 16)
    return total


def test_the_embedding_is_about_thirty_lines_and_reuses_what_it_has_read() -> None:
    config = {
        "model_type": "qwen3_5_text",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 512,
    }
    assert isinstance(ModelLayout.from_hf_config(config), ModelLayout)
    read: list[int] = []

    def forward(token_ids, step, pages, pools):
        read.append(len(token_ids))
        return toy_forward(token_ids, step, pages, pools)

    names = {
        "config": config,
        "memory_bytes": 1 << 24,
        "device": "cpu",
        "forward": forward,
        "sample": lambda total: int(total) % 500,
    }
    exec(compile(EMBEDDING, "README.md", "exec"), names)
    assert 25 <= len([line for line in EMBEDDING.splitlines() if line.strip()]) <= 35
    first = names["answer"](list(range(3000)), 5)
    assert sum(read) == 3004
    read.clear()
    second = names["answer"]([*first, 7, 8, 9], 5)
    assert sum(read) == 3 + 1 + 4  # the last sampled token had not been read
    names["cache"].clear()
    assert names["answer"]([*first, 7, 8, 9], 5) == second  # the restored state was the true one


def test_the_step_that_verifies_drafts() -> None:
    driver = Driver(draft_tokens=3)
    prompt = tokens(12).tolist()
    lease = driver.cache.reserve(prompt)
    assert lease is not None
    driver.prefill(lease)

    def verify(step):
        assert len(step.write_slots) == 4
        driver.apply()
        return [1, 2, 3]

    exec(compile(DRAFTS, "README.md", "exec"), {"lease": lease, "verify": verify})
    assert driver.cache.match([*prompt, 1, 2, 9]).length == 14


def test_the_wrapper() -> None:
    pytest.importorskip("transformers")
    from tests.tiny_models import tiny_model

    names = {"model": tiny_model("qwen3_5"), "input_ids": list(range(100))}
    exec(compile(WRAPPER, "README.md", "exec"), names)
    assert len(names["result"].sequence) == 132


def test_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("prometheus_client")
    registry, ports = client.CollectorRegistry(), []
    monkeypatch.setattr("hybridcache.metrics.register.__defaults__", (registry,))
    monkeypatch.setattr(client, "start_http_server", ports.append)
    exec(compile(METRICS, "README.md", "exec"), {"cache": Driver().cache})
    assert ports == [9400]
