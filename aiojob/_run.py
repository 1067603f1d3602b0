"""The asyncio adapter: coroutines that run plain functions as jobs, and resume them.

A coroutine drives its job: whatever the job pauses for, the coroutine awaits, within the
awaiting task's own steps. Timeouts, cancellation, task groups and context variables are
therefore what they would be if the job were a coroutine.
"""

from __future__ import annotations

import functools
import logging
import sys
from asyncio import AbstractEventLoop, CancelledError, Future, Runner, get_running_loop, iscoroutine
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar

from ._errors import JobError, WrongThreadError
from ._fibre import (
    PAUSE,
    Fibre,
    Pool,
    current_fibre,
    getcurrent,
    greenlet,
    pool_of,
    run_in_own_greenlet,
    take_idle,
)
from ._job import (
    CANCELLATIONS,
    begin,
    check_no_job_runs,
    drop,
    finish,
    job_of,
    name_of,
    pause_nested,
    resume,
    take_wait_ctx,
    throw,
    unwind,
)
from ._observe import note_pause
from ._waitctx import WaitCtx
from ._wakeups import NEXT_ITERATION, attach, current_hub, loop_runs

__all__ = ["Session", "as_coroutine", "await_", "iterate", "run", "run_job"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("aiojob")

CANCELLATIONS.add(CancelledError)


async def run_job(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a plain function as a job, and return what it returns.

    Anywhere down its call stack the function may pause, with `await_`, `pause_job` or an
    engine; meanwhile the event loop serves others. It runs in the awaiting task's own steps
    and in its context, not in a thread.

    >>> import asyncio
    >>> def greet(name):
    ...     await_(asyncio.sleep(0.01))
    ...     return f"hello, {name}"
    >>> asyncio.run(run_job(greet, "world"))
    'hello, world'

    Where the thread's pool is limited (`init_thread`) and exhausted, the job waits its turn.

    Cancellation: `asyncio.CancelledError` is raised in the job, at its pause. The job may
    clean up, pause again while it does, and swallow it, as a coroutine may. Closing the
    coroutine raises `GeneratorExit` there, and the job cannot pause any more.

    Threads: a job stays in the thread of its event loop; await it there.

    Stands for the loop around ``ASYNC_start_job`` in OpenSSL's applications.

    Raises:
        BaseException: What `func` raises, with the traceback into the job's frames. As from any
            coroutine, a `StopIteration` comes as a `RuntimeError`.
        JobError: Awaited by hand inside a running job: there, call `func` directly.
    """
    driver = getcurrent()
    fibre = take_idle(driver, attach)
    if fibre is None:
        fibre = await _acquire(func)
        driver = getcurrent()
        port = fibre.port
        reply = begin(fibre, func, args, kwargs)
    else:
        # This is `begin`, whose frame would be in the way: from Python 3.12 on, greenlet walks
        # all frames between the two ends of a switch.
        port = fibre.port
        port.running = True
        try:
            reply = fibre.switch(func, args, kwargs)
        except BaseException as exc:  # not traced
            reply = throw(fibre, exc)
        port.running = False
    pool = fibre.pool
    is_untouched = fibre.job is None and fibre.way_back is pool.home_switch
    if reply is port and is_untouched and port.error is None:
        # This is `finish`, without its frame.
        value = port.value
        port.value = fibre.gr_context = None
        pool.give(fibre)
        return value  # type: ignore[no-any-return]
    # Resume the job, from its first pause on to its end. This has no function of its own, as each
    # coroutine on the way to what is awaited costs time at each step.
    counts = pool.counts
    while reply is not port:
        counts.pauses += 1.0
        try:
            if (interval := pool.interval) is None:
                interval = note_pause(fibre)
            port.since = interval
            if reply is PAUSE:
                value = None
                if (wake_up := _paused(fibre)) is not None:
                    await wake_up
            else:
                value = await reply
            here = getcurrent()  # a call, after which a signal handler may run, and raise
        except BaseException as exc:
            error = _without_first_frame(exc)
        else:
            if here is not driver:
                driver = _follow_driver(fibre)
            if fibre.paused_in is None:  # this is `resume`, without its frame
                port.running = True
                try:
                    reply = fibre.switch(value)
                except BaseException as exc:  # not traced
                    reply = throw(fibre, exc)
                port.running = False
            else:
                reply = resume(fibre, value)
            value = None  # the job's by now: it is not to be kept until the next pause ends
            continue
        # Here and not in the except block, or what the job raises later would get `error`
        # as its __context__.
        if reply is PAUSE:
            _end_wait(fibre)
        if isinstance(error, GeneratorExit):
            del error
            return _close(fibre)  # type: ignore[no-any-return]
        if getcurrent() is not driver:
            driver = _follow_driver(fibre)
        reply = throw(fibre, error)
        del error  # its traceback may hold this frame
    return finish(fibre)  # type: ignore[no-any-return]


async def _acquire(func: Callable[..., Any]) -> Fibre:
    """Take a fibre for a job from the thread's pool, or wait for one, and prepare it."""
    if current_fibre() is not None:
        # An eager task begins inside the job that created it; its next step does not.
        await NEXT_ITERATION
        check_no_job_runs()
    pool = pool_of(getcurrent())
    fibre = pool.acquire()
    if fibre is None:
        fibre = await _wait_for_fibre(pool, func)
    fibre.prepare(getcurrent(), attach)
    if pool.is_large:
        current_hub().trim_by_and_by(pool)
    return fibre


class _Waiter:
    """A coroutine that waits for a fibre."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.since = monotonic()
        self._loop = get_running_loop()
        self.fibre: Future[Fibre] = self._loop.create_future()

    def offer(self, fibre: Fibre) -> bool:
        if self.fibre.done() or self._loop.is_closed():
            return False
        self.fibre.set_result(fibre)
        return True

    def call_soon_threadsafe(self, action: Callable[[], object]) -> bool:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed
            return False
        return True


async def _wait_for_fibre(pool: Pool, func: Callable[..., Any]) -> Fibre:
    waiter = _Waiter(func)
    pool.add_waiter(waiter)
    try:
        return await waiter.fibre
    except BaseException:
        pool.remove_waiter(waiter)
        if waiter.fibre.done() and not waiter.fibre.cancelled():
            # It was offered a fibre, and cancelled before this step.
            if pool.is_here:
                pool.give(waiter.fibre.result())
            else:
                pool.post(functools.partial(pool.give, waiter.fibre.result()))
        raise


def _paused(fibre: Fibre) -> Awaitable[None] | None:
    """Return what a job that called `pause_job` waits for, None if it was woken already."""
    job = fibre.job
    ctx = None if job is None else job._wait_ctx
    if ctx is None:
        ctx = job_of(fibre).wait_ctx
    if ctx._changed:
        ctx._forget_changes()
    return ctx._waker.pause(ctx)  # type: ignore[no-any-return]


def _end_wait(fibre: Fibre) -> None:
    """Have a wake-up that is still to come end the job's next pause instead of this one."""
    if fibre.job is not None and fibre.job._wait_ctx is not None:
        fibre.job._wait_ctx._waker.forget_pause()


def _follow_driver(fibre: Fibre) -> greenlet:
    """Have the job come back to the greenlet that its coroutine runs in by now."""
    driver = getcurrent()
    try:
        if not fibre.pool.is_here:
            raise WrongThreadError("run_job() was resumed in another thread than it began in")
        check_no_job_runs()
    except JobError:
        drop(fibre)
        raise
    fibre.set_home(driver)
    return driver


def _close(fibre: Fibre) -> Any:
    if not loop_runs() and not sys.is_finalizing():
        logger.warning(
            "a job, %s, is unwound, as its event loop has ended: cancel its task and await that "
            "before the loop ends, as run() and asyncio.run() do",
            name_of(fibre.port.func),
        )
    if fibre.pool.is_here:
        return unwind(fibre)
    drop(fibre)  # leaves it to the job's own thread
    raise GeneratorExit


def _without_first_frame(error: BaseException) -> BaseException:
    traceback = error.__traceback__
    return error.with_traceback(traceback and traceback.tb_next)


def await_(awaitable: Awaitable[T], /) -> T:
    """Pause the running job until its driver has awaited `awaitable`; return the result.

    >>> import asyncio
    >>> async def main():
    ...     return await run_job(await_, asyncio.sleep(0.01, "slept"))
    >>> asyncio.run(main())
    'slept'

    Cancelling the task cancels what is awaited, as it would in a coroutine. It is awaited in the
    job's own thread and task.

    Raises:
        BaseException: What the awaitable raises.
        CannotPauseError: No job is running here, pausing is blocked, or the job is being
            closed; a coroutine is closed then.
    """
    try:
        way_back = getcurrent().way_back  # type: ignore[attr-defined]
    except AttributeError:
        way_back = pause_nested
    return way_back(awaitable)  # type: ignore[no-any-return]


class Session:
    """Several jobs, one after the other, on one wait context (a TLS connection, say).

    >>> import asyncio
    >>> def engine():
    ...     ctx = get_wait_ctx()
    ...     if ctx.get_fd("engine") is None:
    ...         ctx.set_wait_fd("engine", 7)
    ...     return ctx.get_all_fds()
    >>> async def main():
    ...     async with Session() as session:
    ...         return [await session.run_job(engine) for _ in range(2)]
    >>> asyncio.run(main())
    [[7], [7]]

    Leaving the ``async with`` block frees the context, which calls the cleanup of each fd that
    is left. If a job is still under way then, that is a `JobError`; if an exception leaves the
    block, it goes on, and the job frees the context at its end. A session belongs to the thread
    of its event loop.
    """

    __slots__ = ("_left", "wait_ctx")

    wait_ctx: WaitCtx
    """The wait context that all jobs of the session share."""

    def __init__(self) -> None:
        self.wait_ctx = WaitCtx()
        self._left = False

    async def __aenter__(self) -> Self:
        self.wait_ctx.__enter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left = True
        if exc is None or not self.wait_ctx._in_use:
            self.wait_ctx.free()
        # Otherwise the job that is under way frees it, and the body's exception goes on.

    async def run_job(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job on the session's wait context; otherwise the same as `aiojob.run_job`.

        Raises:
            JobError: Another job of the session has not finished, or the session has ended.
        """
        self.wait_ctx._check_startable()
        attach(self.wait_ctx)
        self.wait_ctx._in_use = True
        begins = _OnContext(self.wait_ctx, func)
        try:
            return await run_job(begins, *args, **kwargs)
        finally:
            if not begins.done:
                self.wait_ctx._in_use = False
            if self._left:
                self.wait_ctx.free()


class _OnContext(Generic[P, T]):
    """What a session's job runs first: it takes its wait context, and then is the function."""

    __slots__ = ("_ctx", "_func", "done")

    def __init__(self, ctx: WaitCtx, func: Callable[P, T]) -> None:
        self._ctx = ctx
        self._func = func
        self.done = False

    def __repr__(self) -> str:
        return name_of(self._func)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        take_wait_ctx(self._ctx, self._func)
        self.done = True
        return self._func(*args, **kwargs)


def as_coroutine(func: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a coroutine function of a plain one, that runs it with `run_job`.

    >>> import asyncio
    >>> @as_coroutine
    ... def greet(name):
    ...     await_(asyncio.sleep(0.01))
    ...     return f"hello, {name}"
    >>> asyncio.run(greet("world"))
    'hello, world'

    Pauses, cancellation, threads and errors are those of `run_job`.

    Raises:
        TypeError: `func` is not callable.
    """
    if not callable(func):
        raise TypeError(f"func must be callable, got {func!r}: as_coroutine(func)(*args)")

    @functools.wraps(func)
    async def coroutine(*args: P.args, **kwargs: P.kwargs) -> T:
        return await run_job(func, *args, **kwargs)

    return coroutine


_END: Final = object()


async def iterate(iterable: Iterable[T], /) -> AsyncGenerator[T, None]:
    """Iterate over a plain iterable whose steps may pause: each runs as a job.

    >>> import asyncio
    >>> def ticks():
    ...     for number in range(3):
    ...         await_(asyncio.sleep(0.01))
    ...         yield number
    >>> async def main():
    ...     return [number async for number in iterate(ticks())]
    >>> asyncio.run(main())
    [0, 1, 2]

    Cancellation reaches the iterable at the pause it is in. A generator is closed, in a job too,
    when the iteration ends or is closed; to have that happen at once after a ``break``, use
    `contextlib.aclosing`.
    """
    iterator = await run_job(iter, iterable)
    try:
        while (item := await run_job(next, iterator, _END)) is not _END:
            yield item  # type: ignore[misc]
    finally:
        if isinstance(iterator, Generator):
            await run_job(iterator.close)


def run(
    main: Coroutine[Any, Any, T],
    *,
    loop_factory: Callable[[], AbstractEventLoop] | None = None,
    debug: bool | None = None,
) -> T:
    """Run a coroutine in a new event loop, as `asyncio.run` does.

    The loop runs in a greenlet of its own. From Python 3.12 on, switching greenlets costs time
    for each frame of the stacks that are switched between; this way the frames below the
    loop do not count.

    Raises:
        RuntimeError: An event loop, or a job, is running in this thread.
        TypeError: `loop_factory` is not callable.
        ValueError: `main` is no coroutine.
    """

    def run_main() -> T:
        with Runner(loop_factory=loop_factory, debug=debug) as runner:
            return runner.run(main)

    try:
        check_no_job_runs()
        if loop_runs():
            raise RuntimeError(
                "aiojob.run() cannot be called while an event loop runs in this thread: "
                "await the coroutine instead"
            )
        if loop_factory is not None and not callable(loop_factory):
            raise TypeError(
                f"loop_factory must be callable without arguments, got {loop_factory!r}: "
                "run(main(), loop_factory=uvloop.new_event_loop)"
            )
    except (RuntimeError, TypeError):
        if iscoroutine(main):
            main.close()  # or it would warn that it was never awaited
        raise
    return run_in_own_greenlet(run_main)  # type: ignore[no-any-return]
