"""Offload to threads against asyncio's own ways, by how many calls there are at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import aiojob

from .jobs import gathered, gathered_coroutines, nothing
from .measure import Row, by_turns
from .results import at_most

TRIVIAL = "offload of a trivial function"


def rows() -> Iterator[Row]:
    for calls, target in ((1, 0.75), (10, 0.45), (100, 0.3), (1000, 0.65)):
        yield Row(
            "offload",
            TRIVIAL,
            by_turns(
                {
                    "aiojob": gathered(aiojob.run_job, offloaded, calls),
                    "run_in_executor": gathered_coroutines(in_executor, calls),
                    "to_thread": gathered_coroutines(in_to_thread, calls),
                    "offload_async": gathered_coroutines(offloaded_async, calls),
                },
                max(calls, 200),
            ),
            {"run_in_executor": at_most(target)},
            calls,
        )
    yield Row(
        "offload",
        "offload of a function that blocks for 1 ms",
        by_turns(
            {
                "aiojob": gathered(aiojob.run_job, blocking_offloaded, 100),
                "run_in_executor": gathered_coroutines(blocking_in_executor, 100),
            },
            100,
        ),
        {"run_in_executor": at_most(1.0)},
        100,
    )


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
