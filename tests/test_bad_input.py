"""Wrong values, at all moments, to every public call: documented errors, and all is as before."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable
from fractions import Fraction
from io import StringIO
from types import SimpleNamespace
from typing import Any

import greenlet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiojob
from aiojob import (
    Completion,
    Session,
    WaitCtx,
    all_jobs,
    as_coroutine,
    await_,
    cleanup_thread,
    get_wait_ctx,
    init_thread,
    iterate,
    offload,
    offload_async,
    pause_blocked,
    pause_job,
    print_jobs,
    run,
    run_job,
    set_offload_threads,
    sleep,
    start_job,
    stats,
    unblock_pause,
    wait_future,
    wait_readable,
    wait_writable,
)

DOCUMENTED = (
    aiojob.AiojobError,
    TypeError,
    ValueError,
    KeyError,
    TimeoutError,
    RuntimeError,
    concurrent.futures.CancelledError,
    asyncio.CancelledError,
)
"""The errors that the documentation names, those of Python's own calls among them."""


def finished_job() -> Any:
    _, job, _ = start_job(None, None, pause_job)
    assert job is not None
    start_job(job, None)
    return job


def freed_ctx() -> WaitCtx:
    ctx = WaitCtx()
    ctx.free()
    return ctx


def cancelled_future() -> concurrent.futures.Future[None]:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.cancel()
    return future


