"""`wait_future`: the futures of executors and of asyncio, waited for from synchronous code."""

from __future__ import annotations

import asyncio
import concurrent.futures
from contextlib import suppress
from typing import Any, TypeVar, overload

from .._errors import CannotPauseError
from .._job import can_await
from .._run import await_
from .._wakeups import loop_runs
from ._completion import Completion

__all__ = ["wait_future"]

T = TypeVar("T")


@overload
def wait_future(future: concurrent.futures.Future[T], /) -> T: ...
@overload
def wait_future(future: asyncio.Future[T], /) -> T: ...
def wait_future(future: concurrent.futures.Future[T] | asyncio.Future[T], /) -> T:
    """Pause, or block, until a future is done; return its result or raise its exception.

    >>> import asyncio, concurrent.futures
    >>> with concurrent.futures.ThreadPoolExecutor() as executor:
    ...     future = executor.submit(pow, 2, 10)
    ...     wait_future(future), asyncio.run(run_job(wait_future, future))
    (1024, 1024)

    Cancellation is raised here, and cancels the future, as ``await`` would; so does any
    exception that ends the wait.

    Args:
        future: Of `concurrent.futures`, in any thread; or of an event loop: the one that drives
            the job, or one that another thread runs.

    Raises:
        BaseException: What the future ended with. If somebody cancelled it, that is the
            ``CancelledError`` of `concurrent.futures` or of `asyncio`, as from its ``result()``.
        CannotPauseError: The future belongs to this thread's event loop and nothing can pause
            here: the loop could never get to it.
        TypeError: That is neither kind of future.
    """
    if isinstance(future, concurrent.futures.Future):
        try:
            return _wait_concurrent(future)
        finally:
            del future  # what it raises holds this frame
    if asyncio.isfuture(future):
        return _wait_asyncio(future)
    raise TypeError(
        f"a future of concurrent.futures or asyncio is needed, got {future!r}: "
        "for other awaitables use await_()"
    )


def _wait_concurrent(future: concurrent.futures.Future[T]) -> T:
    if not future.done():
        completion: Completion[None] = Completion(on_cancel=future.cancel)
        future.add_done_callback(lambda _: completion.set_result(None))
        completion.wait()
    try:
        return future.result()
    finally:
        del future  # what it raises holds this frame


def _wait_asyncio(future: asyncio.Future[T]) -> T:
    if future.done():
        return future.result()
    loop = future.get_loop()
    if loop_runs() and loop is asyncio.get_running_loop():
        if can_await():
            return await_(future)
        raise CannotPauseError(
            f"wait_future({future!r}): it needs this thread's event loop, which nothing gives way "
            "to here; call this function through run_job(), and not while pausing is blocked"
        )
    if not loop.is_running():
        raise RuntimeError(f"wait_future({future!r}): no thread runs its event loop")

    def cancel() -> None:
        with suppress(RuntimeError):  # the loop is closed by now
            loop.call_soon_threadsafe(future.cancel)

    completion: Completion[None] = Completion(on_cancel=cancel)

    def complete(_: Any) -> None:
        completion.set_result(None)

    loop.call_soon_threadsafe(future.add_done_callback, complete)
    completion.wait()
    return future.result()
