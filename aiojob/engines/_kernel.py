"""File descriptors that turn readable when something happens: a signal, a deadline, room to write.

A hand-written loop watches only whether fds are readable, and that is all a wait context can ask
for; whatever else a job waits for has to come as such an fd.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from contextlib import suppress
from threading import RLock
from typing import Final

__all__ = ["Signal", "TimerFd", "WritableFd"]

ONE: Final = (1).to_bytes(8, sys.byteorder)
"""What an eventfd takes; a pipe takes it as well."""


class Signal:
    """An fd that any thread makes readable: an eventfd, or a pipe where there is none."""

    __slots__ = ("_armed", "_lock", "_write_fd", "fd")

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._write_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fd, self._write_fd = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write_fd, False)
        self._armed = False
        # Reentrant: a signal handler may call set() in the thread that it interrupts here.
        self._lock = RLock()

    def arm(self) -> None:
        """Have `set` make the fd readable from now on."""
        self._armed = True

    def set(self) -> None:
        """Make the fd readable, if it is armed. Any thread may call this."""
        # Under the lock, or the fd could be closed, and its number be somebody else's, between
        # the test and the write.
        with self._lock:
            if self._armed:
                with suppress(BlockingIOError):  # full, and so readable
                    os.write(self._write_fd, ONE)

    def clear(self) -> None:
        """Make the fd unreadable."""
        with suppress(BlockingIOError):  # it is
            os.read(self.fd, 4096)

    def disarm(self) -> None:
        """Make the fd unreadable, and keep it so, whoever comes late with `set`."""
        with self._lock:
            self._armed = False
            self.clear()

    def close(self) -> None:
        """Close the fd; `set` has no effect any more."""
        with self._lock:
            self._armed = False
            for fd in {self.fd, self._write_fd}:
                os.close(fd)


class TimerFd:
    """An fd that turns readable after so many seconds."""

    __slots__ = ("_queue", "fd")

    def __init__(self, seconds: float) -> None:
        if sys.platform == "linux":
            self.fd = _timerfd(max(seconds, 1e-9))  # zero would disarm it
        else:  # not on Linux
            self._queue = _kqueue(
                select.kevent(
                    1,
                    select.KQ_FILTER_TIMER,
                    select.KQ_EV_ADD | select.KQ_EV_ONESHOT,
                    data=int(seconds * 1000) + 1,
                )
            )
            self.fd = self._queue.fileno()

    def close(self) -> None:
        """Close the fd."""
        if sys.platform == "linux":
            os.close(self.fd)
        else:  # not on Linux
            self._queue.close()


class WritableFd:
    """An fd that is readable while another one is writable."""

    __slots__ = ("_queue", "fd")

    def __init__(self, fd: int) -> None:
        if sys.platform == "linux":
            self._queue = select.epoll()
            try:
                self._queue.register(fd, select.EPOLLOUT)
            except BaseException:
                self._queue.close()
                raise
        else:  # not on Linux
            self._queue = _kqueue(select.kevent(fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD))
        self.fd = self._queue.fileno()

    def close(self) -> None:
        """Close the fd that `fd` names, not the one that was watched."""
        self._queue.close()


if sys.platform != "linux":  # not on Linux

    def _kqueue(event: select.kevent) -> select.kqueue:
        """Return a kernel queue that waits for one event, and is readable when it is there."""
        queue = select.kqueue()
        try:
            queue.control([event], 0)
        except BaseException:
            queue.close()
            raise
        return queue


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def _timerfd_by_libc(seconds: float) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    whole = int(seconds)
    once = _Itimerspec(value=_Timespec(whole, max(1, int((seconds - whole) * 1e9))))
    libc.timerfd_settime(fd, 0, ctypes.byref(once), None)
    return int(fd)


_timerfd = _timerfd_by_libc

if sys.version_info >= (3, 13):  # pragma: no branch

    def _timerfd_by_os(seconds: float) -> int:
        fd = os.timerfd_create(_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)
        os.timerfd_settime(fd, initial=seconds)
        return fd

    _timerfd = _timerfd_by_os

_MONOTONIC: Final = 1
