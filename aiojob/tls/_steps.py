"""How the steps of a handshake are run: on the loop's thread, or in a worker thread.

A step is one call of ``do_handshake``: it works on what the peer has sent so far, and ends the
handshake or needs more. Each connection has a `Steps` object of its own, whose `Steps.step` its job
calls. While steps are under way they are `current_steps`, so that a callback of OpenSSL's, which
gets no other argument to know its connection by, finds them.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from abc import ABC, abstractmethod
from asyncio import Task
from collections.abc import Awaitable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import Any, Final, Generic, TypeVar
from weakref import ref

from .._run import await_
from ..engines._offload import offload_beneath

__all__ = ["LoopSteps", "Steps", "ThreadSteps", "current_steps", "set_current"]

T = TypeVar("T")


class Steps(ABC):
    """The steps of one connection's handshake.

    callback_failed: whether a callback raised something. An exception cannot cross OpenSSL: the
        callback passes it to `fail_callback` and returns an alert, and the step raises it.
    in_flight: whether somebody else is using the SSL object and its BIOs, so that nobody may touch
        them. It stays so when the job's wait for that is given up.
    """

    callback_failed: bool = False
    in_flight: bool = False

    def __init__(
        self, ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        self._ssl_object = ssl_object
        self._callback_error: BaseException | None = None

    @abstractmethod
    def step(self) -> None:
        """Take the handshake one step further, in its job; may pause.

        Raises:
            ssl.SSLWantReadError: It needs more from the peer.
            ssl.SSLError: It has failed.
            BaseException: What a callback raised.
        """

    @abstractmethod
    def await_in_callback(self, awaitable: Awaitable[T]) -> T:
        """Wait for something inside a callback of OpenSSL's."""

    def fail_callback(self, error: BaseException) -> None:
        """Have the step that called a callback raise what the callback has raised."""
        self.callback_failed = True
        self._callback_error = error

    def finish(self) -> None:  # noqa: B027  # there seldom is anything to do
        """Leave the SSL object as it was: the handshake is complete."""

    def abandon(self) -> None:  # noqa: B027  # the same
        """Clean up: the connection is given up, perhaps in the middle of a step."""

    def _do_handshake(self) -> None:
        try:
            self._ssl_object.do_handshake()
        except ssl.SSLError:
            if not self.callback_failed:
                raise
        if self.callback_failed:  # also where OpenSSL can do without it and goes on
            self._raise_callback_error()

    def _raise_callback_error(self) -> None:
        assert self._callback_error is not None
        try:
            raise self._callback_error
        finally:
            self._callback_error = None  # its traceback holds this frame


class LoopSteps(Steps):
    """Steps on the event loop's thread, in the job: callbacks may pause it."""

    def step(self) -> None:
        self._do_handshake()

    def await_in_callback(self, awaitable: Awaitable[T]) -> T:
        return await_(awaitable)


class ThreadSteps(Steps):
    """Steps in worker threads: the loop goes on, and callbacks block their worker.

    is_abandoned: whether nobody waits for the step that is under way.
    task: what the event loop runs for the callback that is under way.
    """

    def __init__(
        self, ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        super().__init__(ssl_object, incoming, outgoing)
        self._loop = asyncio.get_running_loop()
        self._awaited: Future[Any] | None = None
        self.task: Task[Any] | None = None
        self.is_abandoned = False

    def step(self) -> None:
        self.in_flight = True
        try:
            offload_beneath(self._do_handshake)
        except Exception:  # and not a cancellation: the worker goes on then
            self.in_flight = False
            raise
        self.in_flight = False

    def await_in_callback(self, awaitable: Awaitable[T]) -> T:
        request = _Request(self, awaitable)
        awaited = self._awaited = request.outcome
        try:
            self._loop.call_soon_threadsafe(request)
        finally:
            if self._loop.is_closed():  # perhaps since that call had looked: nobody calls it
                request.drop()
            del request  # the loop's alone
        try:
            return awaited.result()
        finally:
            self._awaited = self.task = None
            del awaited  # what it raised holds this frame

    def fail_callback(self, error: BaseException) -> None:
        super().fail_callback(error)
        if self.is_abandoned and not isinstance(error, CancelledError):
            # Nobody waits for the step any more.
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._report, error)

    def _report(self, error: BaseException) -> None:
        message = "a callback of a TLS handshake that was given up failed"
        self._loop.call_exception_handler({"message": message, "exception": error})

    def abandon(self) -> None:
        self.is_abandoned = True
        task, awaited = self.task, self._awaited  # the worker may take them away meanwhile
        if task is not None:
            with suppress(RuntimeError):  # the loop is closed
                task.cancel()
        if awaited is not None:
            awaited.cancel()


class _Request(Generic[T]):
    """A worker's request to an event loop, to await something: the loop is to call it.

    A loop that is closed before lets go of it, and nobody else holds it: so it ends in any case.
    """

    def __init__(self, steps: ThreadSteps, awaitable: Awaitable[T]) -> None:
        self.outcome: Future[T] = Future()
        self._steps: ThreadSteps | None = steps
        self._coroutine = awaitable if inspect.iscoroutine(awaitable) else _awaiting(awaitable)

    def __call__(self) -> None:
        steps, self._steps = self._steps, None
        assert steps is not None
        if steps.is_abandoned:
            self.drop()
            return
        task = asyncio.get_running_loop().create_task(self._coroutine)
        steps.task = task
        task.add_done_callback(self._settle)

    def _settle(self, task: Task[T]) -> None:
        if task.cancelled():
            self.outcome.cancel()
        elif self.outcome.set_running_or_notify_cancel():
            if (error := task.exception()) is not None:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(task.result())

    def drop(self) -> None:
        """End it: nothing is to be awaited."""
        self._coroutine.close()
        self.outcome.cancel()

    def __del__(self) -> None:
        if self._steps is not None:
            self.drop()


async def _awaiting(awaitable: Awaitable[T]) -> T:
    return await awaitable


_current_steps: Final[ContextVar[ref[Steps] | None]] = ContextVar("current_steps", default=None)
"""Weakly: what a callback starts takes its context with it, and may outlive the connection."""


def current_steps() -> Steps | None:
    """Return the steps that are being run in this context."""
    steps = _current_steps.get()
    return None if steps is None else steps()


def set_current(steps: Steps) -> Token[ref[Steps] | None]:
    """Have these steps be the context's, until the token's variable is reset."""
    return _current_steps.set(ref(steps))
