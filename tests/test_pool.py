"""The pool of fibres: trimming, fibres that are lost, and what reaches an idle one."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn

import greenlet
import pytest

from aiojob import (
    CannotPauseError,
    Job,
    JobError,
    JobStatus,
    Session,
    WaitFdError,
    WaitStatus,
    WrongThreadError,
    _fibre,
    _wakeups,
    await_,
    block_pause,
    can_pause,
    get_wait_ctx,
    init_thread,
    pause_job,
    run_job,
    start_job,
    unblock_pause,
)


async def at_the_same_time(number: int) -> None:
    """Run so many jobs, all paused at a time."""
    together = asyncio.Barrier(number)
    await asyncio.gather(*(run_job(await_, together.wait()) for _ in range(number)))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def in_thread(func: Callable[[], object]) -> None:
    thread = threading.Thread(target=func)
    thread.start()
    thread.join()


# -- trimming


@pytest.fixture
def trim_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wakeups, "TRIM_INTERVAL", 0)
    monkeypatch.setattr(_wakeups, "TRIM_PAUSE", 0)
    monkeypatch.setattr(_wakeups, "TRIM_AT_ONCE", 10)


@pytest.mark.usefixtures("trim_at_once")
async def test_fibres_that_no_job_needs_are_dropped_but_some() -> None:
    pool = _fibre.pool_of_thread()
    await at_the_same_time(200)
    await until(lambda: pool.idle == _fibre.KEPT)
    assert not pool.is_large
    await at_the_same_time(100)
    await until(lambda: pool.idle == _fibre.KEPT)


@pytest.mark.usefixtures("trim_at_once")
async def test_fibres_that_init_thread_asked_for_are_kept() -> None:
    init_thread(0, 100)
    pool = _fibre.pool_of_thread()
    assert pool.idle == 100
    await at_the_same_time(200)
    await until(lambda: pool.idle == 100)


async def test_small_pool_is_not_trimmed() -> None:
    await at_the_same_time(_fibre.KEPT)
    assert not _wakeups.current_hub()._trims


async def test_reserve_is_used_before_new_fibres_are_made() -> None:
    pool = _fibre.pool_of_thread()
    await at_the_same_time(100)
    pool.renew_reserve()
    made = set(pool._fibres)
    assert len(pool._reserve) == 100 - _fibre.KEPT
    await at_the_same_time(100)
    assert pool._fibres == made


def test_smaller_limit_drops_idle_fibres() -> None:
    init_thread(0, 10)
    init_thread(3)
    assert _fibre.pool_of_thread().idle == 3


# -- fibres that are lost


def stray() -> None:
    stray_at(pause_job)


def stray_at(pause: Callable[..., object], *args: object) -> None:
    """Leave a job in a way that no driver expects, when it is closed."""
    try:
        pause(*args)
    except GeneratorExit:
        parent = greenlet.getcurrent().parent
        assert parent is not None
        parent.switch("stray")


async def test_job_that_leaves_its_close_by_a_switch_is_given_up() -> None:
    init_thread(1)
    coroutine = run_job(stray)
    coroutine.send(None)
    lost = weakref.ref(next(iter(_fibre.pool_of_thread()._fibres)))
    with pytest.raises(JobError, match="did not end when it was closed"):
        coroutine.close()
    gc.collect()
    assert lost() is None
    assert await run_job(len, "abc") == 3


async def test_job_that_is_given_up_frees_its_wait_context() -> None:
    cleaned: list[object] = []

    def work() -> None:
        get_wait_ctx().set_wait_fd("key", 7, None, lambda *args: cleaned.append(args[1:]))
        stray_at(await_, asyncio.sleep(0))

    coroutine = run_job(work)
    coroutine.send(None)
    with pytest.raises(JobError, match="did not end when it was closed"):
        coroutine.close()
    assert cleaned == [("key", 7, None)]


async def test_waiter_gets_the_place_of_a_job_that_is_given_up() -> None:
    init_thread(1)
    coroutine = run_job(stray)
    coroutine.send(None)
    waiter = asyncio.create_task(run_job(len, "abc"))
    await until(lambda: _fibre.pool_of_thread().waiters == 1)
    with pytest.raises(JobError, match="did not end when it was closed"):
        coroutine.close()
    assert await waiter == 3


def test_error_of_a_job_that_another_thread_dropped_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def work() -> None:
        try:
            pause_job()
        finally:
            raise LookupError("in the cleanup")

    jobs = [start_job(None, None, work).job]
    in_thread(jobs.clear)
    assert caplog.records == []
    assert start_job(None, None, len, "abc").ret == 3
    assert [record.name for record in caplog.records] == ["aiojob"]
    assert "in the cleanup" in caplog.text


async def test_place_freed_while_a_waiter_enters_the_queue_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init_thread(1)
    handles = [start_job(None, None, pause_job).job]
    add_waiter = _fibre.Pool.add_waiter

    def drop_and_add(pool: _fibre.Pool, waiter: _fibre.Waiter) -> None:
        # Between the waiter's look at the pool and its place in the queue.
        in_thread(handles.clear)
        add_waiter(pool, waiter)

    monkeypatch.setattr(_fibre.Pool, "add_waiter", drop_and_add)
    assert await run_job(len, "abc") == 3


def test_waiter_is_taken_out_of_the_queue_without_a_search() -> None:
    """Tens of thousands may be cancelled at once."""
    compared = []

    class Waiter:
        func: Callable[..., Any] = len
        since = 0.0

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return self is other

        __hash__ = object.__hash__

        def offer(self, fibre: _fibre.Fibre) -> bool:
            return False

        def call_soon_threadsafe(self, action: Callable[[], object]) -> bool:
            return False

    pool = _fibre.pool_of_thread()
    waiters = [Waiter() for _ in range(100)]
    for waiter in waiters:
        pool.add_waiter(waiter)
    assert pool.queue() == waiters
    for waiter in reversed(waiters):
        pool.remove_waiter(waiter)
        pool.remove_waiter(waiter)  # no effect
    assert pool.waiters == 0
    assert not compared


async def test_waiter_offered_a_fibre_and_closed_by_another_thread_gives_it_back() -> None:
    init_thread(1)
    gate = asyncio.Event()
    holder = asyncio.create_task(run_job(await_, gate.wait()))
    pool = _fibre.pool_of_thread()
    await until(lambda: pool.outstanding == 1)
    waiting = run_job(len, "abc")
    future = waiting.send(None)
    gate.set()
    await holder
    assert future is not None
    assert pool.idle == 0
    in_thread(waiting.close)
    assert await run_job(len, "abcd") == 4


def test_waiter_on_a_closed_loop_is_passed_over(loop_factory: Callable[[], Any]) -> None:
    init_thread(1)
    handles: list[Job | None] = [start_job(None, None, pause_job).job]
    loop = loop_factory()

    async def wait() -> Any:
        waiting = run_job(len, "abc")
        waiting.send(None)
        return waiting

    waiting = loop.run_until_complete(wait())
    loop.close()
    in_thread(handles.clear)
    assert start_job(None, None, len, "abc").ret == 3
    waiting.close()


def test_nothing_is_posted_when_greenlets_cannot_switch_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shut_down() -> None:
        raise RuntimeError("greenlet is being finalized")

    pool = _fibre.pool_of_thread()
    with monkeypatch.context() as patch:
        patch.setattr(_fibre, "getcurrent", shut_down)
        assert not pool.is_here
        pool.post(lambda: pytest.fail("was called"))
    pool.do_posted()


# -- what reaches an idle fibre


def test_greenlet_of_an_ended_job_passes_values_and_errors_through_the_idle_fibre() -> None:
    greenlets: list[greenlet.greenlet] = []

    def inner() -> None:
        parent = greenlet.getcurrent().parent
        assert parent is not None
        assert parent.switch("a value") == "an answer"
        raise LookupError

    def work() -> None:
        greenlets.append(greenlet.greenlet(inner))

    start_job(None, None, work)
    pool = _fibre.pool_of_thread()
    assert pool.idle == 1
    assert greenlets[0].switch() == "a value"
    assert pool.idle == 1
    with pytest.raises(LookupError):
        greenlets[0].switch("an answer")
    assert pool.idle == 0  # that ended the fibre
    assert start_job(None, None, len, "abc").ret == 3


def test_tuple_that_a_greenlet_of_an_ended_job_returns_is_not_taken_for_a_job() -> None:
    called: list[object] = []
    greenlets: list[greenlet.greenlet] = []

    def inner() -> object:
        return (called.append, ("called",), {})

    start_job(None, None, lambda: greenlets.append(greenlet.greenlet(inner)))
    assert greenlets[0].switch() == (called.append, ("called",), {})
    assert called == []
    assert start_job(None, None, len, "abc").ret == 3


# -- what reaches a driver that did not ask for it


def test_value_sent_to_a_hand_written_loop_comes_back_to_the_job_as_an_error() -> None:
    stranger = greenlet.greenlet(lambda: "a stranger's result")

    def work() -> str:
        with pytest.raises(JobError, match="a stranger's result"):
            stranger.switch()
        pause_job()
        return "went on"

    _, job, _ = start_job(None, None, work)
    assert job is not None
    assert start_job(job, None).ret == "went on"


@pytest.mark.parametrize("pauses", [0, 1])
async def test_error_raised_to_the_driver_comes_to_the_job(pauses: int) -> None:
    init_thread(1)

    def fail() -> None:
        raise LookupError

    stranger = greenlet.greenlet(fail)

    def work() -> str:
        for _ in range(pauses):
            await_(asyncio.sleep(0))
        with pytest.raises(LookupError):
            stranger.switch()
        return await_(asyncio.sleep(0, "went on"))

    assert await run_job(work) == "went on"
    assert await run_job(len, "abc") == 3


@pytest.mark.parametrize("pauses", [0, 1])
def test_error_raised_to_a_hand_written_loop_comes_to_the_job(pauses: int) -> None:
    def fail() -> None:
        raise LookupError

    stranger = greenlet.greenlet(fail)

    def work() -> str:
        for _ in range(pauses):
            pause_job()
        with pytest.raises(LookupError):
            stranger.switch()
        return "went on"

    status, job, ret = start_job(None, None, work)
    for _ in range(pauses):
        assert job is not None
        status, job, ret = start_job(job, None)
    assert (status, job, ret) == (JobStatus.FINISH, None, "went on")


async def test_fibre_is_given_up_when_the_driver_gets_one_error_after_the_other() -> None:
    init_thread(1)

    def fail() -> None:
        raise LookupError

    strangers = [greenlet.greenlet(fail) for _ in range(2)]

    def work() -> None:
        try:
            strangers[0].switch()
        except LookupError:
            strangers[1].switch()

    with pytest.raises(LookupError):
        await run_job(work)
    assert await run_job(len, "abc") == 3


def test_hand_written_loop_in_a_greenlet_of_its_own_gets_its_jobs_back() -> None:
    results: list[object] = []

    def loop() -> None:
        _, job, _ = start_job(None, None, pause_job)
        assert job is not None
        results.append(start_job(job, None).status)

    def work() -> str:
        pause_job()
        return "went on"

    _, job, _ = start_job(None, None, work)
    greenlet.greenlet(loop).switch()
    assert results == [JobStatus.FINISH]
    assert job is not None
    assert start_job(job, None).ret == "went on"


def test_coroutine_driven_without_a_loop_tells_the_job_when_it_pauses() -> None:
    def work() -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            pause_job()
        return "went on"

    with pytest.raises(StopIteration, match="went on"):
        run_job(work).send(None)


# -- what outlives its thread


def test_fibre_dies_with_its_thread_though_a_traceback_holds_it() -> None:
    errors: list[BaseException] = []
    fibres: list[weakref.ref[object]] = []

    def fail() -> None:
        raise LookupError

    def thread() -> None:
        try:
            asyncio.run(run_job(fail))
        except LookupError as error:
            errors.append(error)
        fibres.extend(map(weakref.ref, _fibre.pool_of_thread()._fibres))

    in_thread(thread)
    assert len(fibres) == 1
    fibre = fibres[0]()
    assert fibre is None or fibre.dead  # type: ignore[attr-defined]
    errors.clear()
    del fibre
    gc.collect()
    assert fibres[0]() is None


def test_pool_that_another_thread_closes_lets_go_of_its_fibres_only() -> None:
    pool = _fibre.Pool()
    pool.resize(1, 1)
    posted: list[str] = []
    in_thread(lambda: pool.post(lambda: posted.append("done")))
    in_thread(pool.close)
    assert pool.idle == 0
    assert posted == []
    in_thread(lambda: pool.post(lambda: posted.append("done")))
    pool.do_posted()
    assert posted == ["done"]


def test_wait_context_is_first_asked_for_in_the_jobs_own_thread() -> None:
    errors: list[BaseException] = []
    _, job, _ = start_job(None, None, pause_job)
    assert job is not None

    def ask() -> None:
        try:
            get_wait_ctx(job)
        except JobError as error:
            errors.append(error)

    in_thread(ask)
    assert [type(error) for error in errors] == [WrongThreadError]
    assert get_wait_ctx(job) is job.wait_ctx
    start_job(job, None)


# -- wake-ups


async def test_callback_after_something_was_thrown_in_ends_the_next_pause() -> None:
    def work() -> str:
        ctx = get_wait_ctx()
        ctx.status = WaitStatus.OK
        with pytest.raises(LookupError):
            pause_job()
        callback, arg = ctx.get_callback() or (None, None)
        assert callback is not None
        callback(arg)
        pause_job()
        return "woken"

    coroutine = run_job(work)
    future = coroutine.send(None)
    with pytest.raises(StopIteration, match="woken"):
        coroutine.throw(LookupError)
    assert future is not None


def test_late_callbacks_are_not_kept_when_the_loop_closed_before_its_drain(
    loop_factory: Callable[[], Any],
) -> None:
    loop = loop_factory()

    async def hub() -> _wakeups.Hub:
        return _wakeups.current_hub()

    late = loop.run_until_complete(hub())
    late.post(_wakeups.Waker.wake, _wakeups.Waker(late))
    loop.close()
    assert not late._posted
    for _ in range(10):
        late.post(_wakeups.Waker.wake, _wakeups.Waker(late))
    assert not late._posted


async def test_check_that_takes_long_is_polled_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    sleep = _wakeups.Waker._sleep

    async def recorded(self: _wakeups.Waker, seconds: float) -> None:
        slept.append(seconds)
        await sleep(self, 0)

    monkeypatch.setattr(_wakeups.Waker, "_sleep", recorded)

    def work() -> None:
        while len(slept) < 10:
            sum(range(20_000))
            pause_job()

    await run_job(work)
    assert slept == sorted(slept)
    assert slept[0] == _wakeups.POLL_SHORTEST
    assert slept[-1] == _wakeups.POLL_LONGEST


async def test_session_left_by_an_error_with_a_job_under_way_frees_when_the_job_ends() -> None:
    gate = asyncio.Event()
    cleaned: list[object] = []

    def work() -> None:
        get_wait_ctx().set_wait_fd("key", 7, None, lambda *args: cleaned.append(args))
        await_(gate.wait())

    with pytest.raises(LookupError):
        async with Session() as session:
            task = asyncio.create_task(session.run_job(work))
            await asyncio.sleep(0)
            raise LookupError
    assert cleaned == []
    gate.set()
    await task
    assert cleaned == [(session.wait_ctx, "key", 7, None)]


# -- closing


async def test_job_that_is_being_closed_cannot_pause_whatever_it_blocks() -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            pause_job()
        finally:
            block_pause()
            unblock_pause()
            seen.append(can_pause())
            with pytest.raises(CannotPauseError, match="being closed"):
                pause_job()

    coroutine = run_job(work)
    coroutine.send(None)
    coroutine.close()
    assert seen == [False]


# -- readers


@pytest.mark.asyncio(loop_factories=["asyncio"])  # uvloop refuses such a transport by itself
async def test_fd_closed_and_taken_by_a_transport_is_left_to_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "aiojob")
    loop = asyncio.get_running_loop()
    socks: list[socket.socket] = []

    async def connect() -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection(sock=socks[0])
        return writer

    def work() -> asyncio.StreamWriter:
        reader, writer = os.pipe()
        get_wait_ctx().set_wait_fd("key", reader)
        loop.call_soon(os.write, writer, b"x")
        pause_job()
        os.close(reader)
        socks.extend(socket.socketpair())
        if socks[0].fileno() != reader:
            os.dup2(socks[0].fileno(), reader)
            socks[0].close()
            socks[0] = socket.socket(fileno=reader)
        os.close(writer)
        return await_(connect())

    writer = await run_job(work)
    writer.close()
    await writer.wait_closed()
    socks[1].close()


class LoopWithoutReaders(asyncio.SelectorEventLoop):
    """What a loop is like that cannot watch fds, or not now."""

    error: Exception = NotImplementedError()

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> NoReturn:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize(
    ("error", "number", "message"),
    [
        (NotImplementedError(), errno.ENOTSUP, "use the wait context's callback"),
        (OSError(errno.ENOSPC, "no space"), errno.ENOSPC, "no space"),
    ],
)
def test_loop_that_cannot_watch_an_fd_raises_at_the_pause(
    error: Exception, number: int, message: str
) -> None:
    def work() -> str:
        reader, writer = os.pipe()
        get_wait_ctx().set_wait_fd("key", reader)
        with pytest.raises(WaitFdError, match=message) as raised:
            pause_job()
        os.close(reader)
        os.close(writer)
        assert raised.value.errno == number
        return "went on"

    with asyncio.Runner(loop_factory=LoopWithoutReaders) as runner:
        runner.get_loop().error = error  # type: ignore[attr-defined]
        assert runner.run(run_job(work)) == "went on"


async def test_completions_that_follow_each_other_let_the_loop_serve_others() -> None:
    hub = _wakeups.current_hub()
    turns: list[int] = []

    def chained(_: None) -> None:
        if len(turns) < 100:
            turns.append(served)
            hub.post(chained, None)

    served = 0
    hub.post(chained, None)
    while len(turns) < 100:
        await asyncio.sleep(0)
        served += 1
    assert len(set(turns)) > 2


def test_interrupted_post_does_not_keep_later_ones_from_the_loop(
    loop_factory: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[str] = []

    class Interrupted:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *args: object) -> NoReturn:
            raise KeyboardInterrupt

    async def main() -> None:
        hub = _wakeups.current_hub()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hub, "_loop", Interrupted)
            hub.post(woken.append, "woken")
        hub.post(woken.append, "woken")
        await until(lambda: len(woken) == 2)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def test_interrupted_drain_loses_no_delivery(
    loop_factory: Callable[[], Any],
) -> None:
    delivered: list[str] = []

    def interrupted_once(name: str) -> None:
        if not delivered:
            delivered.append("interrupted")
            raise KeyboardInterrupt
        delivered.append(name)

    async def main() -> None:
        hub = _wakeups.current_hub()
        for name in ("first", "second"):
            hub.post(interrupted_once, name)
        await until(lambda: len(delivered) == 3)

    with closing(loop_factory()) as loop:
        task = loop.create_task(main())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        loop.run_until_complete(task)
    assert delivered == ["interrupted", "first", "second"]


async def test_delivery_to_a_future_that_is_done_is_dropped() -> None:
    hub = _wakeups.current_hub()
    cancelled, waiting = asyncio.Future[int](), asyncio.Future[int]()
    cancelled.cancel()
    hub.post(cancelled.set_result, 1)
    hub.post(waiting.set_result, 2)
    assert await waiting == 2


def test_no_job_runs_where_none_was_started() -> None:
    assert not can_pause()
    assert start_job(None, None, can_pause) == (JobStatus.FINISH, None, True)
