"""What all tests share: the event loops they run on, and the check that nothing is left."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import uvloop

import aiojob
from aiojob import _fibre
from aiojob.testing import nothing_left

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


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an fd, a thread, a live job or an offloaded call behind."""
    _fibre._local.__dict__.clear()  # a pool of its own, whatever a failed test left in the last one
    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        yield
        if hasattr(request.node, "rep_call") and request.node.rep_call.failed:
            stack.pop_all()  # its frames hold what they held
    aiojob.cleanup_thread()


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
