"""A dump of the cache, read: nodes with what they hold, leases; the order in which they would leave; as text.

Owns the grammar of `HybridCache.dump()`, the JSON that `hybridcache show --json` writes and reads, the choice
of nodes when there are too many to draw, and the drawing as text. Knows no cache: a dump is a file. Words
that it does not know are kept and shown, so a dump of a later version can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

_NODE = re.compile(r"\[(\d+), (\d+)\)(?: tokens((?: -?\d+)+)( \.\.\.)?)?(.*)")
_FLAGS = ("superseded", "resting", "fresh")


@dataclass
class Checkpoint:
    """A state at its node's depth. `worth`: the policy's figure (None: the policy or a pin has none);
    `leaves`: its place in the order of eviction, 1 is the next to leave."""

    kind: str
    slot: int
    tick: int
    tail: int | None = None
    superseded: bool = False
    pinned: int = 0
    worth: int | None = None
    leaves: int | None = None


@dataclass
class Node:
    """An edge of the tree, tokens [begin, depth), and what its end holds. `tokens`: the first few of them."""

    begin: int
    depth: int
    tokens: list[int] = field(default_factory=list)
    pages: int = 0
    pins: int = 0
    checkpoint: Checkpoint | None = None
    children: list[Node] = field(default_factory=list)
    more: dict[str, int] = field(default_factory=dict)  # words that are not known here
    hidden: int = 0  # children and theirs that `choose` left out

    def walk(self) -> Iterator[Node]:
        """Itself and all below, parents first. No recursion: trees may be deep."""
        left = [self]
        while left:
            node = left.pop()
            yield node
            left += reversed(node.children)


@dataclass
class Dump:
    """`arena`: the numbers of the first lines. `policy`: what decides who leaves. `salts`: hexadecimal, with
    the roots of each. `leases`: one dict each."""

    arena: dict[str, int] = field(default_factory=dict)
    salts: dict[str, list[Node]] = field(default_factory=dict)
    leases: list[dict[str, Any]] = field(default_factory=list)
    hidden: dict[str, int] = field(default_factory=dict)  # by salt, nodes that `choose` left out of its top
    policy: str = ""  # not told

    def walk(self) -> Iterator[Node]:
        for roots in self.salts.values():
            for root in roots:
                yield from root.walk()


# --- reading ---


def read(text: str) -> Dump:
    """The text of `dump()`. ValueError names a line that is not of one."""
    dump = Dump()
    open_nodes: list[Node] = []  # the path to the last one, by indent
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        try:
            if not words:
                continue
            if words[0] == "salt":
                dump.salts[words[1].strip("'")] = []
            elif words[0] == "policy":
                dump.policy, bytes_held = _read_policy(line)
                dump.arena |= bytes_held
            elif words[0] == "transcript":
                continue  # it holds nothing of the tree
            elif words[0] == "lease":
                dump.leases.append(_read_lease(words))
            elif line.startswith(" "):
                level = (len(line) - len(line.lstrip())) // 2 - 1  # a salt's first nodes are indented twice
                node = _read_node(line.strip())
                siblings = open_nodes[level - 2].children if level > 1 else dump.salts[list(dump.salts)[-1]]
                siblings.append(node)
                open_nodes[level - 1 :] = [node]
            else:
                dump.arena |= _read_arena(line)
        except (IndexError, ValueError, AttributeError):
            raise ValueError(f"line {number}: {line.strip()[:60]!r}, expected a dump of a cache") from None
    if not dump.arena:
        raise ValueError("an empty text, expected a dump of a cache")
    return _ordered(dump)


def _read_arena(line: str) -> dict[str, int]:
    found = re.fullmatch(
        r"pages (\d+) of (\d+) taken, slots (\d+) of (\d+), free slabs (\d+), checkpoints (\d+)", line
    )
    names = ("taken_pages", "num_pages", "taken_slots", "num_slots", "free_slabs", "checkpoints")
    if found is None:
        raise ValueError
    return dict(zip(names, map(int, found.groups()), strict=True))


def _read_policy(line: str) -> tuple[str, dict[str, int]]:
    found = re.fullmatch(r"policy (\w+), (\d+) bytes cached of (\d+)", line)
    if found is None:
        raise ValueError
    return found[1], {"cached_bytes": int(found[2]), "total_bytes": int(found[3])}


def _read_lease(words: list[str]) -> dict[str, Any]:
    pages = words.index("pages")
    lease: dict[str, Any] = _pairs(words[:pages])
    lease["pages"] = [int(each.rstrip("o")) for each in words[pages + 1 :]]
    lease["own_pages"] = sum(each.endswith("o") for each in words[pages + 1 :])
    return lease


def _read_node(line: str) -> Node:
    found = _NODE.fullmatch(line)
    if found is None:
        raise ValueError
    own, _, state = found[5].partition("*")
    node = Node(int(found[1]), int(found[2]), [int(each) for each in (found[3] or "").split()])
    pairs = _pairs(own.split())
    node.pages, node.pins = pairs.pop("pages", 0), pairs.pop("pins", 0)
    if state:
        kind, *words = state.split()
        held = _pairs(words)
        known = {name: held.pop(name) for name in ("slot", "tick", "tail", "worth", "pinned") if name in held}
        node.checkpoint = Checkpoint(kind, superseded=bool(held.pop("superseded", False)), **known)
        pairs |= held
    node.more = pairs
    return node


def _pairs(words: list[str]) -> dict[str, int]:
    """`name number name number`, and flags without one."""
    found: dict[str, int] = {}
    rest = iter(words)
    for name in rest:
        found[name] = 1 if name in _FLAGS else int(next(rest, ""))
    return found


def _ordered(dump: Dump) -> Dump:
    """Numbers the checkpoints that have a worth in the order in which they would leave."""
    held = [node.checkpoint for node in dump.walk() if node.checkpoint]
    placed = [(each.worth, each.tick, each) for each in held if each.worth is not None and not each.pinned]
    for place, (_, _, checkpoint) in enumerate(sorted(placed, key=lambda each: each[:2]), 1):
        checkpoint.leaves = place
    return dump


def as_json(dump: Dump) -> dict[str, Any]:
    """Plain values; a list of nodes with the index of their parent, since trees may be deep."""
    nodes: list[dict[str, Any]] = []
    for salt, roots in dump.salts.items():
        for root in roots:
            numbers: dict[int, int] = {}
            parents = {id(child): id(node) for node in root.walk() for child in node.children}
            for node in root.walk():
                numbers[id(node)] = len(nodes)
                fields = {
                    name: value for name, value in vars(node).items() if name not in ("children", "hidden")
                }
                fields["checkpoint"] = asdict(node.checkpoint) if node.checkpoint else None
                nodes.append({"salt": salt, "parent": numbers.get(parents.get(id(node), 0)), **fields})
    fields = {"arena": dump.arena, "policy": dump.policy, "salts": list(dump.salts)}
    return {**fields, "nodes": nodes, "leases": dump.leases}


def from_json(found: Any) -> Dump:
    """What `as_json` made. ValueError if it is something else."""
    try:
        dump = Dump(found["arena"], {salt: [] for salt in found["salts"]}, found["leases"])
        dump.policy = found.get("policy", "")
        nodes: list[Node] = []
        for entry in found["nodes"]:
            fields = {name: value for name, value in entry.items() if name not in ("salt", "parent")}
            held = fields.pop("checkpoint")
            nodes.append(Node(**fields, checkpoint=Checkpoint(**held) if held else None))
            parent = entry["parent"]
            (dump.salts[entry["salt"]] if parent is None else nodes[parent].children).append(nodes[-1])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{error}: expected what hybridcache show --json writes") from None
    return dump


# --- choosing ---


def choose(dump: Dump, limit: int) -> Dump:
    """The `limit` nodes below which most is held, with how many of each one's were left out."""
    nodes = list(dump.walk())
    if len(nodes) <= limit:
        return dump
    weight = {id(node): node.pages + 1 + (node.checkpoint is not None) for node in nodes}
    count = dict.fromkeys(weight, 1)
    for node in reversed(nodes):  # children before their parents
        for child in node.children:
            weight[id(node)] += weight[id(child)]
            count[id(node)] += count[id(child)]
    kept = {id(node) for node in sorted(nodes, key=lambda node: -weight[id(node)])[:limit]}

    def part(siblings: list[Node]) -> tuple[list[Node], int]:
        left_out = sum(count[id(node)] for node in siblings if id(node) not in kept)
        return [node for node in siblings if id(node) in kept], left_out

    chosen = Dump(dump.arena, leases=dump.leases, policy=dump.policy)
    for node in nodes:
        node.children, node.hidden = part(node.children)
    for salt, roots in dump.salts.items():
        chosen.salts[salt], left_out = part(roots)
        chosen.hidden |= {salt: left_out} if left_out else {}
    return chosen


