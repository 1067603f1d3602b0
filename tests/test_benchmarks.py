"""The benchmarks: every row can be measured, what comes of it is right, charts are drawn."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from support import PATIENCE

from benchmarks import suites
from benchmarks.__main__ import measured, parse
from benchmarks.charts import CHARTS
from benchmarks.measure import Row, Run, Samples
from benchmarks.results import UNITS, Figure, Judged, Report, Result, Target, at_least, at_most
from benchmarks.table import table
from benchmarks.tls import Heartbeat

ROOT = Path(__file__).parents[1]
LOOPS = ("asyncio", "uvloop")


def run(module: str, *arguments: str | Path, status: set[int]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": ""},  # which takes twice as long
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode in status, done.stderr
    return done


def result(
    figures: Mapping[str, list[float]],
    targets: Mapping[str, Target],
    judged: Judged = "best",
    unit: str = "s",
) -> Result:
    of_unit = {who: Figure.of(samples, UNITS[unit]) for who, samples in figures.items()}
    return Result("asyncio", "group", "row", 10, unit, judged, of_unit, targets)


# -- every row


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of each row, measured once and with next to nothing to do."""
    file = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    run("benchmarks", "--smoke", "--json", file, status={0, 1})
    return file


def test_each_row_is_measured_on_each_loop(smoke: Path) -> None:
    report = json.loads(smoke.read_text())
    assert report["errors"] == []
    measured = [(some["loop"], some["name"], some["at_a_time"]) for some in report["results"]]
    assert measured == [
        (loop, row.name, row.at_a_time)
        for loop in LOOPS
        for rows in suites.SUITES.values()
        for row in rows()
        if loop in row.loops
    ]


def test_each_time_is_positive_and_each_target_has_a_figure(smoke: Path) -> None:
    for some in json.loads(smoke.read_text())["results"]:
        row = Result.from_json(some)
        assert set(row.targets) <= set(row.figures)
        # Memory may come from what was free, or the system takes some meanwhile; and a loop that
        # rounds its timers is never late with a few beats.
        if row.unit != "B" and row.group != "tls-stall":
            assert all(figure.best > 0 for figure in row.figures.values()), row.title


def test_a_row_that_fails_is_reported_and_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Run) -> Samples:
        raise ArithmeticError("no figure")

    rows = [Row("group", "bad", fail), Row("group", "good", lambda run: Samples({"aiojob": [1.0]}))]
    monkeypatch.setitem(suites.SUITES, "jobs", lambda: iter(rows))
    suites.main("jobs", "asyncio", "smoke", "group")
    begun, failed, next_begun, ended = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begun["begun"], next_begun["begun"]) == ("bad", "good")
    assert failed["error"].endswith("ArithmeticError: no figure\n")
    assert Result.from_json(ended["result"]).judged_figure("aiojob") == 1.0


def test_a_suite_whose_process_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (line,) = measured("jobs", "asyncio", "smoke", ["job"])
    assert "ended with status 1" in line["error"]


# -- what comes of figures


def test_figures_of_several_rounds_have_their_quartiles() -> None:
    assert Figure.of([5.0, 1.0, 4.0, 2.0, 3.0], UNITS["s"]) == Figure(1.0, 2.0, 3.0, 4.0, 5.0, 5)


def test_figure_of_one_round_is_that_round() -> None:
    assert Figure.of([7.0], UNITS["s"]) == Figure(7.0, 7.0, 7.0, 7.0, 7.0, 1)


def test_more_is_better_of_a_rate() -> None:
    assert Figure.of([1.0, 2.0, 3.0], UNITS["1/s"]).best == 3.0
    assert Figure.of([1.0, 2.0, 3.0], UNITS["1/s"]).worst == 1.0


def test_a_ratio_is_one_of_the_best_rounds_or_of_the_medians() -> None:
    figures = {"aiojob": [1.0, 3.0, 4.0], "peer": [2.0, 4.0, 5.0]}
    (of_bests,) = result(figures, {}).comparisons
    (of_medians,) = result(figures, {}, "median").comparisons
    assert (of_bests.value, of_medians.value) == (0.5, 0.75)
    assert of_bests.target is None
    assert not of_bests.is_missed


@pytest.mark.parametrize(
    ("target", "missed"),
    [
        (at_most(0.5), False),
        (at_most(0.49), True),
        (at_least(0.5), False),
        (at_least(0.51), True),
    ],
)
def test_target_of_a_ratio_is_met_up_to_its_limit(target: Target, missed: bool) -> None:
    row = result({"aiojob": [1.0], "peer": [2.0]}, {"peer": target})
    assert [comparison.is_missed for comparison in row.comparisons] == [missed]


def test_target_of_the_figure_itself_stands_before_the_ratios() -> None:
    row = result({"aiojob": [30.0], "native": [300.0]}, {"aiojob": at_most(25.0)}, unit="B")
    assert [(some.peer, some.value, some.is_missed) for some in row.comparisons] == [
        ("aiojob", 30.0, True),
        ("native", 0.1, False),
    ]


