"""`sleep`: the passing of time as an engine."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

from .._job import can_await, can_pause, get_wait_ctx, pause_job
from .._run import await_
from ._pauses import alarm_of, check_seconds, watching_fds

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
    if can_await():
        await_(asyncio.sleep(seconds))
    elif can_pause():
        _pause_for_fd(seconds)
    else:
        time.sleep(seconds)


def _pause_for_fd(seconds: float) -> None:
    ctx = get_wait_ctx()
    with watching_fds(ctx), closing(alarm_of(ctx, seconds)) as alarm:
        while not alarm.is_due():
            pause_job()
