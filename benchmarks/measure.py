"""Rows of the benchmark, and how they are measured.

All contenders of a row run in one event loop, by turns and many times over, so that what the
machine does meanwhile hits all alike. A figure is the best round's; a ratio is one of bests.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import uvloop

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Contender = Callable[[int], Awaitable[None]]
"""Does an operation so many times."""


@dataclass(frozen=True)
class Row:
    """One line of the results: aiojob and its peers doing the same."""

    group: str
    name: str
    contenders: Mapping[str, Contender]
    """The first is aiojob's, the others are its peers."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """For peers by name: at most so much of their time."""
    count: int = 1000
    """Operations in a round."""


@dataclass(frozen=True)
class Figure:
    """What one contender needed for an operation, in the result's unit."""

    best: float
    median: float


@dataclass(frozen=True)
class Result:
    """A row's figures, and aiojob's ratios to its peers."""

    group: str
    name: str
    figures: Mapping[str, Figure]
    ratios: Mapping[str, float]
    targets: Mapping[str, float]
    unit: str = "s"

    def shown(self, who: str) -> str:
        best = self.figures[who].best
        return f"{best / 1024:.2f} KiB" if self.unit == "B" else f"{best * 1e6:.2f} us"

    @property
    def missed(self) -> list[str]:
        return [peer for peer, target in self.targets.items() if self.ratios[peer] > target]


async def measure(row: Row, rounds: int, progress: Callable[[], None]) -> Result:
    """Run the contenders of a row by turns."""
    times: dict[str, list[float]] = {name: [] for name in row.contenders}
    for contender in row.contenders.values():
        await contender(row.count)
    contenders = deque(row.contenders.items())
    for _ in range(rounds):
        gc.collect()
        contenders.rotate()
        for name, contender in contenders:
            begin = perf_counter()
            await contender(row.count)
            times[name].append((perf_counter() - begin) / row.count)
        progress()
    return result_of(row.group, row.name, times, row.targets)


def result_of(
    group: str,
    name: str,
    times: Mapping[str, list[float]],
    targets: Mapping[str, float],
    unit: str = "s",
) -> Result:
    """Make a result of what each contender needed in each round; the first is aiojob."""
    figures = {who: Figure(min(some), statistics.median(some)) for who, some in times.items()}
    ours, *peers = figures
    ratios = {peer: figures[ours].best / figures[peer].best for peer in peers}
    return Result(group, name, figures, ratios, targets, unit)
