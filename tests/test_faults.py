"""Faults: wake-ups at the wrong time, bad fds, errors, dropped jobs, cancellation, exhaustion."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import os
import select
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeVar

import greenlet
import pytest

import aiojob
from aiojob import (
    CannotPauseError,
    EngineError,
    Job,
    JobError,
    JobStatus,
    Session,
    WaitCtx,
    WaitFdError,
    WaitStatus,
    WrongThreadError,
    _fibre,
    _wakeups,
    await_,
    can_pause,
    get_current_job,
    get_wait_ctx,
    init_thread,
    pause_blocked,
    pause_job,
    run_job,
    start_job,
)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Wake = Callable[[], object]
T = TypeVar("T")

KEY = "the-key"


class Odd(BaseException):
    """An exception that ``except Exception`` does not catch."""


class Operation:
    """What an engine's job waits for: it pauses until `done`, and counts its pauses."""

    def __init__(self, status: WaitStatus = WaitStatus.OK) -> None:
        self.done = False
        self.pauses = 0
        self.log: list[str] = []
        self.status = status
        self.wake: Wake = _not_started

    def __call__(self) -> str:
        ctx = get_wait_ctx()
        ctx.status = self.status
        self.wake = current_wake()
        while not self.done:
            self.pauses += 1
            try:
                pause_job()
            except BaseException as error:
                self.log.append(type(error).__name__)
                raise
        self.log.append("done")
        return "done"

    def complete(self) -> None:
        self.done = True
        self.wake()


def _not_started() -> NoReturn:
    raise AssertionError("the job has not begun")


def current_wake() -> Wake:
    """What an engine calls when the running job may go on."""
    callback_and_arg = get_wait_ctx().get_callback()
    assert callback_and_arg is not None
    callback, arg = callback_and_arg
    return partial(callback, arg)


def resume(job: Job | None) -> aiojob.StartResult[Any]:
    assert job is not None
    return start_job(job, None)


def in_thread(func: Callable[[], T]) -> T:
    """Call func in another thread, and return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(func())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()
    return results.pop()


async def iterations(count: int = 20) -> None:
    """Let the event loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def started(awaitable: Awaitable[T]) -> asyncio.Future[T]:
    """Begin a task, and let it come to its first pause."""
    task = asyncio.ensure_future(awaitable)
    await iterations()
    return task


@contextlib.contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    with open_pipe() as ends:
        yield ends


def outstanding() -> int:
    return _fibre.pool_of_thread().outstanding


# -- wake-ups at the wrong time


@pytest.mark.parametrize("caller", ["loop", "thread"])
async def test_callback_before_the_pause_ends_that_pause(caller: str) -> None:
    def job() -> str:
        get_wait_ctx().status = WaitStatus.OK
        wake = current_wake()
        if caller == "loop":
            wake()
        else:
            in_thread(wake)
        pause_job()
        return "went on"

    assert await run_job(job) == "went on"


async def test_callbacks_before_each_of_many_pauses_are_never_lost() -> None:
    def job() -> int:
        get_wait_ctx().status = WaitStatus.OK
        wake = current_wake()
        for number in range(100):
            in_thread(wake) if number % 10 == 0 else wake()
            pause_job()
        return number

    assert await run_job(job) == 99


@pytest.mark.parametrize("caller", ["loop", "thread"])
async def test_callback_after_the_job_finished_wakes_no_other_job(caller: str) -> None:
    first, second = Operation(), Operation()
    task = await started(run_job(first))
    first.complete()
    assert await task == "done"
    other = await started(run_job(second))
    if caller == "loop":
        first.wake()
    else:
        in_thread(first.wake)
    await iterations()
    assert (second.pauses, other.done()) == (1, False)
    second.complete()
    assert await other == "done"


async def test_late_callback_during_a_cleanup_await_does_not_end_it() -> None:
    gate = asyncio.Event()
    operation = Operation()
    log: list[str] = []

    def job() -> None:
        try:
            operation()
        finally:
            await_(gate.wait())
            log.append("cleaned up")

    task = await started(run_job(job))
    task.cancel()
    await iterations()
    operation.wake()
    in_thread(operation.wake)
    await iterations()
    assert log == []
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cleaned up"]


async def test_late_callback_during_a_cleanup_pause_is_one_early_wake_up() -> None:
    first, cleanup = Operation(), Operation()

    def job() -> None:
        try:
            first()
        finally:
            cleanup()

    task = await started(run_job(job))
    task.cancel()
    await iterations()
    assert (cleanup.pauses, task.done()) == (1, False)
    first.wake()
    await iterations()
    assert cleanup.pauses == 2
    cleanup.complete()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("caller", ["loop", "thread"])
async def test_callback_called_twice_ends_at_most_one_pause_early(caller: str) -> None:
    operation = Operation()
    task = await started(run_job(operation))
    for _ in range(2):
        if caller == "loop":
            operation.wake()
        else:
            in_thread(operation.wake)
    await iterations()
    assert 2 <= operation.pauses <= 3
    operation.complete()
    assert await task == "done"


def pause_and_close_the_loop(
    loop_factory: LoopFactory, operation: Operation
) -> asyncio.Future[str]:
    loop = loop_factory()
    loop.set_exception_handler(lambda *_: None)  # it complains of a task that was destroyed
    task = loop.create_task(run_job(operation))
    loop.run_until_complete(iterations())
    loop.close()
    return task


def close_coroutine(task: asyncio.Future[Any]) -> None:
    """Unwind the job of a task that no loop will step again.

    The garbage collector cannot do it here: the paused greenlet, which it does not look into,
    holds the future that holds the task.
    """
    assert isinstance(task, asyncio.Task)
    coroutine: Any = task.get_coro()
    coroutine.close()


@pytest.mark.parametrize("caller", ["same thread", "other thread"])
def test_callback_after_the_loop_was_closed_on_a_paused_job_is_dropped(
    loop_factory: LoopFactory, caller: str
) -> None:
    operation = Operation()
    task = pause_and_close_the_loop(loop_factory, operation)
    for _ in range(3):
        if caller == "same thread":
            operation.wake()
        else:
            in_thread(operation.wake)
    assert operation.pauses == 1
    close_coroutine(task)
    assert operation.log == ["GeneratorExit"]


@pytest.mark.parametrize("caller", ["same thread", "other thread"])
def test_callback_after_the_job_finished_and_the_loop_was_closed_is_dropped(
    loop_factory: LoopFactory, caller: str
) -> None:
    def job() -> Wake:
        return current_wake()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        wake = runner.run(run_job(job))
    for _ in range(3):
        assert (wake() if caller == "same thread" else in_thread(wake)) is None


def test_callback_from_a_thread_that_outlives_the_loop_is_dropped(
    loop_factory: LoopFactory,
) -> None:
    gate = threading.Event()
    operation = Operation()
    errors: list[BaseException] = []

    def late() -> None:
        gate.wait()
        try:
            operation.wake()
            operation.wake()
        except BaseException as error:
            errors.append(error)

    async def main() -> None:
        task = await started(run_job(operation))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=late)
    thread.start()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    gate.set()
    thread.join()
    assert errors == []
    assert operation.log == ["CancelledError"]


def test_callback_posted_before_the_loop_closed_leaves_the_next_loop_alone(
    loop_factory: LoopFactory,
) -> None:
    first = Operation()
    task = pause_and_close_the_loop(loop_factory, first)
    first.done = True
    in_thread(first.wake)
    second = Operation()

    async def main() -> str:
        other = await started(run_job(second))
        in_thread(first.wake)
        await iterations()
        assert second.pauses == 1
        second.complete()
        return await other

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(main()) == "done"
    close_coroutine(task)
    assert first.log == ["GeneratorExit"]


def test_post_to_a_loop_that_closes_meanwhile_keeps_nothing() -> None:
    class ClosingLoop:
        held: Any = None

        def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
            self.held = callback  # it had looked already, and closes before it adds this

        def is_closed(self) -> bool:
            return self.held is not None

    loop: Any = ClosingLoop()
    hub = _wakeups.Hub(loop)
    arg = Operation()
    gone = weakref.ref(arg)
    hub.post(print, arg)
    del arg
    assert gone() is None
    assert not hub.has_posted


@pytest.mark.parametrize("sender", ["loop", "thread"])
async def test_callback_from_a_signal_handler_through_the_loop_wakes_the_job(sender: str) -> None:
    loop = asyncio.get_running_loop()
    operation = Operation()

    def handler(*_: object) -> None:
        operation.done = True
        loop.call_soon_threadsafe(operation.wake)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        task = await started(run_job(operation))
        if sender == "loop":
            signal.raise_signal(signal.SIGUSR1)
        else:
            in_thread(partial(os.kill, os.getpid(), signal.SIGUSR1))
        assert await task == "done"
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- file descriptors


