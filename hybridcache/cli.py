"""The command line: `python -m hybridcache` and the console script `hybridcache`.

Owns which subcommands there are, the arguments of `demo` and `replay`, and the exit status: 0 every claim
holds (what was asked for fits), 1 one does not, 2 a wrong argument or a missing package. The work of a
subcommand lives in its own module; what needs torch or transformers is imported only when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import bench_command, show_command, size_command
from ._command import Status, add_json, output, show_rich, write

EXAMPLES = """examples:
  hybridcache size qwen3.5-397b --memory 8x141GB --tp 8 --weights float8_e4m3fn
  hybridcache replay agentic --memory 10GB,50GB --policy lru,default
  hybridcache show agentic:sessions=3,turns=4 --memory 10GB --svg tree.svg
  hybridcache bench --quick
  hybridcache demo
`hybridcache COMMAND --help` has more of them.
"""
DEMO_EXAMPLES = """examples:
  hybridcache demo                                    the whole conversation, about a minute
  hybridcache demo --turns 3 --first 2048             a short one
  hybridcache demo --out results --json results.json  keep the plot and all figures
"""
REPLAY_EXAMPLES = """examples:
  hybridcache replay agentic --memory 10GB,25GB,50GB --policy lru,default
  hybridcache replay roundrobin:sessions=8,seed=3 --memory 5GB --model qwen3-next-80b
  hybridcache replay trace.jsonl.gz --memory 10%,25%,50% --optimum --plot rates.png --json rates.json
  hybridcache replay think --memory 25GB --hints keep,expected_return

