"""Jobs against their peers: one that never pauses, and each kind of pause."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import awaitlet  # type: ignore[import-untyped]
import greenback
from greenlet import getcurrent, greenlet
from sqlalchemy.util import await_only, greenlet_spawn

import aiojob

from .measure import Contender, Row, by_turns
from .results import at_most

NEVER_PAUSES = "a job that never pauses"
Spawn = Callable[..., Awaitable[Any]]
EVENT = (1).to_bytes(8, "little")


def rows() -> Iterator[Row]:
    yield Row(
        "job",
        NEVER_PAUSES,
        by_turns(
            {
                "aiojob": one_after_another(aiojob.run_job),
                "sqlalchemy": one_after_another(greenlet_spawn),
                "awaitlet": one_after_another(awaitlet.async_def),
                "greenback": one_after_another(greenback_run),
                "to_thread": one_after_another(asyncio.to_thread),
                "greenlet pair": switch_pairs,
            },
            200,
        ),
        {
            "sqlalchemy": at_most(0.17),
            "awaitlet": at_most(0.17),
            "greenback": at_most(0.13),
            "to_thread": at_most(0.03),
            "greenlet pair": at_most(3.2),
        },
    )
    for jobs, target in ((1, 0.97), (100, 0.93)):
        yield Row(
            "await",
            "await_ of sleep(0)",
            by_turns(
                {
                    "aiojob": in_jobs(aiojob.run_job, aiojob.await_, jobs),
                    "sqlalchemy": in_jobs(greenlet_spawn, await_only, jobs),
                    "greenback": in_jobs(greenback_run, greenback.await_, jobs),
                },
                600,
            ),
            {"sqlalchemy": at_most(target), "greenback": at_most(0.5)},
            jobs,
        )
    for jobs, target in ((1, 1.2), (100, 1.05)):
        yield Row(
            "callback",
            "pause and wake by callback",
            by_turns(
                {
                    "aiojob": gathered(aiojob.run_job, woken_by_callback, jobs),
                    "sqlalchemy": gathered(greenlet_spawn, woken_by_future, jobs),
                },
                600,
            ),
            {"sqlalchemy": at_most(target)},
            jobs,
        )
    yield Row(
        "eventfd",
        "pause and wake by an eventfd",
        by_turns(
            {
                "aiojob": gathered(aiojob.run_job, woken_by_eventfd, 1),
                "coroutine": add_and_remove_reader,
            },
            200,
        ),
        {"coroutine": at_most(0.8)},
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
        await asyncio.gather(*(coroutine(max(1, count // number)) for _ in range(number)))

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
