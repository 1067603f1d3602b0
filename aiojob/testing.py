"""For the tests of engines: a dummy engine, gates and barriers, a check that nothing is left.

All of them work in jobs, in threads, and under hand-written loops. A coroutine uses them through
`run_job`: ``await run_job(gate.reached, 2)``.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, ParamSpec, TypeVar

from ._errors import JobError
from ._fibre import pool_of_thread
from ._job import can_pause, get_wait_ctx, pause_job
from .engines._completion import Completion, check_exception
from .engines._offload import all_workers
from .engines._pauses import wake_up_of
from .engines._workers import Worker

__all__ = ["Barrier", "DummyEngine", "Gate", "nothing_left"]

P = ParamSpec("P")
T = TypeVar("T")


class DummyEngine:
    """An engine that pauses its callers for no other reason than to have them pause.

    Stands for OpenSSL's ``dasync`` engine: the wake-up is there before the pause, and the function
    is called in place when the job goes on. One that holds its calls waits for the test to
    `complete` them, in any order with cancellations and other engines.

    >>> import asyncio
    >>> asyncio.run(run_job(DummyEngine().call, pow, 2, 10))
    1024

    >>> engine = DummyEngine(hold=True)
    >>> _, job, _ = start_job(None, None, engine.call, pow, 2, 10)
    >>> engine.pending
    1
    >>> engine.complete()
    >>> start_job(job, None).ret
    1024

    Args:
        hold: Whether calls wait for `complete` or `fail`.
    """

    calls: int
    """How many calls there were."""
    cancelled: int
    """How many of them were given up by their callers, by an exception at the pause."""

    def __init__(self, *, hold: bool = False) -> None:
        self.calls = self.cancelled = 0
        self._hold = hold
        self._held: deque[Completion[None]] = deque()

    @property
    def pending(self) -> int:
        """How many calls are held."""
        return len(self._held)

    def call(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Pause once, or block while the engine holds it; then call the function.

        Raises:
            BaseException: What the function raises, or what was passed to `fail`.
        """
        self.calls += 1
        if self._hold:
            self._wait()
        elif can_pause():
            self._pause()
        return func(*args, **kwargs)

    def _wait(self) -> None:
        completion: Completion[None] = Completion(on_cancel=lambda: self._forget(completion))
        self._held.append(completion)
        completion.wait()

    def _forget(self, completion: Completion[None]) -> None:
        self.cancelled += 1
        with suppress(ValueError):  # it is being completed just now
            self._held.remove(completion)

    def _pause(self) -> None:
        wake_up = wake_up_of(get_wait_ctx())
        try:
            wake_up.wake()
            pause_job()
        except BaseException:
            self.cancelled += 1
            raise
        finally:
            wake_up.close()

    def complete(self, count: int | None = None) -> None:
        """Let the oldest held calls go on, all of them by default. Any thread may call this.

        Raises:
            JobError: Fewer are held; they still are.
        """
        held = len(self._held)
        if count is None:
            count = held
        _check_count("count", count)
        if count > held:
            raise JobError(f"complete({count}): {held} call(s) are held, so wait for `pending`")
        for _ in range(count):
            self._take().set_result(None)

    def fail(self, exception: BaseException) -> None:
        """Raise an exception in the oldest held call. Any thread may call this.

        Raises:
            TypeError: That is no exception.
            JobError: No call is held.
        """
        check_exception(exception)
        self._take().set_exception(exception)

    def _take(self) -> Completion[None]:
        try:
            return self._held.popleft()
        except IndexError:
            raise JobError("no call is held: wait for `pending`") from None


