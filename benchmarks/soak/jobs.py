"""Jobs under fire.

One event loop after the other keeps a hundred thousand jobs going. They await, and pause for
callbacks, fds, completions and worker threads; threads wake them, some twice, some too late; they
return and raise; they are cancelled, once or twice, time out, and are closed in mid-air; now and
then the process may open no fd and start no thread. In some rounds the pool is limited to half of
them. Meanwhile another thread drives jobs by hand, and drops some.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import select
import socket
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from typing import Any

import aiojob

from ..measure import LOOPS
from .harness import Part, Soak

ROUNDS = 2
"""Event loops of each kind, one after the other."""
SOCKETS = 200
"""Jobs at a time that wait for a socket."""
WAKERS = 2
"""Threads that complete what jobs wait for."""


class JobError(Exception):
    """Raised by jobs."""


class Round:
    """One event loop's life: what its jobs and threads share."""

    def __init__(self, soak: Soak, seconds: float, limit: int, chance: random.Random) -> None:
        self.chance = chance
        self.counts: Counter[str] = Counter()  # of the loop's thread
        self.operations: deque[Callable[[], object]] = deque()
        self.sockets = 0
        self.is_limited = bool(limit)
        self.longest = max(0.1, soak.jobs / 20_000)  # seconds, so that the loop can keep up
        self.is_over = False
        self._soak = soak
        self._deadline = time.monotonic() + seconds

    def look(self) -> None:
        """Hand the counts over, and look at the time."""
        stats = aiojob.stats()
        peak = max(self._soak.counts["jobs at a time"], stats.paused + stats.running)
        for what, count in self.counts.items():
            self._soak.counts[what] += count
        self.counts.clear()
        self._soak.counts["jobs at a time"] = peak
        self.is_over = time.monotonic() >= self._deadline or bool(self._soak.faults)

    def fault(self, what: str) -> None:
        self._soak.fault(what)


class Body:
    """A job's function, which knows how often it began and ended."""

    __slots__ = ("_round", "begun", "ended")

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self.begun = self.ended = 0

    def __call__(self) -> Body:
        self.begun += 1
        chance = self._round.chance
        try:
            for _ in range(chance.randrange(4)):
                chance.choice(PAUSES)(self._round)
            if chance.random() < 0.1:
                raise JobError(self)
            return self
        finally:
            try:
                if chance.random() < 0.2 and aiojob.can_pause():
                    aiojob.await_(asyncio.sleep(0))  # a second cancel may hit this
            finally:
                self.ended += 1

    def check(self, returned: object) -> None:
        """Look whether it ended as often as it began, once or never."""
        if self.begun != self.ended or self.begun > 1:
            self._round.fault(f"a job began {self.begun} times and ended {self.ended} times")
        if returned is not None and returned is not self:
            self._round.fault(f"a job brought {returned!r}")
        self._round.counts["jobs ended" if self.begun else "jobs not begun"] += 1


# -- what jobs pause for


def sleeps(round_: Round) -> None:
    aiojob.await_(asyncio.sleep(round_.chance.random() * round_.longest))


def polls(round_: Round) -> None:
    aiojob.get_wait_ctx().status = round_.chance.choice(
        (aiojob.WaitStatus.EAGAIN, aiojob.WaitStatus.UNSUPPORTED)
    )
    for _ in range(3):
        aiojob.pause_job()


def waits_for_a_completion(round_: Round) -> None:
    completion: aiojob.Completion[None] = aiojob.Completion()
    if round_.chance.random() < 0.1:
        round_.operations.append(lambda: completion.set_exception(JobError(None)))
        with suppress(JobError):
            completion.wait()
    elif round_.chance.random() < 0.1:
        with suppress(TimeoutError):
            completion.wait(timeout=round_.chance.random() * round_.longest)  # nobody completes it
    else:
        round_.operations.append(lambda: completion.set_result(None))
        completion.wait()


def waits_for_a_callback(round_: Round) -> None:
    ctx = aiojob.get_wait_ctx()
    wake = ctx.get_callback()
    assert wake is not None
    callback, arg = wake
    done: list[bool] = []

    def complete() -> None:
        done.append(True)
        callback(arg)

    ctx.status = aiojob.WaitStatus.OK
    round_.operations.append(complete)
    if round_.chance.random() < 0.1:
        round_.operations.append(complete)  # again, and perhaps too late
    try:
        while not done:
            aiojob.pause_job()
    finally:
        ctx.status = aiojob.WaitStatus.UNSUPPORTED


def waits_for_a_socket(round_: Round) -> None:
    if round_.sockets >= SOCKETS:
        return sleeps(round_)
    round_.sockets += 1
    try:
        here, there = socket.socketpair()
    except OSError as error:
        round_.sockets -= 1
        if error.errno != errno.EMFILE:
            raise
        round_.counts["fds refused"] += 1
        return None
    with here, there:
        try:
            round_.operations.append(lambda: _send(there))
            aiojob.wait_readable(here)
        finally:
            round_.sockets -= 1
    return None


def _send(there: socket.socket) -> None:
    with suppress(OSError):  # the job was cancelled
        there.send(b"x")


def offloads(round_: Round) -> None:
    try:
        aiojob.offload(int)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        round_.counts["threads refused"] += 1


def runs_another(round_: Round) -> None:
    if not round_.is_limited:  # it might wait for itself
        aiojob.await_(aiojob.run_job(sleeps, round_))


PAUSES = (
    *(sleeps,) * 6,
    *(waits_for_a_completion,) * 4,
    *(waits_for_a_callback,) * 4,
    waits_for_a_socket,
    offloads,
    polls,
    runs_another,
)


# -- how jobs end


