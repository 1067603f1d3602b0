"""What all tests share: the event loops they run on, and the check that nothing is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import uvloop

import aiojob
from aiojob import _fibre

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    return loop


LOOPS: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
if sys.version_info >= (3, 12):
    LOOPS["asyncio-eager"] = eager_loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    """Run each async test on every loop, in debug mode."""
    return LOOPS


@pytest.fixture(params=LOOPS)
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """A loop factory, for a test that makes and closes loops itself."""
    return LOOPS[request.param]


@pytest.fixture(scope="session", autouse=True)
def _loops_were_used() -> None:
    """Have each kind of loop open what it keeps for good."""
    for factory in LOOPS.values():
        factory().close()


def open_fds() -> set[int]:
    fds = set()
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the directory's own
        fds.add(int(name))
    return fds


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an fd, a thread or a live job behind."""
    _fibre._local.__dict__.clear()  # a pool of its own, whatever a failed test left in the last one
    fds, threads = open_fds(), set(threading.enumerate())
    yield
    if hasattr(request.node, "rep_call") and request.node.rep_call.failed:
        return  # its frames hold what they held
    gc.collect()
    pool = _fibre.pool_of_thread()
    pool.do_posted()
    assert pool.outstanding == 0, "a job was left behind"
    assert pool.waiters == 0, "a waiter for a fibre was left behind"
    aiojob.cleanup_thread()
    left = set(threading.enumerate()) - threads
    assert not left, f"threads left behind: {left}"
    assert open_fds() <= fds, "fds were left behind"


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def no_loop_errors() -> Iterator[None]:
    """Fail a test in which an event loop's exception handler was called."""
    errors = _Errors()
    logger = logging.getLogger("asyncio")
    logger.addHandler(errors)
    yield
    logger.removeHandler(errors)
    assert not errors.messages, f"the loop's exception handler was called: {errors.messages}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    setattr(item, f"rep_{report.when}", report)
    return report
