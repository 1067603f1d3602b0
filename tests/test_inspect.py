"""Looking at jobs: which there are, where they are, what they wait for, how many."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import os
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from types import FrameType
from typing import Any, NoReturn, TypeVar

import greenlet
import pytest
from sqlalchemy.util import await_only

import aiojob
from aiojob import (
    Job,
    JobError,
    JobStatus,
    Session,
    WaitCtx,
    WaitStatus,
    WrongThreadError,
    _fibre,
    _inspect,
    _observe,
    _stack,
    all_jobs,
    await_,
    cleanup_thread,
    get_current_job,
    get_wait_ctx,
    init_thread,
    offload,
    pause_blocked,
    pause_job,
    print_jobs,
    run_job,
    start_job,
    stats,
    wait_readable,
    wait_writable,
)
from aiojob._stack import CurrentFrames
from aiojob.testing import Gate

T = TypeVar("T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def names(job: Job) -> list[str]:
    return [frame.f_code.co_name for frame in job.get_stack()]


def printed() -> str:
    """What `print_jobs` prints, with no time for which a busy machine takes longer."""
    return re.sub(r" for (\d+\.\d to )?\d+\.\d s\n", " for 0.0 s\n", printed_with_times())


def printed_with_times() -> str:
    file = io.StringIO()
    print_jobs(file)
    return file.getvalue()


def paused_by_hand(ctx: WaitCtx | None = None) -> Job:
    _, job, _ = start_job(None, ctx, pause_job)
    assert job is not None
    return job


def elsewhere(func: Callable[[], T]) -> T:
    """Call a function in another thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(func).result()


async def at_its_pause(*jobs: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(job) for job in jobs]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@contextmanager
def paused_elsewhere(func: Callable[[], Any], *args: Any) -> Iterator[None]:
    """Have a job of `run_job`, in a loop of another thread, paused meanwhile."""
    end = asyncio.Event()
    paused = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        tasks = await at_its_pause(run_job(func, *args))
        paused.set()
        await end.wait()
        await cancelled(*tasks)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="elsewhere")
    thread.start()
    paused.wait()
    try:
        yield
    finally:
        loops[0].call_soon_threadsafe(end.set)
        thread.join()


@pytest.fixture
def gate() -> Gate:
    return Gate()


def waits_for_a_callback() -> None:
    get_wait_ctx().status = WaitStatus.OK
    pause_job()


def awaits() -> None:
    await_(asyncio.sleep(3600))


# -- all_jobs


def test_no_jobs_are_live_where_none_was_started() -> None:
    assert all_jobs() == []
    assert printed() == "0 jobs: 0 running, 0 paused\n"


def test_hand_driven_job_is_found_by_its_own_handle_until_it_has_finished() -> None:
    job = paused_by_hand()
    (found,) = all_jobs()
    assert found is job
    start_job(found, None)
    assert all_jobs() == []
    assert found.get_stack() == []


def test_looking_does_not_keep_a_hand_driven_job_alive() -> None:
    seen = []

    def work() -> None:
        try:
            pause_job()
        except GeneratorExit:
            seen.append("unwound")
            raise

    _, job, _ = start_job(None, None, work)
    found = all_jobs()
    printed()
    del job
    assert not seen
    found.clear()
    assert seen == ["unwound"]
    assert all_jobs() == []


async def test_running_and_paused_jobs_of_a_loop_are_found(gate: Gate) -> None:
    def look() -> list[Job]:
        found = all_jobs()
        assert get_current_job() in found
        assert found == all_jobs()
        return found

    tasks = await at_its_pause(run_job(gate.wait), run_job(awaits))
    found = await run_job(look)
    assert sorted(job.func.__name__ for job in found) == ["awaits", "look", "wait"]
    assert sorted(job.status.name for job in found) == ["FINISH", "PAUSE", "PAUSE"]
    assert len({*found, *all_jobs()}) == 3
    await cancelled(*tasks)
    assert {job.status for job in found} == {JobStatus.FINISH}
    assert all_jobs() == []


