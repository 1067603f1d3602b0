"""Many jobs at a time, and deep stacks: time and memory for each job.

Jobs are counted in a process of their own for each contender and round.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import psutil
from sqlalchemy.util import await_only, greenlet_spawn

import aiojob

from .measure import LOOPS, Row, Run, Samples, child
from .results import OURS, Target, at_most

CONTENDERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    OURS: (aiojob.run_job, aiojob.await_),
    "sqlalchemy": (greenlet_spawn, await_only),
}
FEW, MANY = 1_000, 100_000
NUMBERS = (FEW, 3_000, 10_000, 30_000, MANY)
DEPTH = 800
WARM = "jobs paused and woken, warm pool"


def rows() -> Iterator[Row]:
    cold = {"sqlalchemy": at_most(1.2)}
    yield Row("scale", "jobs paused and woken, cold pool", of_jobs("cold", MANY), cold, MANY)
    for number in NUMBERS:
        warm = {"sqlalchemy": at_most(1.0)} if number == MANY else {}
        yield Row("scale", WARM, of_jobs("warm", number), warm, number)
    memory = {OURS: at_most(9_000), "sqlalchemy": at_most(1.2)}
    yield Row("scale", "memory of a paused job", of_jobs("memory", MANY), memory, MANY, unit="B")
    yield Row(
        "scale",
        "jobs paused and woken, without garbage collection",
        many_and_few,
        {f"of {FEW}": at_most(1.6)},
        MANY,
    )
    shallow: dict[str, Target] = {"depth 0": at_most(1.1)} if sys.version_info >= (3, 12) else {}
    yield Row("depth", f"a job below {DEPTH} frames, aiojob.run()", deep_and_shallow, shallow)


# -- deep stacks


def deep_and_shallow(run: Run) -> Samples:
    depths = {OURS: DEPTH, "depth 0": 0}
    count = run.effort.of(200)
    times: dict[str, list[float]] = {who: [] for who in depths}
    for _ in range(run.effort.rounds):
        for who, depth in depths.items():
            times[who].append(below(depth, lambda: seconds_of_a_job(run.loop, count)))
    return Samples(times)


def below(frames: int, func: Callable[[], float]) -> float:
    return below(frames - 1, func) if frames else func()


def seconds_of_a_job(loop: str, count: int) -> float:
    async def main() -> float:
        begin = perf_counter()
        for _ in range(count):
            await aiojob.run_job(int)
        return (perf_counter() - begin) / count

    return aiojob.run(main(), loop_factory=LOOPS[loop])


# -- many jobs


def of_jobs(figure: str, number: int) -> Callable[[Run], Samples]:
    """Take one figure of so many jobs that are paused at a time."""

    def measure(run: Run) -> Samples:
        rounds = [
            {who: figures(run, round_, who, number)[figure] for who in CONTENDERS}
            for round_ in range(run.effort.processes)
        ]
        return Samples({who: [of_round[who] for of_round in rounds] for who in CONTENDERS})

    return measure


def many_and_few(run: Run) -> Samples:
    rounds = range(run.effort.processes)
    return Samples(
        {
            OURS: [figures(run, round_, OURS, MANY)["no gc"] for round_ in rounds],
            f"of {FEW}": [figures(run, round_, OURS, FEW)["no gc"] for round_ in rounds],
        }
    )


def figures(run: Run, round_: int, who: str, number: int) -> dict[str, float]:
    """Return the figures of one contender's process.

    The largest number has one of its own, as a pool is cold only once; the others share one.
    """
    of_process = [some for some in NUMBERS if (some == MANY) == (number == MANY)]
    sizes = [str(run.effort.of(some)) for some in of_process]
    output = child(__name__, round_, run.loop, who, *sizes)
    of_number: dict[str, float] = output[str(run.effort.of(number))]
    return of_number


def main() -> None:
    loop, who, *sizes = sys.argv[1:]
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        print(json.dumps({size: runner.run(jobs(who, int(size))) for size in sizes}))


async def jobs(who: str, number: int) -> dict[str, float]:
    """Return the seconds and bytes for each of so many jobs that are paused at a time."""
    process = psutil.Process()
    repeats = min(10, max(2, 10_000 // number))
    gc.collect()
    before = process.memory_info().rss
    cold, used = await start_and_wake(who, number, lambda: process.memory_info().rss)
    warm = min([(await start_and_wake(who, number, int))[0] for _ in range(repeats)])
    gc.collect()
    gc.disable()
    no_gc = min([(await start_and_wake(who, number, int))[0] for _ in range(repeats)])
    gc.enable()
    return {
        "cold": cold / number,
        "warm": warm / number,
        "no gc": no_gc / number,
        "memory": (used - before) / number,
    }


async def start_and_wake(who: str, number: int, measure: Callable[[], int]) -> tuple[float, int]:
    """Start jobs, wait until all are paused, wake them, wait for their ends."""
    spawn, await_ = CONTENDERS[who]
    begin = perf_counter()
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(number)]
    tasks = [loop.create_task(spawn(await_, future)) for future in futures]
    await asyncio.sleep(0)
    measured = measure()
    for future in futures:
        future.set_result(None)
    for task in tasks:
        await task
    return perf_counter() - begin, measured


if __name__ == "__main__":
    main()
