"""Jobs: OpenSSL's ``ASYNC_*`` functions, and every transition of a job's state.

Theory of operation. A job is a call of a function on a fibre. Its state is not stored but
follows from where the fibre is::

    state      the fibre is                        events, and the state that follows
    ---------  ----------------------------------  ------------------------------------------
    idle       in its pool                         begin -> running
    running    switched to by its driver           pause -> paused, end -> finished
    paused     neither of these                    resume, throw -> running, unwind -> finished
    finished   back in its pool (or given up)      none

The transitions are the functions `begin`, `resume`, `throw`, `unwind` and `finish`. Both kinds
of drivers use them: `start_job`, for hand-written loops, and the asyncio adapter. What such a
switch returns is how the job came back: `PAUSE`, an awaitable that `await_` sent, or the
fibre's port, which means that the job has ended and `finish` takes its result.

Who may pause is decided by `Fibre.way_back`; `_way_back` is the one place that chooses it.

`Job` is a handle, made when somebody asks for it. While a hand-driven job is paused, the
handle holds the fibre and nothing in the fibre holds the handle: whoever drops the last
reference unwinds the job.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from time import monotonic
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeVar,
    overload,
)
from weakref import ref

from ._errors import CannotPauseError, JobError, WrongThreadError
from ._fibre import (
    CAPABLE,
    PAUSE,
    UNLIMITED,
    Fibre,
    Pool,
    current_fibre,
    getcurrent,
    greenlet,
    pool_of,
    pool_of_thread,
)
from ._stack import stack_of
from ._waitctx import WaitCtx

if TYPE_CHECKING:
    import threading
    from types import FrameType

__all__ = [
    "Job",
    "JobStatus",
    "StartResult",
    "block_pause",
    "can_pause",
    "cleanup_thread",
    "get_current_job",
    "get_wait_ctx",
    "init_thread",
    "is_capable",
    "pause_blocked",
    "pause_job",
    "start_job",
    "unblock_pause",
]

P = ParamSpec("P")
T = TypeVar("T")

CANCELLATIONS: set[type[BaseException]] = {GeneratorExit}
"""What a job ends with that was cancelled or closed; an event loop's adapter adds its own."""


class JobStatus(IntEnum):
    """What `start_job` returned, with OpenSSL's numbers; ``ASYNC_ERR`` is a `JobError`."""

    NO_JOBS = 1
    """The pool is exhausted: try again when a job has finished."""
    PAUSE = 2
    """The job is paused: wait for its wait context, then resume it."""
    FINISH = 3
    """The job has finished."""
    RUNNING = 4
    """The job is running. Only `Job.status` says so."""


class StartResult(NamedTuple, Generic[T]):
    """The result of `start_job`: ``(status, job, ret)``."""

    status: JobStatus
    job: Job | None
    """The handle to resume, at `JobStatus.PAUSE`; else None."""
    ret: T | None
    """What the function returned, at `JobStatus.FINISH`; else None."""