async def test_next_job_on_the_same_fibre_is_another_job(gate: Gate) -> None:
    (task,) = await at_its_pause(run_job(awaits))
    (first,) = all_jobs()
    await cancelled(task)
    (task,) = await at_its_pause(run_job(awaits))
    (second,) = all_jobs()
    assert second != first
    assert (first.status, second.status) == (JobStatus.FINISH, JobStatus.PAUSE)
    assert (first.get_stack(), names(second)) == ([], ["awaits", "await_"])
    await cancelled(task)


async def test_handle_outlives_the_fibre() -> None:
    (task,) = await at_its_pause(run_job(awaits))
    (job,) = all_jobs()
    await cancelled(task)
    cleanup_thread()
    gc.collect()
    assert job.status is JobStatus.FINISH
    assert repr(job) == "<Job FINISH awaits in MainThread on None>"
    assert job != "job"


def test_jobs_of_other_threads_are_found() -> None:
    with paused_elsewhere(awaits):
        (job,) = all_jobs()
        assert job.func is awaits
        assert job.thread is not None
        assert job.thread.name == "elsewhere"
        assert names(job) == ["awaits", "await_"]
        assert "awaits in elsewhere, paused for 0.0 s" in printed()
    assert job.status is JobStatus.FINISH


async def test_found_job_has_the_wait_context_of_the_job() -> None:
    (task,) = await at_its_pause(run_job(awaits))
    (job,) = all_jobs()
    with pytest.raises(WrongThreadError, match="ask for it first in the job's own thread"):
        elsewhere(lambda: job.wait_ctx)
    ctx = job.wait_ctx
    assert all_jobs()[0].wait_ctx is ctx
    assert elsewhere(lambda: all_jobs()[0].wait_ctx) is ctx
    await cancelled(task)
    with pytest.raises(JobError, match="has finished"):
        assert job.wait_ctx


