"""What all tests share: the event loops they run on, and the check that nothing is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from asyncio import constants
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop
from support import PATIENCE, unavailable
from tls.native_engine import NativeEngine, build, load

import aiojob
from aiojob import _fibre
from aiojob.testing import nothing_left
from aiojob.tls._native import abandoned

# The benchmarks come from the checkout, aiojob does not: hence last.
sys.path.append(str(Path(__file__).parents[1]))

# In debug mode asyncio notes the stack of whoever makes a handle, a timer, a future or a task. One
# frame of it is enough here; ten take a tenth of the time of all tests.
constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]

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


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_collected() -> None:
    """Spare the collection behind each test what stays anyway; that is most of a short test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_not_ignored() -> None:
    """Have tests in a shell's background job, which ignores interrupts, be as others."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _slow_steps_are_not_logged() -> Iterator[None]:
    """Have loops in debug mode not report steps that took long on this machine."""

    def is_no_report(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Executing ")

    logger = logging.getLogger("asyncio")
    logger.addFilter(is_no_report)
    yield
    logger.removeFilter(is_no_report)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an fd, a thread, a live job or an offloaded call behind."""
    _fibre._local.__dict__.clear()  # a pool of its own, whatever a failed test left in the last one
    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        yield
        failed = hasattr(request.node, "rep_call") and request.node.rep_call.failed
        if failed or request.node.get_closest_marker("background_fds"):
            stack.pop_all()  # the frames of a failed test hold what they held
    aiojob.cleanup_thread()


def postgres_programs() -> Path | None:
    """Return the directory of PostgreSQL's programs, which Debian does not put on the path."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server, for the tests alone.

    It takes as many connections as all tests make together: what serves one that was closed is
    there for a while, the longer the busier the machine is.
    """
    programs = postgres_programs()
    if programs is None:
        unavailable("needs PostgreSQL's server: initdb was not found")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to be root
    with tempfile.TemporaryDirectory(prefix="aiojob-", ignore_cleanup_errors=True) as directory:
        if user is not None:
            shutil.chown(directory, user)

        def run(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", f"{directory}/data", *arguments]
            subprocess.run(command, user=user, cwd=directory, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        options = f"-k {directory} -c listen_addresses= -c max_connections=1000 -c fsync=off"
        run("pg_ctl", "start", "-w", "-t", f"{PATIENCE}", "-o", options, "-l", f"{directory}/log")
        try:
            yield f"host={directory} user=postgres dbname=postgres"
        finally:
            run("pg_ctl", "stop", "-m", "immediate")


@pytest.fixture(scope="session")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(engine_path: Path) -> Iterator[NativeEngine]:
    """An engine of OpenSSL's that pauses its jobs; it must have lost none when the test ends."""
    engine = NativeEngine(load(engine_path))
    engine.install()
    yield engine
    engine.uninstall()
    assert not abandoned
    assert engine.counts.in_flight == 0


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