WORKLOAD is a file (this package's gzip JSON lines, or Mooncake's JSONL), or a generator with its arguments.
"""
PROFILE = {  # field of demo.Profile: what --help says, with its default
    "turns": "turns of the conversation (15)",
    "first": "tokens of the first prompt (16384)",
    "turn_tokens": "tokens that each later turn adds (256)",
    "generate": "of these, tokens that the model generates (32)",
    "chunk": "tokens of a prefill chunk (2048)",
    "threads": "torch threads, the same for every side (1)",
}


def parser() -> argparse.ArgumentParser:
    """All subcommands and their arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    about = "Prefix cache for hybrid language models."
    root = argparse.ArgumentParser("hybridcache", description=about, epilog=EXAMPLES, formatter_class=layout)
    commands = root.add_subparsers(required=True, metavar="COMMAND", dest="command")
    about = "an agent conversation through a tiny Qwen3.5 on CPU: cold, cached, and compared bit for bit"
    demo = commands.add_parser(
        "demo", help=about, description=about, epilog=DEMO_EXAMPLES, formatter_class=layout
    )
    for field, text in PROFILE.items():
        demo.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help=text)
    demo.add_argument("--dtype", help="of weights and KV: float32 or bfloat16 (float32)")
    demo.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of demo.png (this one)")
    demo.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write rows, machine and summary; no PATH, or -: to standard output",
    )
    demo.set_defaults(run=_demo)
    _add_replay(commands)
    for module in (size_command, show_command, bench_command):
        module.add_parser(commands).set_defaults(run=_light(module.main))
    return root


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "a trace through the cache, without tensors: hit rates of policies at memory budgets"
    layout = argparse.RawDescriptionHelpFormatter
    replay = commands.add_parser(
        "replay", help=about, description=about, epilog=REPLAY_EXAMPLES, formatter_class=layout
    )
    add = replay.add_argument
    add("workload", metavar="WORKLOAD", help="a file, or a generator such as agentic:seed=1,sessions=32")
    add("--model", default="qwen3.5-397b", help="a preset's name, or a config.json (qwen3.5-397b)")
    add("--page-size", type=int, default=64, metavar="N", help="tokens of a page (64)")
    add(
        "--tp-size", type=int, default=1, metavar="N", help="ranks that share the model; bytes are one rank's"
    )
    add(
        "--memory",
        required=True,
        metavar="LIST",
        help="budgets: 16GB, 8GiB, or 25%% of the working set",
    )
    add(
        "--working-set",
        type=float,
        metavar="GB",
        help="smallest cache that could take every hit (computed)",
    )
    add("--optimum", action="store_true", help="and what an all-knowing policy could hit: seconds a budget")
    add(
        "--policy",
        default="default",
        metavar="LIST",
        help="policies of HybridCache, or all; default-flow: the default without a part (default)",
    )
    add("--in-flight", default="free", help="free: running requests are not charged to the budget; charged")
    add("--inner-checkpoints", action=argparse.BooleanOptionalAction, default=True, help="else passes (yes)")
    add("--hints", default="", metavar="LIST", help="keep,expected_return,breakpoints: with and without them")
    add("--last-unread", action="store_true", help="the last sampled token of an output is not read")
    add("--concurrency", type=int, default=0, metavar="N", help="requests at once; 0: in file order, no time")
    add("--prefill-rate", type=float, default=10_000, metavar="X", help="tokens a second of one (10000)")
    add("--decode-rate", type=float, default=50, metavar="X", help="tokens a second of one (50)")
    add("--arrivals", default="closed", help="closed: users wait for answers; open: at the trace's times")
    add("--limit", type=int, metavar="N", help="only the first N requests")
    add("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    add("--progress", action="store_true", help="on standard error, even where that is no terminal")
    add("--plot", type=Path, metavar="FILE", help="hit rate against budget; needs matplotlib")
    add_json(add, "all figures")
    add("--save", type=Path, metavar="FILE", help="write the workload, gzip JSON lines")
    replay.set_defaults(run=_replay)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (argparse itself exits with 2)."""
    root = parser()
    if not (sys.argv[1:] if argv is None else argv):
        root.print_help(sys.stderr)
        return 2
    args = root.parse_args(argv)
    status: int = args.run(args)
    return status


def _demo(args: argparse.Namespace) -> int:
    try:
        with Status("loading torch and transformers"):
            from . import demo, demo_report
    except ImportError as error:
        print(f"hybridcache demo needs pip install 'hybrid-prefix-cache[hf,cli]': {error}", file=sys.stderr)
        return 2
    try:
        fields = {field: getattr(args, field) for field in (*PROFILE, "dtype")}
        profile = demo.Profile(**{field: value for field, value in fields.items() if value is not None})
        args.out.mkdir(parents=True, exist_ok=True)
        if args.json not in (None, "-"):  # before the run, not after it
            Path(args.json).open("a", encoding="utf-8").close()
    except (ValueError, OSError) as error:
        print(f"hybridcache demo: {error}", file=sys.stderr)
        return 2
    out = output(args.json)
    with demo.engine(profile):
        run = demo.Demo(profile)
        print(demo_report.opening(run), file=out, flush=True)
        for _ in range(profile.turns):
            print(demo_report.progress(run.turn(), profile.turns), file=out, flush=True)
    print(file=out)
    if out.isatty() and show_rich(demo_report.cells(run.rows), out):
        print(*demo_report.notes(run.rows), sep="\n", file=out)
    else:
        print(demo_report.table(run.rows), end="\n\n", file=out)
    print(demo_report.summary(run), file=out)
    drawn = demo_report.plot(run.rows, args.out / "demo.png")
    print("plot: demo.png" if drawn else "no plot: it needs pip install matplotlib", file=out)
    if args.json:
        write(args.json, json.dumps(demo_report.as_json(run), indent=2))
    return 0 if all(row.ok for row in run.rows) else 1


def _replay(args: argparse.Namespace) -> int:
    from . import replay_command

    return _light(replay_command.main)(args)


def _light(main: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that raises ValueError for a wrong argument, and needs no package that may be missing."""

    def run(args: argparse.Namespace) -> int:
        try:
            return main(args)
        except BrokenPipeError:  # whoever read has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes what is left
            return 0
        except (ValueError, TypeError, OSError) as error:
            print(f"hybridcache {args.command}: {error}", file=sys.stderr)
            return 2

    return run