def test_found_job_without_a_context_gets_none_while_its_loop_does_not_run(
    loop_factory: LoopFactory,
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        (task,) = runner.run(at_its_pause(run_job(awaits)))
        (job,) = all_jobs()
        with pytest.raises(JobError, match="gets one only while its event loop runs"):
            assert job.wait_ctx
        assert repr(job) == "<Job PAUSE awaits in MainThread on None>"
        runner.run(cancelled(task))


async def test_found_job_of_a_loop_cannot_be_resumed_by_hand() -> None:
    (task,) = await at_its_pause(run_job(awaits))
    (job,) = all_jobs()
    with pytest.raises(JobError, match="driven by run_job"):
        start_job(job, None)
    await cancelled(task)
    with pytest.raises(JobError, match="has finished"):
        start_job(job, None)


async def test_job_of_a_session_is_found_with_its_context_and_function() -> None:
    async with Session() as session:
        (task,) = await at_its_pause(session.run_job(waits_for_a_callback))
        (job,) = all_jobs()
        assert job.func is waits_for_a_callback
        assert get_wait_ctx(job) is session.wait_ctx
        await cancelled(task)


def test_job_whose_thread_has_ended_is_not_live_and_counts_as_cancelled() -> None:
    before = stats()
    _, job, _ = elsewhere(lambda: start_job(None, None, pause_job))
    assert job is not None
    assert all_jobs() == []
    assert stats().cancelled - before.cancelled == 1
    job = None


def test_job_being_dropped_by_another_thread_is_not_found_any_more() -> None:
    job: Job | None = paused_by_hand()

    def drop() -> None:
        nonlocal job
        job = None

    elsewhere(drop)
    assert all_jobs() == []
    assert stats().paused == 1  # until this thread gets to it
    start_job(None, None, int)
    assert stats().paused == 0


def test_job_resumed_while_another_thread_drops_it_goes_its_way() -> None:
    """The other thread lets go last, and before its finalizer runs, this one finds the handle."""
    job = paused_by_hand()
    elsewhere(job.__del__)
    assert start_job(job, None).status is JobStatus.FINISH
    _, other, _ = start_job(None, None, pause_job)  # on the same fibre; does what was posted
    assert other is not None
    assert other.status is JobStatus.PAUSE
    start_job(other, None)


def test_handle_is_not_found_when_the_garbage_collector_has_its_weak_reference_cleared() -> None:
    job = paused_by_hand()
    fibre = job._fibre
    assert fibre is not None
    handle, fibre.handle = fibre.handle, None
    assert all_jobs() == []
    fibre.handle = handle
    assert all_jobs() == [job]
    start_job(job, None)


@pytest.mark.parametrize("change", ["ends", "is followed by another"])
def test_job_that_ends_while_it_is_looked_at_is_not_found(change: str) -> None:
    """Another thread's job, between two looks at its number."""
    job = paused_by_hand()
    fibre = job._fibre
    assert fibre is not None
    port = fibre.port

    class MovingPort:
        looks = 0
        func = None if change == "ends" else pause_job

        @property
        def number(self) -> float:
            self.looks += 1
            return port.number + self.looks

    fibre.port = MovingPort()  # type: ignore[assignment]
    try:
        assert _inspect._job_on(fibre) is None
    finally:
        fibre.port = port
    start_job(job, None)


# -- get_stack


def test_stack_is_outermost_first_down_to_the_pause() -> None:
    def inner() -> None:
        pause_job()

    def outer() -> None:
        inner()

    _, job, _ = start_job(None, None, outer)
    assert job is not None
    assert names(job) == ["outer", "inner", "pause_job", "pause_to_loop"]
    assert elsewhere(job.get_stack) == job.get_stack()
    start_job(job, None)
    assert job.get_stack() == []


async def test_stack_goes_on_in_the_greenlets_that_paused_the_job() -> None:
    def child() -> None:
        greenlet.greenlet(grandchild).switch()

    def grandchild() -> None:
        await_(asyncio.sleep(3600))

    def work() -> None:
        greenlet.greenlet(child).switch()

    (task,) = await at_its_pause(run_job(work))
    (job,) = all_jobs()
    assert names(job) == ["work", "child", "grandchild", "await_", "pause_nested"]
    assert "waits for <coroutine object sleep at" in printed()
    await cancelled(task)


async def test_stack_of_the_running_job_ends_with_the_caller() -> None:
    def look() -> list[str]:
        (job,) = all_jobs()
        return names(job)

    def work() -> list[str]:
        return look()

    def in_greenlet() -> list[str]:
        return greenlet.greenlet(look).switch()  # type: ignore[no-any-return]

    assert await run_job(work) == ["work", "look", "names"]
    assert await run_job(in_greenlet) == ["in_greenlet", "look", "names"]


def test_stack_of_a_job_that_runs_in_another_thread_is_where_it_blocks() -> None:
    begun, end = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        end.wait()

    thread = threading.Thread(target=lambda: start_job(None, None, block))
    thread.start()
    begun.wait()
    (job,) = all_jobs()
    while names(job)[:2] != ["block", "wait"]:
        sleep(0.001)  # it is on the way there
    assert ", running" in printed()
    end.set()
    thread.join()


def test_stack_of_a_job_that_runs_a_greenlet_in_another_thread_is_its_own() -> None:
    begun, end = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        end.wait()

    def work() -> None:
        greenlet.greenlet(block).switch()

    thread = threading.Thread(target=lambda: start_job(None, None, work))
    thread.start()
    begun.wait()
    (job,) = all_jobs()
    assert names(job) == ["work"]
    end.set()
    thread.join()


def test_stack_is_empty_where_the_job_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's job ended between the look at its fibre and that at its thread's frames."""
    monkeypatch.setattr(_stack, "_current_frames", dict)
    begun, end = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        end.wait()

    thread = threading.Thread(target=lambda: start_job(None, None, block))
    thread.start()
    begun.wait()
    (job,) = all_jobs()
    assert job.get_stack() == []
    end.set()
    thread.join()


async def test_greenlet_of_a_paused_job_is_not_in_its_stack() -> None:
    children: list[greenlet.greenlet] = []

    def work() -> None:
        children.append(greenlet.greenlet(lambda: all_jobs()[0].get_stack()))
        awaits()

    (task,) = await at_its_pause(run_job(work))
    children[0].parent = greenlet.getcurrent()
    frames = children[0].switch()
    assert [frame.f_code.co_name for frame in frames] == ["work", "awaits", "await_"]
    await cancelled(task)


# -- print_jobs


async def test_three_paused_jobs_fit_on_a_screen() -> None:
    reading, writing = os.pipe()
    end = threading.Event()

    def query() -> None:
        ctx = get_wait_ctx()
        ctx.set_wait_fd("the-engine", reading)
        pause_job()

    def handle() -> None:
        query()

    tasks = await at_its_pause(
        run_job(handle), run_job(waits_for_a_callback), run_job(offload, end.wait)
    )
    text = printed()
    end.set()
    assert text.startswith("3 jobs: 0 running, 3 paused\n\n")
    assert len(text.splitlines()) < 24
    job = rf"""{NAME}handle in MainThread, paused for 0.0 s
  waits for fd {reading} \(key 'the-engine'\)
    File "{__file__}", line \d+, in handle
      query\(\)
    File "{__file__}", line \d+, in query
      pause_job\(\)
"""
    assert re.search(job, text)
    assert (
        "waits_for_a_callback in MainThread, paused for 0.0 s\n  waits for the callback\n" in text
    )
    assert "offload in MainThread, paused for 0.0 s\n  waits for <Future pending" in text
    await cancelled(*tasks)
    os.close(reading)
    os.close(writing)


NAME = re.escape("test_three_paused_jobs_fit_on_a_screen.<locals>.")


def polls() -> None:
    while True:
        pause_job()


def sends_by_sqlalchemy() -> None:
    await_only(asyncio.sleep(3600))


class Unspeakable:
    def __await__(self) -> Any:
        return asyncio.sleep(3600).__await__()

    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (polls, "nothing that is known: it is polled"),
        (sends_by_sqlalchemy, "what await_() in sqlalchemy.util.concurrency awaits"),
        (lambda: await_(Unspeakable()), "<Unspeakable instance at"),
        (lambda: offload(pow, 2, 2, executor=NeverExecutor()), "the callback"),
    ],
)
async def test_what_a_job_waits_for_is_named(work: Callable[[], Any], expected: str) -> None:
    (task,) = await at_its_pause(run_job(work))
    assert f"waits for {expected}" in printed()
    await cancelled(task)


class NeverExecutor(ThreadPoolExecutor):
    def submit(self, *_: Any, **__: Any) -> Any:
        from concurrent.futures import Future

        return Future()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (WaitStatus.ERR, "nothing any more: its status is ERR"),
        (WaitStatus.EAGAIN, "an engine that is busy (EAGAIN): it is resumed soon"),
        (WaitStatus.OK, "fd 0 (key 'key') or the callback"),
        (WaitStatus.UNSUPPORTED, "fd 0 (key 'key')"),
    ],
)
async def test_what_an_engine_has_said_is_told(status: WaitStatus, expected: str) -> None:
    (task,) = await at_its_pause(run_job(waits_for_a_callback))
    ctx = all_jobs()[0].wait_ctx
    ctx.set_wait_fd("key", 0)
    ctx.status = status
    assert f"waits for {expected}\n" in printed()
    await cancelled(task)


@pytest.mark.parametrize(
    ("wait", "what"), [(wait_readable, "readable"), (wait_writable, "writable")]
)
async def test_what_an_engine_waits_for_is_named(wait: Callable[..., None], what: str) -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            here.send(bytes(1 << 16))
    (task,) = await at_its_pause(run_job(wait, here, 3600))
    assert f"(key <fd {here.fileno()} {what}>)" in printed()
    await cancelled(task)
    here.close()
    there.close()


def test_what_a_hand_written_loop_has_to_watch_is_named() -> None:
    def work() -> None:
        offload(pow, 2, 2)

    with WaitCtx() as ctx:
        job = paused_by_hand()
        assert "waits for its driver\n" in printed()
        start_job(job, None)
        ctx.set_callback(print)
        ctx.set_wait_fd("key", 0)
        job = paused_by_hand(ctx)
        assert "waits for its driver, with fd 0 (key 'key'), the callback\n" in printed()
        start_job(job, ctx)


async def test_jobs_in_the_queue_for_the_pool_are_printed_last() -> None:
    init_thread(1)
    session = Session()
    tasks = await at_its_pause(
        run_job(awaits), run_job(waits_for_a_callback), session.run_job(pause_job)
    )
    text = printed()
    assert text.startswith("1 job: 0 running, 1 paused; 2 waiting for a pool\n\nawaits in ")
    assert text.endswith(
        "\nwaits_for_a_callback in MainThread, in the queue for 0.0 s\n"
        "  waits for the pool of its thread: the limit of 1 job(s) is reached\n"
        "\npause_job in MainThread, in the queue for 0.0 s\n"
        "  waits for the pool of its thread: the limit of 1 job(s) is reached\n"
    )
    assert stats().waiters == 2
    await cancelled(*tasks)
    session.wait_ctx.free()
    init_thread()


async def test_running_job_is_printed_first_and_deep_stacks_are_cut() -> None:
    def deep(levels: int) -> str:
        if levels:
            return deep(levels - 1) if levels % 2 else str(deep(levels - 1))
        return printed()

    (task,) = await at_its_pause(run_job(awaits))
    first, second = (await run_job(deep, 30)).split("\n\n")[1:]
    assert first.startswith(f"{deep.__qualname__} in MainThread, running\n    (23 outer frames)\n")
    assert first.endswith("in printed_with_times\n      print_jobs(file)")
    assert second.startswith("awaits in MainThread, paused")
    await cancelled(task)


def test_jobs_are_printed_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_jobs()
    assert capsys.readouterr().out == "0 jobs: 0 running, 0 paused\n"


def test_job_of_a_thread_that_threading_does_not_know_is_printed() -> None:
    pool = _fibre.pool_of_thread()
    thread, pool.thread = pool.thread, None
    job = paused_by_hand()
    assert "pause_job in an unknown thread, paused" in printed()
    start_job(job, None)
    pool.thread = thread


def test_job_that_goes_on_while_it_is_printed_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = paused_by_hand()
    monkeypatch.setattr(_inspect, "stack_of", lambda *_: [])
    assert "waits for nothing any more: it goes on just now\n" in printed()
    start_job(job, None)


# -- how long


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (_observe, _inspect):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(_observe._end, "__defaults__", (clock,))
    return clock


@pytest.fixture
def open_intervals(monkeypatch: pytest.MonkeyPatch) -> list[_observe._End]:
    """What ends intervals when it is dropped: not as long as it is in this list."""
    ends: list[_observe._End] = []

    class HeldEnd(_observe._End):
        def __init__(self, pool: _fibre.Pool, interval: _fibre.Interval) -> None:
            super().__init__(pool, interval)
            ends.append(self)

    monkeypatch.setattr(_observe, "_End", HeldEnd)
    return ends


def pause_time() -> str:
    (time,) = re.findall("paused for (.*)", printed_with_times())
    return str(time)


async def test_time_of_a_pause_is_exact_in_debug_mode(clock: Clock) -> None:
    (task,) = await at_its_pause(run_job(awaits))
    clock.now += 12.34
    assert pause_time() == "12.3 s"
    assert _fibre.pool_of_thread().interval is None
    await cancelled(task)


def run_without_debug(loop: asyncio.AbstractEventLoop, main: Awaitable[T]) -> T:
    loop.set_debug(False)
    return loop.run_until_complete(main)


def test_time_of_a_pause_is_known_to_the_length_of_an_interval(
    loop_factory: LoopFactory, clock: Clock, open_intervals: list[_observe._End]
) -> None:
    pool = _fibre.pool_of_thread()

    async def main() -> None:
        (first,) = await at_its_pause(run_job(awaits))
        interval = pool.interval
        assert interval is not None
        clock.now += 0.1
        (second,) = await at_its_pause(run_job(awaits))
        assert pool.interval is interval
        open_intervals.clear()
        while pool.interval is not None:
            await asyncio.sleep(0.01)
        assert interval.end == clock.now
        clock.now += 20
        assert set(re.findall("paused for (.*)", printed_with_times())) == {"20.1 s"}
        await cancelled(first, second)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        run_without_debug(runner.get_loop(), main())


@pytest.mark.usefixtures("open_intervals")
def test_time_of_a_pause_in_a_stalled_loop_lies_between_two_times(
    loop_factory: LoopFactory, clock: Clock
) -> None:
    async def main() -> None:
        (task,) = await at_its_pause(run_job(awaits))
        clock.now += 7  # without giving way to the loop
        assert pause_time() == "0.0 to 7.0 s"
        clock.now += 3
        assert pause_time() == "3.0 to 10.0 s"
        await cancelled(task)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        run_without_debug(runner.get_loop(), main())


def test_interval_ends_with_its_loop(
    loop_factory: LoopFactory, clock: Clock, open_intervals: list[_observe._End]
) -> None:
    pool = _fibre.pool_of_thread()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        run_without_debug(runner.get_loop(), run_job(await_, asyncio.sleep(0)))
        interval = pool.interval
        assert interval is not None
        open_intervals.clear()
    del runner
    gc.collect()
    assert interval.end == clock.now
    assert pool.interval is None


def test_time_of_a_job_driven_without_a_loop_is_exact(clock: Clock) -> None:
    class Bare:
        def __await__(self) -> Any:
            yield

    coroutine = run_job(await_, Bare())
    coroutine.send(None)
    clock.now += 5
    assert pause_time() == "5.0 s"
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_interval_that_another_one_has_followed_is_ended_alone() -> None:
    pool = _fibre.pool_of_thread()
    old, pool.interval = _fibre.Interval(1.0, 2.0), _fibre.Interval(3.0)
    _observe._end(pool, old)
    assert (old.end, pool.interval.end) == (2.0, None)
    pool.interval = None


# -- stats


def fail() -> NoReturn:
    raise ZeroDivisionError


async def changes(before: aiojob.Stats) -> dict[str, int]:
    after = stats()
    assert after.started == sum(
        (after.finished, after.failed, after.cancelled, after.running, after.paused)
    )
    return {
        name: new - old
        for name, new, old in zip(after._fields, after, before, strict=True)
        if new != old and name != "pooled"
    }


async def test_jobs_are_counted_by_their_ends() -> None:
    before = stats()
    await run_job(int)
    await run_job(await_, asyncio.sleep(0))
    assert await changes(before) == {"started": 2, "finished": 2, "pauses": 1}
    with pytest.raises(ZeroDivisionError):
        await run_job(fail)
    (task,) = await at_its_pause(run_job(awaits))
    assert await changes(before) == {
        "started": 4, "finished": 2, "failed": 1, "pauses": 2, "paused": 1,
    }  # fmt: skip
    await cancelled(task)
    coroutine = run_job(pause_job)
    coroutine.send(None)
    coroutine.close()
    assert (await changes(before))["cancelled"] == 2
    assert (await run_job(stats)).running == 1
    assert stats().running == 0


def test_hand_driven_jobs_are_counted() -> None:
    before = stats()
    job = paused_by_hand()
    assert stats().paused == 1
    start_job(job, None)
    job = paused_by_hand()
    del job
    after = stats()
    assert after.started - before.started == 2
    assert after.finished - before.finished == 1
    assert after.cancelled - before.cancelled == 1
    assert after.pauses - before.pauses == 2


def test_fibres_made_in_advance_are_no_jobs() -> None:
    before = stats()
    init_thread(4, 3)
    after = stats()
    assert (after.started, after.finished) == (before.started, before.finished)
    assert after.pooled == 3
    init_thread()


async def test_job_that_is_given_up_counts_as_failed() -> None:
    before = stats()

    def work() -> None:
        try:
            pause_job()
        finally:
            main.switch()

    main = greenlet.getcurrent()
    coroutine = run_job(work)
    coroutine.send(None)
    with pytest.raises(JobError):
        coroutine.close()
    after = stats()
    assert after.failed - before.failed == 1
    assert after.paused == 0


def test_counts_of_many_threads_are_added_up() -> None:
    before = stats()
    start = threading.Barrier(8)

    def thread() -> None:
        async def main() -> None:
            for _ in range(200):
                await run_job(await_, asyncio.sleep(0))
                with suppress(ZeroDivisionError):
                    await run_job(fail)

        start.wait()
        asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    after = stats()
    assert after.finished - before.finished == after.failed - before.failed == 1600
    assert after.pauses - before.pauses == 1600


def test_counts_of_ended_threads_stay_few() -> None:
    before = stats()
    for _ in range(_fibre.UNMERGED + 8):
        elsewhere(lambda: start_job(None, None, int))
    assert stats().finished - before.finished == _fibre.UNMERGED + 8
    registry = _fibre._registry
    assert len(registry._ended) <= _fibre.UNMERGED + 1
    with registry._lock:  # somebody counts: those that end meanwhile are kept
        ended = len(registry._ended)
        for _ in range(_fibre.UNMERGED + 8):
            elsewhere(lambda: start_job(None, None, int))
        assert len(registry._ended) == ended + _fibre.UNMERGED + 8
    elsewhere(lambda: start_job(None, None, int))
    assert len(registry._ended) == 1


def test_child_forked_while_another_thread_counts_can_count() -> None:
    with _fibre._registry._lock, paused_elsewhere(awaits):
        if (child := os.fork()) == 0:
            code = 1
            with suppress(BaseException):
                code = 0 if stats().started and not all_jobs() else 2
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_the_frames_of_threads_are_looked_at(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 deadlocks then."""
    current_frames = CurrentFrames()
    seen: list[bool] = []

    def look() -> dict[int, FrameType]:
        seen.append(gc.isenabled())
        if len(seen) == 1:  # as a signal handler would, and then a fork
            current_frames()
            current_frames.forget()
            assert gc.isenabled() == enabled
        return {}

    monkeypatch.setattr(sys, "_current_frames", look)
    if not enabled:
        gc.disable()
    try:
        assert current_frames() == {}
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [False, False]


@pytest.mark.parametrize("debug", [False, True])
def test_other_threads_may_look_at_any_moment(debug: bool, loop_factory: LoopFactory) -> None:
    end = threading.Event()
    faults: list[BaseException] = []

    def look() -> None:
        try:
            while not end.is_set():
                printed()
                for job in all_jobs():
                    assert repr(job)
                    job.get_stack()
                counts = stats()
                assert min(counts) >= 0
        except BaseException as error:
            faults.append(error)

    def work(depth: int) -> None:
        if depth:
            work(depth - 1)
        await_(asyncio.sleep(0))
        with pause_blocked():
            get_wait_ctx().status = WaitStatus.EAGAIN
        pause_job()

    def by_hand() -> None:
        while not end.is_set():
            job = paused_by_hand()
            start_job(job, None)
            start_job(None, None, pause_job)  # dropped

    async def main() -> None:
        deadline = monotonic() + 0.4
        while monotonic() < deadline:
            await asyncio.gather(*(run_job(work, depth) for depth in range(10)))

    threads = [threading.Thread(target=func) for func in (look, look, by_hand)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        with asyncio.Runner(loop_factory=loop_factory, debug=debug) as runner:
            runner.run(main())
    finally:
        end.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not faults


def test_function_with_a_long_repr_or_none_is_shown_all_the_same() -> None:
    class Silent:
        def __call__(self, data: bytes) -> None:
            pause_job()

        def __repr__(self) -> str:
            raise ValueError("no repr")

    data = bytes(100_000)
    _, silent, _ = start_job(None, None, Silent(), data)
    _, partial, _ = start_job(None, None, functools.partial(Silent.__call__, Silent(), data))
    _, long, _ = start_job(None, None, functools.partial(lambda data: pause_job(), data))
    lines = printed().splitlines()
    assert sum("<Silent instance at 0x" in line for line in lines) == 1
    assert sum("<partial instance at 0x" in line for line in lines) == 1
    assert sum("functools.partial(<function" in line for line in lines) == 1
    assert max(map(len, lines)) < 250
    assert "<Silent instance at 0x" in repr(silent)
    del silent, partial, long
