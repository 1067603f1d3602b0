"""Worker threads that start when they are needed and end when they are not. No jobs in here.

The worker that went idle last is woken first: it is warm, and those that are not needed see their
idle time pass. At most one wake-up is under way; a woken worker wakes the next one before it
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
  limit.
- A woken worker clears the mark of the wake-up under way, then takes a call, and then wakes another
  if there are more: a submit that saw the mark had appended its call by then.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections import deque
from time import monotonic
from typing import Final, Protocol

__all__ = ["IDLE_SECONDS", "Call", "Workers"]

IDLE_SECONDS: Final = 10.0
"""A worker that had nothing to do for so long ends."""


class Call(Protocol):
    """What a worker does."""

    def run(self) -> None:
        """Do the work; must not raise."""

    def deliver(self) -> None:
        """Tell who waits for it; must not raise."""


class Worker(threading.Thread):
    """A thread that runs calls.

    level: of how many nested offloads its calls are; see `Workers`.
    """

    def __init__(self, workers: Workers) -> None:
        # A daemon: an interpreter that exits does not wait for a call that nobody waits for.
        super().__init__(name="aiojob worker", daemon=True)
        self.level = workers.level
        self._workers = workers
        self._woken = allocate_lock()
        self._woken.acquire()

    def run(self) -> None:
        self._workers.serve(self)

    def wake(self) -> None:
        self._woken.release()

    def wait(self, seconds: float = -1) -> bool:
        return self._woken.acquire(timeout=seconds)


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
        if self._idle:
            self._wake_one()
        if self._lacks_workers():
            self._grow(call)

    def _lacks_workers(self) -> bool:
        return len(self._workers) < min(self.limit, len(self._unfinished))

    def _grow(self, call: Call) -> None:
        with self._changing:
            if not self._lacks_workers():
                return
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

    def _wake_one(self) -> None:
        if self._waking:
            return
        try:
            worker = self._idle.pop()
        except IndexError:
            return
        self._waking = True
        worker.wake()

    def serve(self, worker: Worker) -> None:
        """Run calls, in a worker's thread, until there were none for a while."""
        while True:
            if self._has_surplus() and self._end(worker):
                return
            try:
                call = self._calls.popleft()
            except IndexError:
                if self._rest(worker):
                    continue
                return
            if self._calls and self._idle:
                self._wake_one()
            call.run()
            self._unfinished.remove(call)  # before anybody can learn of it, and submit another
            call.deliver()
            del call

    def _rest(self, worker: Worker) -> bool:
        """Wait to be woken; say whether to go on."""
        self._idle.append(worker)
        needed = self._calls or self._has_surplus()
        if not needed and worker.wait(self.idle_seconds):
            self._waking = False
            return True
        try:
            self._idle.remove(worker)
        except ValueError:
            # It was chosen meanwhile, and the wake-up is on its way; unless a KeyboardInterrupt hit
            # whoever chose it, and so not for ever.
            worker.wait(self.idle_seconds)
            self._waking = False
            return True
        return bool(self._calls) or not self._end(worker)

    def _has_surplus(self) -> bool:
        return len(self._workers) > self.limit

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
        with self._changing:
            for _ in range(min(len(self._calls), limit - len(self._workers))):
                self._start_worker()

    def end(self, seconds: float) -> tuple[Worker, ...]:
        """End all workers, and return those whose calls took longer than that."""
        deadline = monotonic() + seconds
        limit, self.limit = self.limit, 0
        self._wake_all()
        for worker in self._workers:
            worker.join(max(0, deadline - monotonic()))
        left = self._workers
        self.resize(limit)
        return left

    def _wake_all(self) -> None:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return
            worker.wake()