def test_report_comes_back_from_its_json_as_it_was() -> None:
    row = result({"aiojob": [1.0, 2.0], "peer": [2.0, 3.0]}, {"peer": at_least(1.2)})
    report = Report({"Python": "3"}, "quick", [row], ["Traceback"])
    assert Report.from_json(report.to_json()) == report
    document = json.loads(report.to_json())
    assert document["missed"] == ["asyncio: row, 10 at a time, against peer"]
    assert document["results"][0]["comparisons"] == [{"peer": "peer", "value": 0.5, "missed": True}]


@pytest.mark.parametrize(
    ("limit", "errors", "status"), [(1.0, [], 0), (0.1, [], 1), (1.0, ["Oh\nno"], 2)]
)
def test_exit_status_says_whether_all_targets_were_met(
    limit: float, errors: list[str], status: int
) -> None:
    row = result({"aiojob": [1.0], "peer": [2.0]}, {"peer": at_most(limit)})
    report = Report({}, "full", [row], errors)
    assert report.exit_status == status
    assert (
        report.summary.splitlines()
        == {
            0: ["1 of 1 targets met"],
            1: ["0 of 1 targets met", "missed: asyncio: row, 10 at a time, against peer"],
            2: ["1 of 1 targets met", "failed: no"],
        }[status]
    )


async def test_late_beat_stands_for_those_that_were_due_meanwhile() -> None:
    with Heartbeat() as heartbeat:
        time.sleep(0.0205)
        await asyncio.sleep(0.005)
    assert heartbeat.delays[-1] >= 0.0195
    assert sum(delay >= 0.0095 for delay in heartbeat.delays) >= 10
    assert max(delay for _, delay in heartbeat.trace) >= 0.0195


@pytest.mark.parametrize(
    ("unit", "value", "shown"),
    [
        ("s", 0.0000012345, "1.23 us"),
        ("s", 0.25, "250 ms"),
        ("s", 2.0, "2 s"),
        ("s", 0.0, "0 us"),
        ("B", 8100.0, "7.91 KiB"),
        ("B", 2e6, "1953 KiB"),
        ("1/s", 431.2, "431 /s"),
    ],
)
def test_value_is_shown_with_three_figures(unit: str, value: float, shown: str) -> None:
    assert UNITS[unit].shown(value) == shown


# -- the command line


def test_groups_are_chosen_by_name_or_by_the_part_before_the_dash() -> None:
    assert parse(["tls-cpu", "job"]).groups == ["job", "tls-cpu"]
    assert parse(["tls"]).groups == ["tls-stall", "tls-cpu", "tls-data", "tls-memory"]
    assert len(parse([]).groups) > 8


def test_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["job", "jbo"])
    assert "unknown groups: jbo" in capsys.readouterr().err


# -- the table and the charts


def test_table_has_a_line_for_each_target_and_a_column_for_each_python_and_loop() -> None:
    row = result(
        {"aiojob": [2048.0], "peer": [1024.0], "other": [1.0]},
        {"aiojob": at_most(4096), "peer": at_most(1.5)},
        unit="B",
    )
    reports = [
        Report({"Python": "3.11.7"}, "full", [row]),
        Report({"Python": "3.13.0"}, "full", [dataclasses.replace(row, loop="uvloop")]),
    ]
    assert table(reports).splitlines() == [
        "| what | against | target | 3.11 asyncio | 3.13 uvloop |",
        "| --- | --- | --- | --- | --- |",
        "| row, 10 at a time |  | at most 4 KiB | 2 KiB | 2 KiB |",
        "| row, 10 at a time | peer | at most 1.5 | **2.00** | **2.00** |",
    ]


def test_charts_are_drawn_for_both_loops(smoke: Path, tmp_path: Path) -> None:
    drawn = run("benchmarks.charts", smoke, "--into", tmp_path, status={0})
    paths = [tmp_path / f"{chart.name}.svg" for chart in CHARTS]
    assert drawn.stdout.splitlines() == [str(path) for path in paths]
    for path in paths:
        svg = ET.parse(path).getroot()
        panels = [each.get("id") for each in svg.iter() if each.get("id", "").startswith("axes_")]
        assert panels == ["axes_1", "axes_2"]


def test_chart_without_figures_is_left_out(smoke: Path, tmp_path: Path) -> None:
    report = json.loads(smoke.read_text())
    report["results"] = [some for some in report["results"] if some["group"] == "offload"]
    file = tmp_path / "offload.json"
    file.write_text(json.dumps(report))
    drawn = run("benchmarks.charts", file, "--into", tmp_path, status={0})
    assert drawn.stdout == f"{tmp_path / 'offload.svg'}\n"
    assert drawn.stderr.splitlines() == [
        f"{name}: not measured" for name in ("job", "heartbeat", "scale")
    ]