def wait_for_fd(fd: int) -> bytes:
    get_wait_ctx().set_wait_fd(KEY, fd)
    while not select.select([fd], [], [], 0)[0]:
        pause_job()
    get_wait_ctx().clear_fd(KEY)
    return os.read(fd, 10)


async def test_fd_readable_before_the_pause_ends_that_pause(pipe: tuple[int, int]) -> None:
    def job() -> bytes:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        os.write(pipe[1], b"x")
        pause_job()
        return os.read(pipe[0], 10)

    assert await run_job(job) == b"x"


@pytest.fixture
def reader_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fds that loops reported to aiojob's readers, one for each report."""
    calls: list[int] = []
    ready = _wakeups._FdWatch._ready

    def counted(watch: _wakeups._FdWatch) -> None:
        calls.append(watch.fd)
        ready(watch)

    monkeypatch.setattr(_wakeups._FdWatch, "_ready", counted)
    return calls


async def test_fd_left_readable_while_the_job_awaits_something_else_does_not_spin(
    pipe: tuple[int, int], reader_calls: list[int]
) -> None:
    gate = asyncio.Event()

    def job() -> bytes:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        pause_job()
        await_(gate.wait())  # while the fd is readable
        pause_job()
        return os.read(pipe[0], 10)

    task = await started(run_job(job))
    os.write(pipe[1], b"x")
    await iterations(200)
    assert 1 <= len(reader_calls) <= 4
    gate.set()
    assert await task == b"x"


async def test_fd_left_readable_between_the_jobs_of_a_session_does_not_spin(
    pipe: tuple[int, int], reader_calls: list[int]
) -> None:
    async with Session() as session:

        def first() -> None:
            get_wait_ctx().set_wait_fd(KEY, pipe[0])
            pause_job()

        os.write(pipe[1], b"x")
        await session.run_job(first)
        await iterations(200)
        assert 1 <= len(reader_calls) <= 4
        await session.run_job(pause_job)
        assert os.read(pipe[0], 10) == b"x"


async def test_fd_closed_without_being_cleared_raises_at_the_pause_and_the_job_goes_on() -> None:
    def job() -> tuple[str, bytes]:
        ctx = get_wait_ctx()
        reading, writing = os.pipe()
        ctx.set_wait_fd(KEY, reading)
        os.write(writing, b"x")
        pause_job()
        os.close(reading)
        os.close(writing)
        with pytest.raises(WaitFdError) as info:
            pause_job()
        ctx.clear_fd(KEY)
        with open_pipe() as (again, other):
            os.write(other, b"y")
            return f"{reading} {info.value}", wait_for_fd(again)

    message, data = await run_job(job)
    number, _, rest = message.partition(" ")
    assert f"fd {number} " in rest
    assert repr(KEY) in rest
    assert data == b"y"


def new_pipe() -> tuple[int, int]:
    return os.pipe()


def new_eventfd() -> tuple[int, int]:
    fd = os.eventfd(0)  # type: ignore[attr-defined, unused-ignore]
    return fd, os.dup(fd)


def new_socketpair() -> tuple[int, int]:
    first, second = socket.socketpair()
    return first.detach(), second.detach()


KINDS: dict[str, Callable[[], tuple[int, int]]] = {"pipe": new_pipe, "socket": new_socketpair}
if hasattr(os, "eventfd"):
    KINDS["eventfd"] = new_eventfd

SIGNAL = (1).to_bytes(8, sys.byteorder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "order",
    [
        "clear close reuse set",
        "close clear reuse set",
        "close reuse clear set",
        "close reuse set",
        "close reuse",
    ],
)
async def test_fd_number_closed_and_reused_between_two_pauses_is_watched_afresh(
    order: str, kind: str
) -> None:
    paused = asyncio.Event()

    def job() -> None:
        ctx = get_wait_ctx()
        number, writing = KINDS[kind]()
        other, other_writing = KINDS[kind]()
        ctx.set_wait_fd(KEY, number)
        os.write(writing, SIGNAL)
        pause_job()
        steps: dict[str, Callable[[], object]] = {
            "clear": partial(ctx.clear_fd, KEY),
            "close": partial(os.close, number),
            "reuse": partial(os.dup2, other, number),
            "set": partial(ctx.set_wait_fd, KEY, number),
        }
        for step in order.split():
            steps[step]()
        asyncio.get_running_loop().call_soon(os.write, other_writing, SIGNAL)
        paused.set()
        while not select.select([number], [], [], 0)[0]:
            pause_job()
        while ctx.get_fd(KEY) is not None:
            ctx.clear_fd(KEY)
        for fd in (number, writing, other, other_writing):
            os.close(fd)

    async with asyncio.timeout(60):
        await run_job(job)
    assert paused.is_set()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="kqueue watches regular files")
async def test_regular_file_raises_at_the_pause_naming_the_fd_and_key() -> None:
    def job() -> None:
        with open(__file__, "rb") as file:
            get_wait_ctx().set_wait_fd(KEY, file.fileno())
            with pytest.raises(WaitFdError, match=f"fd {file.fileno()} .*{KEY}.*regular"):
                pause_job()
            get_wait_ctx().clear_fd(KEY)

    await run_job(job)
    assert outstanding() == 0


async def test_fd_of_a_transport_raises_at_the_pause_and_the_transport_works_on() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        fd = writer.get_extra_info("socket").fileno()

        def job() -> None:
            get_wait_ctx().set_wait_fd(KEY, fd)
            with pytest.raises(WaitFdError, match=f"fd {fd} .*{KEY}"):
                pause_job()

        await run_job(job)
        theirs.sendall(b"still here")
        assert await reader.readexactly(10) == b"still here"
        writer.close()
        await writer.wait_closed()


async def test_two_jobs_on_one_fd_are_both_woken(pipe: tuple[int, int]) -> None:
    log: list[int] = []

    def job(number: int) -> None:
        get_wait_ctx().set_wait_fd(number, pipe[0])
        while not select.select([pipe[0]], [], [], 0)[0]:
            pause_job()
        log.append(number)

    tasks = [await started(run_job(job, number)) for number in range(2)]
    os.write(pipe[1], b"x")
    await asyncio.gather(*tasks)
    assert sorted(log) == [0, 1]
    assert not asyncio.get_running_loop().remove_reader(pipe[0])


async def test_two_jobs_on_one_fd_the_end_of_one_leaves_the_other_watched(
    pipe: tuple[int, int],
) -> None:
    operation = Operation(WaitStatus.UNSUPPORTED)

    def first() -> str:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        return operation()

    first_task = await started(run_job(first))
    second_task = await started(run_job(wait_for_fd, pipe[0]))
    operation.complete()
    assert await first_task == "done"
    os.write(pipe[1], b"x")
    assert await second_task == b"x"


async def test_two_entries_for_one_fd_clearing_one_leaves_it_watched(
    pipe: tuple[int, int],
) -> None:
    def job() -> bytes:
        ctx = get_wait_ctx()
        ctx.set_wait_fd("first", pipe[0])
        ctx.set_wait_fd("second", pipe[0])
        os.write(pipe[1], b"x")
        pause_job()
        os.read(pipe[0], 10)
        ctx.clear_fd("second")
        asyncio.get_running_loop().call_soon(os.write, pipe[1], b"y")
        while not select.select([pipe[0]], [], [], 0)[0]:
            pause_job()
        ctx.clear_fd("first")
        return os.read(pipe[0], 10)

    assert await run_job(job) == b"y"
    assert not asyncio.get_running_loop().remove_reader(pipe[0])


async def test_fd_cleared_while_its_reader_is_registered_is_watched_no_more(
    pipe: tuple[int, int],
) -> None:
    operation = Operation(WaitStatus.UNSUPPORTED)

    def job() -> str:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        return operation()

    async with Session() as session:
        task = await started(session.run_job(job))
        session.wait_ctx.clear_fd(KEY)
        assert not asyncio.get_running_loop().remove_reader(pipe[0])
        os.write(pipe[1], b"x")
        await iterations()
        assert operation.pauses == 1
        operation.complete()
        assert await task == "done"


@pytest.mark.parametrize("first", ["fd", "callback"])
async def test_fd_and_callback_the_first_one_ends_the_pause(
    first: str, pipe: tuple[int, int]
) -> None:
    operation = Operation(WaitStatus.UNSUPPORTED if first == "callback" else WaitStatus.OK)

    def job() -> str:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        return operation()

    task = await started(run_job(job))
    operation.done = True
    if first == "fd":
        os.write(pipe[1], b"x")
    else:
        operation.wake()
    assert await task == "done"
    assert operation.pauses == 1
    os.write(pipe[1], b"x")
    operation.wake()
    await iterations()
    assert not asyncio.get_running_loop().remove_reader(pipe[0])