async def client(round_: Round) -> None:
    while not round_.is_over:
        body = Body(round_)
        returned = None
        try:
            returned = await round_.chance.choice(WAYS)(round_, body)
        except JobError as error:
            (returned,) = error.args
            round_.counts["exceptions"] += 1
        except TimeoutError:
            round_.counts["timeouts"] += 1
        except asyncio.CancelledError:
            round_.counts["cancellations"] += 1
            task = asyncio.current_task()
            assert task is not None
            while task.uncancel():
                pass
        body.check(returned)


async def to_its_end(round_: Round, body: Body) -> object:
    return await aiojob.run_job(body)


async def on_a_session(round_: Round, body: Body) -> object:
    async with aiojob.Session() as session:
        return await session.run_job(body)


async def with_a_timeout(round_: Round, body: Body) -> object:
    async with asyncio.timeout(round_.chance.random() * round_.longest):
        return await aiojob.run_job(body)


async def closed(round_: Round, body: Body) -> object:
    await some_steps(aiojob.run_job(body), round_.chance.randrange(4))
    round_.counts["closed"] += 1
    return None


@types.coroutine
def some_steps(coroutine: Coroutine[Any, Any, object], steps: int) -> Generator[Any, Any, None]:
    """Run a coroutine so far, then close it."""
    try:
        for _ in range(steps):
            yield coroutine.send(None)
    except StopIteration:
        return
    finally:
        coroutine.close()


WAYS = (*(to_its_end,) * 6, on_a_session, with_a_timeout, with_a_timeout, closed)


# -- what happens to them


async def cancelling(round_: Round, clients: list[asyncio.Task[None]]) -> None:
    while not round_.is_over:
        for task in round_.chance.choices(clients, k=len(clients) // 500 + 1):
            for _ in range(round_.chance.randint(1, 2)):
                task.cancel()
        await asyncio.sleep(0.005)


async def refusing(round_: Round) -> None:
    """Let nobody have a new fd, or a new thread, for a moment."""
    while not round_.is_over:
        await asyncio.sleep(0.3)
        with round_.chance.choice((no_new_fds, no_new_threads))():
            await asyncio.sleep(0.02)


@contextmanager
def no_new_fds() -> Generator[None, None, None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_new_threads() -> Generator[None, None, None]:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


def waking(round_: Round, stop: threading.Event, chance: random.Random) -> None:
    """Complete operations, those that came last first at times."""
    while not stop.is_set():
        for _ in range(500):
            try:
                operation = (
                    round_.operations.pop()
                    if chance.random() < 0.2
                    else round_.operations.popleft()
                )
            except IndexError:
                break
            with suppress(aiojob.JobError):  # it was completed, and no one needs it
                operation()
        time.sleep(0.001)


def driving_by_hand(round_: Round, stop: threading.Event, soak: Soak) -> None:
    """A loop of one's own: it resumes its jobs when their fds are readable, and drops some."""
    number = 0
    while not stop.is_set():
        body = Body(round_)
        with aiojob.WaitCtx() as ctx:
            by_hand(ctx, body, drops=number % 3 == 0)
        if (body.begun, body.ended) != (1, 1):
            round_.fault("a job driven by hand did not end once")
        number += 1
    soak.counts["jobs driven by hand"] += number


def by_hand(ctx: aiojob.WaitCtx, body: Body, *, drops: bool) -> None:
    def work() -> None:
        body.begun += 1
        try:
            for _ in range(3):
                with suppress(TimeoutError):
                    aiojob.Completion[None]().wait(timeout=0.001)
        finally:
            body.ended += 1

    try:
        status, job, _ = aiojob.start_job(None, ctx, work)
        while status is aiojob.JobStatus.PAUSE and job is not None and not drops:
            select.select(ctx.get_all_fds(), [], [], 1)
            status, job, _ = aiojob.start_job(job, ctx)
    except OSError as error:  # it may have no timer now
        if error.errno != errno.EMFILE:
            raise


# -- rounds


def run(soak: Soak, loops: list[str], chance: random.Random) -> None:
    seconds = soak.seconds / (len(loops) * ROUNDS)
    for number in range(ROUNDS):
        for loop in loops:
            limit = soak.jobs // 2 if number % 2 else 0
            aiojob.init_thread(limit)
            round_ = Round(soak, seconds, limit, chance)
            live_through(round_, LOOPS[loop], soak)
            round_.look()
            check_none_left(soak)
            aiojob.cleanup_thread()


def live_through(
    round_: Round, loop_factory: Callable[[], asyncio.AbstractEventLoop], soak: Soak
) -> None:
    stop = threading.Event()
    programs: list[tuple[Any, ...]] = [(driving_by_hand, round_, stop, soak)]
    programs += [(waking, round_, stop, random.Random(number)) for number in range(WAKERS)]
    threads = [threading.Thread(target=soak.guarded, args=program) for program in programs]
    for thread in threads:
        thread.start()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main(round_, soak.jobs))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def main(round_: Round, jobs: int) -> None:
    clients = [asyncio.create_task(client(round_)) for _ in range(jobs)]
    others = [
        asyncio.create_task(cancelling(round_, clients)),
        asyncio.create_task(refusing(round_)),
    ]
    while not round_.is_over:
        await asyncio.sleep(0.5)
        round_.look()
    for task in clients:
        task.cancel()
    await asyncio.wait([*clients, *others])
    for task in others:
        task.result()
    for task in clients:
        if not task.cancelled():  # before it began
            task.result()


def check_none_left(soak: Soak) -> None:
    stats = aiojob.stats()
    if stats.running or stats.paused or stats.waiters:
        soak.fault(f"jobs were left behind by a loop: {stats}")


PART = Part(run, "jobs ended")
