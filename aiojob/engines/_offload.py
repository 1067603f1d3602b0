"""`offload`: functions run elsewhere, in aiojob's worker threads or in an executor."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from asyncio import Future, get_running_loop
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import Any, Final, NoReturn, ParamSpec, TypeVar, overload

from .._job import can_await
from .._run import await_
from .._wakeups import current_hub, hub_of
from ._completion import Completion
from ._futures import wait_future
from ._workers import Workers, nesting

__all__ = ["offload", "offload_async", "offload_beneath", "set_offload_threads"]

BENEATH: Final = -1
"""The level of workers that may wait for those of level 0, as these may for those of level 1."""

P = ParamSpec("P")
T = TypeVar("T")


@overload
def offload(
    func: Callable[..., T], /, *args: Any, executor: Executor | None, **kwargs: Any
) -> T: ...
@overload
def offload(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
def offload(  # type: ignore[misc]
    func: Callable[..., Any], /, *args: Any, executor: Executor | None = None, **kwargs: Any
) -> Any:
    """Run a function in a worker thread; pause, or block, until it has returned.

    >>> import asyncio
    >>> offload(pow, 2, 10)
    1024
    >>> asyncio.run(run_job(offload, pow, 2, 10))
    1024

    Worker threads are started when they are needed, up to a limit (`set_offload_threads`), and
    end after ten idle seconds. The function sees a copy of the context variables. An offload
    inside an offloaded function is run at once in the same worker, so that nesting cannot
    exhaust the workers.

    Cancellation is raised here. A function that has not begun is dropped then. One that has
    cannot be stopped: its thread goes on, and what it returns or raises is dropped. An
    interpreter that exits doesn't wait for it either.

    Args:
        func: Any callable. What it raises is raised here, with its traceback.
        executor: None for aiojob's worker threads, or any executor of `concurrent.futures`: a
            process pool, Dask's ``client.get_executor(pure=False)``. Context variables travel to
            threads alone. (To pass an argument of that name on, use `functools.partial`.)

    Raises:
        BaseException: What the function raises.
        RuntimeError: No thread can be started, or the executor was shut down.
        TypeError: `executor` is neither None nor an executor.
    """
    if executor is not None:
        return wait_future(_submit(executor, func, args, kwargs))
    if not can_await():
        return _blocking(func, args, kwargs)
    loop = get_running_loop()
    future: Future[Any] = Future(loop=loop)
    call = _JobCall(func, args, kwargs, future, hub_of(loop).post)
    _levels[nesting.level].submit(call)
    try:
        outcome = await_(future)
    except BaseException:
        call.drop()
        raise
    return outcome if outcome is not call else call.fail()


def offload_beneath(func: Callable[[], T], /) -> T:
    """Offload, in a job, a function that may wait for what the event loop offloads.

    It has workers of its own, or as many such functions as there are workers would wait for ever.
    """
    # The lines of `offload`: a frame that both share would cost that one half a per cent.
    loop = get_running_loop()
    future: Future[Any] = Future(loop=loop)
    call = _JobCall(func, (), {}, future, hub_of(loop).post)
    _levels[BENEATH].submit(call)
    try:
        outcome = await_(future)
    except BaseException:
        call.drop()
        raise
    return outcome if outcome is not call else call.fail()  # type: ignore[no-any-return]


@overload
def offload_async(
    func: Callable[..., T], /, *args: Any, executor: Executor | None, **kwargs: Any
) -> Future[T]: ...
@overload
def offload_async(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...
def offload_async(  # type: ignore[misc]
    func: Callable[..., Any], /, *args: Any, executor: Executor | None = None, **kwargs: Any
) -> Future[Any]:
    """Run a function in a worker thread, for a coroutine: return a future of the running loop.

    >>> import asyncio
    >>> async def main():
    ...     return await asyncio.gather(*(offload_async(pow, 2, n) for n in (8, 9, 10)))
    >>> asyncio.run(main())
    [256, 512, 1024]

    The function is submitted at once, not when the future is awaited. Otherwise the same as
    `offload`. Cancelling the future, or the task that awaits it, is what cancellation is there.

    Raises:
        RuntimeError: No event loop is running here, no thread can be started, or the executor
            was shut down. As from any future, a `StopIteration` comes as a `RuntimeError`.
        TypeError: `executor` is neither None nor an executor.
    """
    if executor is not None:
        future = get_running_loop().create_future()
        _Relay(future).follow(_submit(executor, func, args, kwargs))
        return future
    loop = get_running_loop()
    future = loop.create_future()
    _levels[nesting.level].submit(_AsyncCall(func, args, kwargs, future, hub_of(loop).post))
    return future


def set_offload_threads(limit: int) -> None:
    """Limit the worker threads of `offload` to so many; any thread may call this.

    At first it is as many as `concurrent.futures.ThreadPoolExecutor` has: four more than there
    are cores, and 32 at most. Where nested offloads need workers of their own (an offloaded
    function that runs an event loop), the limit holds for each level of nesting.

    >>> set_offload_threads(8)

    Raises:
        TypeError: That is no int.
        ValueError: It is less than one.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"the number of threads must be an int, got {limit!r}")
    if limit < 1:
        raise ValueError(f"at least one thread is needed, got {limit}")
    _levels.resize(limit)


# -- calls: what the workers run