async def test_fd_and_callback_in_one_iteration_end_one_pause(pipe: tuple[int, int]) -> None:
    operation = Operation()

    def job() -> str:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        return operation()

    task = await started(run_job(job))
    operation.done = True
    os.write(pipe[1], b"x")
    operation.wake()
    in_thread(operation.wake)
    assert await task == "done"
    assert operation.pauses == 1


@pytest.mark.parametrize("first_does", ["end", "clear its fd", "cancel the second"])
async def test_first_of_two_jobs_on_one_fd_changes_who_watches_it(
    first_does: str, pipe: tuple[int, int]
) -> None:
    def wait(then: Callable[[], object]) -> None:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        pause_job()
        then()

    def change() -> None:
        if first_does == "clear its fd":
            get_wait_ctx().clear_fd(KEY)
        elif first_does == "cancel the second":
            second.cancel()

    first = await started(run_job(wait, change))
    second = await started(run_job(wait, int))
    os.write(pipe[1], b"x")
    await asyncio.wait([first, second])
    assert first.exception() is None
    assert second.cancelled() == (first_does == "cancel the second")
    assert not asyncio.get_running_loop().remove_reader(pipe[0])


def test_job_that_exits_when_its_fd_is_readable_leaves_the_other_to_be_woken(
    loop_factory: LoopFactory, pipe: tuple[int, int]
) -> None:
    def wait(then: Callable[[], T]) -> T:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        pause_job()
        return then()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        loop = runner.get_loop()
        leaver = loop.create_task(run_job(wait, sys.exit))
        stayer = loop.create_task(run_job(wait, lambda: os.read(pipe[0], 9)))
        loop.call_later(0.001, os.write, pipe[1], b"x")
        with pytest.raises(SystemExit):
            loop.run_forever()
        assert loop.run_until_complete(stayer) == b"x"
        with pytest.raises(SystemExit):
            leaver.result()


# -- the future of a pause for an fd

End = Callable[[_wakeups.FdPause], object]


def set_result(pause: _wakeups.FdPause) -> None:
    pause.set_result(None)


each_end = pytest.mark.parametrize("end", [_wakeups.FdPause.end, set_result])


async def test_end_of_an_fd_pause_has_the_task_go_on_within_it() -> None:
    pause = _wakeups.FdPause()
    log: list[str] = []

    async def wait() -> None:
        await pause
        log.append("went on")

    def end() -> None:
        pause.end()
        log.append("ended")

    task = await started(wait())
    asyncio.get_running_loop().call_soon(end)
    await task
    assert log == ["went on", "ended"]


@each_end
async def test_fd_pause_that_ended_before_a_task_awaits_it_is_no_pause(end: End) -> None:
    pause = _wakeups.FdPause()
    end(pause)
    await pause


@each_end
async def test_fd_pause_that_ends_while_the_task_adds_its_callback_is_not_lost(end: End) -> None:
    """As by a signal handler."""
    pause = _wakeups.FdPause()
    calls: list[object] = []
    end(pause)
    pause.add_done_callback(calls.append, context=contextvars.copy_context())
    await iterations()
    assert calls == [pause]


async def test_fd_pause_that_is_set_in_another_task_has_its_task_go_on_later() -> None:
    pause = _wakeups.FdPause()

    async def wait() -> None:
        await pause

    task = await started(wait())
    pause.set_result(None)
    assert not task.done()
    await task


async def test_fd_pause_that_is_cancelled_passes_the_message_on() -> None:
    pause = _wakeups.FdPause()

    async def wait() -> None:
        await pause

    task = await started(wait())
    task.cancel("no more")
    with pytest.raises(asyncio.CancelledError, match="no more"):
        await task
    assert pause.cancelled()


@each_end
async def test_fd_pause_calls_whoever_else_wants_to_know_once(end: End) -> None:
    pause = _wakeups.FdPause()
    calls: list[str] = []
    number = contextvars.ContextVar[int]("number", default=0)

    def add(who: str) -> Callable[[object], None]:
        return lambda _: calls.append(f"{who} {number.get()}")

    context = contextvars.copy_context()
    context.run(number.set, 1)
    pause.add_done_callback(add("plain"))
    pause.add_done_callback(add("first"), context=context)
    pause.add_done_callback(add("second"), context=context)
    end(pause)
    await iterations()
    assert sorted(calls) == ["first 1", "plain 0", "second 1"]


# -- a job that raises

RAISED: dict[str, BaseException] = {
    "Exception": ValueError("no"),
    "BaseException": Odd("no"),
    "GreenletExit": greenlet.GreenletExit("no"),
    "GeneratorExit": GeneratorExit("no"),
    "CancelledError": asyncio.CancelledError("no"),
    "StopIteration": StopIteration("no"),
    "StopAsyncIteration": StopAsyncIteration("no"),
    "KeyboardInterrupt": KeyboardInterrupt("no"),
    "SystemExit": SystemExit("no"),
}


def raise_it(name: str, pauses: int) -> NoReturn:
    for _ in range(pauses):
        pause_job()
    raise RAISED[name].with_traceback(None)


@pytest.mark.parametrize("pauses", [0, 2])
@pytest.mark.parametrize("name", RAISED)
def test_exception_comes_out_of_start_job_as_itself_and_the_job_is_finished(
    name: str, pauses: int
) -> None:
    with WaitCtx() as ctx:
        job: Job | None = None
        for _ in range(pauses):
            status, job, _ = start_job(job, ctx, raise_it, name, pauses)
            assert status is JobStatus.PAUSE
        with pytest.raises(BaseException) as info:
            start_job(job, ctx, raise_it, name, pauses)
        assert info.value is RAISED[name]
        assert outstanding() == 0
        assert start_job(None, ctx, len, "abc").ret == 3
    if job is not None:
        assert job.status is JobStatus.FINISH


@pytest.mark.parametrize("pauses", [0, 2])
@pytest.mark.parametrize(
    "name", sorted(RAISED.keys() - {"StopIteration", "KeyboardInterrupt", "SystemExit"})
)
async def test_exception_comes_out_of_run_job_as_itself(name: str, pauses: int) -> None:
    with pytest.raises(BaseException) as info:
        await run_job(raise_it, name, pauses)
    assert info.value is RAISED[name]
    assert outstanding() == 0


@pytest.mark.parametrize("pauses", [0, 2])
async def test_stop_iteration_comes_out_of_run_job_as_it_does_of_a_coroutine(pauses: int) -> None:
    with pytest.raises(RuntimeError, match="coroutine raised StopIteration") as info:
        await run_job(raise_it, "StopIteration", pauses)
    assert info.value.__cause__ is RAISED["StopIteration"]
    assert outstanding() == 0


@pytest.mark.parametrize("pauses", [0, 2])
@pytest.mark.parametrize("name", ["KeyboardInterrupt", "SystemExit"])
def test_exit_exception_of_a_job_ends_the_loop_as_that_of_a_coroutine(
    loop_factory: LoopFactory, name: str, pauses: int
) -> None:
    loop = loop_factory()
    try:
        with pytest.raises(type(RAISED[name])) as info:
            loop.run_until_complete(run_job(raise_it, name, pauses))
        assert info.value is RAISED[name]
        assert loop.run_until_complete(run_job(len, "abc")) == 3
    finally:
        loop.close()


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "SystemExit"])
def test_exit_exception_of_a_job_comes_out_of_a_coroutine_stepped_by_hand(name: str) -> None:
    with pytest.raises(type(RAISED[name])) as info:
        run_job(raise_it, name, 0).send(None)
    assert info.value is RAISED[name]
    assert outstanding() == 0


async def test_awaited_exception_is_raised_in_the_job_without_a_false_context() -> None:
    async def fail() -> NoReturn:
        raise KeyError("awaited")

    def job() -> None:
        with pytest.raises(KeyError):
            await_(fail())
        raise ValueError("later")

    with pytest.raises(ValueError, match="later") as info:
        await run_job(job)
    assert info.value.__context__ is None


def refuse_cleanup(*_: object) -> NoReturn:
    raise OSError("the cleanup failed")


async def test_failing_cleanup_of_a_jobs_own_context_keeps_the_jobs_error_as_context() -> None:
    def job() -> NoReturn:
        get_wait_ctx().set_wait_fd(KEY, 0, cleanup=refuse_cleanup)
        raise ValueError("of the job")

    with pytest.raises(OSError, match="the cleanup failed") as info:
        await run_job(job)
    assert isinstance(info.value.__context__, ValueError)
    assert outstanding() == 0


