"""Jobs against their peers: one that never pauses, and each kind of pause."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import awaitlet  # type: ignore[import-untyped]
import greenback
from greenlet import getcurrent, greenlet
from sqlalchemy.util import await_only, greenlet_spawn

import aiojob

from .measure import Contender, Row

Spawn = Callable[..., Awaitable[Any]]
EVENT = (1).to_bytes(8, "little")


def rows() -> Iterator[Row]:
    yield Row(
        "job",
        "a job that never pauses",
        {
            "aiojob": one_after_another(aiojob.run_job),
            "sqlalchemy": one_after_another(greenlet_spawn),
            "awaitlet": one_after_another(awaitlet.async_def),
            "greenback": one_after_another(greenback_run),
            "to_thread": one_after_another(asyncio.to_thread),
            "greenlet pair": switch_pairs,
        },
        {
            "sqlalchemy": 0.17,
            "awaitlet": 0.17,
            "greenback": 0.13,
            "to_thread": 0.03,
            "greenlet pair": 3.2,
        },
        count=200,
    )
    for jobs in (1, 100):
        yield Row(
            "await",
            f"await_ of sleep(0), {jobs} job(s)",
            {
                "aiojob": in_jobs(aiojob.run_job, aiojob.await_, jobs),
                "sqlalchemy": in_jobs(greenlet_spawn, await_only, jobs),
                "greenback": in_jobs(greenback_run, greenback.await_, jobs),
            },
            {"sqlalchemy": 0.97 if jobs == 1 else 0.93, "greenback": 0.5},
            count=600,
        )
    for jobs in (1, 100):
        yield Row(
            "callback",
            f"pause and wake by callback, {jobs} job(s)",
            {
                "aiojob": gathered(aiojob.run_job, woken_by_callback, jobs),
                "sqlalchemy": gathered(greenlet_spawn, woken_by_future, jobs),
            },
            {"sqlalchemy": 1.2 if jobs == 1 else 1.05},
            count=600,
        )
    yield Row(
        "eventfd",
        "pause and wake by an eventfd",
        {
            "aiojob": gathered(aiojob.run_job, woken_by_eventfd, 1),
            "coroutine": add_and_remove_reader,
        },
        {"coroutine": 0.8},
        count=200,
    )
    for jobs, target in ((1, 0.75), (10, 0.45), (100, 0.3), (1000, 0.65)):
        yield Row(
            "offload",
            f"offload of a trivial function, {jobs} at a time",
            {
                "aiojob": gathered(aiojob.run_job, offloaded, jobs),
                "run_in_executor": gathered_coroutines(in_executor, jobs),
                "to_thread": gathered_coroutines(in_to_thread, jobs),
                "offload_async": gathered_coroutines(offloaded_async, jobs),
            },
            {"run_in_executor": target},
            count=max(jobs, 200),
        )
    yield Row(
        "offload",
        "offload of a function that blocks for 1 ms, 100 at a time",
        {
            "aiojob": gathered(aiojob.run_job, blocking_offloaded, 100),
            "run_in_executor": gathered_coroutines(blocking_in_executor, 100),
        },
        {"run_in_executor": 1.0},
        count=100,
    )


def nothing() -> None:
    pass


async def greenback_run(func: Callable[..., Any], *args: Any) -> Any:
    return await greenback.with_portal_run_sync(func, *args)


def one_after_another(spawn: Spawn) -> Contender:
    async def contender(count: int) -> None:
        for _ in range(count):
            await spawn(nothing)

    return contender


async def switch_pairs(count: int) -> None:
    main = getcurrent()

    def back_and_forth() -> None:
        back = main.switch
        while True:
            back()

    forth = greenlet(back_and_forth).switch
    for _ in range(count):
        forth()


def in_jobs(
    spawn: Spawn, await_: Callable[[Coroutine[Any, Any, None]], Any], jobs: int
) -> Contender:
    def job(count: int) -> None:
        for _ in range(count):
            await_(asyncio.sleep(0))

    return gathered(spawn, job, jobs)


def gathered(spawn: Spawn, job: Callable[[int], None], jobs: int) -> Contender:
    return gathered_coroutines(partial(spawn, job), jobs)


def gathered_coroutines(coroutine: Callable[[int], Awaitable[None]], number: int) -> Contender:
    async def contender(count: int) -> None:
        await asyncio.gather(*(coroutine(count // number) for _ in range(number)))

    return contender


def woken_by_callback(count: int) -> None:
    call_soon = asyncio.get_running_loop().call_soon
    ctx = aiojob.get_wait_ctx()
    ctx.status = aiojob.WaitStatus.OK
    for _ in range(count):
        call_soon(*(ctx.get_callback() or ()))
        aiojob.pause_job()


def woken_by_future(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await_only(future)


def woken_by_eventfd(count: int) -> None:
    call_soon = asyncio.get_running_loop().call_soon
    fd = os.eventfd(0)
    ctx = aiojob.get_wait_ctx()
    ctx.set_wait_fd("benchmark", fd, None, lambda ctx, key, fd, data: os.close(fd))
    for _ in range(count):
        call_soon(os.write, fd, EVENT)
        aiojob.pause_job()
        os.read(fd, 8)


async def add_and_remove_reader(count: int) -> None:
    loop = asyncio.get_running_loop()
    fd = os.eventfd(0)
    for _ in range(count):
        readable = loop.create_future()
        loop.add_reader(fd, readable.set_result, None)
        loop.call_soon(os.write, fd, EVENT)
        await readable
        loop.remove_reader(fd)
        os.read(fd, 8)
    os.close(fd)


def offloaded(count: int) -> None:
    for _ in range(count):
        aiojob.offload(nothing)


async def offloaded_async(count: int) -> None:
    for _ in range(count):
        await aiojob.offload_async(nothing)


async def in_executor(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.run_in_executor(None, nothing)


async def in_to_thread(count: int) -> None:
    for _ in range(count):
        await asyncio.to_thread(nothing)


def block() -> None:
    time.sleep(0.001)


def blocking_offloaded(count: int) -> None:
    for _ in range(count):
        aiojob.offload(block)


async def blocking_in_executor(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.run_in_executor(None, block)
