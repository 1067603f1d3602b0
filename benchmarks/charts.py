"""Draw the charts of the README: ``python -m benchmarks.charts docs/benchmarks-3.13.json``.

Their background is transparent, and their colours are about as far from white as from black: one
file serves light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import jobs, offload, scale, tls
from .measure import ROOT
from .results import OURS, Report, Result

TEXT = "#727a85"
GRID = "#727a8540"
COLOURS = {
    OURS: "#e4572e",
    "offload_async": "#c98a12",
    "native": "#3f88c5",
    "sqlalchemy": "#3f88c5",
    "run_in_executor": "#3f88c5",
    "to_thread": "#8b6fc9",
    "awaitlet": "#8b949e",
    "greenback": "#8b949e",
}
LABELS = {
    "sqlalchemy": "SQLAlchemy",
    "to_thread": "asyncio.to_thread",
    "native": "the loop's own TLS server",
    "offload_async": "aiojob, offload_async",
}
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlecolor": TEXT,
    "axes.titlelocation": "left",
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "svg.hashsalt": "aiojob",  # the same file from the same figures
}
MICRO, MILLI = 1e6, 1e3


@dataclass(frozen=True)
class Chart:
    """A file, and what is drawn in it: a panel for each loop."""

    name: str
    title: str
    group: str
    row: str
    draw: Callable[[Axes, Sequence[Result]], None]
    room: float = 1.1
    """The height of the axes as a multiple of what is drawn, to have room for the legend."""

    def panels(self, results: Sequence[Result]) -> Mapping[str, Sequence[Result]]:
        """Return the results that it shows, by loop."""
        mine = [
            result for result in results if (result.group, result.name) == (self.group, self.row)
        ]
        return {loop: list(some) for loop, some in groupby(mine, lambda result: result.loop)}


def bars(axes: Axes, results: Sequence[Result]) -> None:
    """Draw a bar for each contender of a row, the cheapest at the top."""
    (result,) = results
    costs = sorted(
        (result.judged_figure(who) * MICRO, who) for who in result.figures if who in COLOURS
    )
    values = [cost for cost, _ in costs]
    names = [LABELS.get(who, who) for _, who in costs]
    drawn = axes.barh(names, values, color=[COLOURS[who] for _, who in costs], height=0.62)
    axes.bar_label(drawn, labels=[f"{value:.3g} µs" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.22)
    axes.xaxis.set_visible(False)
    axes.spines.bottom.set_visible(False)
    axes.spines.left.set_visible(False)
    emphasise(axes, names.index(OURS))


def emphasise(axes: Axes, number: int) -> None:
    label = axes.get_yticklabels()[number]
    label.set_color(COLOURS[OURS])
    label.set_fontweight("bold")


def lines(axes: Axes, results: Sequence[Result]) -> None:
    """Draw a line for each contender, by how many there are at a time."""
    in_order = sorted(results, key=lambda result: result.at_a_time or 0)
    numbers = [result.at_a_time or 0 for result in in_order]
    for who in in_order[0].figures:
        costs = [result.judged_figure(who) * MICRO for result in in_order]
        axes.plot(numbers, costs, "o-", color=COLOURS[who], label=LABELS.get(who, who))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda number, _: f"{number:,.0f}".replace(",", " "))
    )
    axes.grid(True)
    axes.set_xlabel("at a time")
    axes.set_ylabel("µs each")


def heartbeat(axes: Axes, results: Sequence[Result]) -> None:
    """Draw how late the beats of the loop were, in the course of a burst."""
    (result,) = results
    for who in ("native", OURS):
        times = [due * MILLI for due, _ in result.traces[who]]
        delays = [delay * MILLI for _, delay in result.traces[who]]
        label = f"{LABELS.get(who, who)}: {max(delays):.0f} ms at the worst"
        axes.fill_between(times, delays, color=COLOURS[who], alpha=0.25, linewidth=0)
        axes.plot(times, delays, color=COLOURS[who], linewidth=1.5, label=label)
    axes.set_xlim(left=0)
    axes.grid(True)
    axes.set_xlabel("ms since the beginning")
    axes.set_ylabel("ms late")


CHARTS = (
    Chart(
        "job",
        "A call that never pauses: what it costs as a job (less is better)",
        "job",
        jobs.NEVER_PAUSES,
        bars,
    ),
    Chart(
        "offload",
        "A trivial function in a worker thread, by calls at a time (less is better)",
        "offload",
        offload.TRIVIAL,
        lines,
    ),
    Chart(
        "heartbeat",
        f"How late the loop's 1 ms heartbeat is while {tls.BURST} RSA-4096 handshakes come at once",
        "tls-stall",
        tls.STALL,
        heartbeat,
        room=1.3,
    ),
    Chart(
        "scale",
        "Start, pause, wake and finish: what a job costs, by jobs at a time (less is better)",
        "scale",
        scale.WARM,
        lines,
    ),
)


def drawn(chart: Chart, results: Sequence[Result], footer: str) -> Figure | None:
    """Draw a chart, or return None if its figures were not measured."""
    panels = chart.panels(results)
    if not panels:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(footer, x=0.99, ha="right", fontsize=8)
    every = figure.subplots(1, len(panels), sharey=chart.draw is not bars, squeeze=False)[0]
    for axes, (loop, some) in zip(every, panels.items(), strict=True):
        axes.set_title(loop)
        chart.draw(axes, some)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)
    if chart.draw is not bars:
        every[0].set_ylim(0, chart.room * max(axes.dataLim.y1 for axes in every))
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.charts", description=__doc__)
    parser.add_argument("file", type=Path, help="what ``python -m benchmarks --json`` wrote")
    parser.add_argument("--into", type=Path, default=ROOT / "docs", help="default: %(default)s")
    options = parser.parse_args()
    report = Report.from_json(options.file.read_text())
    packages = ("Python", "greenlet", "uvloop", "OpenSSL")
    versions = [f"{name} {report.environment[name]}" for name in packages]
    footer = ", ".join([*versions, f"{report.environment['cores']} cores"])
    options.into.mkdir(exist_ok=True)
    for chart in CHARTS:
        with style.context(STYLE):
            figure = drawn(chart, report.results, footer)
            if figure is None:
                print(f"{chart.name}: not measured", file=sys.stderr)
                continue
            path = options.into / f"{chart.name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Title": chart.title})
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
