"""`sleep`: the passing of time as an engine."""

from __future__ import annotations

import asyncio
import time

from .._job import can_pause, get_wait_ctx, pause_job
from .._run import await_
from .._waitctx import WaitStatus
from ._pauses import alarm_of, check_seconds, has_event_loop

__all__ = ["sleep"]


def sleep(seconds: float) -> None:
    """Pause, or block, for so many seconds.

    >>> import asyncio
    >>> async def main():
    ...     async with asyncio.timeout(0.01):
    ...         await run_job(sleep, 3600)
    >>> asyncio.run(main())
    Traceback (most recent call last):
    TimeoutError

    In a job, ``sleep(0)`` lets others run. Cancellation is raised here.

    Raises:
        TypeError: That is no number.
        ValueError: It is negative, or longer than thirty years.
    """
    check_seconds("seconds", seconds)
    if not can_pause():
        time.sleep(seconds)
    elif has_event_loop():
        await_(asyncio.sleep(seconds))
    else:
        _pause_for_fd(seconds)


def _pause_for_fd(seconds: float) -> None:
    ctx = get_wait_ctx()
    before, ctx.status = ctx.status, WaitStatus.UNSUPPORTED
    alarm = alarm_of(ctx, seconds)
    try:
        while not alarm.is_due():
            pause_job()
    finally:
        alarm.close()
        ctx.status = before
