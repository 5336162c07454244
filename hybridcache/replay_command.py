"""`hybridcache replay`: from the arguments of the command line to cells, from their results to the output.

Owns the reading of arguments that argparse does not check (sizes, lists, workloads, models). What runs is
`replay`'s, how it is shown `replay_report`'s. ValueError names an argument that is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from hybridcache import cache, replay_report
from hybridcache._arguments import parts_off
from hybridcache._command import (
    GB,
    UNITS,
    Status,
    check_targets,
    output,
    read_model,
    show_table,
    split,
    write,
)
from hybridcache.config import ModelLayout
from hybridcache.optimum import Bounds, optimum, working_set
from hybridcache.replay import Cell, run_cells
from hybridcache.replay_values import Result, Settings
from hybridcache.workloads import GENERATORS, Workload, load


def main(args: argparse.Namespace) -> int:
    """Replays, prints and writes; the exit status."""
    with busy(args, f"reading {Path(args.workload).name}"):
        workload = read_workload(args.workload)
    if args.limit is not None:
        workload = replace(workload, requests=workload.requests[: args.limit])
    layout = read_model(args.model, page_size=args.page_size, tp_size=args.tp_size)
    asked = [(request.input, request.output) for request in workload.requests]
    weights = {"unit": workload.unit, "page_size": args.page_size}
    if "%" in args.memory and args.working_set is None:
        with busy(args, "how large a cache could take every hit"):
            needed = working_set(asked, layout.kv_bytes_per_token, layout.state_bytes, **weights)
        args.working_set = needed / GB
    cells = read_cells(args)
    if args.jobs < 1:
        raise ValueError(f"jobs: {args.jobs}, expected at least 1")
    check_targets(args.json, args.plot)
    if args.save:
        workload.save(args.save)
    out = output(args.json)
    print(replay_report.opening(workload, described(args, layout)), file=out, flush=True)
    results = collect(workload, layout, cells, args)
    bounds: list[Bounds] = []
    if args.optimum:
        budgets = sorted({cell.budget_bytes for cell in cells})
        with busy(args, "what an all-knowing policy could hit"):
            bounds = optimum(asked, layout.kv_bytes_per_token, layout.state_bytes, budgets, **weights)
    show(results, bounds, args, out)
    if args.json:
        model = {"name": args.model, "page_size": args.page_size, "tp_size": args.tp_size}
        model |= {"kv_bytes_per_token": layout.kv_bytes_per_token, "slot_bytes": layout.slot_bytes}
        figures = replay_report.as_json(workload, model, results, working_set=args.working_set)
        figures["optimum"] = [replay_report.bounds_as_json(each) for each in bounds]
        write(args.json, json.dumps(figures, indent=2))
    return 0


def described(args: argparse.Namespace, layout: ModelLayout) -> str:
    return (
        f"{args.model}, pages of {args.page_size} tokens, {layout.kv_bytes_per_token:,} bytes of KV a token, "
        f"a state {layout.slot_bytes:,}"
    )


def show(results: list[Result], bounds: list[Bounds], args: argparse.Namespace, out: TextIO) -> None:
    """Tables and plot."""
    tables = replay_report.tables(results, working_set=args.working_set)
    if bounds:
        tables.append(("", replay_report.optimum_table(bounds)))
    for title, rows in tables:
        print(file=out)
        show_table(rows, out, title=title)
    if args.plot:
        drawn = replay_report.plot(results, args.plot)
        print(
            f"\nplot: {args.plot.name}" if drawn else "\nno plot: it needs pip install matplotlib", file=out
        )


def busy(args: argparse.Namespace, text: str) -> Status:
    """Progress, where somebody sees it."""
    return Status(text, shown=args.progress or None)


def collect(
    workload: Workload, layout: ModelLayout, cells: list[Cell], args: argparse.Namespace
) -> list[Result]:
    """Runs the cells, with progress."""
    results: list[Result] = []
    with busy(args, "what a cache without bounds would hit") as status:

        def progress(done: int, of: int) -> None:
            if args.jobs > 1:
                status.say(f"{done:,} of {of:,} cells")
                return
            cell = cells[min(len(results), len(cells) - 1)]
            where = f"{cell.policy} at {cell.budget_bytes / GB:.4g} GB"
            status.say(f"cell {len(results) + 1} of {len(cells)}, {where}: {done:,} of {of:,} requests")

        for result in run_cells(workload, layout, cells, jobs=args.jobs, progress=progress):
            results.append(result)
    return results


def read_cells(args: argparse.Namespace) -> list[Cell]:
    """A cell for each policy, budget and, where hints are asked for, without and with them."""
    policies = split(args.policy)
    if policies == ["all"]:
        policies = list(cache._POLICIES)
    for policy in policies:
        check_policy(policy)
    budgets = [read_size(text, args.working_set) for text in split(args.memory)]
    if not policies or not budgets:
        raise ValueError("policy, memory: expected at least one of each")
    plain = Settings(
        in_flight=args.in_flight,
        inner_checkpoints=args.inner_checkpoints,
        read_all=not args.last_unread,
        concurrency=args.concurrency,
        prefill_rate=args.prefill_rate,
        decode_rate=args.decode_rate,
        arrivals=args.arrivals,
    )
    variants = [plain]
    if args.hints:
        variants.append(replace(plain, hints=tuple(split(args.hints))))
    return [Cell(budget, policy, each) for budget in budgets for policy in policies for each in variants]


def check_policy(policy: str) -> None:
    name, *without = policy.split("-")
    if name not in cache._POLICIES:
        raise ValueError(f"policy: {policy!r}, expected some of {cache._POLICIES}")
    parts_off(without)


def read_size(text: str, whole: float | None = None) -> int:
    """Bytes: a number with a unit, or a share of the working set (GB)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[A-Za-z]+)", text)
    if found is None or found[2] not in (*UNITS, "%"):
        raise ValueError(f"memory: {text!r}, expected a size such as 16GB, 8GiB or 25%")
    number = float(found[1])
    if found[2] != "%":
        return round(number * UNITS[found[2]])
    if whole is None or not whole > 0:
        raise ValueError(f"memory: {text!r}, expected a working set (GB) beside a share of it")
    return int(number / 100 * whole * GB)


def read_workload(text: str) -> Workload:
    """A file, or `name` or `name:argument=number,...` of a generator."""
    name, _, arguments = text.partition(":")
    if Path(text).exists() or name not in GENERATORS:
        if not Path(text).is_file():
            raise ValueError(f"workload: {text!r}, expected a file or one of {', '.join(GENERATORS)}")
        return load(text)
    options: dict[str, Any] = {}
    for part in split(arguments):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = float(value) if "." in value else int(value)
        except ValueError:
            raise ValueError(f"workload: {part!r}, expected argument=number") from None
    try:
        return GENERATORS[name](**options)
    except TypeError as error:
        raise ValueError(f"workload: {text!r}: {error}") from None
