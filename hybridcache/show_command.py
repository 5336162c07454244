"""`hybridcache show`: the tree of a dump, or of a replay, as text, JSON or SVG.

Owns the arguments, and where the tree comes from. Reading and text are `tree_view`'s, the SVG `tree_svg`'s, a
replay `replay`'s. ValueError names an argument that is wrong.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from hybridcache import tree_svg, tree_view
from hybridcache._command import Status, add_json, check_targets, output, read_bytes, read_model, write

EXAMPLES = """examples:
  hybridcache show dump.txt --svg tree.svg      what Path("dump.txt").write_text(cache.dump()) wrote
  hybridcache show agentic:sessions=3,turns=4 --memory 10GB --svg tree.svg
  hybridcache show trace.jsonl.gz --memory 25GB --policy lru --after 500 --limit 40 --json tree.json
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The arguments."""
    about = "the tree of a dump or of a replay: what its nodes hold and what they are worth"
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "show", help=about, description=about, epilog=EXAMPLES, formatter_class=layout
    )
    add = command.add_argument
    add("source", metavar="SOURCE", help="a dump (text, or JSON of this command); with --memory a workload")
    add("--memory", metavar="SIZE", help="replay SOURCE with this budget, and show the tree at its end")
    add("--policy", default="default", help="of the replay (default)")
    add("--model", default="qwen3.5-397b", help="of the replay: a preset, or a config.json (qwen3.5-397b)")
    add("--page-size", type=int, default=64, metavar="N", help="of the replay: tokens of a page (64)")
    add("--after", type=int, metavar="N", help="of the replay: only the first N requests")
    add("--limit", type=int, default=100, metavar="N", help="nodes drawn, those below which most is (100)")
    add("--svg", type=Path, metavar="FILE", help="draw it")
    add_json(add, "the tree, whole")
    return command


def main(args: argparse.Namespace) -> int:
    """Shows and writes; 0."""
    if args.limit < 1:
        raise ValueError(f"limit: {args.limit}, expected at least 1")
    check_targets(args.json, args.svg, plots=(".svg",))
    if args.memory is None:
        title, dump = Path(args.source).name, read_dump(args.source)
    else:
        title, dump = replayed(args)
    out = output(args.json)
    head = tree_view.opening(dump)
    print(title, head, "", sep="\n", file=out)
    if args.json:
        write(args.json, json.dumps(tree_view.as_json(dump), indent=2))
    chosen = tree_view.choose(dump, args.limit)
    for line in tree_view.draw(chosen):
        print(line, file=out)
    if args.svg:
        args.svg.write_text(tree_svg.svg(chosen, title, head), encoding="utf-8")
        print(f"\nsvg: {args.svg.name}", file=out)
    return 0


def read_dump(source: str) -> tree_view.Dump:
    """A file: the text of `HybridCache.dump()`, or the JSON of this command."""
    if not Path(source).is_file():
        raise ValueError(
            f"source: {source!r}, expected a file with a dump; to replay a workload give --memory"
        )
    try:
        text = Path(source).read_text(encoding="utf-8")
        return tree_view.from_json(json.loads(text)) if text.startswith("{") else tree_view.read(text)
    except ValueError as error:
        raise ValueError(f"source: {Path(source).name}: {error}") from None


def replayed(args: argparse.Namespace) -> tuple[str, tree_view.Dump]:
    """What was replayed, and the tree at its end."""
    from hybridcache.foresight import Foresight
    from hybridcache.replay import Cell, Replay
    from hybridcache.replay_command import check_policy, read_workload
    from hybridcache.replay_values import Settings

    workload, budget = read_workload(args.source), read_bytes("memory", args.memory)
    check_policy(args.policy)
    if args.after is not None:
        if args.after < 1:
            raise ValueError(f"after: {args.after}, expected at least 1")
        workload = replace(workload, requests=workload.requests[: args.after])
    layout = read_model(args.model, page_size=args.page_size)
    settings = Settings()
    facts, cell = Foresight(workload, settings.read_all), Cell(budget, args.policy, settings)
    with Status("what could be hit") as status:

        def progress(done: int, of: int) -> None:
            status.say(f"{done:,} of {of:,} requests replayed")

        replay = Replay(facts, layout, cell, {}, progress)
        result = replay.run()
    title = (
        f"{workload.name} after {len(workload):,} requests: {args.policy} at {args.memory}, "
        f"{100 * result.hit_rate:.1f} % hit"
    )
    return title, tree_view.read(replay.cache.dump())