class Job:
    """A handle of a job (``ASYNC_JOB``); `start_job`, `get_current_job`, `all_jobs` return it.

    Handles of the same job are equal. A paused job whose last handle goes away is unwound:
    `GeneratorExit` is raised at its pause, so that its ``finally`` blocks run. In another
    thread than the job's own, that waits until that thread next starts a job or ends.
    """

    __slots__ = ("__weakref__", "_blocks", "_fibre", "_func", "_number", "_pool", "_wait_ctx")

    _fibre: Fibre | None
    _pool: Pool
    _number: float
    _func: Callable[..., Any]
    _wait_ctx: WaitCtx | None
    _blocks: int

    def __init__(self) -> None:
        self._fibre = None
        raise TypeError(
            "jobs are not constructed: start_job(None, wait_ctx, func, ...) starts one, "
            "get_current_job() returns the one that is running"
        )

    @property
    def status(self) -> JobStatus:
        """`JobStatus.RUNNING`, `JobStatus.PAUSE` or `JobStatus.FINISH`."""
        fibre = self._fibre  # once: in another thread it may go away meanwhile
        if fibre is None:
            return JobStatus.FINISH
        return JobStatus.RUNNING if fibre.port.running else JobStatus.PAUSE

    @property
    def func(self) -> Callable[..., Any]:
        """The function that the job runs."""
        return self._func

    @property
    def wait_ctx(self) -> WaitCtx:
        """The job's wait context, made when first asked for if it was not given one.

        Raises:
            JobError: It has none yet, and the job has finished, or its event loop does not run.
            WrongThreadError: It has none yet, and this is not the job's thread.
        """
        if self._wait_ctx is None:
            self._wait_ctx = self._new_wait_ctx()
        return self._wait_ctx

    def _new_wait_ctx(self) -> WaitCtx:
        if self._fibre is None:
            raise JobError(f"{self!r} has finished and has no wait context")
        if not self._pool.is_here:
            raise WrongThreadError(
                f"{self!r} has no wait context yet: ask for it first in the job's own thread"
            )
        ctx = WaitCtx()
        if self._fibre.attach is not None:
            try:
                self._fibre.attach(ctx)
            except RuntimeError as error:
                raise JobError(
                    f"no running event loop: {self!r} has no wait context yet, and gets one only "
                    "while its event loop runs"
                ) from error
        ctx._in_use = True
        return ctx

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that started the job, and the only one that may resume it.

        None for one that `threading` does not know.
        """
        return self._pool.thread

    def get_stack(self) -> list[FrameType]:
        """Return the frames of the job, outermost first; none when it has finished.

        Those of a greenlet inside the job that paused it come last. Any thread may call this;
        a job of another thread may go on meanwhile. A job that keeps its own frames keeps
        itself: don't call this in a job to store what it returns.

        >>> def work():
        ...     pause_job()
        >>> _, job, _ = start_job(None, None, work)
        >>> [frame.f_code.co_name for frame in job.get_stack()]
        ['work', 'pause_job', 'pause_to_loop']
        """
        fibre = self._fibre
        return [] if fibre is None else stack_of(fibre, sys._getframe().f_back)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Job):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[int, float]:
        # The fibre's number until the job has ended: a handle may be made before it begins.
        fibre = self._fibre
        return id(self._pool), self._number if fibre is None else fibre.port.number

    def __repr__(self) -> str:
        name = name_of(self._func)
        thread = "an unknown thread" if self.thread is None else self.thread.name
        return f"<Job {self.status.name} {name} in {thread} on {self._wait_ctx!r}>"

    def __del__(self) -> None:
        # Only a hand-driven job that is paused gets here with its fibre: in every other state
        # the fibre holds the handle.
        # One that a KeyboardInterrupt kept from being made has no attributes.
        if (fibre := getattr(self, "_fibre", None)) is not None:
            fibre.handle = None  # `all_jobs` finds it no more
            drop(fibre, self)


_short: Final = reprlib.Repr()
_short.maxother = 120


def short_repr(value: object) -> str:
    """Return a `repr` for somebody who looks at jobs: not a long one, and it does not raise."""
    return _short.repr(value)


def name_of(func: object) -> str:
    return getattr(func, "__qualname__", None) or short_repr(func)


def new_job(fibre: Fibre, func: Callable[..., Any], wait_ctx: WaitCtx | None) -> Job:
    job = fibre.job = Job.__new__(Job)
    job._fibre = fibre
    job._pool = fibre.pool
    job._func = func
    job._wait_ctx = wait_ctx
    job._blocks = 0
    return job


# -- transitions


def begin(
    fibre: Fibre, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Start a job on a fibre that was prepared for it."""
    port = fibre.port
    port.running = True
    try:
        if fibre:  # has begun
            reply = fibre.switch(func, args, kwargs)
        else:
            port.first = (func, args, kwargs)
            reply = fibre.switch()
    except BaseException as error:  # not traced
        return throw(fibre, error)
    port.running = False
    return reply


def resume(fibre: Fibre, value: Any) -> Any:
    """Let a paused job go on; its pause returns `value`."""
    target = _paused_greenlet(fibre)
    fibre.port.running = True
    try:
        reply = target.switch(value)
    except BaseException as error:  # not traced
        return throw(fibre, error)
    fibre.port.running = False
    return reply


def throw(fibre: Fibre, error: BaseException) -> Any:
    """Let a job go on that has not ended; where it waits, it raises `error`.

    That is usually its pause. It may also be a switch to a greenlet that is not the job's own,
    but a child of the driver: what such a one raises comes to the driver, though the job still
    runs. The job gets it.
    """
    target = _paused_greenlet(fibre)
    fibre.port.running = True
    try:
        reply = target.throw(type(error), error, error.__traceback__)
    except BaseException:  # not traced
        _give_up(fibre)
        raise
    fibre.port.running = False
    return reply


