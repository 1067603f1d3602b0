"""Worker threads: the races of their scheme, each forced."""

from __future__ import annotations

import os
import queue
import resource
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from aiojob.engines import _kernel
from aiojob.engines._kernel import TimerFd, WritableFd
from aiojob.engines._workers import Call, Worker, Workers
from aiojob.testing import open_fds


class NoCall:
    def run(self, ended: Callable[[Any], object]) -> None:
        raise AssertionError("not to be run")


class SleepingWorker(Worker):
    """A worker without a thread, whose waits do what a test says."""

    def __init__(self, workers: Workers, *waits: Callable[[], bool]) -> None:
        super().__init__(workers)
        self.waits = list(waits)
        self.wait = lambda block, seconds: self.waits.pop(0)()


def test_wake_up_under_way_is_not_doubled() -> None:
    workers = Workers(0, 0)
    first, second = (Worker(workers) for _ in range(2))
    for worker in (first, second):
        worker.is_resting = True
        workers._idle.append(worker)
    for _ in range(2):
        workers.submit(NoCall())
    assert (first.wait(True, 0), second.wait(True, 0), workers._waking) == (False, True, True)


def test_wake_up_that_finds_nobody_idle_is_not_under_way() -> None:
    workers = Workers(0, 2)
    workers._wake_one()
    assert not workers._waking


def test_end_waits_for_the_threads_of_workers_that_have_left_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(0, 1)
    joined: list[Worker] = []

    class Leaving(Worker):
        def join(self, timeout: float | None = None) -> None:
            joined.append(self)

    worker = Leaving(workers)
    workers._workers = (worker,)
    monkeypatch.setattr(workers, "_wake_all", lambda: workers._end(worker))
    assert workers.end(1) == ()
    assert joined == [worker]


def test_end_has_what_is_queued_run_and_starts_no_worker_for_it_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(0, 1)
    ending = threading.Event()
    ran: list[Call] = []

    def now() -> float:
        ending.set()
        return time.monotonic()

    class Slow(NoCall):
        def run(self, ended: Callable[[Any], object]) -> None:
            ending.wait()
            time.sleep(0.02)  # enough for workers to be told to leave too early
            ran.append(self)
            ended(self)

    calls = [Slow(), Slow()]
    for call in calls:
        workers.submit(call)
    monkeypatch.setattr("aiojob.engines._workers.monotonic", now)
    assert workers.end(60) == ()
    assert ran == calls
    assert workers.threads == ()


def test_worker_that_is_woken_twice_gets_up_once() -> None:
    worker = Worker(Workers(0, 2))
    worker.wake()
    worker.wake()
    assert worker.wait(True, 0)
    assert not worker.wait(True, 0)


def test_worker_chosen_when_its_idle_time_ends_leaves_no_wake_up_under_way() -> None:
    workers = Workers(0, 0)

    def chosen_meanwhile() -> bool:
        workers._calls.append(NoCall())
        workers._wake_one()
        assert workers._waking
        return False

    worker = SleepingWorker(workers, chosen_meanwhile)
    assert workers._rest(worker)
    assert (worker.waits, workers._idle, workers._waking) == ([], [], False)


def test_wake_up_that_comes_after_its_worker_got_up_goes_to_another_one() -> None:
    """The idle time of the one that was chosen ended just before, and it works or is gone."""
    workers = Workers(0, 0)
    other = Worker(workers)
    other.is_resting = True

    class Late(Worker):
        def wake(self) -> None:
            workers._idle.remove(self)

    workers._idle += [other, Late(workers)]
    workers._wake_one()
    assert other.wait(True, 0)
    assert workers._waking


def test_wake_up_that_comes_after_the_last_idle_worker_got_up_is_not_under_way() -> None:
    workers = Workers(0, 0)

    class Late(Worker):
        def wake(self) -> None:
            workers._idle.remove(self)

    workers._idle.append(Late(workers))
    workers._wake_one()
    assert not workers._waking


def test_worker_that_goes_idle_sees_a_call_that_came_just_before() -> None:
    workers = Workers(0, 2)
    workers._calls.append(NoCall())
    assert workers._rest(SleepingWorker(workers))
    assert workers._idle == []


def test_worker_that_goes_idle_sees_a_limit_that_was_lowered_just_before() -> None:
    workers = Workers(0, 1)
    worker = SleepingWorker(workers)
    workers._workers = (worker, Worker(workers))
    assert workers._rest(worker)  # without any wait
    workers.serve(worker)
    assert len(workers.threads) == 1


