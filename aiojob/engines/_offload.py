"""`offload`: functions run elsewhere, in aiojob's worker threads or in an executor."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from abc import ABC, abstractmethod
from asyncio import Future, get_running_loop
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

from .._job import can_await
from .._run import await_
from .._wakeups import current_hub
from ._completion import Completion
from ._futures import wait_future
from ._workers import Worker, Workers

__all__ = ["offload", "offload_async", "set_offload_threads"]

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
    """
    if executor is not None:
        return wait_future(_submit(executor, func, args, kwargs))
    if can_await():
        return _in_job(func, args, kwargs)
    if isinstance(threading.current_thread(), Worker):
        return copy_context().run(func, *args, **kwargs)
    return _blocking(func, args, kwargs)


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
    """
    if executor is not None:
        future = get_running_loop().create_future()
        _Relay(future).follow(_submit(executor, func, args, kwargs))
        return future
    call = _AsyncCall(func, args, kwargs)
    _workers().submit(call)
    return call.future


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
    """A call of a function: by a worker, for somebody who waits."""

    __slots__ = ("_args", "_error", "_func", "_kwargs", "_run", "_value", "is_dropped")

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._run = copy_context().run
        self._func = func
        self._args = args
        self._kwargs = kwargs
        self._value: Any = None
        self._error: BaseException | None = None
        self.is_dropped = False

    def run(self) -> None:
        """Call the function, in a worker, unless nobody waits any more."""
        if not self.is_dropped:
            try:
                self._value = self._run(self._func, *self._args, **self._kwargs)
            except BaseException as error:
                # Without this frame, the traceback is the function's own.
                traceback = error.__traceback__
                self._error = error.with_traceback(traceback and traceback.tb_next)
                del traceback
        del self._run, self._func, self._args, self._kwargs  # may be large

    def result(self) -> Any:
        """Return or raise what the function did."""
        if self._error is None:
            return self._value
        try:
            raise self._error
        finally:
            self._error = None  # its traceback holds this frame


class _BlockingCall(_Call):
    """A call that a thread waits for, or a job of a hand-written loop."""

    __slots__ = ("completion",)

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__(func, args, kwargs)
        self.completion: Completion[None] = Completion(on_cancel=self.drop)

    def drop(self) -> None:
        self.is_dropped = True

    def deliver(self) -> None:
        self.completion.set_result(None)


class _LoopCall(_Call, ABC):
    """A call that the running event loop is told of, for somebody who awaits the future."""

    __slots__ = ("_hub", "future")

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__(func, args, kwargs)
        self.future: Future[Any] = get_running_loop().create_future()
        self._hub = current_hub()

    def deliver(self) -> None:
        self._hub.post(self)

    @abstractmethod
    def wake(self) -> None:
        """Hand the call over, in the loop's thread."""


class _JobCall(_LoopCall):
    """A call that a job waits for: it takes the outcome from the call."""

    __slots__ = ()

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _AsyncCall(_LoopCall):
    """A call that a coroutine waits for: it takes the outcome from the future."""

    __slots__ = ()

    def run(self) -> None:
        self.is_dropped = self.future.cancelled()
        super().run()

    def wake(self) -> None:
        _settle(self.future, self._value, self._error)
        self._error = None  # its traceback may hold who holds this


def _settle(future: Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    elif isinstance(error, StopIteration):
        refused = RuntimeError("the offloaded function raised StopIteration")
        refused.__cause__ = error
        future.set_exception(refused)
    else:
        future.set_exception(error)


def _in_job(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _JobCall(func, args, kwargs)
    _workers().submit(call)
    try:
        await_(call.future)
    except BaseException:
        call.is_dropped = True
        raise
    return call.result()


def _blocking(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _BlockingCall(func, args, kwargs)
    _workers().submit(call)
    call.completion.wait()
    return call.result()


# -- executors


def _submit(
    executor: Executor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> concurrent.futures.Future[Any]:
    if _runs_in_threads(executor):
        return executor.submit(copy_context().run, func, *args, **kwargs)
    if kwargs:  # some executors, Dask's for one, take keyword arguments for themselves
        func = partial(func, **kwargs)
    return executor.submit(func, *args)


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
        source.add_done_callback(lambda _: self._hub.post(self))

    def _cancel(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._source.cancel()

    def wake(self) -> None:
        """Hand the result over, in the loop's thread."""
        if self._source.cancelled():
            self._future.cancel()
        elif (error := self._source.exception()) is not None:
            _settle(self._future, None, error)
        else:
            _settle(self._future, self._source.result(), None)


# -- the workers, by level of nesting


class _Levels:
    """The workers of each level; those of level 1 run calls that come from workers of level 0."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._limit = min(32, (cores or 1) + 4)
        self.forget()

    def forget(self) -> None:
        """Begin without workers: a forked process has none."""
        self._workers: dict[int, Workers] = {}
        self._changing = threading.Lock()

    def __iter__(self) -> Iterator[Workers]:
        return iter(tuple(self._workers.values()))

    def __getitem__(self, level: int) -> Workers:
        try:
            return self._workers[level]
        except KeyError:
            with self._changing:
                return self._workers.setdefault(level, Workers(level, self._limit))

    def resize(self, limit: int) -> None:
        with self._changing:
            self._limit = limit
            for workers in self:
                workers.resize(limit)


_levels = _Levels()


def all_workers() -> Iterator[Workers]:
    """Return the workers of every level."""
    return iter(_levels)


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_levels.forget)


def _workers() -> Workers:
    """Return the workers for calls that come from this thread."""
    thread = threading.current_thread()
    return _levels[thread.level + 1 if isinstance(thread, Worker) else 0]
