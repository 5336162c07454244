"""Parallel samples and a tree search on one prompt: `Lease.fork` shares what the branches have in common.

The same search runs twice: on leases, and on a reader that has no cache and reads every branch from its first
token. Both must find the same branches; what they had to read is printed. Needs torch.

    python examples/branches.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny_model import LAYERS, VOCAB, Paged, Plain, TinyHybrid

from hybridcache import HybridCache, Lease, ModelLayout, Pools


@dataclass(eq=False)
class Branch:
    """Some tokens, and the logits of what may come next."""

    tokens: list[int]
    logits: torch.Tensor
    lease: Lease | None = None
    score: float = 0.0


class Cached:
    """Branches on leases."""

    def __init__(self, model: TinyHybrid, memory_bytes: int) -> None:
        layout = ModelLayout(page_size=8, layers=LAYERS)
        self.cache = HybridCache(layout, memory_bytes=memory_bytes, pass_cost=64)  # prompts are short here
        self.pools = Pools(layout, self.cache.geometry)
        self.model, self.tokens_read = model, 0

    def start(self, prompt: list[int]) -> Branch:
        lease = self.cache.reserve(prompt)
        if lease is None:
            raise RuntimeError("no room for the prompt")
        while lease.computed < len(prompt):
            logits = self.read(lease, prompt)
        return Branch(prompt, logits, lease)

    def fork(self, branch: Branch) -> Branch:
        """Both go on from one state; what has to be copied for that stands in the next plan."""
        lease = branch.lease.fork()
        if lease is None:
            raise RuntimeError("no room for a branch: an engine would let it wait")
        return Branch(branch.tokens, branch.logits, lease, branch.score)

    def extend(self, branch: Branch, token: int) -> None:
        branch.tokens = [*branch.tokens, token]
        branch.logits = self.read(branch.lease, branch.tokens)

    def drop(self, branch: Branch) -> None:
        """A branch that nobody will come back to: what only it has read goes first."""
        branch.lease.close(keep="nothing")

    def read(self, lease: Lease, tokens: list[int]) -> torch.Tensor:
        """One step over what is not read yet."""
        step = lease.launch(len(tokens) - lease.computed)
        if step is None:
            raise RuntimeError("no room for the next page")
        plan = self.cache.plan()
        self.pools.apply(plan)
        self.cache.applied(plan)
        memory = Paged(self.pools, step.begin, step.end, step.write_slot, torch.tensor(lease.pages))
        read = tokens[step.begin : step.end]
        self.tokens_read += len(read)
        logits = self.model(torch.tensor(read), [len(read)], [memory])[0]
        lease.commit(tokens[max(step.begin, lease.prompt_length) : step.end])
        return logits


class Uncached:
    """Branches that are read from nothing whenever they grow."""

    def __init__(self, model: TinyHybrid) -> None:
        self.model, self.tokens_read = model, 0

    def start(self, tokens: list[int]) -> Branch:
        self.tokens_read += len(tokens)
        return Branch(tokens, self.model(torch.tensor(tokens), [len(tokens)], [Plain()])[0])

    def fork(self, branch: Branch) -> Branch:
        return Branch(branch.tokens, branch.logits, None, branch.score)

    def extend(self, branch: Branch, token: int) -> None:
        branch.tokens = [*branch.tokens, token]
        branch.logits = self.start(branch.tokens).logits

    def drop(self, branch: Branch) -> None:
        pass


def parallel_samples(reader: Cached | Uncached, prompt: list[int], n: int, length: int) -> list[list[int]]:
    """`n` answers of `length` tokens, each drawn by dice of its own, all under way at once."""
    branches = [reader.start(prompt)]
    branches += [reader.fork(branches[0]) for _ in range(n - 1)]
    dice = [torch.Generator().manual_seed(number) for number in range(n)]
    for _ in range(length):
        for branch, die in zip(branches, dice, strict=True):
            reader.extend(branch, int(torch.multinomial(branch.logits.softmax(0), 1, generator=die)))
    for branch in branches:
        reader.drop(branch)
    return [branch.tokens[len(prompt) :] for branch in branches]


def tree_search(
    reader: Cached | Uncached, prompt: list[int], *, beam: int, width: int, depth: int, length: int
) -> list[tuple[float, list[int]]]:
    """The `beam` best paths of `depth` thoughts; each thought starts with one of `width` tokens and goes on
    greedily for `length`."""
    best = [reader.start(prompt)]
    for _ in range(depth):
        children = []
        for parent in best:
            firsts = parent.logits.topk(width).indices.tolist()
            family = [*(reader.fork(parent) for _ in firsts[1:]), parent]  # the parent goes on as the last
            for child, first in zip(family, firsts, strict=True):
                think(reader, child, first, length)
            children += family
        children.sort(key=lambda child: -child.score)
        best, rest = children[:beam], children[beam:]
        for child in rest:
            reader.drop(child)
    for child in best:
        reader.drop(child)
    return [(child.score, child.tokens[len(prompt) :]) for child in best]


def think(reader: Cached | Uncached, branch: Branch, token: int, length: int) -> None:
    for _ in range(length):
        branch.score += float(branch.logits.log_softmax(0)[token])
        reader.extend(branch, token)
        token = int(branch.logits.argmax())


def main() -> tuple[Cached, Uncached]:
    torch.set_num_threads(1)
    model = TinyHybrid()
    cached, uncached = Cached(model, 2 << 20), Uncached(model)
    prompt = torch.randint(1, VOCAB, (120,), generator=torch.Generator().manual_seed(2)).tolist()

    samples = [parallel_samples(reader, prompt, n=4, length=12) for reader in (cached, uncached)]
    assert samples[0] == samples[1]
    print("4 samples:", *samples[0], sep="\n  ")

    shape = {"beam": 2, "width": 3, "depth": 3, "length": 4}
    found = [tree_search(reader, prompt, **shape) for reader in (cached, uncached)]
    assert [path for _, path in found[0]] == [path for _, path in found[1]]
    print("the best paths of the tree:", *(f"{score:.3f} {path}" for score, path in found[0]), sep="\n  ")

    cached.cache.check()
    stats = cached.cache.stats()
    print(
        f"{stats['forks']} forks; {cached.tokens_read} tokens read, {uncached.tokens_read} without the cache"
    )
    return cached, uncached


if __name__ == "__main__":
    main()
