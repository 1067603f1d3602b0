"""What is going on: the live jobs, what each waits for and where, and counts.

Looking changes nothing. Any thread may look, and sees the jobs of all; those of other threads
go on meanwhile.
"""

from __future__ import annotations

import sys
import traceback
from math import inf
from time import monotonic
from types import FrameType
from typing import Any, Final, NamedTuple, TextIO
from weakref import ref

from ._errors import JobError, WrongThreadError
from ._fibre import (
    Fibre,
    Interval,
    Pool,
    Waiter,
    all_pools,
    total_counts,
)
from ._job import Job, job_of, name_of, pause_job, pause_nested, pause_to_loop, short_repr
from ._observe import end_intervals
from ._run import await_
from ._stack import stack_of, without_own_frames
from ._waitctx import WaitCtx, WaitStatus

__all__ = ["Stats", "all_jobs", "print_jobs", "stats"]


class Stats(NamedTuple):
    """What all jobs of the process have done so far, and what they do now; see `stats`."""

    started: int
    """Jobs that have begun."""
    finished: int
    """Those whose function has returned."""
    failed: int
    """Those whose function has raised an exception."""
    cancelled: int
    """Those that ended with a `CancelledError`, or were closed or dropped while paused."""
    pauses: int
    """How often jobs have paused."""
    running: int
    """Jobs that run now."""
    paused: int
    """Jobs that are paused now."""
    pooled: int
    """Idle fibres: each holds about 8 KB, ready for the next job."""
    waiters: int
    """Jobs that have not begun, as the limit of their thread's pool is reached (`init_thread`)."""


def stats() -> Stats:
    """Return counts of all threads' jobs, those of ended threads among them.

    >>> before = stats()
    >>> _ = start_job(None, None, len, "abc")
    >>> stats().finished - before.finished
    1

    Any thread may call this. While other threads run jobs, what they do in that moment may be in
    some of the numbers and not yet in others; ``started`` is always the sum of ``finished``,
    ``failed``, ``cancelled``, ``running`` and ``paused``.
    """
    some = all_pools()
    # First those that only grow, and what began last: no number comes out below zero.
    before = total_counts()
    fibres = [fibre for pool in some for fibre in pool.on_jobs()]
    running = sum(fibre.port.running for fibre in fibres)
    started = int(total_counts().started)
    return Stats(
        started=started,
        finished=started - before.failed - before.cancelled - len(fibres),
        failed=before.failed,
        cancelled=before.cancelled,
        pauses=int(before.pauses),
        running=running,
        paused=len(fibres) - running,
        pooled=sum(pool.idle for pool in some),
        waiters=sum(pool.waiters for pool in some),
    )


class _Sighting(Job):
    """A handle that `all_jobs` made: it knows a job of `run_job` by its number, and holds nothing.

    The job has none, or its own thread has one: other threads cannot tell safely.
    """

    __slots__ = ("_seen_on",)

    def __init__(self, fibre: Fibre, number: float, func: Any) -> None:
        self._seen_on = ref(fibre)
        self._number = number
        self._func = func
        self._pool = fibre.pool

    @property
    def _fibre(self) -> Fibre | None:  # type: ignore[override]
        fibre = self._seen_on()
        if fibre is None or fibre.port.number != self._number or fibre.port.func is None:
            return None
        return fibre

    @property
    def _wait_ctx(self) -> WaitCtx | None:  # type: ignore[override]
        fibre = self._fibre
        return None if fibre is None else _wait_ctx_of(fibre)

    @property
    def wait_ctx(self) -> WaitCtx:
        """The job's wait context; see `Job.wait_ctx`."""
        fibre, ctx = self._fibre, self._wait_ctx
        if fibre is None:
            raise JobError(f"{self!r} has finished: keep its wait context, not the job")
        if ctx is not None:
            return ctx
        if not self._pool.is_here:
            raise WrongThreadError(
                f"{self!r} has no wait context yet: ask for it first in the job's own thread"
            )
        return job_of(fibre).wait_ctx

    def __del__(self) -> None:
        """Do nothing: the job's coroutine holds it."""


