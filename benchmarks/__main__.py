"""Measure aiojob against its peers: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import ssl
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import jobs, scale
from .measure import LOOPS, Result, measure

ROUNDS, QUICK_ROUNDS = 200, 60


def main() -> int:
    options = parse()
    console = Console(stderr=True)
    results: dict[str, list[Result]] = {}
    with Progress(console=console) as progress:
        for loop in options.loop:
            results[loop] = [
                *measured(loop, options, progress),
                *scale.results(loop, options.quick, options.groups, progress),
            ]
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(report(results), indent=2) + "\n")
    return any(result.missed for some in results.values() for result in some)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    groups = [*dict.fromkeys(row.group for row in jobs.rows()), *scale.GROUPS]
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)}")
    parser.add_argument("--loop", action="append", choices=LOOPS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    options.groups = options.groups or groups
    if unknown := set(options.groups) - set(groups):
        parser.error(f"unknown groups: {', '.join(unknown)}")
    options.loop = options.loop or list(LOOPS)
    return options


def measured(loop: str, options: argparse.Namespace, progress: Progress) -> Iterator[Result]:
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    for row in jobs.rows():
        if row.group in options.groups:
            task = progress.add_task(f"{loop}: {row.name}", total=rounds)
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                yield runner.run(measure(row, rounds, lambda: progress.advance(task)))  # noqa: B023


def show(results: dict[str, list[Result]]) -> None:
    table = Table(title=" ".join(f"{name} {value}" for name, value in environment().items()))
    for column in ("loop", "what", "aiojob", "peer", "peer's", "ratio", "at most", ""):
        table.add_column(column, justify="right" if column in {"aiojob", "peer's"} else "left")
    for loop, some in results.items():
        for result in some:
            ours, *_ = result.figures
            for peer, ratio in result.ratios.items():
                target = result.targets.get(peer)
                met = "" if target is None else "met" if ratio <= target else "MISSED"
                table.add_row(
                    loop,
                    result.name,
                    result.shown(ours),
                    peer,
                    result.shown(peer),
                    f"{ratio:.3f}",
                    "" if target is None else f"{target:g}",
                    met,
                )
    Console(width=150).print(table)


def environment() -> dict[str, Any]:
    return {
        "Python": platform.python_version(),
        "greenlet": importlib.metadata.version("greenlet"),
        "uvloop": importlib.metadata.version("uvloop"),
        "SQLAlchemy": importlib.metadata.version("sqlalchemy"),
        "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
        "cores": os.cpu_count(),
    }


def report(results: dict[str, list[Result]]) -> dict[str, Any]:
    return {
        "environment": environment(),
        "results": {loop: [asdict(result) for result in some] for loop, some in results.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
