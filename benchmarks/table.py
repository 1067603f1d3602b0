"""Print the README's table of results: ``python -m benchmarks.table docs/benchmarks-*.json``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .results import OURS, UNITS, Comparison, Report, Result, Target

Line = tuple[str, str, str]
"""What is measured, against what, and the target."""


def table(reports: Sequence[Report]) -> str:
    """Return a table in Markdown: a line for each target, a column for each Python and loop."""
    cells: dict[Line, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for report in reports:
        python = ".".join(report.environment["Python"].split(".")[:2])
        for result in report.results:
            column = f"{python} {result.loop}"
            columns[column] = None
            for comparison in result.comparisons:
                if comparison.target is not None:
                    line = line_of(result, comparison, comparison.target)
                    cells.setdefault(line, {})[column] = cell(result, comparison)
    lines = [["what", "against", "target", *columns], ["---"] * (3 + len(columns))]
    lines += [
        [*line, *(some.get(column, "") for column in columns)] for line, some in cells.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def line_of(result: Result, comparison: Comparison, target: Target) -> Line:
    against = "" if comparison.peer == OURS else comparison.peer
    limit = f"{target.limit:g}" if against else UNITS[result.unit].shown(target.limit)
    return result.title, against, f"{target.bound} {limit}"


def cell(result: Result, comparison: Comparison) -> str:
    value = comparison.value
    shown = UNITS[result.unit].shown(value) if comparison.peer == OURS else f"{value:.2f}"
    return f"**{shown}**" if comparison.is_missed else shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files: list[Path] = parser.parse_args().files
    print(table([Report.from_json(file.read_text()) for file in files]))


if __name__ == "__main__":
    main()