def _paused_greenlet(fibre: Fibre) -> greenlet:
    child = fibre.paused_in
    if child is None:
        return fibre
    fibre.paused_in = None
    return child


def unwind(fibre: Fibre) -> Any:
    """End a paused job of this thread: raise `GeneratorExit` at its pause; it pauses no more.

    Works in any greenlet of the thread, also in the middle of another job, where the garbage
    collector may find what it has to end. Returns and raises what the job does.
    """
    port = fibre.port
    port.home = getcurrent().switch
    fibre.way_back = _refuse_closing
    fibre.__sqlalchemy_greenlet_provider__ = False
    reply = throw(fibre, GeneratorExit())
    if reply is not port:
        _give_up(fibre)
        raise JobError(
            "the job did not end when it was closed: something in it switched greenlets instead; "
            "its fibre is given up"
        )
    return finish(fibre)


def finish(fibre: Fibre) -> Any:
    """Give the fibre of an ended job back, and return or raise the job's result."""
    port = fibre.port
    pool = fibre.pool
    value, error = port.value, port.error
    port.value = None
    fibre.gr_context = None
    if error is None:
        if fibre.job is None and fibre.way_back is pool.home_switch:
            pool.give(fibre)
        else:
            _give_back(fibre)
        return value
    port.error = None
    _count_error(pool, error)
    try:
        raise error
    finally:
        del error, pool, port  # the traceback holds this frame
        _give_back(fibre)
        del fibre


def _count_error(pool: Pool, error: BaseException) -> None:
    if isinstance(error, tuple(CANCELLATIONS)):
        pool.counts.cancelled += 1
    else:
        pool.counts.failed += 1


def _give_back(fibre: Fibre) -> None:
    """Give a fibre back to its pool as it was before the job, whatever that did with it."""
    own_ctx = _detach(fibre)
    fibre.set_home(fibre.pool.home)
    fibre.__sqlalchemy_greenlet_provider__ = True
    fibre.pool.give(fibre)
    if own_ctx is not None:
        own_ctx.free()


def _give_up(fibre: Fibre) -> None:
    """Part with a fibre that nobody can tell any more where it is."""
    fibre.port.running = False
    fibre.pool.counts.failed += 1
    own_ctx = _detach(fibre)
    fibre.pool.forget(fibre)
    if own_ctx is not None:
        own_ctx.free()


def _detach(fibre: Fibre) -> WaitCtx | None:
    """Part an ended job from its fibre; return its context if it is the job's to free."""
    job = fibre.job
    if job is None:
        return None
    job._number = fibre.port.number
    fibre.job = fibre.handle = job._fibre = None
    ctx = job._wait_ctx
    if ctx is not None:
        ctx._in_use = False
    return ctx if fibre.frees_wait_ctx else None


def drop(fibre: Fibre, job: Job | None = None) -> None:
    """End a paused job that nobody can resume any more; from any thread."""
    if not fibre.pool.is_here:
        fibre.pool.post(partial(drop, fibre, job))
        return
    if job is not None:
        if job._fibre is not fibre:
            return  # somebody found the handle just before it went away, and resumed the job
        fibre.job = job
    with suppress(GeneratorExit):
        unwind(fibre)


# -- ways back: what a pause calls


def _way_back(fibre: Fibre) -> Callable[[Any], Any]:
    """Choose what a pause of the running job does."""
    if fibre.way_back is _refuse_closing:
        return _refuse_closing
    if fibre.job is not None and fibre.job._blocks:
        return _stay
    return fibre.port.home if fibre.attach is not None else pause_to_loop


def _set_way_back(fibre: Fibre) -> None:
    fibre.way_back = _way_back(fibre)
    fibre.__sqlalchemy_greenlet_provider__ = fibre.way_back is fibre.port.home


def pause_to_loop(request: Any) -> Any:
    """In a job that a hand-written loop drives."""
    if request is not PAUSE:
        _refuse(request, "a hand-written loop drives this job, and cannot await: use run_job()")
    fibre = current_fibre()
    assert fibre is not None
    home = fibre.port.home
    del fibre
    return home(PAUSE)


