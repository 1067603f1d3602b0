"""Offloads under fire.

Event loops in several threads, and threads without one, offload at random: functions that return,
raise, block, and offload in their turn; waits that are cancelled or time out; limits that change,
and workers whose idle time is over at once.
"""

from __future__ import annotations

import asyncio
import random
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import aiojob
from aiojob.engines._offload import all_workers

from ..measure import LOOPS
from .harness import Part, Soak

TASKS = 30
"""Jobs and coroutines at a time in each event loop."""


class OffloadedError(Exception):
    """Raised by offloaded functions."""


class Call:
    """An offloaded function that knows how often it ran."""

    def __init__(self, soak: Soak, chance: random.Random) -> None:
        self.runs = 0
        self.token = object()
        self._soak = soak
        self._fate = chance.choice(("return",) * 6 + ("raise", "raise", "block", "nest"))

    def __call__(self) -> object:
        self.runs += 1
        self._soak.count("calls run")
        if self._fate == "raise":
            raise OffloadedError(self.token)
        if self._fate == "block":
            time.sleep(0.0005)
        if self._fate == "nest":
            return aiojob.offload(lambda: self.token)
        return self.token

    def outcome(self, offload: Callable[[Call], object]) -> None:
        """Offload the call, and check that what comes back is its own."""
        try:
            returned = offload(self)
        except OffloadedError as error:
            (returned,) = error.args
            self._soak.count("exceptions")
        self.check(returned)

    def check(self, returned: object) -> None:
        if returned is not self.token or self.runs != 1:
            self._soak.fault(f"a call ran {self.runs} times and brought {returned!r}")
        self._soak.count("calls ended")


def in_job(soak: Soak, chance: random.Random) -> None:
    Call(soak, chance).outcome(aiojob.offload)


async def in_coroutine(soak: Soak, chance: random.Random) -> None:
    call = Call(soak, chance)
    try:
        returned = await aiojob.offload_async(call)
    except OffloadedError as error:
        (returned,) = error.args
        soak.count("exceptions")
    call.check(returned)


async def given_up(soak: Soak, chance: random.Random) -> None:
    """Cancel an offload at some moment, or let it time out."""
    call = Call(soak, chance)
    way: Any = aiojob.offload_async(call) if chance.random() < 0.3 else None
    task = asyncio.ensure_future(way or aiojob.run_job(aiojob.offload, call))
    if chance.random() < 0.5:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
    else:
        await asyncio.wait([task], timeout=chance.random() * 0.002)
        task.cancel()
    await asyncio.wait([task])
    soak.count("given up" if task.cancelled() else "ended before it was given up")
    if not task.cancelled() and task.exception() is None and task.result() is not call.token:
        soak.fault("a call that was to be given up brought another's result")
    if call.runs > 1:
        soak.fault(f"a call that was given up ran {call.runs} times")


async def client(soak: Soak, chance: random.Random) -> None:
    while not soak.is_over:
        kind = chance.random()
        if kind < 0.5:
            await aiojob.run_job(in_job, soak, chance)
        elif kind < 0.75:
            await in_coroutine(soak, chance)
        else:
            await given_up(soak, chance)


def event_loop(soak: Soak, loop: str, chance: random.Random) -> None:
    async def main() -> None:
        await asyncio.gather(*(client(soak, random.Random(chance.random())) for _ in range(TASKS)))

    while not soak.is_over:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(main())


def select_loop(soak: Soak, chance: random.Random) -> None:
    while not soak.is_over:
        with aiojob.WaitCtx() as ctx:
            status, job, _ = aiojob.start_job(None, ctx, in_job, soak, chance)
            while status is aiojob.JobStatus.PAUSE and job is not None:
                select.select(ctx.get_all_fds(), [], [])
                status, job, _ = aiojob.start_job(job, ctx)


def blocking(soak: Soak, chance: random.Random) -> None:
    while not soak.is_over:
        in_job(soak, chance)


def disturbing(soak: Soak, chance: random.Random) -> None:
    """Change the limit, and have idle workers end at once or stay."""
    while not soak.is_over:
        aiojob.set_offload_threads(chance.randint(1, 8))
        for workers in all_workers():
            workers.idle_seconds = chance.choice((0.0, 0.0001, 0.001, 10.0))
        time.sleep(0.003)
        soak.count("limits changed")
    aiojob.set_offload_threads(6)


def run(soak: Soak, loops: list[str], chance: random.Random) -> None:
    """Run it, in threads of its own."""
    programs: list[tuple[Any, ...]] = [(event_loop, soak, loop) for loop in loops for _ in range(2)]
    programs += [(select_loop, soak), (blocking, soak), (disturbing, soak)]
    threads = [
        threading.Thread(target=soak.guarded, args=(*program, random.Random(chance.random())))
        for program in programs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


PART = Part(run, "calls run")
