"""`hybridcache show`: a dump is read as the cache is, and every node of it is drawn."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hybridcache import cli, tree_svg, tree_view
from hybridcache.replay import Replay
from tests.conftest import Driver, tokens


def grown(policy: str = "default", **options: Any) -> Driver:
    """Several salts, branches, content, an open lease, a resting one and a pin."""
    driver = Driver(policy=policy, slabs=80, **options)
    trunk = tokens(30)
    driver.turn(trunk, tokens(3, seed=3))
    for seed in range(4):
        driver.turn(np.append(trunk[:20], tokens(9, seed=seed + 10)), tokens(2, seed=seed), chunk=11)
    driver.turn(np.append(trunk[:13], tokens(9, seed=9)), salt=b"\x01a", breakpoints=[5])
    driver.turn(trunk[:9], salt=b"image", content_keys=[(4, b"cat")])
    driver.turn(trunk[:9], salt=b"image", content_keys=[(4, b"dog")])
    lease = driver.cache.reserve(np.append(trunk[:20], tokens(13, seed=4)))
    assert lease is not None
    driver.prefill(lease, chunk=7)
    driver.lease, driver.pin = lease, driver.cache.pin(trunk)
    return driver


@pytest.mark.parametrize("policy", ["default", "supersede", "lru", "gdsf", "marconi"])
def test_a_dump_is_read_as_the_cache_is(policy: str) -> None:
    driver = grown(policy)
    dump, stats = tree_view.read(driver.cache.dump()), driver.cache.stats()
    nodes = list(dump.walk())
    held = [node.checkpoint for node in nodes if node.checkpoint]
    assert len(nodes) == stats["nodes"] - len(dump.salts)  # a root is none
    assert len(held) == stats["checkpoints"] == dump.arena["checkpoints"]
    assert len({each.slot for each in held}) == len(held)
    assert dump.arena["taken_pages"] == stats["taken_pages"]
    assert dump.arena["cached_bytes"] == stats["cached_bytes"]
    assert (dump.policy, dump.arena["total_bytes"]) == (policy, driver.cache.geometry.total_bytes)
    again = tree_view.from_json(json.loads(json.dumps(tree_view.as_json(dump))))
    assert tree_view.opening(again) == tree_view.opening(dump) and f"policy {policy}, " in tree_view.opening(
        dump
    )
    tails = {each.tail for each in held if each.tail is not None}
    assert (
        sum(node.pages for node in nodes)
        <= stats["tree_pages"]
        <= sum(node.pages for node in nodes) + len(tails)
    )
    assert sum(node.pins for node in nodes) == 2  # a lease's anchor, a pin
    assert set(dump.salts) == {"", b"\x01a".hex(), b"image".hex()}
    for node in nodes:
        assert all(child.begin == node.depth for child in node.children) and not node.more
        assert len(node.tokens) == min(node.depth - node.begin, 8)
    for kind in {each.kind for each in held}:
        assert sum(each.kind == kind for each in held) == stats[f"held_{kind}"]
    (lease,) = dump.leases
    assert (lease["prompt"], lease["committed"], lease["live"]) == (33, 33, driver.lease.live_slot)
    assert lease["pages"] == driver.lease.pages.tolist() and 0 < lease["own_pages"] < 8


def test_a_dump_with_transcripts_and_of_two_regions() -> None:
    driver = Driver(num_pages=11, num_slots=5, pages_per_slab=3)
    with driver.cache.transcript() as transcript:
        transcript.extend([1, 2, 3, 4, 5])
        driver.turn(transcript)
        dump = tree_view.read(driver.cache.dump())
    assert dump.arena["total_bytes"] == driver.cache.geometry.total_bytes
    assert sum(node.checkpoint is not None for node in dump.walk()) == dump.arena["checkpoints"] > 0


def test_edges_and_checkpoints_are_where_a_match_finds_them() -> None:
    driver = grown()
    dump = tree_view.read(driver.cache.dump())
    for salt, roots in dump.salts.items():
        if salt == b"image".hex():
            assert any(token < 0 for root in roots for node in root.walk() for token in node.tokens)
            continue
        paths = [(root, root.tokens) for root in roots if len(root.tokens) == root.depth]
        while paths:
            node, path = paths.pop()
            found = driver.cache.match([*path, 2**31 - 1], salt=bytes.fromhex(salt))
            assert found.kv_length == node.depth
            assert (found.length == node.depth) is (node.checkpoint is not None)
            paths += [
                (child, path + child.tokens)
                for child in node.children
                if len(child.tokens) == child.depth - child.begin
            ]


def test_what_is_said_to_leave_first_does() -> None:
    driver, seen = grown(), 0
    for number in range(200):
        before = tree_view.read(driver.cache.dump())
        placed = {node.checkpoint.leaves: node.checkpoint for node in before.walk() if node.checkpoint}
        placed.pop(None, None)  # pinned
        assert sorted(placed) == list(range(1, len(placed) + 1))
        worths = [placed[place].worth for place in sorted(placed)]
        assert worths == sorted(worths)
        assert driver.cache.reserve([number]) is not None
        after = {
            node.checkpoint.slot for node in tree_view.read(driver.cache.dump()).walk() if node.checkpoint
        }
        gone = {each.slot for each in placed.values()} - after
        assert not gone or placed[1].slot in gone
        seen += len(gone)
        if seen == 5:
            break
    assert seen == 5


def test_leases_that_rest_and_words_of_a_later_version() -> None:
    driver = Driver(run_ahead=1)
    lease, other = driver.cache.reserve(tokens(9)), driver.cache.reserve(tokens(8, seed=1))
    assert lease is not None and other is not None
    lease.launch(9), other.launch(8)
    driver.apply()
    lease.close()
    text = driver.cache.dump()
    assert [each.get("resting") for each in tree_view.read(text).leases] == [1, None]
    assert "  resting" in "\n".join(tree_view.draw(tree_view.read(text)))
    later = grown().cache.dump().replace(" pins 1", " pins 1 colour 7").replace(" tick", " uses 5 tick")
    dump = tree_view.read(later)
    pinned = next(node for node in dump.walk() if node.pins)
    assert pinned.more["colour"] == 7 and "colour 7" in tree_view.describe(pinned)
    assert all(node.more["uses"] == 5 for node in dump.walk() if node.checkpoint)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "pages 1 of 2 taken", "{}", "salt", "    [0, 4) pages 1", "lease 1 start"],
)
def test_what_is_no_dump_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a dump of a cache"):
        tree_view.read(text)


def test_a_line_that_is_no_node_is_named() -> None:
    text = grown().cache.dump()
    lines = text.splitlines()
    for wrong in (
        "    [0, 4 tokens",
        "    [0, 4) tokens 1 pages",
        "    [0, 4) tokens 1 pages 1 * cut slot x",
    ):
        with pytest.raises(ValueError, match=r"^line 3: "):
            tree_view.read("\n".join([*lines[:2], wrong, *lines[3:]]))


def test_json_holds_all_of_it() -> None:
    dump = tree_view.read(grown().cache.dump())
    assert tree_view.from_json(json.loads(json.dumps(tree_view.as_json(dump)))) == dump
    for wrong in ({}, {"arena": {}}, {"arena": {}, "salts": [], "leases": [], "nodes": [{"begin": 1}]}):
        with pytest.raises(ValueError, match="expected what hybridcache show --json writes"):
            tree_view.from_json(wrong)


# --- drawing ---


def test_the_text_has_a_line_for_each_node_below_its_parent() -> None:
    dump = tree_view.read(grown().cache.dump())
    lines = list(tree_view.draw(dump))
    drawn = [
        (line.index("["), tree_view.describe(node))
        for line, node in zip(nodes_of(lines), dump.walk(), strict=True)
    ]
    for line, (_, words) in zip(nodes_of(lines), drawn, strict=True):
        assert line.endswith(words) and "─ [" in line
    columns = {id(node): column for (column, _), node in zip(drawn, dump.walk(), strict=True)}
    for node in dump.walk():
        assert all(columns[id(child)] == columns[id(node)] + 3 for child in node.children)
    assert lines[0] == "salt (none)" and lines[-1].startswith("lease ")
    assert any("leaves 1st" in line for line in lines) and any("pinned" in line for line in lines)


def nodes_of(lines: list[str]) -> list[str]:
    return [line for line in lines if "─ [" in line]


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_of_many_nodes_those_are_drawn_below_which_most_is(limit: int) -> None:
    whole = tree_view.read(grown().cache.dump())
    total = sum(1 for _ in whole.walk())
    first = max(
        (root for roots in whole.salts.values() for root in roots),
        key=lambda root: sum(n.pages for n in root.walk()),
    )
    dump = tree_view.choose(tree_view.read(grown().cache.dump()), limit)
    shown = list(dump.walk())
    assert len(shown) == min(limit, total)
    assert len(shown) + sum(node.hidden for node in shown) + sum(dump.hidden.values()) == total
    assert shown[0].tokens == first.tokens
    more = [int(n) for line in tree_view.draw(dump) for n in re.findall(r"\.\.\. (\d+) more", line)]
    assert sum(more) == total - len(shown)
    if limit < total:
        assert f"{total - len(shown)}" and sum(
            map(int, re.findall(r"(\d+) more", tree_svg.svg(dump, "", "")))
        ) == sum(more)


def boxes(text: str) -> tuple[ElementTree.Element, list[tuple[float, float, float, float]]]:
    root = ElementTree.fromstring(text)
    groups = [group.find("{*}rect") for group in root.iter("{http://www.w3.org/2000/svg}g")]
    found = [tuple(float(box.get(name)) for name in ("x", "y", "width", "height")) for box in groups]
    return root, found


def test_the_svg_has_a_box_for_each_node_and_none_covers_another() -> None:
    dump = tree_view.read(grown().cache.dump())
    root, found = boxes(tree_svg.svg(dump, "a <title> & more", "head"))
    nodes = list(dump.walk())
    assert len(found) == len(nodes)
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in combinations(found, 2):
        apart = x + width <= other_x or other_x + other_width <= x
        assert apart or y + height <= other_y or other_y + other_height <= y
    assert max(x + width for x, _, width, _ in found) <= float(root.get("width"))
    assert max(y + height for _, y, _, height in found) <= float(root.get("height"))
    places = dict(zip(map(id, nodes), found, strict=True))
    for node in nodes:
        x, y, width, _ = places[id(node)]
        assert all(places[id(child)][0] > x + width and places[id(child)][1] >= y for child in node.children)
    titles = [each.text for each in root.iter("{http://www.w3.org/2000/svg}title")]
    for node, title in zip(nodes, titles, strict=True):
        assert f"pages {node.pages:,}, pins {node.pins}" in title
        if node.checkpoint:
            assert f"slot {node.checkpoint.slot}" in title and f"tick {node.checkpoint.tick}" in title
            assert node.checkpoint.worth is None or f"worth {node.checkpoint.worth:.3g}" in title
    written = " ".join(each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text"))
    for words in ("a <title> & more", "leaves 1st", "salt 0161", "pinned", "lease "):
        assert words in written
    links = root.findall("{http://www.w3.org/2000/svg}path")
    assert len(links) == sum(len(node.children) for node in nodes)


def test_the_text_of_a_box_lies_in_it() -> None:
    root, found = boxes(tree_svg.svg(tree_view.read(grown().cache.dump()), "", ""))
    groups = list(root.iter("{http://www.w3.org/2000/svg}g"))
    for group, (x, y, width, height) in zip(groups, found, strict=True):
        lines = group.findall("{*}text")
        for line in lines:
            assert x < float(line.get("x")) and float(line.get("x")) + 6.0 * len(line.text) <= x + width
            assert y < float(line.get("y")) < y + height
        assert all(float(b.get("y")) - float(a.get("y")) >= 12 for a, b in pairwise(lines))


def test_a_chain_of_thousands_of_nodes() -> None:
    """Deeper than Python's stack."""
    text = "pages 0 of 1 taken, slots 1 of 1, free slabs 0, checkpoints 0\nsalt ''\n"
    depth = sys.getrecursionlimit() + 500
    text += "\n".join(f"{'  ' * (at + 2)}[{at}, {at + 1}) tokens {at} pages 1" for at in range(depth))
    dump = tree_view.read(text)
    assert sum(1 for _ in dump.walk()) == depth == len(nodes_of(list(tree_view.draw(dump))))
    assert len(tree_view.as_json(dump)["nodes"]) == depth
    picture = tree_svg.svg(tree_view.choose(dump, 200), "", "")
    assert len(boxes(picture)[1]) == 200 == picture.count(">no state<")


