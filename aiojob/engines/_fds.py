"""`wait_readable` and `wait_writable`: for libraries that ask their caller to wait for an fd."""

from __future__ import annotations

import errno
import select
from contextlib import closing
from math import ceil
from selectors import EVENT_READ, EVENT_WRITE
from time import monotonic
from typing import Final, Protocol

from .._errors import WaitFdError
from .._job import can_pause, get_wait_ctx, pause_job
from .._waitctx import FDS_END
from ._kernel import WritableFd
from ._pauses import Key, alarm_of, check_seconds, watching_fds

__all__ = ["HasFileno", "wait_readable", "wait_writable"]


class HasFileno(Protocol):
    """A socket, a pipe, a connection: what has a file descriptor."""

    def fileno(self) -> int: ...


def wait_readable(fd: int | HasFileno, timeout: float | None = None) -> None:
    """Pause, or block, until there is something to read, or an end of file or an error to see.

    >>> import socket
    >>> here, there = socket.socketpair()
    >>> _ = there.send(b"hello")
    >>> wait_readable(here)
    >>> here.recv(5)
    b'hello'
    >>> here.close(), there.close()
    (None, None)

    Returns at once if there is, without a pause. A job pauses with the fd in its wait context;
    elsewhere, or where pausing is blocked, the thread blocks. Several jobs may wait for one fd,
    and each is woken. The fd must stay open meanwhile.

    Cancellation is raised here; nothing is left behind.

    Args:
        fd: A file descriptor, or an object with a ``fileno()`` method.
        timeout: Seconds to wait at most, None for no limit.

    Raises:
        TimeoutError: There was nothing in time.
        TypeError: That is neither an fd nor something that has one.
        ValueError: A negative fd, as of a closed file, or a time that `sleep` refuses.
        WaitFdError: The fd is closed, or the event loop cannot watch it.
    """
    _wait(fd, EVENT_READ, timeout)


def wait_writable(fd: int | HasFileno, timeout: float | None = None) -> None:
    """Pause, or block, until a write would take something, or there is an error to see.

    >>> import socket
    >>> here, there = socket.socketpair()
    >>> wait_writable(here)
    >>> here.close(), there.close()
    (None, None)

    Otherwise the same as `wait_readable`. What goes into the wait context is an fd of its own,
    readable while this one is writable, as drivers watch for nothing else.

    Raises:
        TimeoutError: There was no room in time.
        WaitFdError: The fd is closed, or cannot be watched.
    """
    _wait(fd, EVENT_WRITE, timeout)


def _wait(fd: int | HasFileno, event: int, timeout: float | None) -> None:
    if timeout is not None:
        check_seconds("timeout", timeout)
    number = _number_of(fd)
    if not 0 <= number < FDS_END:
        raise ValueError(f"an open fd is needed, got {number} of {fd!r}: is the file closed?")
    if _is_ready(number, event, 0):
        return
    ready = _pause(number, event, timeout) if can_pause() else _block(number, event, timeout)
    if not ready:
        raise TimeoutError(f"fd {number} was not {_NAMES[event]} within {timeout} s")


def _number_of(fd: int | HasFileno) -> int:
    if isinstance(fd, int) and not isinstance(fd, bool):
        return fd
    fileno = getattr(fd, "fileno", None)
    number = fileno() if callable(fileno) else None
    if not isinstance(number, int):
        raise TypeError(f"an fd, or an object with fileno(), is needed, got {fd!r}")
    return number


_NAMES: Final = {EVENT_READ: "readable", EVENT_WRITE: "writable"}


def _is_ready(fd: int, event: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN if event == EVENT_READ else select.POLLOUT)
    for _, seen in poll.poll(milliseconds):
        if seen & select.POLLNVAL:
            raise WaitFdError(errno.EBADF, f"fd {fd} cannot be waited for: it is closed")
        return True
    return False


def _block(fd: int, event: int, timeout: float | None) -> bool:
    if timeout is None:
        return _is_ready(fd, event, None)
    deadline = monotonic() + timeout
    while (left := deadline - monotonic()) > 0:
        if _is_ready(fd, event, min(ceil(left * 1000), _LONGEST_POLL)):
            return True
    return False


_LONGEST_POLL: Final = 1 << 30
"""Milliseconds; poll() takes no more than fit into an int."""


def _pause(fd: int, event: int, timeout: float | None) -> bool:
    if event == EVENT_READ:
        return _pause_watching(fd, fd, event, timeout)
    with closing(WritableFd(fd)) as writable:
        return _pause_watching(writable.fd, fd, event, timeout)


def _pause_watching(watched: int, fd: int, event: int, timeout: float | None) -> bool:
    """Pause until the event is there, which makes `watched` readable; False if it is too late."""
    ctx = get_wait_ctx()
    key = Key(f"fd {fd} {_NAMES[event]}")
    with watching_fds(ctx), closing(alarm_of(ctx, timeout)) as alarm:
        ctx.set_wait_fd(key, watched)
        try:
            while not alarm.is_due():
                pause_job()
                if _is_ready(fd, event, 0):
                    return True
            return False
        finally:
            ctx.clear_fd(key)