def test_failing_cleanup_of_a_hand_driven_jobs_own_context_gives_the_fibre_back() -> None:
    def job() -> None:
        get_wait_ctx().set_wait_fd(KEY, 0, cleanup=refuse_cleanup)

    with pytest.raises(OSError, match="the cleanup failed"):
        start_job(None, None, job)
    assert outstanding() == 0
    assert start_job(None, None, len, "abc").ret == 3


# -- a paused job whose handle is dropped


def logging_job(log: list[str]) -> None:
    try:
        pause_job()
        log.append("resumed")
    except BaseException as error:
        log.append(type(error).__name__)
        raise
    finally:
        log.append("cleaned up")


def test_dropped_job_is_unwound_and_its_place_is_free() -> None:
    init_thread(1)
    log: list[str] = []
    ctx = WaitCtx()
    _, job, _ = start_job(None, ctx, logging_job, log)
    assert start_job(None, None, len, "abc").status is JobStatus.NO_JOBS
    assert log == []
    del job
    assert log == ["GeneratorExit", "cleaned up"]
    assert start_job(None, ctx, len, "abc").ret == 3
    ctx.free()


def test_job_dropped_in_another_thread_is_unwound_when_its_own_starts_a_job() -> None:
    init_thread(1)
    log: list[str] = []
    threads: list[int] = []

    def job() -> None:
        try:
            logging_job(log)
        finally:
            threads.append(threading.get_ident())

    handles = [start_job(None, None, job).job]
    in_thread(handles.clear)
    assert log == []
    assert start_job(None, None, len, "abc").ret == 3
    assert log == ["GeneratorExit", "cleaned up"]
    assert threads == [threading.get_ident()]


def test_job_dropped_inside_another_running_job_leaves_that_job_alone() -> None:
    log: list[str] = []
    handles = [start_job(None, None, logging_job, log).job]

    def outer() -> str:
        me = get_current_job()
        handles.clear()
        assert log == ["GeneratorExit", "cleaned up"]
        assert get_current_job() is me
        assert can_pause()
        del me
        pause_job()
        return "outer"

    status, job, _ = start_job(None, None, outer)
    assert (status, get_current_job()) == (JobStatus.PAUSE, None)
    assert resume(job).ret == "outer"


async def test_job_dropped_inside_a_run_job_leaves_that_job_alone() -> None:
    log: list[str] = []
    handles = [start_job(None, None, logging_job, log).job]

    def outer() -> str:
        handles.clear()
        assert log == ["GeneratorExit", "cleaned up"]
        return await_(asyncio.sleep(0, "outer"))

    assert await run_job(outer) == "outer"


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """The exceptions that had nowhere to go."""
    seen: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    return seen


def test_dropped_job_that_pauses_again_gets_an_error_and_its_place_is_free(
    unraisable: list[BaseException | None],
) -> None:
    init_thread(1)
    log: list[str] = []

    def job() -> None:
        try:
            pause_job()
        finally:
            assert not can_pause()
            try:
                pause_job()
            except CannotPauseError as error:
                log.append(type(error).__name__)

    handles = [start_job(None, None, job).job]
    handles.clear()
    assert (log, unraisable) == (["CannotPauseError"], [])
    assert start_job(None, None, len, "abc").ret == 3


def test_dropped_job_that_raises_in_its_cleanup_is_reported_and_its_place_is_free(
    unraisable: list[BaseException | None],
) -> None:
    init_thread(1)

    def job() -> None:
        try:
            pause_job()
        finally:
            raise ValueError("in the cleanup")

    handles = [start_job(None, None, job).job]
    handles.clear()
    assert [type(error) for error in unraisable] == [ValueError]
    unraisable.clear()
    assert start_job(None, None, len, "abc").ret == 3


def test_dropped_job_that_swallows_the_exit_ends_quietly(
    unraisable: list[BaseException | None],
) -> None:
    def job() -> str:
        with contextlib.suppress(GeneratorExit):
            pause_job()
        return "swallowed"

    handles = [start_job(None, None, job).job]
    handles.clear()
    assert (outstanding(), unraisable) == (0, [])


def test_dropped_job_paused_by_a_foreign_greenlet_is_unwound_there() -> None:
    log: list[str] = []

    def job() -> None:
        greenlet.greenlet(logging_job).switch(log)

    handles = [start_job(None, None, job).job]
    handles.clear()
    assert log == ["GeneratorExit", "cleaned up"]


# -- a coroutine that is closed while its job is paused


def pause_on_callback() -> None:
    get_wait_ctx().status = WaitStatus.OK
    pause_job()


def await_a_future() -> None:
    await_(asyncio.get_running_loop().create_future())


PAUSES: dict[str, Callable[[], None]] = {
    "pause_job": pause_on_callback,
    "await_": await_a_future,
    "poll": pause_job,
}


def paused_coroutine(func: Callable[[], object]) -> Any:
    coroutine: Any = run_job(func)
    coroutine.send(None)
    return coroutine


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_closed_coroutine_raises_generator_exit_in_the_job(pause: Callable[[], None]) -> None:
    log: list[str] = []

    def job() -> None:
        try:
            pause()
        except GeneratorExit:
            log.append("GeneratorExit")
            raise
        finally:
            log.append(str(can_pause()))

    paused_coroutine(job).close()
    assert log == ["GeneratorExit", "False"]
    assert outstanding() == 0


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_closed_coroutine_whose_job_swallows_the_exit_closes(
    pause: Callable[[], None],
) -> None:
    log: list[str] = []

    def job() -> None:
        with contextlib.suppress(GeneratorExit):
            pause()
        log.append("swallowed")

    paused_coroutine(job).close()
    assert log == ["swallowed"]
    assert outstanding() == 0


@pytest.mark.parametrize("again", PAUSES.values(), ids=PAUSES)
@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_closed_coroutine_whose_job_pauses_again_raises_a_runtime_error(
    pause: Callable[[], None], again: Callable[[], None]
) -> None:
    log: list[str] = []

    def job() -> None:
        try:
            pause()
        finally:
            try:
                again()
            except RuntimeError as error:
                log.append(type(error).__name__)
                raise

    with pytest.raises(CannotPauseError, match="closed") as info:
        paused_coroutine(job).close()
    assert isinstance(info.value, RuntimeError)
    assert log == ["CannotPauseError"]
    assert outstanding() == 0


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_closed_coroutine_whose_job_fails_in_its_cleanup_raises_that(
    pause: Callable[[], None],
) -> None:
    def job() -> None:
        try:
            pause()
        finally:
            raise ValueError("in the cleanup")

    with pytest.raises(ValueError, match="in the cleanup"):
        paused_coroutine(job).close()
    assert outstanding() == 0


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_coroutine_closed_in_another_thread_is_unwound_in_its_own(
    pause: Callable[[], None],
) -> None:
    threads: list[int] = []

    def job() -> None:
        try:
            pause()
        finally:
            threads.append(threading.get_ident())

    coroutine = paused_coroutine(job)
    in_thread(coroutine.close)
    assert threads == []
    assert await run_job(len, "abc") == 3
    assert threads == [threading.get_ident()]
    assert outstanding() == 0


async def test_coroutine_closed_inside_another_running_job_leaves_that_job_alone() -> None:
    log: list[str] = []

    def inner() -> None:
        try:
            pause_on_callback()
        finally:
            log.append("cleaned up")

    coroutine = paused_coroutine(inner)

    def outer() -> str:
        me = get_current_job()
        coroutine.close()
        assert log == ["cleaned up"]
        assert get_current_job() is me
        return await_(asyncio.sleep(0, "outer"))

    assert await run_job(outer) == "outer"


async def test_never_started_coroutine_closes_without_a_job() -> None:
    run_job(raise_it, "Exception", 0).close()
    assert outstanding() == 0


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_coroutine_dropped_while_paused_is_unwound_at_once(
    pause: Callable[[], None],
) -> None:
    log: list[str] = []

    def job() -> None:
        try:
            pause()
        finally:
            log.append("cleaned up")

    coroutine = paused_coroutine(job)
    del coroutine
    assert log == ["cleaned up"]
    assert outstanding() == 0


def test_job_polled_when_its_loop_is_closed_is_unwound_with_its_task(
    loop_factory: LoopFactory,
) -> None:
    log: list[str] = []
    heard: list[str] = []

    def job() -> None:
        try:
            while True:
                pause_job()
        finally:
            log.append("cleaned up")

    loop = loop_factory()
    loop.set_exception_handler(lambda _, context: heard.append(context["message"]))
    task = loop.create_task(run_job(job))
    loop.run_until_complete(iterations(3))
    loop.close()
    assert log == []
    del task
    gc.collect()
    assert log == ["cleaned up"]
    assert heard == ["Task was destroyed but it is pending!"]
    assert outstanding() == 0