def all_jobs() -> list[Job]:
    """Return all live jobs, running and paused, of all threads.

    >>> _, job, _ = start_job(None, None, pause_job)
    >>> all_jobs() == [job]
    True

    Any thread may call this; jobs of other threads go on meanwhile. The result holds hand-driven
    jobs (`start_job`) as any reference to them does; whoever lets go last unwinds a paused one, in
    the job's own thread. Jobs that wait for the pool have not begun; `print_jobs` shows them.
    """
    jobs = [_job_on(fibre) for pool in all_pools() for fibre in pool.on_jobs()]
    return [job for job in jobs if job is not None]


def _job_on(fibre: Fibre) -> Job | None:
    """Return a handle of the job on a fibre; None if it ends meanwhile, or is being dropped."""
    port = fibre.port
    # Number, driver, function and number again, against the order in which the job's thread
    # writes them: if the numbers are equal, what is in between belongs to the job.
    number = port.number
    is_hand_driven = fibre.attach is None
    func = port.func
    if func is None or port.number != number:
        return None
    if not is_hand_driven:
        return _Sighting(fibre, number, func)
    handle = fibre.handle
    return None if handle is None else handle()


def print_jobs(file: TextIO | None = None) -> None:
    """Print each live job: its function, how long it has been paused, what it waits for, its stack.

    >>> def look_up(city):
    ...     pause_job()
    >>> with WaitCtx() as ctx:
    ...     ctx.set_wait_fd("resolver", 7)
    ...     _, job, _ = start_job(None, ctx, look_up, "Rome")
    ...     print_jobs()  # doctest: +ELLIPSIS
    ...     job = None
    1 job: 0 running, 1 paused
    <BLANKLINE>
    look_up in MainThread, paused for ... s
      waits for its driver, with fd 7 (key 'resolver')
        File "<doctest ...>", line 2, in look_up
          pause_job()

    Running jobs come first, then those that have been paused longest; then those that have not
    begun, as the limit of their thread's pool is reached. Of a stack, this shows the frames down
    to the line that paused, without aiojob's own.

    The time is known to about 0.1 s; in asyncio's debug mode, or where a loop of your own drives
    the job, exactly. If the event loop was stalled or stopped around the pause, it is said to
    lie between two times.

    Any thread may call this, and signal handlers may. `repr` of what is awaited is called.

    Args:
        file: Where to print, `sys.stdout` by default.

    Raises:
        TypeError: `file` has no ``write`` method.
    """
    if file is not None and not callable(getattr(file, "write", None)):
        raise TypeError(
            f"file must be None or a text file, got {file!r}: print_jobs(), print_jobs(sys.stderr)"
        )
    end_intervals()
    now = monotonic()
    some = all_pools()
    reports = [_Report(fibre, now) for pool in some for fibre in pool.on_jobs()]
    waiting = [(pool, waiter) for pool in some for waiter in pool.queue()]
    print(_summary(reports, len(waiting)), file=file)
    for report in sorted(reports, key=lambda one: -one.most):
        print(f"\n{report}", file=file)
    for pool, waiter in waiting:
        print(f"\n{_waiter_text(pool, waiter, now)}", file=file)


def _summary(reports: list[_Report], waiting: int) -> str:
    running = sum(report.is_running for report in reports)
    jobs = "1 job" if len(reports) == 1 else f"{len(reports)} jobs"
    text = f"{jobs}: {running} running, {len(reports) - running} paused"
    return f"{text}; {waiting} waiting for a pool" if waiting else text


