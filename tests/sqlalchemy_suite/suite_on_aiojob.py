"""A pytest plugin that puts aiojob in the place of SQLAlchemy's greenlets, for its own suite.

`greenlet_spawn` becomes `run_job` and `await_` becomes aiojob's, in every module that has them
by name. SQLAlchemy's class of greenlets is replaced by one that takes no function to run, so
that a place that was missed raises.

With ``AIOJOB_SUITE_LOOP=uvloop`` the suite runs on uvloop.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import suite_outcomes
import uvloop
from sqlalchemy import exc
from sqlalchemy.util import concurrency

import aiojob

P = ParamSpec("P")
T = TypeVar("T")

counts = suite_outcomes.counts
bridge: Any = concurrency  # the parts of it that are not SQLAlchemy's public interface
original_await = concurrency.await_
original_spawn = concurrency.greenlet_spawn
jobs_that_awaited: WeakSet[aiojob.Job] = WeakSet()


class AwaitPoint:
    """Stands where SQLAlchemy's class of greenlets was.

    The suite's cancellation tests patch `switch` and `throw` of that class, to count what is
    awaited and to cancel it. So every awaitable passes through `switch`, or those tests would
    pass without having cancelled anything.
    """

    dead = False

    def switch(self, awaitable: Awaitable[T]) -> Awaitable[T]:
        return awaitable

    def throw(self) -> None:
        """Be there to be patched."""


def await_(awaitable: Awaitable[T]) -> T:
    if not aiojob.can_pause():
        return original_await(awaitable)  # raises SQLAlchemy's own error
    job = aiojob.get_current_job()
    assert job is not None
    jobs_that_awaited.add(job)
    counts["awaits"] += 1
    return aiojob.await_(AwaitPoint().switch(awaitable))


async def greenlet_spawn(
    fn: Callable[..., T], *args: Any, _require_await: bool = False, **kwargs: Any
) -> T:
    counts["jobs"] += 1
    if _require_await:
        return await aiojob.run_job(call_that_awaits, fn, *args, **kwargs)
    return await aiojob.run_job(fn, *args, **kwargs)


def call_that_awaits(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    result = fn(*args, **kwargs)
    if aiojob.get_current_job() not in jobs_that_awaited:
        raise exc.AwaitRequired(WITHOUT_AWAIT)
    return result


def message_without_await() -> str:
    """Have SQLAlchemy say what it says of a function that had to await and did not."""
    try:
        original_spawn(int, _require_await=True).send(None)
    except exc.AwaitRequired as error:
        return str(error.args[0])
    raise AssertionError("SQLAlchemy's greenlet_spawn did not insist on an await")


def replace_everywhere() -> None:
    """Replace the functions by identity, in the modules of SQLAlchemy that are loaded.

    Those that are loaded later import the new ones.
    """
    new = {id(original_await): await_, id(original_spawn): greenlet_spawn}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "sqlalchemy":
            for attribute, value in list(vars(module).items()):
                if id(value) in new:
                    setattr(module, attribute, new[id(value)])


def make_uvloop_runner(util: Any) -> None:
    util.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)


def pytest_unconfigure() -> None:
    assert bridge._concurrency_shim._AsyncIoGreenlet is AwaitPoint


assert "sqlalchemy.testing" not in sys.modules, "the suite was loaded before this plugin"
# First, as the first use of SQLAlchemy's bridge sets the class of its greenlets.
WITHOUT_AWAIT = message_without_await()
bridge._concurrency_shim._AsyncIoGreenlet = AwaitPoint
replace_everywhere()
if os.environ.get("AIOJOB_SUITE_LOOP") == "uvloop":
    bridge._AsyncUtil.__init__ = make_uvloop_runner
