"""Handshakes as OpenSSL's own jobs, for engines and providers that pause natively.

With ``SSL_MODE_ASYNC``, libssl runs the handshake as an ``ASYNC_JOB``. An engine that pauses it
shows through `_ssl` as an error with an unknown number; ``SSL_want`` says what it was. The job of
ours that took the step then pauses too, with the native job's fds in its wait context, and takes
the step again when one of them is readable.

What holds for a native job that is paused:

- It goes on only in the thread that it began in.
- Its connection must not be freed. libssl would leak the job, and the engine, which does not know,
  would signal its completion through an fd that is somebody else's by then. So a connection that is
  given up in mid-job is kept and resumed until it has no native job; see `NativeSteps.abandon`.
- When it goes on, it may close its fds, whose numbers may be reused at once. So they are in our
  wait context only while ours is paused.

Callbacks in Python would run on the native job's stack of 32 KiB, and are refused.
"""

from __future__ import annotations

import inspect
import ssl
import threading
from asyncio import Task, get_running_loop
from collections.abc import Awaitable
from contextlib import suppress
from typing import Final, TypeVar
from weakref import ref

from .._errors import CannotPauseError, LibsslUnavailableError
from .._job import get_wait_ctx, pause_job
from .._run import run_job
from .._wakeups import loop_runs
from ..engines._pauses import watching_fds
from ._libssl import (
    SSL_ASYNC_NO_JOBS,
    SSL_ASYNC_PAUSED,
    check_rebind,
    connection_of,
    has_psk_callback,
    is_async_capable,
)
from ._steps import Steps

__all__ = ["NativeSteps", "abandoned", "check_native", "is_native_capable", "resume_abandoned"]

T = TypeVar("T")


class NativeSteps(Steps):
    """Steps as a native job of OpenSSL's, which is in flight while it is paused.

    Use it in one thread, under an event loop.

    Raises:
        LibsslUnavailableError: This is not possible; the message says why.
    """

    def __init__(
        self, ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        super().__init__(ssl_object, incoming, outgoing)
        _check_callbacks(ssl_object.context)  # once more: they can be set at any time
        resume_abandoned()
        self._connection = connection_of(ssl_object, incoming, outgoing)
        self._connection.set_async()
        self._drain_task: ref[Task[None]] | None = None

    def step(self) -> None:
        while not self._go_on():
            self._pause()

    def _go_on(self) -> bool:
        """Start or resume the native job; return whether the handshake is complete by now.

        Raises:
            ssl.SSLError: The native job has ended without that.
        """
        want = self._connection.want
        try:
            self._do_handshake()
        except ssl.SSLError:
            if want() not in (SSL_ASYNC_PAUSED, SSL_ASYNC_NO_JOBS):
                raise
            return False
        finally:
            # However it was left: a KeyboardInterrupt comes after libssl has returned.
            self.in_flight = want() == SSL_ASYNC_PAUSED
        return True

    def _pause(self) -> None:
        """Pause until an fd of the native job is readable, or for a while if there is none.

        There is none if all native jobs of the thread are in use, or the engine has to be polled.
        """
        fds = self._connection.async_fds() if self.in_flight else []
        ctx = get_wait_ctx()
        with watching_fds(ctx):
            for fd in fds:
                ctx.set_wait_fd(self, fd)
            try:
                pause_job()
            finally:
                for _ in fds:
                    ctx.clear_fd(self)

    def await_in_callback(self, awaitable: Awaitable[T]) -> T:
        if inspect.iscoroutine(awaitable):
            awaitable.close()  # or it would warn that it was never awaited
        raise CannotPauseError(
            'a callback that was set after the handshake began cannot wait with handshake="openssl"'
        )

    def finish(self) -> None:
        self._connection.clear_async()

    def abandon(self) -> None:
        """Give the connection up, after its last step, which was perhaps cancelled.

        If a native job is paused, a task of its own goes on resuming it to its end; the connection
        lives until then. What an event loop leaves behind at its own end, or what is abandoned
        where none runs, goes on with the next native handshake of the thread; if there is none, it
        is kept as long as the process lives.
        """
        if not self.in_flight:
            return
        abandoned.add(self)
        _local.abandoned.add(self)
        if loop_runs():
            self._drain_task = ref(get_running_loop().create_task(self._drain()))

    async def _drain(self) -> None:
        try:
            # How the handshake ends interests nobody. If an fd cannot be watched, it has not.
            with suppress(OSError):
                await run_job(self._wait_and_step)
        finally:
            self._release_if_ended()

    def _wait_and_step(self) -> None:
        self._pause()
        self.step()

    def _release_if_ended(self) -> None:
        if not self.in_flight:
            abandoned.discard(self)
            _local.abandoned.discard(self)

    def _is_left_behind(self) -> bool:
        task = None if self._drain_task is None else self._drain_task()
        return task is None or task.done() or task.get_loop().is_closed()


abandoned: Final[set[NativeSteps]] = set()
"""Those that were given up in mid-job, in any thread. Here they outlive loops and threads."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.abandoned: set[NativeSteps] = set()


_local: Final = _Local()
"""Those of them that began in this thread."""


def resume_abandoned() -> None:
    """Resume once each native job that an event loop of this thread has left behind."""
    for steps in tuple(_local.abandoned):
        if steps._is_left_behind():
            with suppress(OSError):
                steps._go_on()
            steps._release_if_ended()


def is_native_capable() -> bool:
    """Return whether ``handshake="openssl"`` is possible here (``ASYNC_is_capable``).

    If not, `create_server` raises a `LibsslUnavailableError` that says why. Whether an engine or
    a provider that pauses is there does not matter: without one, handshakes do not pause.

    >>> handshake = "openssl" if is_native_capable() else "thread"

    Any thread may call this.
    """
    return _obstacle() is None


def check_native(context: ssl.SSLContext) -> None:
    """Check that connections of this context can shake hands as native jobs.

    Raises:
        LibsslUnavailableError: They cannot; the message says why.
    """
    obstacle = _obstacle()
    if obstacle is not None:
        raise LibsslUnavailableError(f'handshake="openssl" is not possible here: {obstacle}')
    _check_callbacks(context)


def _obstacle() -> str | None:
    error = check_rebind()
    if error is not None:
        return str(error)
    try:
        is_capable = is_async_capable()
    except LibsslUnavailableError as missing:
        return str(missing)
    return None if is_capable else "OpenSSL cannot pause jobs on this platform (ASYNC_is_capable)"


def _check_callbacks(context: ssl.SSLContext) -> None:
    if context.sni_callback is not None:
        callback = "sni_callback"
    elif context._msg_callback is not None:  # type: ignore[attr-defined]
        callback = "_msg_callback"
    elif has_psk_callback(context):
        callback = "a PSK callback"
    else:
        return
    raise LibsslUnavailableError(
        f'{callback} is set on {context!r}: with handshake="openssl" it would run on the small '
        'stack of a native job; use handshake="loop" or "thread"'
    )
