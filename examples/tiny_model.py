"""A hybrid model small enough to read: three recurrent layers, one of full attention, random weights.

Owns the arithmetic and the two memories that it runs on: `Paged` (what one step of a lease may read and write
of hybridcache's pools) and `Plain` (tensors of its own: the run without a cache that examples compare with).
The weights are such that states remember: a wrong state changes the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hybridcache import LayerSpec, Pools, TensorSpec

VOCAB, HIDDEN, HEADS, KEY, VALUE, STOP = 64, 32, 2, 8, 16, 0
CHANNELS = HEADS * (2 * KEY + VALUE)
CONV, STATE = (CHANNELS, 3), (HEADS, KEY, VALUE)
RECURRENT = (TensorSpec("conv", CONV, "float32"), TensorSpec("recurrent", STATE, "float32"))
ATTENTION = (TensorSpec("k", (HEADS, VALUE), "float32"), TensorSpec("v", (HEADS, VALUE), "float32"))
KINDS = ("recurrent", "recurrent", "attention", "recurrent")
LAYERS = [LayerSpec(i, kind, RECURRENT if kind == "recurrent" else ATTENTION) for i, kind in enumerate(KINDS)]


class DeltaRule(nn.Module):
    """A gated delta rule behind a short convolution: its memory is updated in place at every token."""

    def __init__(self, index):
        super().__init__()
        self.index, self.out = index, nn.Linear(HEADS * VALUE, HIDDEN, bias=False)
        self.project = nn.Linear(HIDDEN, CHANNELS + HEADS, bias=False)
        self.conv = nn.Parameter(torch.rand(CHANNELS, 4))
        self.decay = nn.Parameter(torch.exp(-torch.empty(HEADS, 1, 1).uniform_(1e-3, 2e-2)))  # it remembers

    def mix(self, x, memory):
        conv, state = memory.state(self.index)
        x, beta = x.split([CHANNELS, HEADS], 1)
        window = torch.cat((conv, x.T), 1)
        conv.copy_(window[:, -3:])
        mixed = F.silu((window.unfold(1, 4, 1) * self.conv[:, None]).sum(2)).T
        q, k, v = (
            each.unflatten(1, (HEADS, -1)) for each in mixed.split([HEADS * KEY] * 2 + [HEADS * VALUE], 1)
        )
        q, k, beta = F.normalize(q, dim=2), F.normalize(k, dim=2), torch.sigmoid(beta)[..., None, None]
        outputs = []
        for t in range(len(x)):
            state.mul_(self.decay)
            error = v[t, :, None] - k[t, :, None] @ state
            state.add_(k[t, ..., None] @ (beta[t] * error))
            outputs.append(q[t, :, None] @ state)
        return torch.stack(outputs).flatten(1)


class Attention(nn.Module):
    """Full attention over keys and values that are only ever appended."""

    def __init__(self, index):
        super().__init__()
        self.index, self.out = index, nn.Linear(HEADS * VALUE, HIDDEN, bias=False)
        self.project = nn.Linear(HIDDEN, 3 * HEADS * VALUE, bias=False)

    def mix(self, x, memory):
        q, k, v = x.unflatten(1, (3, HEADS, VALUE)).unbind(1)
        k, v = memory.extend(self.index, k, v)
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        mixed = F.scaled_dot_product_attention(*(each.transpose(0, 1) for each in (q, k, v)), attn_mask=seen)
        return mixed.transpose(0, 1).flatten(1)


class TinyHybrid(nn.Module):
    """Logits after the last token of each run; `ids` holds the runs of all requests, one after the other."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.ModuleList(
            (DeltaRule if kind == "recurrent" else Attention)(i) for i, kind in enumerate(KINDS)
        )

    @torch.inference_mode()
    def forward(self, ids, counts, memories):
        x = self.embed(ids)
        for layer in self.layers:
            runs = layer.project(F.rms_norm(x, (HIDDEN,))).split(counts)
            x = x + layer.out(
                torch.cat([layer.mix(run, memory) for run, memory in zip(runs, memories, strict=True)])
            )
        return self.head(x[torch.tensor(counts).cumsum(0) - 1])


@dataclass
class Paged:
    """What one step reads and writes of the pools: one slot, and KV at its own positions only."""

    pools: Pools
    begin: int
    end: int
    slot: int
    table: torch.Tensor

    def state(self, layer):
        return [part[self.slot] for part in self.pools.state(layer)]  # the plan has copied or zeroed the slot

    def extend(self, layer, *new):
        positions = torch.arange(self.begin, self.end)
        parts, size = self.pools.kv(layer), self.pools.layout.page_size
        for part, rows in zip(parts, new, strict=True):
            part[self.table[positions // size], positions % size] = rows
        return [part[self.table].flatten(0, 1)[: self.end] for part in parts]


class Plain:
    """The same without a cache."""

    def __init__(self):
        self.states, self.kv = {}, {}

    def state(self, layer):
        return self.states.setdefault(layer, (torch.zeros(CONV), torch.zeros(STATE)))

    def extend(self, layer, *new):
        self.kv[layer] = (
            [torch.cat(pair) for pair in zip(self.kv[layer], new, strict=True)] if layer in self.kv else new
        )
        return self.kv[layer]


def answer_without_cache(model, prompt, max_new_tokens):
    """The prompt in one pass, then token by token."""
    memory, ids, output = Plain(), prompt, []
    while len(output) < max_new_tokens and STOP not in output:
        output.append(int(model(torch.tensor(ids), [len(ids)], [memory])[0].argmax()))
        ids = output[-1:]
    return output
