"""The command line: `python -m hybridcache` and the console script `hybridcache`.

Owns the arguments and where output goes; the work of a subcommand lives in its own module, which is imported
only when it runs: `--help` needs neither torch nor transformers. Exit status: 0 every claim holds, 1 one does
not, 2 a wrong argument or a missing package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  hybridcache demo                                    the whole conversation, about a minute
  hybridcache demo --turns 3 --first 2048             a short one
  hybridcache demo --out results --json results.json  keep the plot and all figures
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
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    about = "an agent conversation through a tiny Qwen3.5 on CPU: cold, cached, and compared bit for bit"
    demo = commands.add_parser("demo", help=about, description=about, epilog=EXAMPLES, formatter_class=layout)
    for field, text in PROFILE.items():
        demo.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help=text)
    demo.add_argument("--dtype", help="of weights and KV: float32 or bfloat16 (float32)")
    demo.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of demo.png (this one)")
    demo.add_argument("--json", metavar="PATH", help="write rows, machine and summary; - is standard output")
    demo.set_defaults(run=_demo)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (argparse itself exits with 2)."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _demo(args: argparse.Namespace) -> int:
    try:
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
    out = sys.stderr if args.json == "-" else sys.stdout
    with demo.engine(profile):
        run = demo.Demo(profile)
        print(demo_report.opening(run), file=out, flush=True)
        for _ in range(profile.turns):
            print(demo_report.progress(run.turn(), profile.turns), file=out, flush=True)
    print("", demo_report.table(run.rows), "", demo_report.summary(run), sep="\n", file=out)
    drawn = demo_report.plot(run.rows, args.out / "demo.png")
    print("plot: demo.png" if drawn else "no plot: it needs pip install matplotlib", file=out)
    if args.json:
        _write(args.json, json.dumps(demo_report.as_json(run), indent=2))
    return 0 if all(row.ok for row in run.rows) else 1


def _write(target: str, text: str) -> None:
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")
