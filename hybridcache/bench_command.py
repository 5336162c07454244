"""`hybridcache bench`: runs the repository's benchmarks, a process each, and gathers their figures.

Owns the arguments, and where the checkout is found: benchmarks are not part of the wheel. What is measured,
and how, is `benchmarks/`'s matter. ValueError names an argument that is wrong, or says what to do where there
is no checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybridcache._command import add_json, check_targets, output, write

EXAMPLES = """examples:
  hybridcache bench --quick                      fewer sizes and repetitions
  hybridcache bench --json figures.json          minutes: all sizes
  hybridcache bench control_plane --json -       one of them, its figures on standard output

Run it in a checkout of the repository, or with the package installed from one (pip install --editable .).
"""
BENCHMARKS = {  # module of benchmarks/: what it measures
    "control_plane": "every call of a turn beside memcmp, and beside the peers that are set up",
    "data_plane": "moving states and pages; it needs CUDA, on a CPU only --quick",
}
SOURCE = Path(__file__).resolve().parent.parent


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The arguments."""
    about = "runs the repository's benchmarks: what the control plane and, on a GPU, the data plane cost"
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "bench", help=about, description=about, epilog=EXAMPLES, formatter_class=layout
    )
    add = command.add_argument
    known = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    add("names", nargs="*", metavar="NAME", help=f"{known} (all that this machine can run)")
    add("--quick", action="store_true", help="fewer sizes and repetitions")
    add_json(add, "all figures, by benchmark")
    return command


def main(args: argparse.Namespace) -> int:
    """Runs them one after the other; 0, or 1 if one broke off."""
    for name in args.names:
        if name not in BENCHMARKS:
            raise ValueError(f"name: {name!r}, expected one of {', '.join(BENCHMARKS)}")
    root = checkout()
    if "data_plane" in args.names and not args.quick and not has_cuda():
        raise ValueError("name: 'data_plane' found no CUDA device; expected one, or --quick")
    check_targets(args.json, None)
    out, figures, broken = output(args.json), dict[str, Any](), []
    names = args.names or [name for name in BENCHMARKS if name != "data_plane" or has_cuda()]
    for name in names:
        print(f"benchmarks.{name}: {BENCHMARKS[name]}", file=out, flush=True)
        found = run(name, root, quick=args.quick, to_stderr=out is sys.stderr)
        if found is None:
            broken.append(name)
        else:
            figures[name] = found
    for name in set(BENCHMARKS).difference(names) if not args.names else ():
        print(f"benchmarks.{name} was left out: torch finds no CUDA device here", file=out)
    if args.json:
        write(args.json, json.dumps(figures, indent=1))
    for name in broken:
        print(f"hybridcache bench: benchmarks.{name} broke off, see above", file=sys.stderr)
    return 1 if broken else 0


def checkout() -> Path:
    """The checkout that the package was imported from, or else the one around the working directory."""
    for folder in (SOURCE, *(Path.cwd() / "x").resolve().parents):
        if is_checkout(folder):
            return folder
    raise ValueError(
        "no checkout: the benchmarks are part of the repository, not of the installed package. Run this "
        "inside a checkout of it (where pyproject.toml and benchmarks/ are), or there: python -m "
        "benchmarks.control_plane"
    )


def is_checkout(folder: Path) -> bool:
    """Whether the benchmarks of this project lie in `folder`."""
    project, module = folder / "pyproject.toml", folder / "benchmarks" / "control_plane.py"
    return module.is_file() and project.is_file() and '"hybrid-prefix-cache"' in project.read_text("utf-8")


def has_cuda() -> bool:
    """Whether torch is there and finds a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def run(name: str, root: Path, *, quick: bool, to_stderr: bool) -> Any:
    """The figures of one benchmark, which prints its tables itself; None if it broke off."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(target)]
        command += ["--quick"] if quick else []
        # The process imports this very package, wherever it is installed.
        paths = [str(root), str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        printed = sys.stderr if to_stderr else None
        done = subprocess.run(command, cwd=root, env=environment, stdout=printed, check=False)
        return json.loads(target.read_text("utf-8")) if done.returncode == 0 else None
