"""Hostile and odd surroundings: no fds, no threads, no memory, signals, tracers, nested loops."""

from __future__ import annotations

import ast
import asyncio
import bdb
import cProfile
import gc
import logging
import os
import pstats
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import PATIENCE

from aiojob import (
    Completion,
    WaitCtx,
    _fibre,
    await_,
    cleanup_thread,
    get_wait_ctx,
    init_thread,
    offload,
    pause_job,
    run_job,
    sleep,
    start_job,
    stats,
    wait_writable,
)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def step(value: int) -> int:
    return await_(asyncio.sleep(0, value))


def steps(count: int = 3) -> int:
    return sum(step(number) for number in range(count))


# -- no fds, no threads, no memory


@contextmanager
def no_new_fds() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_jobs_of_a_loop_go_on_without_new_fds() -> None:
    def work() -> int:
        completion: Completion[int] = Completion()
        thread = threading.Thread(target=completion.set_result, args=[1])
        thread.start()
        result = completion.wait(timeout=60)
        thread.join()
        sleep(0.001)
        return result + offload(int, "2") + steps()

    with no_new_fds():
        results = await asyncio.gather(*(run_job(work) for _ in range(10)))
    assert results == [6] * 10


@pytest.mark.parametrize(
    "wait",
    [
        lambda: Completion[None]().wait(),
        lambda: Completion[None]().wait(timeout=1),
        lambda: sleep(1),
    ],
)
def test_engine_that_gets_no_fd_in_a_hand_driven_job_raises_and_leaves_nothing(
    wait: Callable[[], None],
) -> None:
    def work() -> str:
        with pytest.raises(OSError, match="Too many open files"):
            wait()
        assert get_wait_ctx().get_all_fds() == []
        return "went on"

    with WaitCtx() as ctx, no_new_fds():
        assert start_job(None, ctx, work).ret == "went on"


async def test_wait_for_room_to_write_that_gets_no_fd_raises_and_leaves_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:
        try:
            os.write(writing, bytes(4096))
        except BlockingIOError:
            break

    def work() -> str:
        with pytest.raises(OSError, match="Too many open files"):
            wait_writable(writing)
        return "went on"

    with no_new_fds():
        assert await run_job(work) == "went on"
    os.close(reading)
    os.close(writing)


async def test_offload_that_gets_no_thread_raises_in_the_job_which_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> int:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            offload(int)
        return steps()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert await run_job(work) == 3
    assert await run_job(offload, int) == 0


async def test_job_that_runs_out_of_memory_gives_its_fibre_back() -> None:
    def work() -> None:
        step(1)
        bytearray(1 << 62)

    for _ in range(3):
        with pytest.raises(MemoryError):
            await run_job(work)
    assert _fibre.pool_of_thread().outstanding == 0
    assert await run_job(steps) == 3


@pytest.mark.parametrize("pauses", [0, 1])
async def test_job_that_recurses_too_deeply_gives_its_fibre_back(pauses: int) -> None:
    def recurse(depth: int) -> int:
        return recurse(depth + 1) + 1

    def work() -> None:
        steps(pauses)
        recurse(0)

    for _ in range(3):
        with pytest.raises(RecursionError):
            await run_job(work)
    assert _fibre.pool_of_thread().outstanding == 0
    assert await run_job(steps) == 3