class Hostile:
    """Nothing about it can be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        raise ValueError("not comparable")

    def __repr__(self) -> str:
        return "<hostile>"

    __hash__ = None  # type: ignore[assignment]


CLOSED_FD = 999_999


def seconds(value: Any) -> Any:
    """The value as a time to wait, but for one that is a time, and long."""
    return 0.001 if value is CLOSED_FD else value


MAKERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "a closed fd": lambda: CLOSED_FD,
    "beyond an int": lambda: 1 << 31,
    "huge": lambda: 10**400,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus inf": lambda: float("-inf"),
    "small float": lambda: 1e-9,
    "fraction": lambda: Fraction(1, 3),
    "complex": lambda: 1j,
    "str": lambda: "text",
    "bytes": lambda: b"bytes",
    "list": lambda: [1],
    "object": object,
    "type": lambda: int,
    "exception type": lambda: OSError,
    "exception": lambda: OSError(22, "no"),
    "finished job": finished_job,
    "freed context": freed_ctx,
    "context": WaitCtx,
    "cancelled future": cancelled_future,
    "hostile": Hostile,
    "module": lambda: os,
}

Call = Callable[[Any], Any]


def status_is_set(value: Any) -> None:
    WaitCtx().status = value


def wait_readable_for(timeout: Any) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"x")
    try:
        wait_readable(reading, timeout)
    finally:
        os.close(reading)
        os.close(writing)


CALLS: dict[str, Call] = {
    "start_job(v)": lambda v: start_job(v, None),
    "start_job(wait_ctx)": lambda v: start_job(None, v, int),
    "start_job(func)": lambda v: start_job(None, None, v),
    "init_thread(max)": init_thread,
    "init_thread(init)": lambda v: init_thread(3, v),
    "get_wait_ctx": get_wait_ctx,
    "await_": await_,
    "as_coroutine": lambda v: as_coroutine(v),
    "run": run,
    "offload": offload,
    "offload(executor)": lambda v: offload(int, executor=v),
    "print_jobs(file)": lambda v: print_jobs(v or StringIO()),
    "set_offload_threads": set_offload_threads,
    "sleep": lambda v: sleep(seconds(v)),
    "wait_future": wait_future,
    "wait_readable": lambda v: wait_readable(v, 0.001),
    "wait_writable": lambda v: wait_writable(v, 0.001),
    "wait_readable(timeout)": wait_readable_for,
    "Completion(on_cancel)": lambda v: Completion(on_cancel=v),
    "Completion.wait": lambda v: Completion[None]().wait(0.001 if v is None else seconds(v)),
    "Completion.set_exception": lambda v: Completion[None]().set_exception(v),
    "WaitCtx.set_wait_fd": lambda v: WaitCtx().set_wait_fd("key", v),
    "WaitCtx.set_wait_fd(key)": lambda v: WaitCtx().set_wait_fd(v, 0),
    "WaitCtx.set_wait_fd(cleanup)": lambda v: WaitCtx().set_wait_fd("key", 0, None, v),
    "WaitCtx.get_fd": lambda v: WaitCtx().get_fd(v),
    "WaitCtx.clear_fd": lambda v: WaitCtx().clear_fd(v),
    "WaitCtx.set_callback": lambda v: WaitCtx().set_callback(v),
    "WaitCtx.status": status_is_set,
    "cleanup_thread": lambda _: cleanup_thread(),
    "unblock_pause": lambda _: unblock_pause(),
}


def called(name: str, value: str) -> str:
    """Make a call, and say what came of it; only documented errors come out."""
    try:
        CALLS[name](MAKERS[value]())
    except DOCUMENTED as error:
        return type(error).__name__
    finally:
        set_offload_threads(6)
    return "returned"


def steps(calls: list[tuple[str, str]]) -> None:
    for name, value in calls:
        called(name, value)


Calls = list[tuple[str, str]]


def outside(calls: Calls) -> None:
    steps(calls)


def in_a_coroutine(calls: Calls) -> None:
    async def main() -> None:
        steps(calls)

    asyncio.run(main())


def in_a_job(calls: Calls) -> None:
    asyncio.run(run_job(steps, calls))


def in_a_session(calls: Calls) -> None:
    async def main() -> None:
        async with Session() as session:
            await session.run_job(steps, calls)

    asyncio.run(main())


def in_a_blocked_job(calls: Calls) -> None:
    def work() -> None:
        with pause_blocked():
            steps(calls)

    asyncio.run(run_job(work))


def in_a_greenlet_of_a_job(calls: Calls) -> None:
    asyncio.run(run_job(lambda: greenlet.greenlet(steps).switch(calls)))


def in_a_hand_driven_job(calls: Calls) -> None:
    _, job, _ = start_job(None, None, steps, calls)
    while job is not None:
        _, job, _ = start_job(job, None)


def in_a_job_that_is_closed(calls: Calls) -> None:
    def work() -> None:
        try:
            await_(asyncio.sleep(1))
        finally:
            steps(calls)

    async def main() -> None:
        coroutine = run_job(work)
        coroutine.send(None)
        coroutine.close()

    asyncio.run(main())


MOMENTS = (
    outside,
    in_a_coroutine,
    in_a_job,
    in_a_session,
    in_a_blocked_job,
    in_a_greenlet_of_a_job,
    in_a_hand_driven_job,
    in_a_job_that_is_closed,
)


def check_all_is_as_before() -> None:
    init_thread()  # refused if a job were under way
    assert all_jobs() == []
    counts = stats()
    assert (counts.running, counts.paused, counts.waiters) == (0, 0, 0)
    assert asyncio.run(run_job(await_, asyncio.sleep(0, "works"))) == "works"


@pytest.mark.parametrize("moment", MOMENTS)
def test_each_wrong_value_is_refused_as_documented(moment: Callable[[Calls], None]) -> None:
    for name in CALLS:
        moment([(name, value) for value in MAKERS])
        check_all_is_as_before()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(MOMENTS),
    st.lists(st.tuples(st.sampled_from(list(CALLS)), st.sampled_from(list(MAKERS))), max_size=8),
)
def test_wrong_values_after_each_other_leave_all_as_before(
    moment: Callable[[Calls], None], calls: Calls
) -> None:
    moment(calls)
    check_all_is_as_before()


async def test_coroutines_refuse_wrong_values_as_documented() -> None:
    async def iterated(iterable: Any) -> list[Any]:
        return [item async for item in iterate(iterable)]

    for call in (run_job, lambda func: as_coroutine(func)(), Session().run_job, iterated):
        for name, make in MAKERS.items():
            try:
                await call(make())
            except DOCUMENTED:
                pass
            except OSError:  # the value itself, called
                assert name == "exception type"
    assert await run_job(await_, asyncio.sleep(0, "works")) == "works"


def test_what_is_no_executor_is_named_and_the_way_to_pass_one() -> None:
    class_of_executors: Any = concurrent.futures.ThreadPoolExecutor
    not_one: Any = SimpleNamespace(submit="text")
    executor: Any
    for executor in (5, class_of_executors, not_one):
        with pytest.raises(TypeError, match=r"executor must be .*, got .*executor=Thread") as info:
            offload(int, executor=executor)
        assert repr(executor) in str(info.value)


async def test_offload_async_refuses_what_is_no_executor() -> None:
    not_one: Any = 5
    with pytest.raises(TypeError, match=r"executor must be .*, got 5"):
        offload_async(int, executor=not_one)
    with pytest.raises(TypeError, match=r"executor must be .*, got 5"):
        await run_job(offload, int, executor=not_one)


async def test_anything_with_submit_is_an_executor() -> None:
    class InPlace:
        def submit(self, func: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.set_result(func(*args))
            return future

    executor: Any = InPlace()
    assert offload(divmod, 7, 2, executor=executor) == (3, 1)
    assert await offload_async(divmod, 7, 2, executor=executor) == (3, 1)


def test_print_jobs_refuses_what_cannot_be_written_to() -> None:
    _, job, _ = start_job(None, None, pause_job)
    not_one: Any = 5
    with pytest.raises(TypeError, match=r"file must be .*, got 5: print_jobs\(\)"):
        print_jobs(not_one)

    class Lines(list[str]):
        write = list.append

    lines: Any = Lines()
    print_jobs(lines)  # needs no more than that
    assert lines[0] == "1 job: 0 running, 1 paused"
    del job


def test_an_object_whose_fileno_is_no_fd_is_refused() -> None:
    text: Any = "text"
    for fileno in (text, lambda: text, lambda: None):
        fake: Any = SimpleNamespace(fileno=fileno)
        for wait in (wait_readable, wait_writable):
            with pytest.raises(TypeError, match=r"an fd, or an object with fileno\(\), is needed"):
                wait(fake, 0.001)


def test_as_coroutine_refuses_what_cannot_be_called_before_it_is() -> None:
    not_one: Any = 5
    with pytest.raises(TypeError, match=r"func must be callable, got 5: as_coroutine\(func\)"):
        as_coroutine(not_one)


def test_run_refuses_a_wrong_loop_factory_and_closes_the_coroutine() -> None:
    not_one: Any = 5
    main = asyncio.sleep(0)
    with pytest.raises(TypeError, match="loop_factory must be callable without arguments, got 5"):
        run(main, loop_factory=not_one)
    with pytest.raises(RuntimeError, match="already awaited"):
        main.send(None)


class Submitting:
    """Something with a `submit` method, that returns what it is told to."""

    def __init__(self, returned: Any) -> None:
        self._returned = returned

    def submit(self, func: Callable[..., Any], *args: Any) -> Any:
        return self._returned


async def test_executor_that_returns_no_future_is_refused() -> None:
    executor: Any = Submitting(None)
    for call in (offload, offload_async):
        with pytest.raises(TypeError, match=r"submit\(\) must return a future .*, got None"):
            call(int, executor=executor)


async def test_executor_whose_future_fails_as_none_may_holds_up_no_other() -> None:
    class Odd(concurrent.futures.Future[Any]):
        def exception(self, timeout: float | None = None) -> Any:
            return "text"

    seen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
    future = Odd()
    future.set_result(None)
    executor: Any = Submitting(future)
    odd = offload_async(int, executor=executor)
    async with asyncio.timeout(20):
        assert await offload_async(divmod, 7, 2) == (3, 1)
    assert not odd.done()
    odd.cancel()
    (context,) = seen
    assert isinstance(context["exception"], TypeError)
