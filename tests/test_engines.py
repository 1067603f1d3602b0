"""Engines: the same results in a job, under a hand-written loop, blocked, and outside a job."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import PATIENCE, without_slow_steps

from aiojob import (
    CannotPauseError,
    Completion,
    EngineError,
    JobError,
    JobStatus,
    WaitCtx,
    WaitFdError,
    WaitStatus,
    await_,
    can_pause,
    get_wait_ctx,
    offload,
    offload_async,
    pause_blocked,
    pause_job,
    run_job,
    set_offload_threads,
    sleep,
    start_job,
    wait_future,
    wait_readable,
    wait_writable,
)
from aiojob.engines import _offload, _workers
from aiojob.testing import Gate

# -- the environments in which an engine may be called


def outside(func: Callable[[], Any]) -> Any:
    return func()


def under_run_job(func: Callable[[], Any]) -> Any:
    return asyncio.run(run_job(func))


def under_run_job_blocked(func: Callable[[], Any]) -> Any:
    return asyncio.run(run_job(blocked, func))


def blocked(func: Callable[[], Any]) -> Any:
    with pause_blocked():
        return func()


def under_select(func: Callable[[], Any]) -> Any:
    """Run a job in a loop that only watches fds."""
    with WaitCtx() as ctx:
        status, job, ret = start_job(None, ctx, func)
        while status is JobStatus.PAUSE:
            assert job is not None
            select.select(ctx.get_all_fds(), [], [], 20)
            status, job, ret = start_job(job, ctx)
        return ret


def under_callbacks(func: Callable[[], Any]) -> Any:
    """Run a job in a loop that has a callback, and watches the fds if that is not promised."""
    called = threading.Semaphore(0)
    with WaitCtx() as ctx:
        ctx.set_callback(lambda _: called.release())
        status, job, ret = start_job(None, ctx, func)
        while status is JobStatus.PAUSE:
            assert job is not None
            if ctx.status is WaitStatus.OK:
                assert called.acquire(timeout=60)
            else:
                select.select(ctx.get_all_fds(), [], [], 20)
            status, job, ret = start_job(job, ctx)
        return ret


ENVIRONMENTS = [
    outside,
    under_run_job,
    under_run_job_blocked,
    under_select,
    under_callbacks,
]
Environment = Callable[[Callable[[], Any]], Any]


@pytest.fixture(params=ENVIRONMENTS, ids=lambda environment: environment.__name__)
def environment(request: pytest.FixtureRequest) -> Environment:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    yield read_fd, write_fd
    os.close(read_fd)
    os.close(write_fd)


@contextmanager
def soon(func: Callable[..., object], *args: Any) -> Iterator[None]:
    """Call a function in another thread, when the caller probably waits already."""
    timer = threading.Timer(0.02, func, args)
    timer.start()
    try:
        yield
    finally:
        timer.join()


class OpError(Exception):
    pass


# -- Completion


def test_completion_returns_the_result_wherever_it_is_waited_for(environment: Environment) -> None:
    completion: Completion[int] = Completion()
    with soon(completion.set_result, 5):
        assert environment(completion.wait) == 5
    assert environment(completion.wait) == 5  # and again, at once


def test_completion_raises_the_exception_wherever_it_is_waited_for(
    environment: Environment,
) -> None:
    completion: Completion[int] = Completion()
    with soon(completion.set_exception, OpError("it")), pytest.raises(OpError, match="it"):
        environment(completion.wait)


def test_completion_that_is_set_before_the_wait_does_not_pause() -> None:
    completion: Completion[int] = Completion()
    completion.set_result(1)
    assert start_job(None, None, completion.wait) == (JobStatus.FINISH, None, 1)


def test_completion_times_out_wherever_it_is_waited_for(environment: Environment) -> None:
    cancelled: list[int] = []
    completion: Completion[int] = Completion(on_cancel=lambda: cancelled.append(1))
    with pytest.raises(TimeoutError, match=r"did not end within 0\.01 s"):
        environment(lambda: completion.wait(0.01))
    assert cancelled == [1]
    completion.set_result(7)
    assert environment(completion.wait) == 7


def test_completion_before_its_timeout_leaves_nothing_of_it(environment: Environment) -> None:
    completion: Completion[int] = Completion()
    with soon(completion.set_result, 5):
        assert environment(lambda: completion.wait(60)) == 5


def test_completion_takes_one_outcome_of_many_threads() -> None:
    completion: Completion[int] = Completion()
    barrier = threading.Barrier(4)
    refused = []

    def complete(number: int) -> None:
        barrier.wait()
        try:
            completion.set_result(number)
        except JobError as error:
            refused.append(error)

    threads = [threading.Thread(target=complete, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert completion.wait() in range(4)


def test_completion_refuses_a_second_outcome_and_keeps_the_first() -> None:
    completion: Completion[int] = Completion()
    completion.set_result(1)
    with pytest.raises(JobError, match="result 1"):
        completion.set_exception(OpError())
    assert completion.wait() == 1


@pytest.mark.parametrize("wrong", [OpError, "boom", None])
def test_completion_refuses_what_is_no_exception(wrong: Any) -> None:
    completion: Completion[int] = Completion()
    with pytest.raises(TypeError, match="exception is needed"):
        completion.set_exception(wrong)
    assert not completion.done()


def test_completion_refuses_an_on_cancel_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="on_cancel"):
        Completion(on_cancel=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (-1, ValueError),
        ("1", TypeError),
        (1e12, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
    ],
)
def test_timeout_that_is_none_is_refused(timeout: Any, error: type[Exception]) -> None:
    for wait in (
        Completion[int]().wait,
        lambda seconds: wait_readable(0, seconds),
        lambda seconds: sleep(seconds),
    ):
        with pytest.raises(error):
            wait(timeout)


def test_completion_shows_its_state() -> None:
    completion: Completion[int] = Completion()
    assert repr(completion) == "<Completion waited for by 0>"
    completion.set_result(3)
    assert repr(completion) == "<Completion result 3>"
    failed: Completion[int] = Completion()
    failed.set_exception(OpError())
    assert repr(failed) == "<Completion exception OpError()>"


async def test_completion_tells_the_operation_that_its_job_was_cancelled() -> None:
    cancelled = threading.Event()
    completion: Completion[int] = Completion(on_cancel=cancelled.set)
    task = asyncio.create_task(run_job(completion.wait))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
    completion.set_result(1)  # late, and harmless


async def test_completion_with_another_waiter_is_not_cancelled() -> None:
    cancelled: list[int] = []
    completion: Completion[int] = Completion(on_cancel=lambda: cancelled.append(1))
    tasks = [asyncio.create_task(run_job(completion.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert not cancelled
    completion.set_result(4)
    assert await asyncio.gather(*tasks[1:]) == [4, 4]


async def test_completion_survives_wake_ups_that_are_not_its_own() -> None:
    completion: Completion[int] = Completion()
    wakes = []

    def job() -> int:
        callback = get_wait_ctx().get_callback()
        assert callback is not None
        wakes.append(callback)
        return completion.wait()

    task = asyncio.create_task(run_job(job))
    for _ in range(3):
        await asyncio.sleep(0)
        for callback, arg in wakes:
            callback(arg)
    completion.set_result(9)
    assert await task == 9


async def test_completion_leaves_the_status_as_it_was() -> None:
    def job() -> WaitStatus:
        ctx = get_wait_ctx()
        ctx.status = WaitStatus.ERR
        offloaded: Completion[int] = Completion()
        with soon(offloaded.set_result, 1):
            offloaded.wait()
        return ctx.status

    assert await run_job(job) is WaitStatus.ERR


def test_completions_of_a_context_share_one_fd_that_is_unreadable_afterwards() -> None:
    seen = []

    def job() -> None:
        for _ in range(3):
            waited_for.append(Completion())
            waited_for[-1].wait()
            seen.extend(get_wait_ctx().get_all_fds())
            assert not select.select(get_wait_ctx().get_all_fds(), [], [], 0)[0]

    waited_for: list[Completion[None]] = []
    with WaitCtx() as ctx:
        status, started, _ = start_job(None, ctx, job)
        while started is not None:
            waited_for[-1].set_result(None)
            status, started, _ = start_job(started, ctx)
    assert status is JobStatus.FINISH
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_completion_late_for_a_job_of_a_select_loop_writes_to_no_fd() -> None:
    late: list[Callable[[], object]] = []

    def job() -> None:
        completion: Completion[None] = Completion()

        def complete() -> None:
            late.extend(completion._wakes)
            completion.set_result(None)

        with soon(complete):
            completion.wait()
        (fd,) = get_wait_ctx().get_all_fds()
        late[0]()
        assert not select.select([fd], [], [], 0)[0]

    under_select(job)
    late[0]()  # the fd is closed by now


def test_signal_works_without_eventfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")

    def job() -> int:
        results = []
        for number in range(3):
            completion: Completion[int] = Completion()
            with soon(completion.set_result, number):
                results.append(completion.wait())
        return sum(results)

    assert under_select(job) == 3


def test_completion_in_a_dropped_job_is_cancelled() -> None:
    cancelled: list[int] = []
    completion: Completion[int] = Completion(on_cancel=lambda: cancelled.append(1))
    result = start_job(None, None, completion.wait)
    assert result.status is JobStatus.PAUSE
    del result
    assert cancelled == [1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_completion_set_by_a_signal_handler_ends_a_blocked_wait() -> None:
    completion: Completion[int] = Completion()
    before = signal.signal(signal.SIGALRM, lambda *_: completion.set_result(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert completion.wait() == 1
    finally:
        signal.signal(signal.SIGALRM, before)


# -- sleep, wait_readable, wait_writable


def test_sleep_takes_its_time(environment: Environment) -> None:
    begin = time.monotonic()
    environment(lambda: sleep(0.02))
    assert time.monotonic() - begin >= 0.019


def test_sleep_of_nothing_returns(environment: Environment) -> None:
    environment(lambda: sleep(0))


async def test_sleep_lets_others_run() -> None:
    order = []

    def job(name: str) -> None:
        order.append(name)
        sleep(0)
        order.append(name)

    await asyncio.gather(run_job(job, "a"), run_job(job, "b"))
    assert order == ["a", "b", "a", "b"]


def test_wait_readable_returns_when_there_is_something(
    environment: Environment, pipe: tuple[int, int]
) -> None:
    with soon(os.write, pipe[1], b"x"):
        environment(lambda: wait_readable(pipe[0], 60))
    environment(lambda: wait_readable(pipe[0]))
    assert os.read(pipe[0], 9) == b"x"


def test_wait_readable_sees_the_end_of_the_file(environment: Environment) -> None:
    here, there = socket.socketpair()
    with here, soon(there.close):
        environment(lambda: wait_readable(here))
        assert here.recv(1) == b""


def test_wait_readable_times_out(environment: Environment, pipe: tuple[int, int]) -> None:
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=f"fd {pipe[0]} was not readable within {timeout} s"):
            environment(lambda: wait_readable(pipe[0], timeout))  # noqa: B023


def test_long_wait_polls_again(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiojob.engines._fds._LONGEST_POLL", 1)
    with soon(os.write, pipe[1], b"x"):
        wait_readable(pipe[0], 60)


def fill(fd: int) -> None:
    try:
        while True:
            os.write(fd, bytes(65536))
    except BlockingIOError:
        pass


def test_wait_writable_returns_when_there_is_room(
    environment: Environment, pipe: tuple[int, int]
) -> None:
    environment(lambda: wait_writable(pipe[1]))
    fill(pipe[1])
    with soon(os.read, pipe[0], 1 << 20):
        environment(lambda: wait_writable(pipe[1], 60))


def test_wait_writable_times_out(environment: Environment, pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    with pytest.raises(TimeoutError, match=f"fd {pipe[1]} was not writable"):
        environment(lambda: wait_writable(pipe[1], 0.01))


def test_waiting_for_a_closed_fd_is_an_error(environment: Environment) -> None:
    fd = fcntl.fcntl(0, fcntl.F_DUPFD, 500)  # a number that nobody else takes
    os.close(fd)
    with pytest.raises(WaitFdError, match=f"fd {fd} cannot be waited for: it is closed"):
        environment(lambda: wait_readable(fd))
    with socket.socket() as closed:
        pass
    with pytest.raises(ValueError, match="is the file closed"):
        environment(lambda: wait_readable(closed))


def test_waiting_for_a_regular_file_returns_at_once(environment: Environment) -> None:
    with open(__file__) as file:
        environment(lambda: wait_readable(file))
        environment(lambda: wait_writable(file))


async def test_several_jobs_wait_for_one_fd_and_all_are_woken(pipe: tuple[int, int]) -> None:
    jobs = [asyncio.create_task(run_job(wait_readable, pipe[0])) for _ in range(3)]
    await asyncio.sleep(0)
    os.write(pipe[1], b"x")
    await asyncio.gather(*jobs)


async def test_several_jobs_wait_for_room_and_all_are_woken(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    jobs = [asyncio.create_task(run_job(wait_writable, pipe[1])) for _ in range(3)]
    await asyncio.sleep(0)
    os.read(pipe[0], 1 << 20)
    await asyncio.gather(*jobs)


async def test_cancelled_wait_for_an_fd_leaves_no_reader(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    for wait, fd in ((wait_readable, os.dup(pipe[1])), (wait_writable, pipe[1])):
        job = asyncio.create_task(run_job(wait, fd, 60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert not asyncio.get_running_loop().remove_reader(fd)
        if fd != pipe[1]:
            os.close(fd)


# -- wait_future


def test_wait_future_returns_what_a_concurrent_future_does(environment: Environment) -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    with soon(future.set_result, 3):
        assert environment(lambda: wait_future(future)) == 3
    assert environment(lambda: wait_future(future)) == 3


def test_wait_future_raises_what_a_concurrent_future_does(environment: Environment) -> None:
    for error in (OpError(), StopIteration(4)):
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        with (
            soon(future.set_exception, error),
            pytest.raises(
                RuntimeError
                if isinstance(error, StopIteration) and "run_job" in environment.__name__
                else type(error)
            ),
        ):
            environment(lambda: wait_future(future))  # noqa: B023


def test_wait_future_that_somebody_cancels_raises(environment: Environment) -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    with soon(future.cancel), pytest.raises(concurrent.futures.CancelledError):
        environment(lambda: wait_future(future))


async def test_wait_future_cancels_the_future_with_its_job() -> None:
    loop = asyncio.get_running_loop()
    for future in (concurrent.futures.Future[int](), loop.create_future()):
        task = asyncio.create_task(run_job(wait_future, future))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert future.cancelled()


async def test_wait_future_of_the_loop_pauses_the_job() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_job(wait_future, future))
    await asyncio.sleep(0)
    future.set_result(6)
    assert await task == 6
    assert await run_job(wait_future, future) == 6


async def test_wait_future_of_this_loop_where_nothing_pauses_is_an_error() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(CannotPauseError, match="call this function through run_job"):
        wait_future(future)
    with pytest.raises(CannotPauseError):
        await run_job(blocked, lambda: wait_future(future))
    assert not future.done()


def test_wait_future_of_another_threads_loop_works_everywhere(environment: Environment) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        future: asyncio.Future[int] = loop.create_future()
        with soon(loop.call_soon_threadsafe, future.set_result, 8):
            assert environment(lambda: wait_future(future)) == 8
        cancelled: asyncio.Future[int] = loop.create_future()
        with (
            soon(loop.call_soon_threadsafe, cancelled.cancel),
            pytest.raises(asyncio.CancelledError),
        ):
            environment(lambda: wait_future(cancelled))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_cancelled_wait_for_the_future_of_a_loop_that_has_closed_is_cancelled() -> None:
    other = asyncio.new_event_loop()
    try:
        future = other.create_future()
        runs = offload_async(other.run_forever)
        while not other.is_running():
            await asyncio.sleep(0.001)
        waits = asyncio.create_task(run_job(wait_future, future))
        await asyncio.sleep(0)
        other.call_soon_threadsafe(other.stop)
        await runs
    finally:
        other.close()
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits


def test_wait_future_of_a_loop_that_nobody_runs_is_an_error() -> None:
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(RuntimeError, match="no thread runs its event loop"):
            wait_future(loop.create_future())
    finally:
        loop.close()


@pytest.mark.parametrize("wrong", [3, None, "future"])
def test_wait_future_refuses_what_is_no_future(wrong: Any) -> None:
    with pytest.raises(TypeError, match="await_"):
        wait_future(wrong)


# -- offload


def test_offload_runs_in_a_worker_thread(environment: Environment) -> None:
    assert environment(lambda: offload(threading.get_ident)) != threading.get_ident()
    assert environment(lambda: offload(dict, a=1)) == {"a": 1}


def raise_it(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [OpError("it"), KeyError("k"), SystemExit(3)], ids=repr)
def test_offload_raises_what_the_function_raises(
    environment: Environment, error: BaseException
) -> None:
    def job() -> str:
        try:
            offload(raise_it, error)
        except type(error) as raised:
            return "".join(traceback.format_tb(raised.__traceback__))
        return ""

    frames = environment(job)
    assert "in raise_it" in frames
    assert "in job" in frames


def test_offload_passes_a_stop_iteration_on(environment: Environment) -> None:
    def job() -> Any:
        try:
            offload(next, iter(()))
        except StopIteration as stop:
            return stop
        return None

    assert isinstance(environment(job), StopIteration)


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


def test_offload_sees_a_copy_of_the_context(environment: Environment) -> None:
    def job() -> tuple[int, int]:
        variable.set(5)
        return offload(change_variable), variable.get()

    def change_variable() -> int:
        before = variable.get()
        variable.set(6)
        return before

    assert contextvars.copy_context().run(environment, job) == (5, 5)


class Large:
    """An argument that should not be kept."""


def fail_with(large: Large) -> None:
    raise OpError(large)


def test_offload_leaves_nothing_to_the_garbage_collector(environment: Environment) -> None:
    def job() -> tuple[weakref.ref[Large], weakref.ref[Large]]:
        returned, raised = Large(), Large()
        references = weakref.ref(returned), weakref.ref(raised)
        assert offload(lambda large: large, returned) is returned
        with pytest.raises(OpError) as caught:
            offload(fail_with, raised)
        del caught
        return references

    # A worker lets go of its call after it has told of it.
    references = environment(job)
    for workers in _offload.all_workers():
        assert not workers.end(60)
    assert [reference() for reference in references] == [None, None]


def test_offload_inside_offload_cannot_exhaust_the_workers(
    environment: Environment, one_worker: None
) -> None:
    def nested(depth: int) -> int:
        return 0 if depth == 0 else 1 + offload(nested, depth - 1)

    assert environment(lambda: offload(nested, 5)) == 5


def test_offload_from_an_event_loop_inside_a_worker_has_workers_of_its_own(
    environment: Environment, one_worker: None
) -> None:
    async def main() -> list[Any]:
        jobs = (run_job(offload, divmod, number, 1) for number in range(3))
        return [*await asyncio.gather(*jobs), await offload_async(pow, 3, 3)]

    assert environment(lambda: offload(lambda: asyncio.run(main()))) == [(0, 0), (1, 0), (2, 0), 27]


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    limit = _offload._levels._limit
    set_offload_threads(threads)
    try:
        yield
    finally:
        set_offload_threads(limit)


@pytest.fixture
def one_worker() -> Iterator[None]:
    with limited_to(1):
        yield


@pytest.fixture
def two_workers() -> Iterator[None]:
    with limited_to(2):
        yield


@pytest.fixture
def no_new_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the system refuse to start threads, once this is called."""

    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(_workers.Worker, "start", refuse)


