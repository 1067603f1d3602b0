"""What is noted when a job pauses, for those who look at it: the time, and the locks it holds.

Reading a clock costs too much for each pause, and so a pause takes note of the pool's current
`Interval`, which is an object that it has at hand. When there is none, the pause opens one; a
timer of the event loop ends it soon after. A loop in which nobody pauses has no such timer. How
long ago a pause was is then known to be between two times, whatever the loop did: usually they lie
`RESOLUTION` apart, and further if the loop was stalled or stopped meanwhile.

In asyncio's debug mode no interval is ever opened. Each pause comes here, has an exact
time, and is checked for locks; outside debug mode this costs nothing.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable
from time import monotonic
from typing import Final

from ._fibre import Fibre, Interval, Pool, all_pools
from ._locks import warn_of_held_locks

__all__ = ["end_intervals", "note_pause"]

RESOLUTION: Final = 0.1
"""Seconds that an interval lasts."""


def note_pause(fibre: Fibre) -> Interval:
    """Take note of a pause of a job of the running loop, when its pool has no interval."""
    now = monotonic()
    try:
        loop = get_running_loop()
    except RuntimeError:  # the coroutine is driven by hand
        return Interval(now, now)
    if loop.get_debug():
        warn_of_held_locks(fibre)
        return Interval(now, now)
    interval = fibre.pool.interval = Interval(now)
    loop.call_later(RESOLUTION, _End(fibre.pool, interval))
    return interval


def end_intervals() -> None:
    """End the interval of each pool, so that its pauses are known to have been before now."""
    for pool in all_pools():
        if (interval := pool.interval) is not None:
            _end(pool, interval)


def _end(pool: Pool, interval: Interval, clock: Callable[[], float] = monotonic) -> None:
    if pool.interval is interval:
        pool.interval = None
    if interval.end is None:
        interval.end = clock()


class _End:
    """Ends an interval when the loop calls it; or when the loop is closed, and drops it."""

    __slots__ = ("_end", "_interval", "_pool")

    def __init__(self, pool: Pool, interval: Interval) -> None:
        self._pool = pool
        self._interval = interval
        self._end = _end  # the module's names may be gone before this is

    def __call__(self) -> None:
        """Do nothing more than to be dropped then."""

    def __del__(self) -> None:
        self._end(self._pool, self._interval)