@pytest.mark.parametrize("kind", ["own", "session"])
def test_fd_of_a_job_paused_when_its_loop_is_closed_gets_its_cleanup(
    loop_factory: LoopFactory, kind: str, pipe: tuple[int, int]
) -> None:
    cleaned: list[int] = []

    def job() -> None:
        get_wait_ctx().set_wait_fd(
            KEY, pipe[0], None, lambda ctx, key, fd, data: cleaned.append(fd)
        )
        while True:
            pause_job()

    async def in_session() -> None:
        async with Session() as session:
            await session.run_job(job)

    loop = loop_factory()
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(run_job(job) if kind == "own" else in_session())
    loop.run_until_complete(iterations())
    loop.close()
    assert cleaned == []
    close_coroutine(task)
    assert cleaned == [pipe[0]]


# -- jobs where they may not be started or resumed


def test_resume_in_another_thread_is_refused_and_the_job_is_as_before() -> None:
    with WaitCtx() as ctx:
        log: list[str] = []
        _, job, _ = start_job(None, ctx, logging_job, log)
        with pytest.raises(WrongThreadError, match="another thread"):
            in_thread(partial(resume, job))
        assert job is not None
        assert (job.status, log) == (JobStatus.PAUSE, [])
        resume(job)
        assert log == ["resumed", "cleaned up"]


def start_in_a_thread_that_ends(log: list[str]) -> Job:
    job = in_thread(lambda: start_job(None, None, logging_job, log).job)
    assert job is not None
    return job


def in_thread_with_ident_of(job: Job, func: Callable[[], T]) -> T:
    """Call func in a thread that got the ident of the job's thread, which has ended."""
    assert job.thread is not None
    ident = job.thread.ident

    def if_same() -> tuple[T] | None:
        return (func(),) if threading.get_ident() == ident else None

    for _ in range(1000):
        if (done := in_thread(if_same)) is not None:
            return done[0]
    pytest.skip("this system does not give the ident of an ended thread to the next one")


def test_resume_of_an_ended_threads_job_is_refused_in_a_thread_with_the_same_ident() -> None:
    job = start_in_a_thread_that_ends([])
    with pytest.raises(WrongThreadError, match="another thread"):
        in_thread_with_ident_of(job, lambda: start_job(job, None))
    assert job.status is JobStatus.PAUSE


def test_drop_of_an_ended_threads_job_in_a_thread_with_the_same_ident_is_silent(
    unraisable: list[BaseException | None],
) -> None:
    jobs = [start_in_a_thread_that_ends([])]
    in_thread_with_ident_of(jobs[0], jobs.clear)
    assert jobs == []
    assert unraisable == []


async def test_coroutine_resumed_in_another_thread_raises_and_unwinds_in_its_own() -> None:
    log: list[str] = []

    def job() -> None:
        try:
            await_a_future()
        finally:
            log.append("cleaned up")

    coroutine = paused_coroutine(job)
    with pytest.raises(WrongThreadError):
        in_thread(partial(coroutine.throw, KeyError("from elsewhere")))
    assert log == []
    await run_job(len, "abc")
    assert log == ["cleaned up"]


def test_start_inside_a_job_is_refused_and_the_job_goes_on() -> None:
    def job() -> str:
        with pytest.raises(JobError, match="inside a running job"):
            start_job(None, None, len, "abc")
        with pytest.raises(JobError, match="running"):
            resume(get_current_job())
        pause_job()
        return "went on"

    _, handle, _ = start_job(None, None, job)
    assert resume(handle).ret == "went on"


async def test_start_inside_a_run_job_is_refused_and_awaiting_run_job_works() -> None:
    def inner() -> str:
        return await_(asyncio.sleep(0, "inner"))

    def job() -> str:
        with pytest.raises(JobError, match="inside a running job"):
            start_job(None, None, len, "abc")
        return await_(run_job(inner))

    assert await run_job(job) == "inner"


async def test_run_job_stepped_by_hand_inside_a_job_is_refused() -> None:
    def job() -> str:
        coroutine: Any = run_job(len, "abc")
        coroutine.send(None)
        with pytest.raises(JobError, match="inside a running job"):
            coroutine.send(None)
        return await_(asyncio.sleep(0, "went on"))

    assert await run_job(job) == "went on"
    assert outstanding() == 0


async def test_task_created_inside_a_job_runs_its_own_job() -> None:
    log: list[str] = []

    def inner() -> str:
        log.append("inner")
        assert await_(asyncio.sleep(0, "slept")) == "slept"
        return "inner"

    def job() -> str:
        task = asyncio.get_running_loop().create_task(run_job(inner))
        me = get_current_job()
        log.append("outer")
        assert await_(asyncio.sleep(0, "slept")) == "slept"
        assert get_current_job() is me
        return await_(task)

    assert await run_job(job) == "inner"
    assert log == ["outer", "inner"]


async def test_resume_of_a_run_job_by_start_job_is_refused() -> None:
    handles: list[Job] = []
    operation = Operation()

    def job() -> str:
        handle = get_current_job()
        assert handle is not None
        handles.append(handle)
        return operation()

    task = await started(run_job(job))
    with pytest.raises(JobError, match="run_job"):
        start_job(handles[0], None)
    operation.complete()
    assert await task == "done"
    with pytest.raises(JobError, match="finished"):
        start_job(handles[0], None)


def test_wait_context_in_use_refuses_another_job_and_free() -> None:
    ctx = WaitCtx()
    _, job, _ = start_job(None, ctx, pause_job)
    with pytest.raises(JobError, match="serves another job"):
        start_job(None, ctx, len, "abc")
    with pytest.raises(JobError, match="cannot be freed"):
        ctx.free()
    assert resume(job).status is JobStatus.FINISH
    ctx.free()
    ctx.free()
    with pytest.raises(JobError, match="freed"):
        start_job(None, ctx, len, "abc")
    assert outstanding() == 0


# -- pools


async def exhaust_pool(waiters: int, log: list[int]) -> tuple[Operation, list[asyncio.Future[Any]]]:
    """One job that holds the only fibre, and tasks that wait for it."""
    init_thread(1)
    operation = Operation()
    asyncio.get_running_loop().set_debug(False)
    holder = asyncio.ensure_future(run_job(operation))
    tasks = [asyncio.ensure_future(run_job(log.append, number)) for number in range(waiters)]
    await iterations()
    assert _fibre.pool_of_thread().waiters == waiters
    return operation, [holder, *tasks]


ORDERS = [order for count in range(4) for order in itertools.permutations(range(3), count) if order]


@pytest.mark.parametrize("order", ORDERS, ids=str)
async def test_waiters_cancelled_in_any_order_keep_the_others_turns(order: tuple[int, ...]) -> None:
    log: list[int] = []
    operation, (holder, *waiters) = await exhaust_pool(4, log)
    for number in order:
        waiters[number].cancel()
    await iterations()
    operation.complete()
    await asyncio.wait([holder, *waiters])
    assert log == [number for number in range(4) if number not in order]
    assert [waiter.cancelled() for waiter in waiters] == [n in order for n in range(4)]
    assert await run_job(len, "abc") == 3


@pytest.mark.parametrize("order", ORDERS, ids=str)
async def test_waiters_cancelled_right_after_the_offer_pass_it_on(order: tuple[int, ...]) -> None:
    init_thread(1)
    log: list[int] = []
    operation = Operation()
    waiters: list[asyncio.Task[None]] = []

    async def hold() -> None:
        await run_job(operation)
        for number in order:  # in the step that offered the fibre
            waiters[number].cancel()

    holder = asyncio.ensure_future(hold())
    await iterations()
    waiters += [asyncio.ensure_future(run_job(log.append, number)) for number in range(4)]
    await iterations()
    operation.complete()
    await asyncio.wait([holder, *waiters])
    assert log == [number for number in range(4) if number not in order]
    assert await run_job(len, "abc") == 3


async def test_waiter_whose_coroutine_is_closed_after_the_offer_passes_it_on() -> None:
    init_thread(1)
    operation = Operation()
    holder = await started(run_job(operation))
    waiter = paused_coroutine(int)
    next_in_line = await started(run_job(len, "abc"))
    operation.complete()
    assert await holder == "done"
    assert not next_in_line.done()
    waiter.close()
    assert await next_in_line == 3


