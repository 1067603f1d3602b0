"""What each public name does with right and wrong arguments, where no fault is involved."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

import aiojob
from aiojob import (
    CannotPauseError,
    Job,
    JobError,
    JobStatus,
    Session,
    StartResult,
    WaitCtx,
    WaitStatus,
    as_coroutine,
    await_,
    get_current_job,
    get_wait_ctx,
    init_thread,
    iterate,
    pause_job,
    run_job,
    start_job,
)

WRONG = cast("Any", "wrong")


async def number(value: int) -> int:
    await asyncio.sleep(0)
    return value


# -- jobs


def test_statuses_have_openssls_numbers() -> None:
    assert [JobStatus.NO_JOBS, JobStatus.PAUSE, JobStatus.FINISH] == [1, 2, 3]
    assert [WaitStatus.UNSUPPORTED, WaitStatus.ERR, WaitStatus.OK, WaitStatus.EAGAIN] == [
        0,
        1,
        2,
        3,
    ]


def test_platform_is_capable() -> None:
    assert aiojob.is_capable() is True


def test_job_is_not_constructed_by_users() -> None:
    with pytest.raises(TypeError, match="start_job"):
        Job()


def test_job_shows_what_it_is() -> None:
    seen = []

    def work() -> None:
        job = get_current_job()
        assert job is not None
        seen.append((job.status, repr(job)))
        pause_job()

    with WaitCtx() as ctx:
        status, job, ret = start_job(None, ctx, work)
        assert (status, ret) == (JobStatus.PAUSE, None)
        assert job is not None
        assert (job.func, job.wait_ctx, job.thread) == (work, ctx, threading.current_thread())
        assert repr(job).startswith("<Job PAUSE ")
        assert seen[0][0] is JobStatus.RUNNING
        assert seen[0][1].startswith("<Job RUNNING ")
        assert start_job(job, ctx) == StartResult(JobStatus.FINISH, None, None)
        assert job.status is JobStatus.FINISH
        assert repr(job).startswith("<Job FINISH ")


def test_finished_job_that_had_no_wait_context_has_none() -> None:
    job = start_job(None, None, get_current_job).ret
    assert job is not None
    with pytest.raises(JobError, match="has no wait context"):
        get_wait_ctx(job)


def test_wait_context_outside_a_job_must_be_asked_of_a_job() -> None:
    with pytest.raises(JobError, match="pass one"):
        get_wait_ctx()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None), "func must be callable"),
        ((None, None, WRONG), "func must be callable"),
        ((None, WRONG, len), "wait_ctx must be a WaitCtx"),
        ((WRONG, None), "job must be a Job"),
    ],
)
def test_start_job_names_the_wrong_argument(arguments: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        start_job(*arguments)
    assert start_job(None, None, len, "abc").ret == 3


@pytest.mark.parametrize("name", ["max_size", "init_size"])
def test_init_thread_names_the_wrong_argument(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got 'wrong'"):
        init_thread(**{name: WRONG})


def test_hand_driven_job_that_awaits_is_told_what_to_use() -> None:
    def work() -> None:
        with pytest.raises(CannotPauseError, match="use run_job"):
            await_(number(1))

    assert start_job(None, None, work).status is JobStatus.FINISH


async def test_job_that_a_coroutine_drives_cannot_be_resumed_by_hand() -> None:
    jobs: list[Job] = []
    begun, resumed = asyncio.Event(), asyncio.Event()

    def work() -> None:
        job = get_current_job()
        assert job is not None
        jobs.append(job)
        begun.set()
        await_(resumed.wait())

    task = asyncio.create_task(run_job(work))
    await begun.wait()
    with pytest.raises(JobError, match="driven by run_job"):
        start_job(jobs[0], None)
    resumed.set()
    await task
    assert jobs[0].status is JobStatus.FINISH


# -- wait contexts


@pytest.mark.parametrize(
    ("fd", "error"),
    [(-1, ValueError), ("7", TypeError), (7.0, TypeError), (True, TypeError), (None, TypeError)],
)
def test_wrong_fd_is_refused_and_not_set(fd: Any, error: type[Exception]) -> None:
    with WaitCtx() as ctx:
        with pytest.raises(error, match="fd must"):
            ctx.set_wait_fd("key", fd)
        assert ctx.get_all_fds() == []


def test_wrong_cleanup_is_refused_and_not_set() -> None:
    with WaitCtx() as ctx:
        with pytest.raises(TypeError, match="cleanup must be callable"):
            ctx.set_wait_fd("key", 7, None, WRONG)
        assert ctx.get_fd("key") is None


def test_wrong_callback_is_refused_and_not_set() -> None:
    with WaitCtx() as ctx:
        ctx.set_callback(print, 1)
        with pytest.raises(TypeError, match="callback must be callable"):
            ctx.set_callback(WRONG)
        assert ctx.get_callback() == (print, 1)
        ctx.set_callback(None)
        assert ctx.get_callback() is None


def test_wrong_status_is_refused_and_not_set() -> None:
    with WaitCtx() as ctx:
        ctx.status = cast("WaitStatus", 3)
        assert ctx.status is WaitStatus.EAGAIN
        with pytest.raises(ValueError, match="4"):
            ctx.status = cast("WaitStatus", 4)
        assert ctx.status is WaitStatus.EAGAIN


def test_clear_of_an_unknown_key_raises_key_error() -> None:
    with WaitCtx() as ctx, pytest.raises(KeyError, match="key"):
        ctx.clear_fd("key")


def test_freed_context_refuses_everything_but_free() -> None:
    ctx = WaitCtx()
    ctx.free()
    ctx.free()
    assert repr(ctx) == "<WaitCtx freed>"
    calls: list[Callable[[], object]] = [
        lambda: ctx.set_wait_fd("key", 7),
        lambda: ctx.get_fd("key"),
        ctx.get_all_fds,
        ctx.get_changed_fds,
        lambda: ctx.clear_fd("key"),
        lambda: ctx.set_callback(print),
        ctx.get_callback,
        ctx.__enter__,
        lambda: start_job(None, ctx, len, "abc"),
    ]
    for call in calls:
        with pytest.raises(JobError, match="was freed"):
            call()


def test_every_cleanup_is_called_and_all_errors_are_raised() -> None:
    called = []

    def cleanup(ctx: WaitCtx, key: object, fd: int, custom_data: object) -> None:
        called.append((key, fd, custom_data))
        raise ValueError(fd)

    ctx = WaitCtx()
    ctx.set_wait_fd("a", 7, "seven", cleanup)
    ctx.set_wait_fd("b", 8, None, cleanup)
    with pytest.raises(BaseExceptionGroup) as raised:
        ctx.free()
    assert called == [("b", 8, None), ("a", 7, "seven")]
    assert [error.args for error in raised.value.exceptions] == [(8,), (7,)]


# -- the adapter


async def test_coroutine_function_of_a_plain_one_keeps_its_name() -> None:
    @as_coroutine
    def double(value: int) -> int:
        """Double."""
        return 2 * await_(number(value))

    assert asyncio.iscoroutinefunction(double)
    assert (double.__name__, double.__doc__) == ("double", "Double.")
    assert await double(3) == 6


async def test_iteration_closes_its_generator_as_a_job() -> None:
    closed = []

    def numbers() -> Iterator[int]:
        try:
            for value in range(10):
                yield await_(number(value))
        finally:
            closed.append(await_(number(-1)))

    iteration = iterate(numbers())
    assert [await anext(iteration) for _ in range(3)] == [0, 1, 2]
    await iteration.aclose()
    assert closed == [-1]


async def test_iteration_of_what_is_not_iterable_raises_type_error() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        async for _ in iterate(cast("Any", 7)):
            pass


async def test_iteration_passes_on_the_iterators_error() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise LookupError

    values = []
    with pytest.raises(LookupError):
        async for value in iterate(failing()):
            values.append(value)  # noqa: PERF401 (the values before the error count)
    assert values == [1]


async def test_iteration_leaves_a_plain_iterator_as_it_is() -> None:
    values = iter([1, 2, 3])
    async for value in iterate(values):
        assert value == 1
        break
    assert list(values) == [2, 3]


async def test_session_serves_jobs_one_after_the_other_and_frees_its_context() -> None:
    cleaned = []
    async with Session() as session:
        await session.run_job(
            lambda: get_wait_ctx().set_wait_fd("key", 7, "data", lambda *args: cleaned.append(args))
        )
        assert await session.run_job(lambda: get_wait_ctx().get_fd("key")) == (7, "data")
        assert cleaned == []
    assert cleaned == [(session.wait_ctx, "key", 7, "data")]
    with pytest.raises(JobError, match="was freed"):
        await session.run_job(len, "abc")


# -- run


def test_run_runs_jobs_like_asyncio_run(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    start_job(None, None, len, "abc")  # leaves an idle fibre, which the loop's jobs use

    async def main() -> list[Any]:
        assert asyncio.get_running_loop().get_debug()
        return [await run_job(await_, number(1)), await run_job(len, "abc")]

    for _ in range(2):
        assert aiojob.run(main(), loop_factory=loop_factory, debug=True) == [1, 3]
    assert start_job(None, None, len, "abcd").ret == 4


def test_run_raises_what_main_raises() -> None:
    async def main() -> None:
        await run_job(await_, number(1))
        raise LookupError

    with pytest.raises(LookupError):
        aiojob.run(main())


def test_run_gives_main_a_copy_of_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="default")

    async def main() -> list[str]:
        seen = [variable.get()]
        variable.set("main")
        return [*seen, await run_job(variable.get)]

    variable.set("caller")
    assert aiojob.run(main()) == ["caller", "main"]
    assert variable.get() == "caller"


def test_job_paused_before_run_goes_on_after_it() -> None:
    _, job, _ = start_job(None, None, pause_job)
    assert job is not None

    async def main() -> int:
        _, inner, _ = start_job(None, None, pause_job)
        assert inner is not None
        inner_jobs.append(inner)
        return await run_job(len, "abc")

    inner_jobs: list[Job] = []
    assert aiojob.run(main()) == 3
    for paused in (job, inner_jobs.pop()):
        assert start_job(paused, None).status is JobStatus.FINISH


async def test_run_inside_a_running_loop_closes_main_and_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="await the coroutine"):
        aiojob.run(number(1))


def test_run_inside_a_job_closes_main_and_says_what_to_do() -> None:
    def work() -> None:
        with pytest.raises(JobError, match="inside a running job"):
            aiojob.run(number(1))

    start_job(None, None, work)
