"""What the engines share: how a paused job is woken, by whom, and by when.

There are two kinds of drivers. Under an event loop (`run_job`), the wait context has a callback and
the loop has timers. A hand-written loop need not have either: it watches fds. So each way to be
woken exists twice here, and `wake_up_of` and `alarm_of` choose.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol

from .._job import can_await
from .._waitctx import Callback, WaitCtx, WaitStatus
from ._kernel import Signal, TimerFd

__all__ = ["Alarm", "Key", "WakeUp", "alarm_of", "check_seconds", "wake_up_of", "watching_fds"]


class WakeUp(Protocol):
    """How others wake the job on a wait context, until it is closed."""

    @property
    def wake(self) -> Callable[[], object]:
        """What ends the job's pause, or its next one; for any thread, at any time."""

    def clear(self) -> None:
        """Forget the wake-ups so far: the job looks at what it waits for after this."""

    def close(self) -> None:
        """Leave the wait context as it was."""


class ByCallback:
    """Wakes a job by its wait context's callback, which the status OK promises."""

    __slots__ = ("_ctx", "_status", "wake")

    def __init__(self, ctx: WaitCtx, callback: tuple[Callback, Any]) -> None:
        self._ctx = ctx
        self._status = ctx.status
        ctx.status = WaitStatus.OK
        self.wake = partial(callback[0], callback[1])

    def clear(self) -> None:
        """Do nothing: a callback ends one pause."""

    def close(self) -> None:
        self._ctx.status = self._status


class Key:
    """A key in wait contexts, equal to itself alone, that says what its fd is for."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}>"


SIGNAL: Final = Key("signal from a thread")
"""The key of the one fd by which a wait context's jobs are woken, for as long as it lives."""


class BySignal:
    """Wakes a job by an fd that its wait context keeps."""

    __slots__ = ("_ctx", "_signal", "_status", "wake")

    def __init__(self, ctx: WaitCtx) -> None:
        self._ctx = ctx
        self._status = ctx.status
        self._signal = _signal_of(ctx)
        self._signal.arm()
        ctx.status = WaitStatus.UNSUPPORTED
        self.wake = self._signal.set

    def clear(self) -> None:
        self._signal.clear()

    def close(self) -> None:
        self._ctx.status = self._status
        self._signal.disarm()


def _signal_of(ctx: WaitCtx) -> Signal:
    known = ctx.get_fd(SIGNAL)
    if known is not None:
        return known[1]  # type: ignore[no-any-return]
    signal = Signal()
    ctx.set_wait_fd(SIGNAL, signal.fd, signal, lambda ctx, key, fd, signal: signal.close())
    return signal


class Alarm(Protocol):
    """Ends a job's pauses at a deadline."""

    def is_due(self) -> bool:
        """Whether the deadline has passed."""

    def close(self) -> None:
        """Leave the wait context as it was."""


class LoopAlarm:
    """A timer of the event loop that drives the job."""

    __slots__ = ("_rung", "_timer", "_wake")

    def __init__(self, ctx: WaitCtx, seconds: float) -> None:
        self._rung = False
        self._wake = ctx._waker.wake
        self._timer = get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._rung = True
        self._wake()

    def is_due(self) -> bool:
        return self._rung

    def close(self) -> None:
        self._timer.cancel()


class FdAlarm:
    """A timer that a hand-written loop watches as an fd."""

    __slots__ = ("_ctx", "_deadline", "_key", "_timer")

    def __init__(self, ctx: WaitCtx, seconds: float) -> None:
        self._deadline = monotonic() + seconds
        self._ctx = ctx
        self._timer = TimerFd(seconds)
        self._key = Key(f"timeout of {seconds} s")
        ctx.set_wait_fd(self._key, self._timer.fd)

    def is_due(self) -> bool:
        return monotonic() >= self._deadline

    def close(self) -> None:
        self._ctx.clear_fd(self._key)
        self._timer.close()


class NoAlarm:
    """For a wait without a deadline."""

    def is_due(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing."""


NO_ALARM: Final = NoAlarm()


def wake_up_of(ctx: WaitCtx, seconds: float | None = None) -> WakeUp:
    """Return how others wake the running job, which waits for no longer than `seconds`."""
    callback = ctx.get_callback()
    # A hand-written loop need not watch fds while a callback is promised; an alarm has to be one.
    if callback is None or (seconds is not None and not can_await()):
        return BySignal(ctx)
    return ByCallback(ctx, callback)


def alarm_of(ctx: WaitCtx, seconds: float | None) -> Alarm:
    """Have the running job's pauses end after so many seconds, None for never."""
    if seconds is None:
        return NO_ALARM
    return LoopAlarm(ctx, seconds) if can_await() else FdAlarm(ctx, seconds)


@contextmanager
def watching_fds(ctx: WaitCtx) -> Iterator[None]:
    """Have the driver watch the fds of a wait context: no callback is promised meanwhile."""
    before, ctx.status = ctx.status, WaitStatus.UNSUPPORTED
    try:
        yield
    finally:
        ctx.status = before


def check_seconds(name: str, seconds: float) -> None:
    """Raise an error unless this is a time to wait."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {seconds!r}")
    if not seconds >= 0:  # nor is nan
        raise ValueError(f"{name} must not be negative, got {seconds!r}")
    if seconds > LONGEST:
        raise ValueError(f"{name} must be at most {LONGEST:.0f} seconds, got {seconds!r}")


LONGEST: Final = 1e9
"""Thirty years: what every timer of every loop takes."""