async def test_offload_cancelled_before_it_began_is_dropped(one_worker: None) -> None:
    gate = Gate()
    begun: list[str] = []
    first = asyncio.create_task(run_job(offload, gate.wait))
    await run_job(gate.reached)
    second = asyncio.create_task(run_job(offload, begun.append, "job"))
    third = offload_async(begun.append, "coroutine")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second.cancel()
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.open()
    await first
    assert await offload_async(pow, 2, 2) == 4  # it came after both
    assert begun == []


async def test_offload_cancelled_under_way_goes_on_and_its_result_is_dropped() -> None:
    gate = Gate()
    ended = threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()
        raise OpError

    task = asyncio.create_task(run_job(offload, work))
    await run_job(gate.reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended.is_set()
    gate.open()
    assert await run_job(offload, ended.wait)
    await asyncio.sleep(0)


async def test_offload_outlives_its_closed_loop() -> None:
    gate = Gate()
    ended = threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()

    def own_loop() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(run_job(offload, work))
        loop.run_until_complete(run_job(gate.reached))
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()

    thread = threading.Thread(target=own_loop)
    thread.start()
    await run_job(offload, thread.join)
    gate.open()
    assert await run_job(offload, ended.wait)


async def test_offloads_run_in_parallel_up_to_the_limit(two_workers: None) -> None:
    barrier = threading.Barrier(2)
    assert sorted(await asyncio.gather(*(run_job(offload, barrier.wait) for _ in range(2)))) == [
        0,
        1,
    ]
    gate = Gate()
    tasks = [asyncio.create_task(run_job(offload, gate.wait)) for _ in range(5)]
    await run_job(gate.reached, 2)
    assert len(_offload._levels[0].threads) == 2
    gate.open()
    await asyncio.gather(*tasks)


async def test_raised_limit_starts_workers_for_what_waits(one_worker: None) -> None:
    barrier = threading.Barrier(3)
    tasks = [asyncio.create_task(run_job(offload, barrier.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    set_offload_threads(3)
    assert sorted(await asyncio.gather(*tasks)) == [0, 1, 2]


async def test_lowered_limit_ends_surplus_workers() -> None:
    barrier = threading.Barrier(3)
    await asyncio.gather(*(offload_async(barrier.wait) for _ in range(3)))
    workers = _offload._levels[0]
    before = workers.threads
    with limited_to(1):
        while len(workers.threads) > 1:
            await asyncio.sleep(0.001)
        assert await offload_async(pow, 2, 3) == 8
        for worker in set(before) - set(workers.threads):
            worker.join(60)
            assert not worker.is_alive()


def test_idle_workers_end_and_others_start_later(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = _offload._levels[0]
    monkeypatch.setattr(workers, "idle_seconds", 0.001)
    for _ in range(5):
        assert offload(pow, 2, 3) == 8
        for thread in workers.threads:
            thread.join(60)
        assert workers.threads == ()


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError), (None, TypeError)],
)
def test_limit_that_is_none_is_refused(limit: Any, error: type[Exception]) -> None:
    before = _offload._levels._limit
    with pytest.raises(error):
        set_offload_threads(limit)
    assert _offload._levels._limit == before


def test_offload_without_a_thread_to_be_had_raises_and_loses_nothing(
    environment: Environment, no_new_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    no_new_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        environment(lambda: offload(ran.append, 1))
    monkeypatch.undo()
    assert environment(lambda: offload(pow, 2, 3)) == 8
    assert ran == []


async def test_offload_with_some_thread_waits_for_it_if_no_other_can_be_had(
    no_new_threads: Callable[[], None],
) -> None:
    gate = Gate()
    first = offload_async(gate.wait)
    await run_job(gate.reached)
    no_new_threads()
    second = offload_async(pow, 2, 3)
    gate.open()
    assert await second == 8
    await first


async def test_offload_async_raises_what_the_function_raises() -> None:
    with pytest.raises(OpError):
        await offload_async(raise_it, OpError())
    with pytest.raises(RuntimeError, match="StopIteration"):
        await offload_async(next, iter(()))


def test_offload_async_without_a_loop_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        offload_async(pow, 2, 3)


async def test_offload_in_a_job_that_is_closed_blocks_instead() -> None:
    results = []

    def job() -> None:
        try:
            await_(asyncio.get_running_loop().create_future())
        finally:
            assert not can_pause()
            results.append(offload(pow, 2, 3))

    coroutine = run_job(job)
    coroutine.send(None)
    coroutine.close()
    assert results == [8]


async def test_closed_job_drops_its_offload(one_worker: None) -> None:
    gate = Gate()
    first = offload_async(gate.wait)
    await run_job(gate.reached)
    begun: list[int] = []
    coroutine = run_job(offload, begun.append, 1)
    coroutine.send(None)
    coroutine.close()
    gate.open()
    await first
    await offload_async(pow, 2, 3)
    assert begun == []


async def test_error_status_of_another_engine_does_not_reach_an_offload() -> None:
    def job() -> int:
        get_wait_ctx().status = WaitStatus.ERR
        eight = offload(pow, 2, 3)
        with pytest.raises(EngineError):
            pause_job()
        return eight

    assert await run_job(job) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_has_workers_of_its_own() -> None:
    program = """
import os, sys, warnings
import aiojob
aiojob.set_offload_threads(3)
assert aiojob.offload(pow, 2, 3) == 8
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
pid = os.fork()
if pid == 0:
    from aiojob.engines import _offload
    os._exit(aiojob.offload(pow, 2, 4) + _offload._levels._limit)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status), aiojob.offload(pow, 2, 5))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout, done.stderr) == ("19 32\n", "")


def test_interpreter_exits_with_work_under_way_that_nobody_waits_for() -> None:
    program = """
import asyncio, threading
import aiojob

async def main():
    begun = threading.Event()
    def forever():
        begun.set()
        threading.Event().wait()
    task = asyncio.create_task(aiojob.run_job(aiojob.offload, forever))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])
    print("given up:", task.cancelled())

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert without_slow_steps(done.stderr) == ""
    assert (done.stdout, done.returncode) == ("given up: True\n", 0)