# --- as text ---


def opening(dump: Dump) -> str:
    arena, nodes = dump.arena, sum(1 for _ in dump.walk())
    held = ""
    if "cached_bytes" in arena:
        cached, total = (arena[name] / 1e9 for name in ("cached_bytes", "total_bytes"))
        held = f"policy {dump.policy}, {cached:,.3g} of {total:,.3g} GB cached; "
    return held + (
        f"{arena['taken_pages']:,} of {arena['num_pages']:,} pages and {arena['taken_slots']:,} of "
        f"{arena['num_slots']:,} slots taken, {arena['free_slabs']:,} free slabs; {nodes:,} nodes, "
        f"{arena['checkpoints']:,} checkpoints, {len(dump.leases):,} leases"
    )


def draw(dump: Dump) -> Iterator[str]:
    """The tree, a line a node: tokens, pages, the state at its end, pins."""
    for salt, roots in dump.salts.items():
        yield f"salt {salt or '(none)'}" + (
            f"  ... {dump.hidden[salt]:,} more" if salt in dump.hidden else ""
        )
        left = [(root, "", root is roots[-1]) for root in reversed(roots)]
        while left:
            node, indent, last = left.pop()
            yield f"{indent}{'└─ ' if last else '├─ '}{describe(node)}"
            below = indent + ("   " if last else "│  ")
            if node.hidden:
                yield f"{below}{'├' if node.children else '└'}─ ... {node.hidden:,} more"
            left += [(child, below, child is node.children[-1]) for child in reversed(node.children)]
    yield from (describe_lease(lease) for lease in dump.leases)