def _stay(request: Any) -> None:
    """While pausing is blocked."""
    if request is not PAUSE:
        _refuse(request, "pausing is blocked here: await after unblock_pause()")


def _refuse_closing(request: Any) -> NoReturn:
    """While the job is being closed."""
    _refuse(request, "the job is being closed: clean up without pausing")


def _outside(request: Any) -> None:
    """Where no job is running."""
    if request is not PAUSE:
        _refuse(request, "no job is running here: call this function through run_job()")


def _refuse(request: Any, reason: str) -> NoReturn:
    if request is PAUSE:
        raise CannotPauseError(f"pause_job(): {reason}")
    close = getattr(request, "close", None)
    if callable(close) and hasattr(request, "send"):  # a coroutine, that would warn
        close()
    raise CannotPauseError(f"await_({request!r}): {reason}")


def pause_nested(request: Any) -> Any:
    """Pause in a greenlet that is not a fibre: inside a job, or outside all jobs."""
    fibre = current_fibre()
    if fibre is None:
        return _outside(request)
    back = fibre.way_back
    if back is fibre.port.home or (back is pause_to_loop and request is PAUSE):
        fibre.paused_in = getcurrent()
    del fibre
    return back(request)


# -- the manual page's functions


def is_capable() -> bool:
    """Return whether jobs can pause here (``ASYNC_is_capable``).

    >>> is_capable()
    True
    """
    return CAPABLE


