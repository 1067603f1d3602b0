"""Rows of the benchmark, and how they are measured.

The contenders of a row take turns, many times over, so that what the machine does meanwhile hits
all alike. Those that take microseconds share one event loop.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop

from .results import UNITS, Figure, Judged, Points, Result, Target

ROOT = Path(__file__).parent.parent
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    """Of what takes microseconds."""
    long_rounds: int
    """Of what takes a second."""
    processes: int
    """For each contender, where one is measured in processes of its own."""
    share: float = 1.0
    """Of the operations that a row does in a round."""

    def of(self, count: float) -> int:
        return max(1, round(count * self.share))


FULL = Effort(rounds=200, long_rounds=7, processes=5)
QUICK = Effort(rounds=60, long_rounds=3, processes=2)
SMOKE = Effort(rounds=1, long_rounds=1, processes=1, share=0.002)


@dataclass(frozen=True)
class Run:
    """What a row is measured on."""

    loop: str
    effort: Effort


@dataclass(frozen=True)
class Samples:
    """Figures of each contender by its name, one a round."""

    figures: Mapping[str, list[float]]
    traces: Mapping[str, Points] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the results: aiojob and its peers doing the same."""

    group: str
    name: str
    measure: Callable[[Run], Samples]
    targets: Mapping[str, Target] = field(default_factory=dict)
    """For peers by name: what aiojob's figure is to be as a multiple of theirs. For aiojob: what
    the figure itself is to be."""
    at_a_time: int | None = None
    unit: str = "s"
    judged: Judged = "best"
    loops: Collection[str] = tuple(LOOPS)

    def result(self, run: Run) -> Result:
        samples = self.measure(run)
        unit = UNITS[self.unit]
        return Result(
            run.loop,
            self.group,
            self.name,
            self.at_a_time,
            self.unit,
            self.judged,
            {who: Figure.of(some, unit) for who, some in samples.figures.items()},
            self.targets,
            samples.traces,
        )


Contender = Callable[[int], Awaitable[None]]
"""Does an operation so many times."""


def by_turns(contenders: Mapping[str, Contender], operations: int) -> Callable[[Run], Samples]:
    """Have contenders do so many operations in each round, and take the time for one."""

    def measure(run: Run) -> Samples:
        count = run.effort.of(operations)
        with asyncio.Runner(loop_factory=LOOPS[run.loop]) as runner:
            return runner.run(rounds(contenders, count, run.effort.rounds))

    return measure


async def rounds(contenders: Mapping[str, Contender], count: int, number: int) -> Samples:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        await contender(count)  # whatever is kept for good is there by now
    turns = deque(contenders.items())
    for _ in range(number):
        gc.collect()
        turns.rotate()
        for name, contender in turns:
            begin = perf_counter()
            await contender(count)
            times[name].append((perf_counter() - begin) / count)
    return Samples(times)


@cache
def child(module: str, round_: int, *arguments: str) -> Any:
    """Return the figures that a module prints, as JSON, in a process of its own.

    A fresh process for each contender and round: what one leaves behind in the allocator would be
    a gift to the next. Rows that show different figures of one process share it.
    """
    command = [sys.executable, "-m", module, *arguments]
    return json.loads(subprocess.check_output(command, cwd=ROOT))
