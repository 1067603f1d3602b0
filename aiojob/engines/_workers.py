"""Worker threads that start when they are needed and end when they are not. No jobs in here.

The worker that went idle last is woken first: it is warm, and those that are not needed see their
idle time pass. One wake-up at a time is under way; a woken worker wakes the next one before it
runs its call, so that tiny calls stay with few threads, and blocking ones spread at once.

Guarantees. A call never waits behind another one while a thread for it may still be started:
there are as many threads as unfinished calls, up to the limit. Each call is run once.

Each of these races is won by the same means, to write first and to look then:

- A submit adds its call to the unfinished ones, then compares their number with the workers'; of
  two submits at a time, the one that compares last counts both calls.
- A submit appends its call, then looks for idle workers; a worker enters the idle ones, then
  looks for calls.
- A submit appends its call, then counts the workers; a worker that ends leaves their number, then
  looks for calls, and comes back if there are any.
- A resize sets the limit, then wakes the idle workers; a worker enters these, then looks at the
  limit. Who has started a worker counts it, then looks at the limit too: it may be lower by now.
- A worker that gets up leaves the idle ones, clears the mark of the wake-up under way, then takes
  a call, and then wakes another worker if there are more: a submit that saw the mark had
  appended its call by then.
- Who wakes a worker marks the wake-up as under way, then looks whether that worker still rests; a
  worker that gets up, for whatever reason, rests no more, then clears the mark. So no mark
  stays that nobody will clear, however late a wake-up comes. It may then come to a worker
  that has not been chosen: who gets up for nothing just looks for calls.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Final, Protocol

__all__ = ["IDLE_SECONDS", "Call", "Workers", "nesting"]

IDLE_SECONDS: Final = 10.0
"""A worker that had nothing to do for so long ends."""


class Call(Protocol):
    """What a worker does."""

    def run(self, ended: Callable[[Any], object]) -> None:
        """Do the work, call `ended` with this, and then tell who waits for it; must not raise.

        In this order: who has been told may submit another call, and counts the unfinished ones.
        """


class _Nesting(threading.local):
    level = 0
    """How many offloads this thread is nested in: of which `Workers` it needs a thread."""


nesting: Final = _Nesting()


class Worker(threading.Thread):
    """A thread that runs calls.

    is_resting: whether it waits to be woken, or is about to.
    wait: waits so many seconds, ``wait(True, seconds)``, and says whether it was woken.
    """

    def __init__(self, workers: Workers) -> None:
        # A daemon: an interpreter that exits does not wait for a call that nobody waits for.
        super().__init__(name="aiojob worker", daemon=True)
        self.is_resting = False
        self._workers = workers
        self._woken = allocate_lock()
        self.wait: Callable[[bool, float], bool] = self._woken.acquire
        self._woken.acquire()

    def run(self) -> None:
        nesting.level = self._workers.level + 1
        self._workers.serve(self)

    def wake(self) -> None:
        """End its wait, or its next one."""
        try:
            self._woken.release()
        except RuntimeError:
            return  # it has been woken already


class Workers:
    """The worker threads of one level.

    Calls that come from a worker's own thread go to the workers of the next level. A worker
    therefore only ever waits for a higher level, and no circle of workers can wait for
    each other, whatever the limit.
    """

    def __init__(self, level: int, limit: int) -> None:
        self.level = level
        self.limit = limit
        self.idle_seconds = IDLE_SECONDS
        self._calls: deque[Call] = deque()
        self._idle: list[Worker] = []
        self._waking = False
        self._unfinished: set[Call] = set()
        self._workers: tuple[Worker, ...] = ()
        self._changing = allocate_lock()  # of _workers

    @property
    def threads(self) -> tuple[Worker, ...]:
        """The workers that there are."""
        return self._workers

    def submit(self, call: Call) -> None:
        """Have a worker run a call. Any thread may call this.

        Raises:
            RuntimeError: There is no worker, and no thread can be started.
        """
        self._unfinished.add(call)
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
        if len(self._workers) < self.limit and len(self._workers) < len(self._unfinished):
            self._grow(call)

    def _grow(self, call: Call) -> None:
        with self._changing:
            if len(self._workers) >= min(self.limit, len(self._unfinished)):
                return  # enough were started meanwhile
            try:
                self._start_worker()
            except RuntimeError:
                if self._workers:
                    return  # the others will come to it
                self._calls.remove(call)
                self._unfinished.remove(call)
                raise

    def _start_worker(self) -> None:
        worker = Worker(self)
        worker.start()
        self._workers = (*self._workers, worker)
        if len(self._workers) > self.limit:
            self._wake_all()

    def _wake_one(self) -> None:
        while True:
            try:
                worker = self._idle[-1]
            except IndexError:
                return
            self._waking = True
            worker.wake()
            if worker.is_resting:
                return
            self._waking = False  # it may have cleared the mark before it was set

    def serve(self, worker: Worker) -> None:
        """Run calls, in a worker's thread, until there were none for a while."""
        calls, idle, ended = self._calls, self._idle, self._unfinished.remove
        while True:
            if len(self._workers) > self.limit and self._end(worker):
                return
            try:
                call = calls.popleft()
            except IndexError:
                if self._rest(worker):
                    continue
                return
            if calls and idle and not self._waking:
                self._wake_one()
            call.run(ended)
            del call

    def _rest(self, worker: Worker) -> bool:
        """Wait to be woken; say whether to go on."""
        worker.is_resting = True
        self._idle.append(worker)
        is_needed = (
            self._calls or len(self._workers) > self.limit or worker.wait(True, self.idle_seconds)
        )
        self._idle.remove(worker)
        worker.is_resting = False
        self._waking = False
        return bool(is_needed or self._calls) or not self._end(worker)

    def _end(self, worker: Worker) -> bool:
        """Take a worker out that is not idle; say whether it may end."""
        with self._changing:
            self._workers = tuple(other for other in self._workers if other is not worker)
            if not self._calls or len(self._workers) >= self.limit:
                return True
            self._workers = (*self._workers, worker)
            return False

    def resize(self, limit: int) -> None:
        """Change the limit. Surplus workers end when they have finished what they do."""
        self.limit = limit
        self._wake_all()
        with self._changing, suppress(RuntimeError):  # no more threads: those there are will do
            for _ in range(min(len(self._calls), limit - len(self._workers))):
                self._start_worker()

    def end(self, seconds: float) -> tuple[Worker, ...]:
        """End all workers once they have run what is queued; return those that took longer."""
        deadline = monotonic() + seconds
        while self._unfinished and monotonic() < deadline:
            sleep(0.001)  # workers that left before would be followed by others, for what is queued
        workers = self._workers  # those that are quick take themselves out before their thread ends
        limit, self.limit = self.limit, 0
        self._wake_all()
        for worker in workers:
            worker.join(max(0, deadline - monotonic()))
        left = self._workers
        self.resize(limit)
        return left

    def _wake_all(self) -> None:
        for worker in tuple(self._idle):
            worker.wake()
