"""Measure aiojob against its peers: ``python -m benchmarks --help``.

The exit status is 0 if all targets were met, 1 if some were missed, and 2 if a row failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .measure import LOOPS, ROOT
from .results import OURS, UNITS, Report, Result, Target, three_figures
from .suites import SUITES, rows_of

PACKAGES = ("greenlet", "uvloop", "sqlalchemy", "awaitlet", "greenback")


def main() -> int:
    options = parse()
    report = Report(environment(), options.effort)
    total = sum(
        len(rows_of(suite, loop, options.groups)) for suite in SUITES for loop in options.loop
    )
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[row]}"),
    )
    # Seldom drawn, as it takes time from what is measured.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task("", total=total, row="")
        for loop in options.loop:
            for suite in SUITES:
                for line in measured(suite, loop, options.effort, options.groups):
                    if "begun" in line:
                        progress.update(task, row=f"{loop}: {line['begun']}")
                    else:
                        progress.advance(task)
                    if "result" in line:
                        report.results.append(Result.from_json(line["result"]))
                    if "error" in line:
                        report.errors.append(line["error"])
    show(report)
    if options.json is not None:
        options.json.write_text(report.to_json())
    return report.exit_status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    groups = list(dict.fromkeys(row.group for rows in SUITES.values() for row in rows()))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)}; tls: all that begin so"
    )
    parser.add_argument("--loop", action="append", choices=LOOPS, help="default: both")
    effort = parser.add_mutually_exclusive_group()
    effort.set_defaults(effort="full")
    for name, help_ in (
        ("quick", "fewer rounds: all ends within five minutes"),
        ("smoke", "each row once, with next to nothing to do: the figures mean nothing"),
    ):
        effort.add_argument(
            f"--{name}", action="store_const", const=name, dest="effort", help=help_
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    asked = options.groups or groups
    options.groups = [group for group in groups if {group, group.partition("-")[0]} & set(asked)]
    known = {*groups, *(group.partition("-")[0] for group in groups)}
    if unknown := set(asked) - known:
        parser.error(f"unknown groups: {', '.join(sorted(unknown))}")
    options.loop = options.loop or list(LOOPS)
    return options


def measured(suite: str, loop: str, effort: str, groups: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure a suite in a process of its own, and yield what it says."""
    if not rows_of(suite, loop, groups):
        return
    command = [sys.executable, "-m", "benchmarks.suites", suite, loop, effort, *groups]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        yield {"error": f"{' '.join(command)} ended with status {process.returncode}"}


def show(report: Report) -> None:
    """Print a table of the ratios, with the target beside each, and what was missed."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    table = Table(title=title, caption="best round (~ median) and quartiles")
    for column in ("loop", "what", "aiojob", "peer", "peer's", "ratio", "target", ""):
        table.add_column(column, justify="right" if column in {"ratio", "target"} else "left")
    for result in report.results:
        for number, comparison in enumerate(result.comparisons):
            is_ratio = comparison.peer != OURS
            unit = UNITS[result.unit]
            verdict = "[red]MISSED" if comparison.is_missed else "met" if comparison.target else ""
            table.add_row(
                "" if number else result.loop,
                "" if number else result.title,
                "" if number else shown(result, OURS),
                comparison.peer if is_ratio else "",
                shown(result, comparison.peer) if is_ratio else "",
                f"{comparison.value:.3f}" if is_ratio else unit.shown(comparison.value),
                target_shown(comparison.target, result, is_ratio),
                verdict,
            )
    console.print(table)
    for error in report.errors:
        console.print(error, markup=False, highlight=False)
    console.print(report.summary, highlight=False)


def shown(result: Result, who: str) -> str:
    figure, judged = result.figures[who], result.judged_figure(who)
    size, name = UNITS[result.unit].scale(judged)
    lower, value, upper = (
        three_figures(some / size)
        for some in (figure.lower_quartile, judged, figure.upper_quartile)
    )
    mark = "~" if result.judged == "median" else ""
    return f"{mark}{value} ({lower}-{upper}) {name}"


def target_shown(target: Target | None, result: Result, is_ratio: bool) -> str:
    if target is None:
        return ""
    limit = f"{target.limit:g}" if is_ratio else UNITS[result.unit].shown(target.limit)
    return f"{target.bound} {limit}"


def environment() -> dict[str, Any]:
    return {
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