def describe(node: Node) -> str:
    parts = [f"[{node.begin:,}, {node.depth:,})", _count(node.pages, "page")]
    parts += checkpoint_words(node.checkpoint) if node.checkpoint else []
    if node.pins:
        parts.append(_count(node.pins, "pin"))
    parts += [f"{name} {value}" for name, value in node.more.items()]
    return "  ".join(parts)


def checkpoint_words(held: Checkpoint) -> list[str]:
    """What a state is and what it is worth."""
    parts = [f"* {held.kind}", f"slot {held.slot}"]
    if held.tail is not None:
        parts.append(f"tail {held.tail}")
    parts.append(f"tick {held.tick}")
    if held.superseded:
        parts.append("superseded")
    if held.worth is not None:
        parts.append(f"worth {held.worth:.3g}")
    if held.leaves is not None:
        parts.append(f"leaves {ordinal(held.leaves)}")
    if held.pinned:
        parts.append("pinned")
    return parts


def describe_lease(lease: dict[str, Any]) -> str:
    words = [f"lease {lease['lease']}:"]
    words += [f"{name} {lease[name]:,}" for name in ("prompt", "start", "committed", "computed", "boundary")]
    words.append(f"live slot {lease['live']}, {len(lease['pages']):,} pages, {lease['own_pages']:,} its own")
    return "  ".join(words) + "".join(f"  {flag}" for flag in ("resting", "fresh") if lease.get(flag))


def ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}" + {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