async def test_newcomer_does_not_overtake_a_waiter_that_was_offered_a_fibre() -> None:
    init_thread(1)
    log: list[str] = []
    operation = Operation()

    async def hold() -> None:
        await run_job(operation)
        await run_job(log.append, "newcomer")

    holder = asyncio.ensure_future(hold())
    await iterations()
    waiter = asyncio.ensure_future(run_job(log.append, "waiter"))
    await iterations()
    operation.complete()
    await asyncio.gather(holder, waiter)
    assert log == ["waiter", "newcomer"]


@pytest.mark.parametrize("end", ["raises", "is cancelled"])
async def test_waiter_gets_the_fibre_of_a_job_that(end: str) -> None:
    init_thread(1)
    operation = Operation()

    def job() -> None:
        operation()
        raise ValueError("no")

    holder = await started(run_job(job))
    waiter = await started(run_job(len, "abc"))
    if end == "raises":
        operation.complete()
    else:
        holder.cancel()
    assert await waiter == 3
    with pytest.raises((ValueError, asyncio.CancelledError)):
        await holder


async def test_waiter_gets_the_place_of_a_dropped_job() -> None:
    init_thread(1)
    handles = [start_job(None, None, pause_job).job]
    waiter = await started(run_job(len, "abc"))
    handles.clear()
    assert await waiter == 3


async def test_waiter_gets_the_place_of_a_job_dropped_by_another_thread() -> None:
    init_thread(1)
    handles = [start_job(None, None, pause_job).job]
    waiter = await started(run_job(len, "abc"))
    in_thread(handles.clear)
    async with asyncio.timeout(60):
        assert await waiter == 3


@pytest.mark.parametrize("cancelled", [False, True])
async def test_session_job_that_waits_for_a_fibre_holds_and_frees_the_context(
    cancelled: bool,
) -> None:
    init_thread(1)
    operation = Operation()
    holder = await started(run_job(operation))
    async with Session() as session:
        waiter = await started(session.run_job(len, "abc"))
        with pytest.raises(JobError, match="serves another job"):
            await session.run_job(len, "abc")
        if cancelled:
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
        operation.complete()
        assert await holder == "done"
        if not cancelled:
            assert await waiter == 3
        assert await session.run_job(len, "abcd") == 4


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1), (2, 3)], ids=str)
def test_init_thread_with_bad_sizes_raises_and_changes_nothing(sizes: tuple[int, int]) -> None:
    init_thread(1)
    with pytest.raises(ValueError, match="size"):
        init_thread(*sizes)
    _, job, _ = start_job(None, None, pause_job)
    assert start_job(None, None, len, "abc").status is JobStatus.NO_JOBS
    resume(job)


def test_init_thread_and_cleanup_thread_with_a_job_under_way_raise_and_change_nothing() -> None:
    init_thread(2, 1)
    _, first, _ = start_job(None, None, pause_job)
    for refused in (init_thread, aiojob.cleanup_thread, partial(init_thread, 5, 5)):
        with pytest.raises(JobError, match="under way"):
            refused()
    _, second, _ = start_job(None, None, pause_job)
    assert start_job(None, None, len, "abc").status is JobStatus.NO_JOBS
    for job in (first, second):
        assert resume(job).status is JobStatus.FINISH
    init_thread(5, 5)
    assert _fibre.pool_of_thread().idle == 5


async def test_saved_exception_of_a_job_does_not_keep_its_place() -> None:
    with pytest.raises(ValueError, match="no") as info:
        await run_job(innermost, 0)
    aiojob.cleanup_thread()
    init_thread(1)
    assert await run_job(len, "abc") == 3
    assert info.value.__traceback__ is not None


def test_init_thread_inside_a_running_job_raises_and_the_job_goes_on() -> None:
    def job() -> str:
        with pytest.raises(JobError, match="under way"):
            init_thread(1)
        with pytest.raises(JobError, match="under way"):
            aiojob.cleanup_thread()
        return "went on"

    assert start_job(None, None, job).ret == "went on"


def test_init_thread_again_shrinks_the_pool() -> None:
    init_thread(5, 5)
    init_thread(2)
    assert _fibre.pool_of_thread().idle == 2
    init_thread(0, 3)
    assert _fibre.pool_of_thread().idle == 3


# -- status


async def test_status_err_raises_at_the_pause_and_the_job_may_go_on() -> None:
    def job() -> str:
        ctx = get_wait_ctx()
        ctx.status = WaitStatus.ERR
        for _ in range(2):
            with pytest.raises(EngineError, match="ERR"):
                pause_job()
        ctx.status = WaitStatus.UNSUPPORTED
        pause_job()
        return "went on"

    assert await run_job(job) == "went on"


async def test_status_err_that_the_job_does_not_catch_comes_out_of_run_job() -> None:
    def job() -> None:
        get_wait_ctx().status = WaitStatus.ERR
        pause_job()

    with pytest.raises(EngineError):
        await run_job(job)
    assert outstanding() == 0


def test_status_err_does_not_concern_a_hand_written_loop() -> None:
    with WaitCtx() as ctx:
        ctx.status = WaitStatus.ERR
        status, job, _ = start_job(None, ctx, pause_job)
        assert status is JobStatus.PAUSE
        assert resume(job).status is JobStatus.FINISH


@pytest.mark.parametrize("with_fd", [False, True])
@pytest.mark.parametrize("status", [WaitStatus.EAGAIN, WaitStatus.UNSUPPORTED])
async def test_job_that_has_nothing_to_wait_for_is_polled_until_it_is_done(
    status: WaitStatus, with_fd: bool, pipe: tuple[int, int]
) -> None:
    if with_fd and status is WaitStatus.UNSUPPORTED:
        os.write(pipe[1], b"x")  # else only this fd would wake the job
    others = 0
    done = False

    def job() -> int:
        ctx = get_wait_ctx()
        ctx.status = status
        if with_fd:
            ctx.set_wait_fd(KEY, pipe[0])
        for _ in range(30):
            pause_job()
        return 30

    async def other() -> None:
        nonlocal others
        while not done:
            others += 1
            await asyncio.sleep(0)

    task = await started(other())
    assert await run_job(job) == 30
    done = True
    await task
    assert others >= 30


async def test_unsupported_with_an_unreadable_fd_is_not_polled(pipe: tuple[int, int]) -> None:
    operation = Operation(WaitStatus.UNSUPPORTED)

    def job() -> str:
        get_wait_ctx().set_wait_fd(KEY, pipe[0])
        return operation()

    task = await started(run_job(job))
    await iterations(100)
    assert operation.pauses == 1
    operation.complete()
    assert await task == "done"