class Gate:
    """Holds jobs and threads until it is opened, and tells when so many have come.

    >>> gate = Gate()
    >>> _, job, _ = start_job(None, None, gate.wait)
    >>> gate.waiting
    1
    >>> gate.open()
    >>> start_job(job, None).status.name
    'FINISH'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: Completion[None] = Completion()
        self._arrivals: list[tuple[int, Completion[None]]] = []
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def wait(self, timeout: float | None = None) -> None:
        """Pause, or block, until the gate is open.

        Raises:
            TimeoutError: It was not opened within so many seconds.
        """
        self._count(1)
        try:
            self._opened.wait(timeout)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._waiting += change
            reached = [item for item in self._arrivals if item[0] <= self._waiting]
            self._arrivals = [item for item in self._arrivals if item not in reached]
        for _, arrival in reached:
            arrival.set_result(None)

    def open(self) -> None:
        """Let all through that wait, and all that come later. Any thread may call this."""
        with suppress(JobError):  # it is open
            self._opened.set_result(None)

    def reached(self, count: int = 1, timeout: float | None = None) -> None:
        """Pause, or block, until so many wait at the gate at a time.

        Raises:
            TimeoutError: They did not come within so many seconds.
        """
        _check_count("count", count)
        arrival: Completion[None] = Completion()
        with self._lock:
            if self._waiting >= count:
                return
            self._arrivals.append((count, arrival))
        try:
            arrival.wait(timeout)
        except BaseException:
            with self._lock:
                self._arrivals = [item for item in self._arrivals if item[1] is not arrival]
            raise


class Barrier:
    """Holds jobs and threads until so many have come, then lets these go on; and so again.

    >>> import asyncio
    >>> barrier = Barrier(2)
    >>> async def main():
    ...     return sorted(await asyncio.gather(run_job(barrier.wait), run_job(barrier.wait)))
    >>> asyncio.run(main())
    [0, 1]
    """

    def __init__(self, parties: int) -> None:
        _check_count("parties", parties)
        if parties < 1:
            raise ValueError(f"a barrier is for at least one party, got {parties}")
        self._parties = parties
        self._lock = threading.Lock()
        self._arrived = 0
        self._complete: Completion[None] = Completion()

    def wait(self, timeout: float | None = None) -> int:
        """Pause, or block, until all parties have come; return how many came before.

        A party that gives up (a cancellation, a timeout) is not counted any more.

        Raises:
            TimeoutError: The others did not come within so many seconds.
        """
        with self._lock:
            number, complete = self._arrived, self._complete
            self._arrived += 1
            if self._arrived == self._parties:
                self._arrived = 0
                self._complete = Completion()
                complete.set_result(None)
        try:
            complete.wait(timeout)
        except BaseException:
            with self._lock:
                if complete is self._complete:
                    self._arrived -= 1
            raise
        return number


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r}")


_GRACE: Final = 20.0
"""Seconds that a worker has to end once its call has returned, on however busy a machine."""


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that a block leaves no job, fd, thread or offloaded call behind.

    It is for one thread with its jobs, and for what else nobody touches meanwhile: open files and
    threads are those of the process. Offload workers are ended.

    >>> with nothing_left():
    ...     offload(pow, 2, 10)
    1024

    Raises:
        AssertionError: Something is left; the message says what.
    """
    pool = pool_of_thread()
    jobs, waiters = pool.outstanding, pool.waiters
    fds, threads = open_fds(), set(threading.enumerate())
    yield
    gc.collect()
    for workers in all_workers():
        busy = workers.end(_GRACE)
        assert not busy, f"offloaded calls are still under way in {busy}"
    for thread in threading.enumerate():
        if isinstance(thread, Worker) and thread not in threads:
            thread.join(_GRACE)  # its idle time was over: it is about to end
    pool.do_posted()
    assert pool.outstanding <= jobs, f"{pool.outstanding - jobs} job(s) were left behind"
    assert pool.waiters <= waiters, "a job that waits for the pool was left behind"
    left = set(threading.enumerate()) - threads
    assert not left, f"threads were left behind: {left}"
    new_fds = open_fds() - fds
    assert not new_fds, f"fds were left behind: {sorted(new_fds)}"


def open_fds() -> set[int]:
    """Return the numbers of the process's open file descriptors."""
    fds = set()
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the directory's own
        fds.add(int(name))
    return fds