def test_worker_wakes_another_for_the_next_call_before_it_runs_its_own() -> None:
    workers = Workers(0, 1)
    other = Worker(workers)
    other.is_resting = True
    workers._idle.append(other)
    woken: list[bool] = []

    class Looking(NoCall):
        def run(self, ended: Callable[[Any], object]) -> None:
            woken.append(other.wait(True, 0))

    workers._calls += [Looking(), Looking()]
    workers.serve(SleepingWorker(workers, lambda: False))
    assert woken == [True, False]


def test_worker_that_ends_stays_for_a_call_that_came_meanwhile() -> None:
    workers = Workers(0, 2)
    worker = Worker(workers)
    workers._workers = (worker,)
    workers._calls.append(NoCall())
    assert not workers._end(worker)
    assert workers.threads == (worker,)
    workers._calls.clear()
    assert workers._end(worker)
    assert not workers.threads


def test_no_worker_is_started_if_enough_were_started_meanwhile() -> None:
    workers = Workers(0, 2)
    worker = Worker(workers)
    workers._workers = (worker,)
    workers._grow(NoCall())
    assert workers.threads == (worker,)


class MeetingCall(NoCall):
    """A call that ends when another one runs at the same time."""

    def __init__(self, barrier: threading.Barrier, results: queue.SimpleQueue[bool]) -> None:
        self._barrier = barrier
        self._results = results
        self._met = False

    def run(self, ended: Callable[[Any], object]) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(60)
            self._met = True
        ended(self)
        self._results.put(self._met)


def test_submit_interrupted_by_another_one_still_starts_its_worker() -> None:
    """The one that began first compares last, and has to count both calls."""
    workers = Workers(0, 2)
    barrier, results = threading.Barrier(2), queue.SimpleQueue[bool]()
    calls = [MeetingCall(barrier, results) for _ in range(2)]

    class Interrupted(deque[Call]):
        def append(self, call: Call) -> None:
            if call is calls[0]:
                workers.submit(calls[1])
            super().append(call)

    workers._calls = Interrupted()
    workers.submit(calls[0])
    assert [results.get(), results.get()] == [True, True]
    assert not workers.end(60)


def test_worker_started_while_the_limit_is_lowered_has_a_surplus_one_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(0, 2)
    idle = Worker(workers)
    workers._workers = (idle,)
    workers._idle.append(idle)

    def lower_limit(self: Any) -> None:
        workers.resize(1)
        assert idle.wait(True, 0)  # it looks, finds no surplus yet, and rests again

    monkeypatch.setattr(Worker, "start", lower_limit)
    workers._start_worker()
    assert idle.wait(True, 0)


def test_call_that_no_thread_could_be_had_for_counts_as_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Worker, "start", refuse)
    workers = Workers(0, 2)
    with pytest.raises(RuntimeError, match="new thread"):
        workers.submit(NoCall())
    assert (list(workers._calls), workers._unfinished) == ([], set())


def test_raised_limit_starts_as_many_threads_as_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, barrier = Worker.start, threading.Barrier(2)
    results = queue.SimpleQueue[bool]()

    def start_one(self: Worker) -> None:
        if len(workers.threads) == 2:
            raise RuntimeError("can't start new thread")
        start(self)

    workers = Workers(0, 1)
    for _ in range(4):
        workers.submit(MeetingCall(barrier, results))
    monkeypatch.setattr(Worker, "start", start_one)
    workers.resize(4)
    assert [results.get() for _ in range(4)] == [True] * 4
    assert len(workers.threads) == 2
    assert not workers.end(60)


# -- the fds that engines make


@pytest.fixture(params=["of this Python", "of libc"])
def timers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers as they are here, and as they are in Pythons that do not have them."""
    if request.param == "of libc":
        monkeypatch.setattr(_kernel, "_timerfd", _kernel._timerfd_by_libc)


@pytest.mark.usefixtures("timers")
@pytest.mark.parametrize("seconds", [0, 0.02, 1.02])
def test_timer_turns_readable_when_its_time_has_passed(seconds: float) -> None:
    begin = time.monotonic()
    timer = TimerFd(seconds)
    assert select.select([timer.fd], [], [], 60)[0] == [timer.fd]
    assert time.monotonic() - begin >= seconds
    timer.close()


@pytest.mark.usefixtures("timers")
def test_timer_without_an_fd_to_be_had_is_an_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 1, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            TimerFd(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


def test_room_to_write_of_a_closed_fd_is_an_error_and_leaves_nothing() -> None:
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        WritableFd(fd + 100)
