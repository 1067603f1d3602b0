"""Many jobs at a time, and deep stacks: time and memory for each job.

Each contender runs in a process of its own, a fresh one in every round: what one leaves behind
in the allocator would be a gift to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
from rich.progress import Progress
from sqlalchemy.util import await_only, greenlet_spawn

import aiojob

from .measure import LOOPS, Result, result_of

GROUPS = ("scale", "depth")
CONTENDERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "aiojob": (aiojob.run_job, aiojob.await_),
    "sqlalchemy": (greenlet_spawn, await_only),
}
MANY, FEW = 100_000, 1_000
DEPTH = 800

Times = dict[str, list[float]]


def results(loop: str, quick: bool, groups: list[str], progress: Progress) -> Iterator[Result]:
    """Measure the groups of this module on one loop."""
    rounds = 1 if quick else 3
    if "scale" in groups:
        yield from scale(loop, rounds, progress)
    if "depth" in groups:
        yield depth(loop, rounds, progress)


def scale(loop: str, rounds: int, progress: Progress) -> Iterator[Result]:
    task = progress.add_task(f"{loop}: {MANY} jobs", total=rounds * 3)
    many: dict[str, dict[str, list[float]]] = {name: {} for name in CONTENDERS}
    few: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in CONTENDERS:
            collect(many[name], child("jobs", name, loop, MANY))
            progress.advance(task)
        collect(few, child("jobs", "aiojob", loop, FEW))
        progress.advance(task)

    def of(figure: str) -> Times:
        return {name: figures[figure] for name, figures in many.items()}

    yield result_of("scale", f"{MANY} jobs, cold pool", of("cold"), {"sqlalchemy": 1.2})
    yield result_of("scale", f"{MANY} jobs, warm pool", of("warm"), {"sqlalchemy": 1.0})
    yield result_of("scale", "memory of a paused job", of("memory"), {"sqlalchemy": 1.2}, "B")
    yield result_of(
        "scale",
        f"a job of {MANY}, without garbage collection",
        {"aiojob": many["aiojob"]["no gc"], f"of {FEW}": few["no gc"]},
        {f"of {FEW}": 1.6},
    )


def depth(loop: str, rounds: int, progress: Progress) -> Result:
    task = progress.add_task(f"{loop}: {DEPTH} frames deep", total=rounds * 2)
    times: Times = {"aiojob": [], "depth 0": []}
    for _ in range(rounds):
        for name, frames in zip(times, (DEPTH, 0), strict=True):
            times[name].append(child("depth", "aiojob", loop, frames)["job"])
            progress.advance(task)
    targets = {"depth 0": 1.1} if sys.version_info >= (3, 12) else {}
    return result_of("depth", f"a job below {DEPTH} frames, aiojob.run()", times, targets)


def collect(figures: dict[str, list[float]], new: dict[str, float]) -> None:
    for name, figure in new.items():
        figures.setdefault(name, []).append(figure)


def child(kind: str, contender: str, loop: str, number: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, kind, contender, loop, str(number)]
    output = subprocess.check_output(command, cwd=Path(__file__).parent.parent)
    figures: dict[str, float] = json.loads(output)
    return figures


# -- in the child


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("jobs", "depth"))
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("number", type=int)
    options = parser.parse_args()
    factory = LOOPS[options.loop]
    if options.kind == "depth":
        figures = {
            "job": below(options.number, lambda: aiojob.run(one_job(), loop_factory=factory))
        }
    else:
        with asyncio.Runner(loop_factory=factory) as runner:
            figures = runner.run(jobs(options.contender, options.number))
    print(json.dumps(figures))


def below(frames: int, func: Callable[[], float]) -> float:
    return below(frames - 1, func) if frames else func()


async def one_job() -> float:
    """Seconds for a job that never pauses."""
    best = float("inf")
    for _ in range(50):
        begin = perf_counter()
        for _ in range(200):
            await aiojob.run_job(int)
        best = min(best, (perf_counter() - begin) / 200)
    return best


async def jobs(contender: str, number: int) -> dict[str, float]:
    """Seconds and bytes for each of so many jobs that are paused at a time."""
    spawn, await_ = CONTENDERS[contender]
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    cold, used = await start_and_wake(spawn, await_, number, lambda: process.memory_info().rss)
    warm, _ = await start_and_wake(spawn, await_, number, lambda: 0)
    gc.collect()
    gc.disable()
    repeats = max(1, 10_000 // number)
    no_gc = min([(await start_and_wake(spawn, await_, number, int))[0] for _ in range(repeats)])
    return {
        "cold": cold / number,
        "warm": warm / number,
        "no gc": no_gc / number,
        "memory": (used - before) / number,
    }


async def start_and_wake(
    spawn: Callable[..., Any], await_: Callable[..., Any], number: int, measure: Callable[[], int]
) -> tuple[float, int]:
    """Start jobs, wait until all are paused, wake them, wait for their ends."""
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