def init_thread(max_size: int = 0, init_size: int = 0) -> None:
    """Set up this thread's pool of jobs (``ASYNC_init_thread``).

    A thread that never calls this has a pool without limit. Call it again to change the pool;
    each thread has one of its own.

    >>> init_thread(max_size=1)
    >>> with WaitCtx() as ctx, WaitCtx() as other:
    ...     _, job, _ = start_job(None, ctx, pause_job)
    ...     start_job(None, other, len, "abc").status.name, start_job(job, ctx).status.name
    ('NO_JOBS', 'FINISH')
    >>> init_thread()

    A job that awaits another one (``await_(run_job(...))``) needs two: with a limit of one, it
    would wait for itself.

    Args:
        max_size: How many jobs may be under way at a time, 0 for no limit. When they are,
            `start_job` returns `JobStatus.NO_JOBS`, and `run_job` waits.
        init_size: How many jobs to make at once, so that the first ones start faster.

    Raises:
        ValueError: A negative size, or more jobs to make than the limit allows.
        JobError: Jobs of this thread have not finished.
    """
    for name, size in (("max_size", max_size), ("init_size", init_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}; 0 is no limit")
    if init_size > max_size > 0:
        raise ValueError(f"init_size ({init_size}) must not exceed max_size ({max_size})")
    _pool_without_jobs("init_thread").resize(max_size or UNLIMITED, init_size)


def cleanup_thread() -> None:
    """Free this thread's pool of jobs (``ASYNC_cleanup_thread``).

    It happens by itself when the thread ends. A job started later makes a new pool, without
    limit. (In an event loop, what a burst of jobs leaves idle is freed by and by.)

    >>> cleanup_thread()

    Raises:
        JobError: Jobs of this thread have not finished; nothing was changed.
    """
    pool = _pool_without_jobs("cleanup_thread")
    pool.resize(0, 0)
    pool.resize(UNLIMITED, 0)


def _pool_without_jobs(caller: str) -> Pool:
    pool = pool_of_thread()
    pool.do_posted()
    if pool.outstanding:
        raise JobError(
            f"{caller}() with {pool.outstanding} job(s) of this thread under way: "
            "resume them until they have finished, or drop them, and call it again"
        )
    return pool


@overload
def start_job(
    job: None,
    wait_ctx: WaitCtx | None,
    func: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> StartResult[T]: ...


@overload
def start_job(job: Job, wait_ctx: WaitCtx | None, /) -> StartResult[Any]: ...


@overload
def start_job(
    job: Job | None,
    wait_ctx: WaitCtx | None,
    func: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> StartResult[T]: ...


def start_job(
    job: Job | None,
    wait_ctx: WaitCtx | None,
    func: Callable[..., Any] | None = None,
    /,
    *args: Any,
    **kwargs: Any,
) -> StartResult[Any]:
    """Start a job, or resume one, until it pauses or finishes (``ASYNC_start_job``).

    This is for loops of your own; in a coroutine use `run_job`. The result's status says what
    to do next: at `JobStatus.PAUSE`, wait until an fd of the context is readable or its
    callback was called, and resume the job by passing it again; at `JobStatus.NO_JOBS`, try
    again later; at `JobStatus.FINISH`, take ``ret``.

    >>> def work(name):
    ...     pause_job()
    ...     return f"hello, {name}"
    >>> with WaitCtx() as ctx:
    ...     status, job, _ = start_job(None, ctx, work, "world")
    ...     start_job(job, ctx).ret
    'hello, world'

    Args:
        job: None to start a job, else the one to resume.
        wait_ctx: The context for the new job, or None for one of its own, which is freed when
            the job ends. Ignored at a resume.
        func: The function to run; ignored at a resume, as are its arguments. They are not
            copied: pass ``bytes(buffer)`` if the buffer may change meanwhile.

    Raises:
        TypeError: `func` is not callable, or `job` or `wait_ctx` is something else.
        WrongThreadError: The job was started by another thread.
        JobError: The job has finished or is running, a job is running in this thread, the
            context is in use or was freed, or `run_job` drives the job. Everything is as before.
        BaseException: What `func` raises; the job is finished then.
    """
    if job is not None:
        return _resume_job(job)
    driver = getcurrent()
    pool = pool_of(driver)
    _check_startable(wait_ctx, func)
    assert func is not None
    fibre = pool.acquire()
    if fibre is None:
        return StartResult(JobStatus.NO_JOBS, None, None)
    if wait_ctx is not None:
        wait_ctx._in_use = True
    job = new_job(fibre, func, wait_ctx)
    fibre.handle = ref(job)
    fibre.frees_wait_ctx = wait_ctx is None
    fibre.prepare(driver, None)
    _set_way_back(fibre)
    return _result(fibre, job, begin(fibre, func, args, kwargs))


def _check_startable(wait_ctx: WaitCtx | None, func: object) -> None:
    check_no_job_runs()
    if not callable(func):
        raise TypeError(f"func must be callable, got {func!r}: start_job(None, ctx, func, *args)")
    if wait_ctx is not None:
        if not isinstance(wait_ctx, WaitCtx):
            raise TypeError(f"wait_ctx must be a WaitCtx or None, got {wait_ctx!r}")
        wait_ctx._check_startable()


def check_no_job_runs() -> None:
    """Raise a `JobError` inside a running job: there, no other can be started or resumed."""
    if current_fibre() is not None:
        raise JobError(
            f"a job cannot be started or resumed inside a running job ({get_current_job()!r}): "
            "call the function directly, or await_(run_job(func, ...))"
        )


def _resume_job(job: Job) -> StartResult[Any]:
    if not isinstance(job, Job):
        raise TypeError(f"job must be a Job to resume, or None to start one, got {job!r}")
    fibre = job._fibre
    if not job._pool.is_here:
        raise WrongThreadError(
            f"{job!r} was started by another thread, and only that one may resume it"
        )
    if fibre is None:
        raise JobError(f"{job!r} has finished: pass None to start a new job")
    if fibre.port.running:
        raise JobError(f"{job!r} is running: only a paused job can be resumed")
    if fibre.attach is not None:
        raise JobError(f"{job!r} is driven by run_job(), which resumes it by itself")
    check_no_job_runs()
    fibre.job = job
    fibre.port.home = getcurrent().switch
    if job._wait_ctx is not None:
        job._wait_ctx._forget_changes()
    return _result(fibre, job, resume(fibre, None))


def _result(fibre: Fibre, job: Job, reply: Any) -> StartResult[Any]:
    while reply is not PAUSE and reply is not fibre.port:
        reply = throw(fibre, JobError(f"another greenlet sent {reply!r} to the driver of {job!r}"))
    if reply is PAUSE:
        fibre.port.counts.pauses += 1.0
        fibre.port.since = monotonic()
        fibre.job = None
        return StartResult(JobStatus.PAUSE, job, None)
    return StartResult(JobStatus.FINISH, None, finish(fibre))


def pause_job() -> None:
    """Pause the running job until its driver resumes it (``ASYNC_pause_job``).

    Has no effect outside a job, or while pausing is blocked: code that pauses works there as
    well. A pause may end early, so ask for the condition that you wait for in a loop::

        while not operation.done:
            pause_job()

    Cancelling the task that awaits the job raises `asyncio.CancelledError` here. Any thread may
    call this; it concerns the job that it runs.

    >>> with WaitCtx() as ctx:
    ...     status, job, _ = start_job(None, ctx, pause_job)
    ...     status.name, start_job(job, ctx).status.name
    ('PAUSE', 'FINISH')

    Raises:
        EngineError: Under `run_job`, the wait context's status is `WaitStatus.ERR`.
        WaitFdError: Under `run_job`, an fd of the wait context cannot be watched.
        CannotPauseError: The job is being closed.
    """
    try:
        back = getcurrent().way_back  # type: ignore[attr-defined]
    except AttributeError:
        back = pause_nested
    back(PAUSE)


def can_pause() -> bool:
    """Return whether `pause_job` would pause here: in a job, and not blocked.

    >>> can_pause(), start_job(None, None, can_pause).ret
    (False, True)
    """
    fibre = current_fibre()
    return fibre is not None and fibre.way_back not in (_stay, _refuse_closing)


def can_await() -> bool:
    """Return whether `await_` would pause here: in a job of an event loop, and not blocked."""
    fibre = current_fibre()
    return fibre is not None and fibre.way_back is fibre.port.home


def get_current_job() -> Job | None:
    """Return the running job that this code is in, or None (``ASYNC_get_current_job``).

    A job that keeps the handle in its own frames holds itself: dropping all other references
    does not unwind it.

    >>> get_current_job(), start_job(None, None, get_current_job).ret
    (None, <Job FINISH get_current_job in MainThread on None>)
    """
    fibre = current_fibre()
    return None if fibre is None else job_of(fibre)


def job_of(fibre: Fibre) -> Job:
    if fibre.job is None:
        assert fibre.port.func is not None
        fibre.job = new_job(fibre, fibre.port.func, None)
        fibre.frees_wait_ctx = True
    return fibre.job


def take_wait_ctx(ctx: WaitCtx, func: Callable[..., Any]) -> None:
    """Put the running job, which has just begun, on a wait context; its function is `func`."""
    fibre = current_fibre()
    assert fibre is not None
    fibre.port.func = func
    new_job(fibre, func, ctx)
    fibre.frees_wait_ctx = False


def get_wait_ctx(job: Job | None = None) -> WaitCtx:
    """Return the wait context of a job, or of the running one (``ASYNC_get_wait_ctx``).

    >>> with WaitCtx() as ctx:
    ...     start_job(None, ctx, get_wait_ctx).ret is ctx
    True

    Raises:
        JobError: No job was passed and none is running, or the job has finished and never
            had a wait context.
        WrongThreadError: It has none yet, and this is not the job's thread.
    """
    if job is None:
        job = get_current_job()
        if job is None:
            raise JobError("get_wait_ctx() needs a job: none is running here, so pass one")
    elif not isinstance(job, Job):
        raise TypeError(f"job must be a Job, or None for the running one, got {job!r}")
    return job.wait_ctx


def block_pause() -> None:
    """Keep the running job from pausing, until `unblock_pause` (``ASYNC_block_pause``).

    Blocks nest. Use it while you hold a lock that whoever runs meanwhile may want as well;
    `pause_blocked` is the same as a ``with`` statement. No effect outside a job.

    >>> def work():
    ...     block_pause()
    ...     pause_job()
    ...     unblock_pause()
    >>> start_job(None, None, work).status.name
    'FINISH'
    """
    fibre = current_fibre()
    if fibre is not None:
        job_of(fibre)._blocks += 1
        _set_way_back(fibre)


def unblock_pause() -> None:
    """Undo one `block_pause` (``ASYNC_unblock_pause``).

    One too many is ignored, as is one outside a job. For an example see `block_pause`.
    """
    fibre = current_fibre()
    if fibre is not None and fibre.job is not None and fibre.job._blocks:
        fibre.job._blocks -= 1
        _set_way_back(fibre)


@contextmanager
def pause_blocked() -> Iterator[None]:
    """Keep the running job from pausing inside a ``with`` statement.

    >>> def work():
    ...     with pause_blocked():
    ...         inside = can_pause()
    ...     return inside, can_pause()
    >>> start_job(None, None, work).ret
    (False, True)
    """
    block_pause()
    try:
        yield
    finally:
        unblock_pause()