def _waiter_text(pool: Pool, waiter: Waiter, now: float) -> str:
    return (
        f"{name_of(waiter.func)} in {_thread_name(pool)},"
        f" in the queue for {now - waiter.since:.1f} s\n"
        f"  waits for the pool of its thread: the limit of {pool.max_size} job(s) is reached"
    )


def _thread_name(pool: Pool) -> str:
    return "an unknown thread" if pool.thread is None else pool.thread.name


INNERMOST: Final = 10
"""So many frames of a stack are printed."""


class _Report:
    """What `print_jobs` says of one job: the text is made at once, as the job may go on."""

    def __init__(self, fibre: Fibre, now: float) -> None:
        port = fibre.port
        self.is_running = port.running
        self._title = f"{name_of(port.func)} in {_thread_name(fibre.pool)}"
        least, self.most = _age(port.since, now)
        stack = stack_of(fibre, sys._getframe().f_back)
        if self.is_running:
            self.most = inf  # to be printed first
            self._title += ", running"
            self._waits_for = ""
        else:
            self._title += f", paused for {_seconds(least, self.most)}"
            self._waits_for = f"  waits for {_waits_for(fibre, stack)}\n"
        self._stack = _stack_text(without_own_frames(stack))

    def __str__(self) -> str:
        return f"{self._title}\n{self._waits_for}{self._stack}"


def _age(since: Interval | float, now: float) -> tuple[float, float]:
    """Return how long ago a pause was, at least and at most."""
    if isinstance(since, float):
        return now - since, now - since
    return max(0.0, now - (since.end or now)), now - since.begin


def _seconds(least: float, most: float) -> str:
    return f"{most:.1f} s" if most - least < 1 else f"{least:.1f} to {most:.1f} s"


def _stack_text(stack: list[FrameType]) -> str:
    lines = (
        line
        for frame in traceback.StackSummary.extract(
            (frame, frame.f_lineno) for frame in stack[-INNERMOST:]
        ).format()
        for line in frame.splitlines()
    )
    omitted = len(stack) - INNERMOST
    text = f"    ({omitted} outer frames)\n" if omitted > 0 else ""
    return text + "\n".join(f"  {line}" for line in lines)


PAUSING: Final = (pause_nested.__code__, pause_to_loop.__code__)
"""What `pause_job` and `await_` may call to pause."""


def _waits_for(fibre: Fibre, stack: list[FrameType]) -> str:
    frame = next((one for one in reversed(stack) if one.f_code not in PAUSING), None)
    if frame is None:
        return "nothing any more: it goes on just now"
    if frame.f_code is pause_job.__code__:
        return _events(_wait_ctx_of(fibre), fibre.attach is None)
    if frame.f_code is await_.__code__:
        return short_repr(frame.f_locals["awaitable"])
    return f"what {frame.f_code.co_qualname}() in {frame.f_globals.get('__name__')} awaits"


def _wait_ctx_of(fibre: Fibre) -> WaitCtx | None:
    """Return the wait context of the job on a fibre, if it has one."""
    job = fibre.job
    if job is None and fibre.handle is not None:
        job = fibre.handle()
    return None if job is None else job._wait_ctx


def _events(ctx: WaitCtx | None, is_hand_driven: bool) -> str:
    """Return what wakes a job that called `pause_job`."""
    fds = (
        []
        if ctx is None
        else [f"fd {entry.fd} (key {short_repr(entry.key)})" for entry in ctx._live()]
    )
    if is_hand_driven:
        if ctx is not None and ctx._callback is not None:
            fds.append("the callback")
        return "its driver, with " + ", ".join(fds) if fds else "its driver"
    status = WaitStatus.UNSUPPORTED if ctx is None else ctx.status
    if status is WaitStatus.ERR:
        return "nothing any more: its status is ERR"
    if status is WaitStatus.EAGAIN:
        return "an engine that is busy (EAGAIN): it is resumed soon"
    if status is WaitStatus.OK:
        fds.append("the callback")
    return " or ".join(fds) or "nothing that is known: it is polled"
