"""Plain synchronous Python that can pause: OpenSSL's ``ASYNC_JOB``, for asyncio.

A map of the package; each module imports only those above it:

======================  ==================================================================
``_errors``             the exceptions
``_waitctx``            `WaitCtx`: where a job says what wakes it
``_fibre``              pooled greenlets, and the switches between them
``_stack``              the stacks of jobs
``_job``                `Job`, `start_job`, `pause_job`, ...: OpenSSL's interface
``_wakeups``            one for each event loop: fd readers, callbacks from threads, polling
``_locks``              locks that a job holds while it pauses, found in asyncio's debug mode
``_observe``            what is noted at a pause: the time, and such locks
``_run``                `run_job`, `Session`, `await_`, ...: the asyncio adapter
``engines``             `Completion`, `offload`, `sleep`, ...: what completes a paused job
``_inspect``            `all_jobs`, `print_jobs`, `stats`
``testing``             a dummy engine, gates and barriers, for the tests of engines
======================  ==================================================================
"""

from ._errors import (
    AiojobError,
    CannotPauseError,
    EngineError,
    JobError,
    LibsslUnavailableError,
    WaitFdError,
    WrongThreadError,
)
from ._inspect import Stats, all_jobs, print_jobs, stats
from ._job import (
    Job,
    JobStatus,
    StartResult,
    block_pause,
    can_pause,
    cleanup_thread,
    get_current_job,
    get_wait_ctx,
    init_thread,
    is_capable,
    pause_blocked,
    pause_job,
    start_job,
    unblock_pause,
)
from ._run import Session, as_coroutine, await_, iterate, run, run_job
from ._waitctx import Callback, Cleanup, WaitCtx, WaitStatus
from .engines import (
    Completion,
    offload,
    offload_async,
    set_offload_threads,
    sleep,
    wait_future,
    wait_readable,
    wait_writable,
)

__all__ = [
    "AiojobError",
    "Callback",
    "CannotPauseError",
    "Cleanup",
    "Completion",
    "EngineError",
    "Job",
    "JobError",
    "JobStatus",
    "LibsslUnavailableError",
    "Session",
    "StartResult",
    "Stats",
    "WaitCtx",
    "WaitFdError",
    "WaitStatus",
    "WrongThreadError",
    "all_jobs",
    "as_coroutine",
    "await_",
    "block_pause",
    "can_pause",
    "cleanup_thread",
    "get_current_job",
    "get_wait_ctx",
    "init_thread",
    "is_capable",
    "iterate",
    "offload",
    "offload_async",
    "pause_blocked",
    "pause_job",
    "print_jobs",
    "run",
    "run_job",
    "set_offload_threads",
    "sleep",
    "start_job",
    "stats",
    "unblock_pause",
    "wait_future",
    "wait_readable",
    "wait_writable",
]