@pytest.mark.parametrize("status", [WaitStatus.EAGAIN, WaitStatus.UNSUPPORTED])
@pytest.mark.parametrize("caller", ["loop", "thread"])
async def test_callback_ends_a_poll_early(
    status: WaitStatus, caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POLLS_AT_ONCE", "POLL_SHORTEST", "POLL_LONGEST", "POLL_BUSY_LONGEST"):
        monkeypatch.setattr(_wakeups, name, 0 if name == "POLLS_AT_ONCE" else 3600)
    operation = Operation(status)
    task = await started(run_job(operation))
    assert operation.pauses == 1
    operation.done = True
    if caller == "loop":
        operation.wake()
    else:
        in_thread(operation.wake)
    assert await task == "done"
    assert operation.pauses == 1


async def test_status_changed_by_the_engine_between_pauses_is_heeded() -> None:
    operation = Operation(WaitStatus.EAGAIN)

    def job() -> str:
        ctx = get_wait_ctx()
        ctx.status = WaitStatus.EAGAIN
        for _ in range(3):
            pause_job()  # the ring is full
        operation.status = WaitStatus.OK
        return operation()

    task = await started(run_job(job))
    await iterations(100)
    assert operation.pauses == 1
    operation.complete()
    assert await task == "done"


# -- sessions


async def test_session_refuses_a_second_job_at_once_and_serves_it_afterwards() -> None:
    operation = Operation()
    async with Session() as session:
        task = await started(session.run_job(operation))
        with pytest.raises(JobError, match="serves another job"):
            await session.run_job(len, "abc")
        operation.complete()
        assert await task == "done"
        assert await session.run_job(len, "abc") == 3
    with pytest.raises(JobError, match="freed"):
        await session.run_job(len, "abc")
    assert outstanding() == 0


@pytest.mark.parametrize("caller", ["loop", "thread"])
async def test_late_callback_of_a_sessions_first_job_does_not_wake_its_second(caller: str) -> None:
    first, second = Operation(), Operation()
    async with Session() as session:
        task = await started(session.run_job(first))
        first.complete()
        assert await task == "done"
        task = await started(session.run_job(second))
        if caller == "loop":
            first.wake()
        else:
            in_thread(first.wake)
        await iterations()
        assert second.pauses == 1
        second.complete()
        assert await task == "done"


@pytest.mark.parametrize("end", ["raises", "is cancelled"])
async def test_session_serves_another_job_after_one_that(end: str) -> None:
    operation = Operation()

    def job() -> None:
        operation()
        raise ValueError("no")

    async with Session() as session:
        task = await started(session.run_job(job))
        if end == "raises":
            operation.complete()
        else:
            task.cancel()
        with pytest.raises((ValueError, asyncio.CancelledError)):
            await task
        assert await session.run_job(len, "abc") == 3


# -- tracebacks and reference cycles


def innermost(depth: int) -> None:
    if depth:
        innermost(depth - 1)
    else:
        raise ValueError("no")


def pausing_innermost() -> None:
    await_(asyncio.sleep(0))
    innermost(2)


async def awaiting(func: Callable[[], object]) -> None:
    await run_job(func)


@pytest.mark.parametrize("func", [partial(innermost, 2), pausing_innermost])
async def test_exception_of_a_job_keeps_its_traceback(func: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no") as info:
        await awaiting(func)
    names = [frame.name for frame in traceback.extract_tb(info.value.__traceback__)]
    assert names[-3:] == ["innermost"] * 3
    assert "awaiting" in names
    assert names.count("run_job") == 1
    assert "_serve" not in names


async def test_exception_awaited_in_a_job_shows_both_sides() -> None:
    async def fail() -> None:
        innermost(0)

    def job() -> None:
        await_(fail())

    with pytest.raises(ValueError, match="no") as info:
        await run_job(job)
    names = [frame.name for frame in traceback.extract_tb(info.value.__traceback__)]
    assert names[-2:] == ["fail", "innermost"]
    assert "job" in names
    assert names.index("job") < names.index("fail")


class Marked(Exception):  # noqa: N818
    """An exception that can be weakly referenced."""


def raise_marked() -> NoReturn:
    raise Marked


def raise_marked_after_pause() -> NoReturn:
    await_(asyncio.sleep(0))
    raise Marked


def raise_marked_with_handle() -> NoReturn:
    get_wait_ctx().status = WaitStatus.EAGAIN
    pause_job()
    raise Marked


def reraise_awaited() -> None:
    async def fail() -> NoReturn:
        raise Marked

    await_(fail())


def engine_error() -> None:
    get_wait_ctx().status = WaitStatus.ERR
    try:
        pause_job()
    except EngineError:
        raise Marked from None


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Fail if the block leaves anything that only the garbage collector can free."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [repr(thing)[:200] for thing in gc.garbage if _is_ours(thing)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


def _is_ours(thing: object) -> bool:
    """Whether an object is an exception, a frame of this package, or one of its objects."""
    if isinstance(thing, BaseException | Job | _fibre.Fibre | _fibre.Port | WaitCtx):
        return True
    code = getattr(thing, "f_code", None) or getattr(thing, "cr_code", None)
    return code is not None and (code.co_filename.startswith(os.path.dirname(_fibre.__file__)))


def fail_in_the_cleanup_too() -> NoReturn:
    def fail(*_: object) -> NoReturn:
        raise Marked

    get_wait_ctx().set_wait_fd(KEY, 0, cleanup=fail)
    raise ValueError


RAISERS = [
    raise_marked,
    raise_marked_after_pause,
    raise_marked_with_handle,
    reraise_awaited,
    engine_error,
]
RAISERS_IN_RUN_JOB = [*RAISERS, fail_in_the_cleanup_too]


async def fails_and_is_caught(func: Callable[[], object]) -> weakref.ref[BaseException]:
    try:
        await run_job(func)
    except Marked as error:
        return weakref.ref(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("func", RAISERS_IN_RUN_JOB)
async def test_exception_of_a_job_makes_no_reference_cycle(func: Callable[[], object]) -> None:
    await run_job(len, "abc")
    with no_garbage():
        assert (await fails_and_is_caught(func))() is None


@pytest.mark.parametrize("func", RAISERS)
async def test_exception_of_a_sessions_job_makes_no_reference_cycle(
    func: Callable[[], object],
) -> None:
    async with Session() as session:
        await session.run_job(len, "abc")
        with no_garbage():
            try:
                await session.run_job(func)
            except Marked as error:
                alive = weakref.ref(error)
            assert alive() is None
            session.wait_ctx.status = WaitStatus.UNSUPPORTED


def test_exception_of_a_hand_driven_job_makes_no_reference_cycle() -> None:
    def job() -> None:
        pause_job()
        raise Marked

    with no_garbage():
        _, handle, _ = start_job(None, None, job)
        try:
            resume(handle)
        except Marked as error:
            alive = weakref.ref(error)
        assert alive() is None
        del handle


async def test_cancelled_job_makes_no_reference_cycle() -> None:
    async def cancelled() -> None:
        operation = Operation()
        task = await started(run_job(operation))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    await cancelled()
    with no_garbage():
        await cancelled()


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
async def test_closed_coroutine_makes_no_reference_cycle(pause: Callable[[], None]) -> None:
    with no_garbage():
        coroutine = paused_coroutine(pause)
        coroutine.close()
        del coroutine


def test_dropped_job_makes_no_reference_cycle() -> None:
    with no_garbage():
        _, job, _ = start_job(None, None, logging_job, [])
        del job
    assert outstanding() == 0


async def test_result_and_arguments_of_a_job_are_not_kept() -> None:
    class Thing:
        pass

    def job(thing: Thing, *, also: Thing) -> Thing:
        pause_job()
        return Thing()

    with no_garbage():
        given, also = Thing(), Thing()
        alive = [weakref.ref(given), weakref.ref(also)]
        alive.append(weakref.ref(await run_job(job, given, also=also)))
        del given, also
        assert [reference() for reference in alive] == [None] * 3


# -- context variables

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="default")


async def test_contextvars_are_shared_both_ways() -> None:
    async def set_and_get(value: str) -> str:
        before = VARIABLE.get()
        VARIABLE.set(value)
        return before

    def job() -> list[str]:
        seen = [VARIABLE.get()]
        VARIABLE.set("job")
        seen.append(await_(set_and_get("awaited")))
        pause_job()
        seen.append(VARIABLE.get())
        VARIABLE.set("job again")
        return seen

    VARIABLE.set("task")
    assert await run_job(job) == ["task", "job", "awaited"]
    assert VARIABLE.get() == "job again"


async def test_context_run_around_a_pause_keeps_its_own_variables() -> None:
    async def get() -> str:
        return VARIABLE.get()

    def inner() -> list[str]:
        VARIABLE.set("inner")
        pause_job()
        await_(asyncio.sleep(0))
        return [VARIABLE.get(), await_(get())]

    def job() -> list[str]:
        seen = contextvars.copy_context().run(inner)
        pause_job()
        return [*seen, VARIABLE.get()]

    VARIABLE.set("task")
    assert await run_job(job) == ["inner", "task", "task"]
    assert VARIABLE.get() == "task"


def test_context_run_around_a_pause_of_a_hand_driven_job_is_left_and_entered() -> None:
    context = contextvars.copy_context()

    def inner() -> str:
        VARIABLE.set("inner")
        pause_job()
        return VARIABLE.get()

    _, job, _ = start_job(None, None, context.run, inner)
    assert VARIABLE.get() == "default"
    with pytest.raises(RuntimeError, match="already entered"):
        context.run(int)
    assert resume(job).ret == "inner"
    assert VARIABLE.get() == "default"
    assert context.run(VARIABLE.get) == "inner"


async def test_contextvars_of_two_tasks_do_not_mix_on_a_reused_fibre() -> None:
    def job(name: str) -> str:
        VARIABLE.set(name)
        pause_job()
        return VARIABLE.get()

    tasks = [asyncio.ensure_future(run_job(job, name)) for name in "abc"]
    assert await asyncio.gather(*tasks) == ["a", "b", "c"]
    assert VARIABLE.get() == "default"
    assert await asyncio.ensure_future(run_job(VARIABLE.get)) == "default"


# -- task groups, timeouts, cancellation


async def test_failing_job_cancels_the_jobs_of_its_task_group() -> None:
    operation = Operation()

    def fail() -> NoReturn:
        await_(asyncio.sleep(0))
        raise ValueError("no")

    with pytest.raises(ExceptionGroup) as info:
        async with asyncio.TaskGroup() as group:
            group.create_task(run_job(operation))
            group.create_task(run_job(fail))
    assert info.group_contains(ValueError, match="no")
    assert operation.log == ["CancelledError"]


async def test_timeout_around_a_job_cancels_it_at_its_pause() -> None:
    operation = Operation()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await run_job(operation)
    assert operation.log == ["CancelledError"]


async def test_timeout_inside_a_job_is_what_it_is_in_a_coroutine() -> None:
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    def job() -> str:
        async def limited() -> None:
            async with asyncio.timeout(0):
                await forever()

        with pytest.raises(TimeoutError):
            await_(limited())
        with pytest.raises(TimeoutError):
            await_(asyncio.wait_for(forever(), 0))
        timeout = asyncio.timeout(0)
        await_(timeout.__aenter__())
        try:
            await_(forever())
        except asyncio.CancelledError as error:
            with pytest.raises(TimeoutError):
                await_(timeout.__aexit__(type(error), error, error.__traceback__))
        return "went on"

    assert await run_job(job) == "went on"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_current_task_inside_a_job_is_the_awaiting_task() -> None:
    def job() -> set[asyncio.Task[Any] | None]:
        tasks = {asyncio.current_task()}
        pause_job()
        return {*tasks, asyncio.current_task()}

    assert await run_job(job) == {asyncio.current_task()}


CANCEL_POINTS = 7


@pytest.mark.parametrize("second", ["none", "second cancel"])
@pytest.mark.parametrize("point", range(CANCEL_POINTS))
async def test_cancel_at_each_pause_of_a_job_reaches_it_there(
    point: int, second: str, pipe: tuple[int, int]
) -> None:
    gate, at_point, cleaning = asyncio.Event(), asyncio.Event(), asyncio.Event()
    log: list[object] = []

    def reach(number: int) -> None:
        log.append(number)
        if number == point:
            at_point.set()

    def step(number: int) -> None:
        reach(number)
        ctx = get_wait_ctx()
        ctx.status = WaitStatus.UNSUPPORTED
        match number % CANCEL_POINTS:
            case 0 | 4:
                pause_job()  # polled
            case 1:
                ctx.status = WaitStatus.OK
                if number != point:
                    asyncio.get_running_loop().call_soon(current_wake())
                pause_job()
            case 2:
                ctx.set_wait_fd(KEY, pipe[0])
                if number != point:
                    os.write(pipe[1], b"x")
                try:
                    pause_job()
                    os.read(pipe[0], 1)
                finally:
                    ctx.clear_fd(KEY)
            case 3:
                await_(asyncio.sleep(3600 if number == point else 0))
            case 5:
                ctx.status = WaitStatus.EAGAIN
                pause_job()
            case 6:
                await_(run_job(pause_job))

    def job() -> None:
        try:
            for number in range(CANCEL_POINTS):
                step(number)
        except asyncio.CancelledError:
            log.append("cancelled")
            try:
                cleaning.set()
                await_(gate.wait())
            except asyncio.CancelledError:
                log.append("cancelled again")
                await_(asyncio.sleep(0))
            log.append("cleaned up")
            raise

    task = asyncio.ensure_future(run_job(job))
    await at_point.wait()
    task.cancel()
    await cleaning.wait()
    if second == "second cancel":
        await iterations(2)
        task.cancel()
    else:
        gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    again = ["cancelled again"] if second == "second cancel" else []
    assert log == [*range(point + 1), "cancelled", *again, "cleaned up"]
    assert outstanding() == 0


async def test_job_that_swallows_a_cancel_goes_on_as_a_coroutine_does() -> None:
    operation = Operation()

    def job() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            operation()
        return await_(asyncio.sleep(0, "went on"))

    task = await started(run_job(job))
    task.cancel()
    assert await task == "went on"
    assert not task.cancelled()


async def test_callback_that_races_a_cancel_leaves_the_job_cancelled_once() -> None:
    for wake_first in (True, False):
        operation = Operation()
        task = await started(run_job(operation))
        for action in (operation.wake, task.cancel)[:: 1 if wake_first else -1]:
            action()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert operation.log == ["CancelledError"]


async def test_cancel_before_the_first_step_never_starts_the_job() -> None:
    log: list[str] = []
    gate = asyncio.Event()

    async def later() -> None:
        await gate.wait()
        await run_job(log.append, "ran")

    task = await started(later())
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == []


# -- blocked pauses


def test_blocks_nest_and_an_unblock_too_many_is_ignored() -> None:
    seen: list[bool] = []

    def job() -> str:
        aiojob.unblock_pause()
        for change in (aiojob.block_pause,) * 2 + (aiojob.unblock_pause,) * 4:
            seen.append(can_pause())
            change()
            pause_and_count()
        return "done"

    pauses = 0

    def pause_and_count() -> None:
        nonlocal pauses
        pauses += can_pause()
        pause_job()

    _, handle, _ = start_job(None, None, job)
    resumed = 1
    while handle is not None and (result := resume(handle)).status is JobStatus.PAUSE:
        resumed += 1
    assert result.ret == "done"
    assert resumed == pauses == 3
    assert seen == [True, False, False, False, True, True]


def test_blocks_are_counted_per_job() -> None:
    def blocked() -> None:
        pause_job()
        aiojob.block_pause()
        pause_job()

    def free() -> str:
        assert can_pause()
        pause_job()
        return "free"

    _, first, _ = start_job(None, None, blocked)
    _, second, _ = start_job(None, None, free)
    assert resume(first).status is JobStatus.FINISH
    assert resume(second).ret == "free"
    status, third, _ = start_job(None, None, free)
    assert status is JobStatus.PAUSE
    resume(third)


async def test_blocked_pause_of_a_run_job_has_no_effect_and_await_raises() -> None:
    async def never() -> None:
        raise AssertionError

    def job() -> str:
        with pause_blocked(), pause_blocked():
            pause_job()
            with pytest.raises(CannotPauseError, match=r"blocked.*unblock_pause"):
                await_(never())
        assert can_pause()
        return await_(asyncio.sleep(0, "went on"))

    assert await run_job(job) == "went on"


async def test_job_that_ends_blocked_leaves_the_next_one_free() -> None:
    await run_job(aiojob.block_pause)
    assert await run_job(can_pause)
    assert await run_job(await_, asyncio.sleep(0, "slept")) == "slept"


def test_pausing_and_blocking_outside_a_job_have_no_effect() -> None:
    pause_job()
    with pause_blocked():
        assert not can_pause()
    aiojob.unblock_pause()
    assert get_current_job() is None
    with pytest.raises(JobError, match="none is running"):
        get_wait_ctx()


# -- await_


async def nothing() -> None:
    raise AssertionError("was awaited")


def test_await_outside_a_job_closes_the_coroutine_and_names_the_remedy() -> None:
    coroutine: Any = nothing()
    with pytest.raises(CannotPauseError, match=r"run_job\(\)"):
        await_(coroutine)
    assert coroutine.cr_frame is None


async def test_await_in_a_coroutine_closes_the_coroutine_and_names_the_remedy() -> None:
    coroutine: Any = nothing()
    with pytest.raises(CannotPauseError, match=r"run_job\(\)"):
        await_(coroutine)
    assert coroutine.cr_frame is None


def test_await_in_a_hand_driven_job_closes_the_coroutine_and_names_the_remedy() -> None:
    coroutine: Any = nothing()

    def job() -> None:
        with pytest.raises(CannotPauseError, match=r"run_job\(\)"):
            await_(coroutine)
        pause_job()

    status, handle, _ = start_job(None, None, job)
    assert status is JobStatus.PAUSE
    resume(handle)
    assert coroutine.cr_frame is None


@pytest.mark.parametrize("thing", [3, (), (1, 2), None, "text", object], ids=repr)
async def test_await_of_what_is_not_awaitable_raises_in_the_job_which_goes_on(thing: Any) -> None:
    def job() -> str:
        for _ in range(2):
            with pytest.raises(TypeError, match="await"):
                await_(thing)
        return await_(asyncio.sleep(0, "went on"))

    assert await run_job(job) == "went on"


async def test_await_of_a_future_of_another_loop_raises_in_the_job_which_goes_on() -> None:
    other = asyncio.new_event_loop()
    foreign = other.create_future()
    other.close()

    def job() -> str:
        with pytest.raises(RuntimeError, match="loop"):
            await_(foreign)
        return await_(asyncio.sleep(0, "went on"))

    assert await run_job(job) == "went on"


async def test_await_in_a_foreign_greenlet_inside_a_job_resumes_that_greenlet() -> None:
    def inner() -> str:
        with pytest.raises(ZeroDivisionError):
            await_(fail())
        return await_(asyncio.sleep(0, "inner"))

    async def fail() -> None:
        raise ZeroDivisionError

    def job() -> str:
        result: str = greenlet.greenlet(inner).switch()
        return result + await_(asyncio.sleep(0, " and outer"))

    assert await run_job(job) == "inner and outer"