async def test_job_that_pauses_deep_in_a_recursion_leaves_others_their_depth() -> None:
    limit = sys.getrecursionlimit()

    def recurse(depth: int) -> int:
        return recurse(depth - 1) if depth else steps()

    results = await asyncio.gather(*(run_job(recurse, limit // 2) for _ in range(10)))
    assert results == [3] * 10
    assert sys.getrecursionlimit() == limit


# -- signals


@pytest.mark.parametrize("delay", range(8))
def test_interrupt_in_a_job_comes_out_of_it_and_all_is_as_before(
    loop_factory: LoopFactory, delay: int
) -> None:
    """The signal comes after so many steps of a job; its handler runs in the job."""
    cleaned = []

    def work() -> None:
        try:
            for number in range(9):
                if number == delay:
                    signal.raise_signal(signal.SIGUSR1)
                step(number)
        finally:
            cleaned.append(True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with (
            asyncio.Runner(loop_factory=loop_factory) as runner,
            pytest.raises(KeyboardInterrupt),
        ):
            runner.run(run_job(work))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cleaned == [True]
    counts = stats()
    assert (counts.running, counts.paused) == (0, 0)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(run_job(steps)) == 3


def test_ctrl_c_cancels_paused_and_running_jobs(loop_factory: LoopFactory) -> None:
    ends: list[str] = []

    def work(name: str) -> None:
        try:
            await_(asyncio.sleep(3600))
        except asyncio.CancelledError:
            ends.append(name)
            raise

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(run_job(work, name))
            await asyncio.sleep(0.01)
            await run_job(signal.raise_signal, signal.SIGINT)
            await asyncio.sleep(3600)

    with asyncio.Runner(loop_factory=loop_factory) as runner, pytest.raises(KeyboardInterrupt):
        runner.run(main())
    assert sorted(ends) == ["a", "b", "c"]


# -- tracers, profilers, debuggers


async def test_tracer_sees_each_line_of_a_job_over_its_pauses() -> None:
    cleanup_thread()  # a fibre that begins under the tracer
    lines: list[int] = []
    first = work_to_trace.__code__.co_firstlineno

    def trace(frame: Any, event: str, arg: object) -> Any:
        if frame.f_code is not work_to_trace.__code__:
            return None
        if event == "line":
            lines.append(frame.f_lineno - first)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert await run_job(work_to_trace) == 3
    finally:
        sys.settrace(before)
    assert lines == [1, 2, 3]


def work_to_trace() -> int:
    one = step(1)
    two = step(2)
    return one + two


async def test_debugger_stops_at_a_breakpoint_in_a_job() -> None:
    stops: list[str] = []

    class Debugger(bdb.Bdb):
        def user_line(self, frame: Any) -> None:
            stops.append(f"{frame.f_code.co_name}:{frame.f_lineno - first}")
            self.set_continue()

    first = work_to_trace.__code__.co_firstlineno
    before = sys.gettrace()
    debugger = Debugger()
    debugger.set_break(__file__, first + 2)
    debugger.set_trace()
    try:
        assert await run_job(work_to_trace) == 3
    finally:
        debugger.clear_all_breaks()
        sys.settrace(before)
    assert "work_to_trace:2" in stops


async def test_profiler_sees_the_calls_of_jobs() -> None:
    """Not exactly: it knows one stack of calls, and not one for each greenlet."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        await asyncio.gather(*(run_job(steps) for _ in range(5)))
    finally:
        profile.disable()
    calls = {name[2]: counts[1] for name, counts in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    assert calls["steps"] >= 5
    assert calls["step"] >= 15


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12")
async def test_monitoring_counts_the_calls_of_jobs() -> None:
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
    starts: list[str] = []
    monitoring.use_tool_id(4, "aiojob's tests")
    try:
        event = monitoring.events.PY_START
        monitoring.register_callback(4, event, lambda code, _: starts.append(code.co_name))
        monitoring.set_events(4, event)
        await asyncio.gather(*(run_job(steps) for _ in range(5)))
    finally:
        monitoring.set_events(4, 0)
        monitoring.free_tool_id(4)
    assert (starts.count("steps"), starts.count("step")) == (5, 15)


# -- loops of other makers


def test_loops_of_pytest_asyncios_scopes_take_turns_in_one_thread(
    loop_factory: LoopFactory,
) -> None:
    """A loop that stays open, and others that come and go in between."""
    with asyncio.Runner(loop_factory=loop_factory) as session:
        fixture = session.get_loop().create_task(run_job(sleep, 3600))
        for _ in range(3):
            assert session.run(run_job(steps)) == 3
            with asyncio.Runner(loop_factory=loop_factory) as function:
                assert function.run(run_job(steps)) == 3
                assert function.run(run_job(pause_job)) is None
        assert stats().paused == 1
        fixture.cancel()


def test_session_loop_of_pytest_asyncio_runs_jobs_of_fixtures_and_tests(tmp_path: Any) -> None:
    tmp_path.joinpath("test_scopes.py").write_text(
        textwrap.dedent("""
            import asyncio, pytest, pytest_asyncio
            from aiojob import await_, run_job

            @pytest_asyncio.fixture(scope="session", loop_scope="session")
            async def service():
                task = asyncio.ensure_future(run_job(await_, asyncio.sleep(3600)))
                yield await run_job(await_, asyncio.sleep(0, "service"))
                task.cancel()

            @pytest.mark.asyncio(loop_scope="session")
            async def test_in_the_session_loop(service):
                assert await run_job(await_, asyncio.sleep(0, service)) == "service"

            @pytest.mark.asyncio
            async def test_in_a_loop_of_its_own(service):
                assert await run_job(await_, asyncio.sleep(0, service)) == "service"

            @pytest.mark.asyncio(loop_scope="module")
            async def test_in_the_modules_loop(service):
                assert await run_job(await_, asyncio.sleep(0, service)) == "service"
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert "3 passed" in done.stdout, done.stdout


def test_loop_of_a_notebook_that_runs_cell_after_cell_runs_jobs(loop_factory: LoopFactory) -> None:
    """IPython compiles cells with top-level await, and keeps one loop for all of them."""
    cells = [
        "import asyncio; from aiojob import *",
        "result = await run_job(await_, asyncio.sleep(0, 1))",
        "task = asyncio.ensure_future(run_job(sleep, 3600)); await asyncio.sleep(0)",
        "result += await run_job(offload, int, '2')",
        "found = [job.func.__name__ for job in all_jobs()]; task.cancel()",
    ]
    names: dict[str, Any] = {}
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        for cell in cells:
            code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            cell_run = eval(code, names)
            if asyncio.iscoroutine(cell_run):
                runner.run(cell_run)
    assert names["result"] == 3
    assert names["found"] == ["sleep"]


def test_pool_with_a_limit_is_shared_by_the_loops_of_a_thread(loop_factory: LoopFactory) -> None:
    init_thread(1)
    for _ in range(2):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            assert runner.run(run_job(steps)) == 3
    init_thread()


# -- what is logged


def test_job_that_is_unwound_as_its_loop_was_closed_is_warned_of(
    loop_factory: LoopFactory, caplog: pytest.LogCaptureFixture
) -> None:
    loop = loop_factory()
    loop.set_exception_handler(lambda *_: None)  # it complains of the task
    task = loop.create_task(run_job(never_woken))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert not caplog.records
    del task
    gc.collect()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aiojob", logging.WARNING)
    assert record.getMessage().startswith(
        "a job, never_woken, is unwound, as its event loop has ended: cancel its task"
    )


def never_woken() -> None:
    while True:
        pause_job()


def test_jobs_that_are_cancelled_with_their_loop_are_not_warned_of(
    loop_factory: LoopFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        tasks = [runner.get_loop().create_task(run_job(sleep, 3600)) for _ in range(3)]
        runner.run(asyncio.sleep(0.01))
    assert all(task.cancelled() for task in tasks)
    assert not caplog.records


def test_wake_up_after_the_loop_was_closed_is_logged_for_debugging_alone(
    loop_factory: LoopFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiojob")
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        callback = runner.run(run_job(lambda: get_wait_ctx().get_callback()))
    assert callback is not None
    thread = threading.Thread(target=callback[0], args=callback[1:])
    thread.start()
    thread.join()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.DEBUG, "a job was woken after its event loop had been closed")
    ]