class _Call:
    """A call of a function, by a worker, for somebody who waits.

    Args:
        waiter: What is told how the call ended: a completion, or a future of an event loop.
        post: How it is told from a worker's thread, ``post(waiter.set_result, value)``.
    """

    __slots__ = ("_args", "_func", "_kwargs", "_post", "_run", "_waiter")

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        waiter: Completion[Any] | Future[Any],
        post: Callable[[Callable[[Any], object], Any], object],
    ) -> None:
        self._run: Callable[..., Any] = copy_context().run
        self._func = func
        self._args = args
        self._kwargs = kwargs
        self._waiter = waiter
        self._post = post

    def run(self, ended: Callable[[Any], object]) -> None:
        """Call the function, unless the call was dropped; see `aiojob.engines._workers.Call`."""
        try:
            outcome = self._run(self._func, *self._args, **self._kwargs)
            tell: Callable[[Any], object] = self._waiter.set_result
        except BaseException as error:
            # Without this frame, the traceback is the function's own.
            traceback = error.__traceback__
            tell, outcome = self._failed(error.with_traceback(traceback and traceback.tb_next))
            del traceback
        # May be large, and the call of a job lives on until the job goes on.
        del self._run, self._func, self._args, self._kwargs
        ended(self)
        self._post(tell, outcome)
        del self, tell, outcome  # what was raised holds this frame

    def _failed(self, error: BaseException) -> tuple[Callable[[Any], object], Any]:
        """Return how the waiter is told that the function raised this."""
        return self._waiter.set_exception, error

    def drop(self) -> None:
        """Have the function not called, unless it has been: nobody waits any more."""
        self._run = _skip


def _skip(*args: Any, **kwargs: Any) -> None:
    """Stand for the function of a call that was dropped."""


class _JobCall(_Call):
    """A call that a job waits for. When it has failed, it is the result of its future.

    A future cannot raise a `StopIteration`, and would hold what it raises.
    """

    __slots__ = ("_error",)

    def _failed(self, error: BaseException) -> tuple[Callable[[Any], object], Any]:
        self._error: BaseException | None = error
        tell = self._waiter.set_result
        del self._waiter  # which holds this from now on
        return tell, self

    def fail(self) -> NoReturn:
        """Raise what the function raised."""
        assert self._error is not None
        try:
            raise self._error
        finally:
            self._error = None  # its traceback holds this frame


class _AsyncCall(_Call):
    """A call that a coroutine waits for, or nobody any more: its future may be cancelled."""

    __slots__ = ()

    _waiter: Future[Any]

    def run(self, ended: Callable[[Any], object]) -> None:
        if self._waiter.cancelled():
            self.drop()
        super().run(ended)

    def _failed(self, error: BaseException) -> tuple[Callable[[Any], object], Any]:
        return self._waiter.set_exception, _awaitable(error)


def _awaitable(error: BaseException) -> BaseException:
    """Return what a future can raise instead: no `StopIteration`."""
    if not isinstance(error, StopIteration):
        return error
    refused = RuntimeError("the offloaded function raised StopIteration")
    refused.__cause__ = error
    return refused


def _blocking(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if nesting.level:
        return copy_context().run(func, *args, **kwargs)
    completion: Completion[Any] = Completion()
    call = _Call(func, args, kwargs, completion, _tell)
    _levels[0].submit(call)
    try:
        return completion.wait()
    except BaseException:
        call.drop()
        raise
    finally:
        del call, completion  # what was raised holds this frame, and they hold that


def _tell(tell: Callable[[Any], object], outcome: Any) -> None:
    tell(outcome)


# -- executors


def _submit(
    executor: Executor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> concurrent.futures.Future[Any]:
    if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor must be None or an executor of concurrent.futures, got {executor!r}: "
            "offload(func, *args, executor=ThreadPoolExecutor())"
        )
    if _runs_in_threads(executor):
        return executor.submit(copy_context().run, func, *args, **kwargs)
    if kwargs:  # some executors, Dask's for one, take keyword arguments for themselves
        func = partial(func, **kwargs)
    future = executor.submit(func, *args)
    if not hasattr(future, "add_done_callback"):
        raise TypeError(
            f"{executor!r}.submit() must return a future of concurrent.futures, got {future!r}: "
            "the function was submitted, but nobody can wait for it"
        )
    return future


def _runs_in_threads(executor: Executor) -> bool:
    """Whether it calls functions as they are, without pickling them first."""
    if not isinstance(executor, concurrent.futures.ThreadPoolExecutor):
        return False
    interpreters = getattr(concurrent.futures, "InterpreterPoolExecutor", None)
    return interpreters is None or not isinstance(executor, interpreters)


class _Relay:
    """Passes the outcome of an executor's future on to one of the running loop."""

    __slots__ = ("_future", "_hub", "_source")

    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._hub = current_hub()

    def follow(self, source: concurrent.futures.Future[Any]) -> None:
        self._source = source
        self._future.add_done_callback(self._cancel)
        source.add_done_callback(lambda _: self._hub.post(_Relay._settle, self))

    def _cancel(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._source.cancel()

    def _settle(self) -> None:
        if self._source.cancelled():
            self._future.cancel()
        elif (error := self._source.exception()) is not None:
            self._future.set_exception(_awaitable(error))
        else:
            self._future.set_result(self._source.result())


# -- the workers, by level of nesting


class _Levels(dict[int, Workers]):
    """The workers of each level; those of level 1 run calls that come from workers of level 0."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._limit = min(32, (cores or 1) + 4)
        self.forget()

    def forget(self) -> None:
        """Begin without workers: a forked process has none."""
        self.clear()
        self._changing = threading.Lock()

    def __missing__(self, level: int) -> Workers:
        with self._changing:
            return self.setdefault(level, Workers(level, self._limit))

    def resize(self, limit: int) -> None:
        with self._changing:
            self._limit = limit
            for workers in self.values():
                workers.resize(limit)


_levels = _Levels()


def all_workers() -> Iterator[Workers]:
    """Return the workers of every level."""
    return iter(tuple(_levels.values()))


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_levels.forget)
