"""`Completion`: what an engine's operation ends with, and how a job or a thread waits for it."""

from __future__ import annotations

from _thread import allocate_lock
from collections.abc import Callable
from contextlib import closing
from typing import Generic, TypeVar

from .._errors import JobError
from .._job import can_pause, get_wait_ctx, pause_job
from ._pauses import Alarm, WakeUp, alarm_of, check_seconds, wake_up_of

__all__ = ["Completion", "check_exception"]

T = TypeVar("T")


class Completion(Generic[T]):
    """One result to come, of an operation that goes on elsewhere: what engines are made of.

    The engine starts the operation, and `wait` returns what another thread, a signal handler or
    the event loop passes to `set_result`, at any time, before or after the wait began. In a
    job, waiting pauses; where nothing can pause it blocks the thread, and never spins.

    >>> import threading
    >>> def double(number):
    ...     completion = Completion()
    ...     threading.Timer(0.01, completion.set_result, [2 * number]).start()
    ...     return completion.wait()
    >>> double(4)
    8
    >>> import asyncio
    >>> asyncio.run(run_job(double, 4))
    8

    Stands for what OpenSSL's engines do with ``ASYNC_WAIT_CTX_get_callback``, or with a wait fd
    where there is none.

    Args:
        on_cancel: Called without arguments, in the thread that waited, when a wait ends by an
            exception (a cancellation, a timeout) while the operation goes on and nobody else
            waits: stop it if that can be. The completion still takes a result, which
            nobody needs by then.
    """

    __slots__ = ("__weakref__", "_on_cancel", "_outcomes", "_wakes")

    def __init__(self, *, on_cancel: Callable[[], object] | None = None) -> None:
        if on_cancel is not None and not callable(on_cancel):
            raise TypeError(f"on_cancel must be callable without arguments, got {on_cancel!r}")
        self._on_cancel = on_cancel
        # Whoever completes appends an outcome, then looks for waiters; a waiter appends itself,
        # then looks for an outcome. Appending is atomic, so one of them sees the other.
        self._outcomes: list[tuple[T, None] | tuple[None, BaseException]] = []
        self._wakes: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        state = f"waited for by {len(self._wakes)}"
        if self._outcomes:
            value, error = self._outcomes[0]
            state = f"result {value!r}" if error is None else f"exception {error!r}"
        return f"<Completion {state}>"

    def done(self) -> bool:
        """Return whether the operation has ended. Any thread may call this."""
        return bool(self._outcomes)

    def set_result(self, result: T) -> None:
        """End the operation with a result. Any thread may call this, once.

        Raises:
            JobError: It has ended already; its outcome stays.
        """
        self._complete((result, None))

    def set_exception(self, exception: BaseException) -> None:
        """End the operation with an exception, which `wait` raises. Any thread may, once.

        Raises:
            TypeError: That is no exception.
            JobError: It has ended already; its outcome stays.
        """
        check_exception(exception)
        self._complete((None, exception))

    def _complete(self, outcome: tuple[T, None] | tuple[None, BaseException]) -> None:
        self._outcomes.append(outcome)
        if self._outcomes[0] is not outcome:
            raise JobError(f"{self!r} has ended already: complete an operation once")
        for wake in tuple(self._wakes):
            wake()

    def wait(self, timeout: float | None = None) -> T:
        """Pause, or block, until the operation has ended; return its result.

        It may be called again, and by several jobs and threads at a time.

        Cancellation is raised here, as `asyncio.CancelledError`; see `on_cancel`.

        Args:
            timeout: Seconds to wait at most, None for no limit.

        Raises:
            BaseException: What the operation ended with.
            TimeoutError: It has not ended in time.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        if not self._outcomes:
            self._wait(timeout)
        value, error = self._outcomes[0]
        if error is None:
            return value  # type: ignore[return-value]
        try:
            raise error
        finally:
            del self, error  # its traceback holds this frame

    def _wait(self, timeout: float | None) -> None:
        try:
            if can_pause():
                self._pause(timeout)
            else:
                self._block(timeout)
        except BaseException:
            if self._on_cancel is not None and not self._outcomes and not self._wakes:
                self._on_cancel()
            raise

    def _pause(self, timeout: float | None) -> None:
        ctx = get_wait_ctx()
        with closing(alarm_of(ctx, timeout)) as alarm:
            self._pause_until(alarm, wake_up_of(ctx, timeout), timeout)

    def _pause_until(self, alarm: Alarm, wake_up: WakeUp, timeout: float | None) -> None:
        self._wakes.append(wake_up.wake)
        try:
            while not self._outcomes:
                if alarm.is_due():
                    raise _too_late(timeout)
                pause_job()
                wake_up.clear()
        finally:
            self._wakes.remove(wake_up.wake)
            wake_up.close()

    def _block(self, timeout: float | None) -> None:
        lock = allocate_lock()
        lock.acquire()
        self._wakes.append(lock.release)
        try:
            if not self._outcomes and not lock.acquire(timeout=-1 if timeout is None else timeout):
                raise _too_late(timeout)
        finally:
            self._wakes.remove(lock.release)


def check_exception(exception: BaseException) -> None:
    """Raise an error unless this is an exception."""
    if not isinstance(exception, BaseException):
        raise TypeError(f"an exception is needed, such as OSError(), got {exception!r}")


def _too_late(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"the operation did not end within {timeout} s")