# --- the command ---


def test_the_command_on_a_dump(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, tree, picture = tmp_path / "dump.txt", tmp_path / "tree.json", tmp_path / "tree.svg"
    source.write_text(grown().cache.dump())
    assert cli.main(["show", str(source), "--json", str(tree), "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    dump = tree_view.read(source.read_text())
    assert out.startswith("dump.txt\n" + tree_view.opening(dump)) and "svg: tree.svg" in out
    assert (
        len(nodes_of(out.splitlines())) == len(boxes(picture.read_text())[1]) == sum(1 for _ in dump.walk())
    )
    assert cli.main(["show", str(tree), "--json", "-", "--limit", "2"]) == 0
    again = capsys.readouterr()
    assert (
        json.loads(again.out) == json.loads(tree.read_text()) and len(nodes_of(again.err.splitlines())) == 2
    )


def test_the_command_on_a_replay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(Replay, "finish", lambda self, seconds: kept.append(self.cache.dump()))
    arguments = ["show", "agentic:sessions=3,turns=4", "--memory", "4GB", "--json", "-"]
    assert cli.main([*arguments, "--after", "7", "--policy", "lru", "--model", "qwen3-next-80b"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == tree_view.as_json(tree_view.read(kept[0]))
    assert out.err.startswith("agentic after 7 requests: lru at 4GB, ") and "% hit" in out.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.txt"], "source: 'nothing.txt', expected a file with a dump"),
        (["agentic"], "to replay a workload give --memory"),
        (["other.txt"], "source: other.txt: line 1: 'hello'"),
        (["other.json"], "source: other.json: "),
        (["agentic", "--memory", "4"], "memory: '4'"),
        (["agentic", "--memory", "4GB", "--policy", "best"], "policy: 'best'"),
        (["agentic", "--memory", "4GB", "--after", "0"], "after: 0"),
        (["agentic", "--memory", "4GB", "--model", "gpt"], "model: 'gpt'"),
        (["agentic", "--memory", "4GB", "--limit", "0"], "limit: 0"),
        (["other.txt", "--svg", "tree.png"], "expected a file of .svg"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("hello\n")
    Path("other.json").write_text('{"arena": {}}')
    assert cli.main(["show", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hybridcache show: ") and message in error, error


def test_ordinals() -> None:
    assert [tree_view.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 21, 113, 122)] == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "11th",
        "12th",
        "21st",
        "113th",
        "122nd",
    ]
