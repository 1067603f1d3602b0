"""Wait contexts: where a job says what wakes it. Plain bookkeeping, no I/O.

A `WaitCtx` holds entries (key, fd, custom data, cleanup), newest last, and remembers which
of them were added or deleted since its job was last resumed. A deleted entry stays in the
list until then, so that whoever watches the fds learns of it from `get_changed_fds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

from ._errors import JobError

__all__ = ["Callback", "Cleanup", "WaitCtx", "WaitStatus"]


FDS_END: Final = 1 << 31
"""No file descriptor is so large: they are C ints."""


class WaitStatus(IntEnum):
    """What an engine says of the operation that its job pauses for (``ASYNC_STATUS_*``)."""

    UNSUPPORTED = 0
    """No callback is to come: watch the fds, or poll. The default."""
    ERR = 1
    """The request failed for good: clean up the session."""
    OK = 2
    """The request was submitted: the callback will be called."""
    EAGAIN = 3
    """The engine is busy (a full ring, say): resume the job soon, and it will try again."""


class Watch(Protocol):
    """What an event loop attached to an entry while it watches the entry's fd."""

    def release(self, ctx: WaitCtx) -> None: ...


class WaitFd:
    """One entry of a wait context."""

    __slots__ = ("added", "cleanup", "custom_data", "deleted", "fd", "key", "watch")

    def __init__(self, key: object, fd: int, custom_data: Any, cleanup: Cleanup | None) -> None:
        self.key = key
        self.fd = fd
        self.custom_data = custom_data
        self.cleanup = cleanup
        self.added = True
        self.deleted = False
        self.watch: Watch | None = None

    def unwatch(self, ctx: WaitCtx) -> None:
        if self.watch is not None:
            self.watch.release(ctx)
            self.watch = None


class WaitCtx:
    """What a job waits for: fds with their keys, a callback, a status (``ASYNC_WAIT_CTX``).

    One context is one session: it serves one job at a time, and the next job after that one
    has finished. It belongs to the thread of its job; only the callback that `get_callback`
    returns, and `status`, may be used from any thread. Use it in a ``with`` statement, or
    call `free` when its last job is done.

    >>> with WaitCtx() as ctx:
    ...     ctx.set_wait_fd("key", 7)
    ...     ctx.get_fd("key"), ctx.get_changed_fds()
    ((7, None), ([7], []))
    """

    __slots__ = (
        "__weakref__",
        "_callback",
        "_changed",
        "_entries",
        "_freed",
        "_in_use",
        "_status",
        "_waker",
    )

    def __init__(self) -> None:
        self._entries: list[WaitFd] = []
        self._changed = False
        self._callback: tuple[Callback, Any] | None = None
        self._status = WaitStatus.UNSUPPORTED
        self._in_use = False
        self._freed = False
        self._waker: Any = None  # the event loop's side of the job that is on this context

    def __repr__(self) -> str:
        if self._freed:
            return "<WaitCtx freed>"
        fds = ", ".join(f"{entry.key!r}: {entry.fd}" for entry in self._live())
        callback = ", callback set" if self._callback is not None else ""
        in_use = ", in use" if self._in_use else ""
        return f"<WaitCtx {self._status.name}, fds {{{fds}}}{callback}{in_use}>"

    def __enter__(self) -> Self:
        self._check_not_freed()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.free()

    def set_wait_fd(
        self,
        key: object,
        fd: int,
        custom_data: Any = None,
        cleanup: Cleanup | None = None,
    ) -> None:
        """Add a file descriptor that becomes readable when the job may go on.

        Stands for ``ASYNC_WAIT_CTX_set_wait_fd``. A key that is there already gets a second
        entry; `get_fd` and `clear_fd` see the newest.

        Args:
            key: Any value that is unique to the engine; compared with ``==``.
            fd: A descriptor that can be polled: a pipe, a socket, an eventfd. Call
                `clear_fd` before you close it. Under `run_job` the loop's reader for this fd
                is aiojob's while the job waits: don't give it another with ``add_reader``.
            custom_data: Anything; `get_fd` returns it.
            cleanup: Called as ``cleanup(wait_ctx, key, fd, custom_data)`` by `free`, if the
                entry has not been cleared by then. It usually closes the fd.

        Raises:
            TypeError: `fd` is not an int, or `cleanup` is not callable.
            ValueError: `fd` is negative, or too large for one.
            JobError: The context was freed.
        """
        self._check_not_freed()
        if not isinstance(fd, int) or isinstance(fd, bool):
            raise TypeError(f"fd must be an int, got {fd!r}: pass obj.fileno()")
        if fd < 0:
            raise ValueError(f"fd must not be negative, got {fd}: is the file closed?")
        if fd >= FDS_END:
            raise ValueError(f"fd must fit into a C int, got {fd}: pass obj.fileno()")
        if cleanup is not None and not callable(cleanup):
            raise TypeError(
                "cleanup must be callable as cleanup(wait_ctx, key, fd, custom_data), "
                f"got {cleanup!r}"
            )
        self._changed = True
        self._entries.append(WaitFd(key, fd, custom_data, cleanup))

    def get_fd(self, key: object) -> tuple[int, Any] | None:
        """Return ``(fd, custom_data)`` of the newest entry with this key, or None.

        Stands for ``ASYNC_WAIT_CTX_get_fd``.

        >>> with WaitCtx() as ctx:
        ...     ctx.set_wait_fd("key", 7, "data")
        ...     ctx.get_fd("key"), ctx.get_fd("other")
        ((7, 'data'), None)

        Raises:
            JobError: The context was freed.
        """
        self._check_not_freed()
        entry = self._find(key)
        return None if entry is None else (entry.fd, entry.custom_data)

    def get_all_fds(self) -> list[int]:
        """Return every fd, newest first (``ASYNC_WAIT_CTX_get_all_fds``).

        >>> with WaitCtx() as ctx:
        ...     ctx.set_wait_fd("key", 7)
        ...     ctx.set_wait_fd("other", 8)
        ...     ctx.get_all_fds()
        [8, 7]

        Raises:
            JobError: The context was freed.
        """
        self._check_not_freed()
        return [entry.fd for entry in self._live()]

    def get_changed_fds(self) -> tuple[list[int], list[int]]:
        """Return the fds ``(added, deleted)`` since the job was last resumed, newest first.

        Stands for ``ASYNC_WAIT_CTX_get_changed_fds``. An fd that was added and cleared in
        between is in neither list. A loop of your own adds the ones and drops the others
        after each pause; `run_job` does that for you.

        >>> with WaitCtx() as ctx:
        ...     ctx.set_wait_fd("key", 7)
        ...     ctx.set_wait_fd("other", 8)
        ...     ctx.clear_fd("other")
        ...     ctx.get_changed_fds()
        ([7], [])

        Raises:
            JobError: The context was freed.
        """
        self._check_not_freed()
        added = [e.fd for e in reversed(self._entries) if e.added and not e.deleted]
        deleted = [e.fd for e in reversed(self._entries) if e.deleted and not e.added]
        return added, deleted

    def clear_fd(self, key: object) -> None:
        """Remove the newest entry with this key; its cleanup is not called.

        Stands for ``ASYNC_WAIT_CTX_clear_fd``. Whoever clears an fd also closes it, after
        this call: the event loop stops watching it here.

        Raises:
            KeyError: There is no such entry.
            JobError: The context was freed.
        """
        self._check_not_freed()
        entry = self._find(key)
        if entry is None:
            raise KeyError(key)
        entry.unwatch(self)
        self._changed = True
        if entry.added:
            self._entries.remove(entry)
        else:
            entry.deleted = True

    def set_callback(self, callback: Callback | None, arg: Any = None) -> None:
        """Set what an engine calls, as ``callback(arg)``, when the job may go on.

        Stands for ``ASYNC_WAIT_CTX_set_callback``. Whoever drives the job sets it, before
        the start; `run_job` does so. None unsets it. It must be short, must not block and
        is called from any thread.

        >>> woken = []
        >>> with WaitCtx() as ctx:
        ...     ctx.set_callback(woken.append, "job 1")
        ...     callback, arg = ctx.get_callback()  # an engine does this, and when it is done:
        ...     callback(arg)
        >>> woken
        ['job 1']

        Raises:
            TypeError: `callback` is neither callable nor None.
            JobError: The context was freed.
        """
        self._check_not_freed()
        if callback is None:
            self._callback = None
        elif callable(callback):
            self._callback = (callback, arg)
        else:
            raise TypeError(f"callback must be callable as callback(arg), got {callback!r}")

    def get_callback(self) -> tuple[Callback, Any] | None:
        """Return ``(callback, arg)``, or None where an engine has to use an fd.

        Stands for ``ASYNC_WAIT_CTX_get_callback``. Under `run_job` there always is one. Call
        ``callback(arg)`` from any thread, as often as you like: a call that comes before the
        pause ends that pause at once, one that comes after the job has finished does
        nothing. From a `signal.signal` handler or a ``__del__`` method, go through
        ``loop.call_soon_threadsafe(callback, arg)``.

        Raises:
            JobError: The context was freed.
        """
        if self._callback is None:
            self._check_not_freed()
        return self._callback

    @property
    def status(self) -> WaitStatus:
        """What the engine said last (``ASYNC_WAIT_CTX_get_status``, ``_set_status``).

        It stays until it is set again. Assigning anything but a `WaitStatus` or its number
        raises `ValueError`.
        """
        return self._status

    @status.setter
    def status(self, status: WaitStatus) -> None:
        self._status = status if type(status) is WaitStatus else WaitStatus(status)

    def free(self) -> None:
        """Call the cleanup of every fd that is left, newest first, and drop them all.

        Stands for ``ASYNC_WAIT_CTX_free``. Every cleanup is called, even if one raises.
        Freeing twice has no effect.

        >>> ctx = WaitCtx()
        >>> ctx.set_wait_fd("key", 7, None, lambda ctx, key, fd, data: print("close", fd))
        >>> ctx.free()
        close 7

        Raises:
            JobError: A job that has not finished is on the context.
            BaseExceptionGroup: Several cleanups raised; one alone raises as itself.
        """
        if self._freed:
            return
        if self._in_use:
            raise JobError(
                f"{self!r} cannot be freed: its job has not finished; resume it until it has, "
                "or drop it, and then call free()"
            )
        self._freed = True
        entries = list(self._live())
        self._entries.clear()
        self._callback = self._waker = None
        for entry in entries:
            entry.unwatch(self)
        _raise_all(self._clean_up(entries))

    def _clean_up(self, entries: list[WaitFd]) -> list[BaseException]:
        errors: list[BaseException] = []
        for entry in entries:
            try:
                if entry.cleanup is not None:
                    entry.cleanup(self, entry.key, entry.fd, entry.custom_data)
            except BaseException as error:
                errors.append(error)
        return errors

    def _live(self) -> Iterator[WaitFd]:
        return (entry for entry in reversed(self._entries) if not entry.deleted)

    def _find(self, key: object) -> WaitFd | None:
        for entry in self._live():
            if entry.key is key or entry.key == key:
                return entry
        return None

    def _check_not_freed(self) -> None:
        if self._freed:
            raise JobError("the wait context was freed: create a new WaitCtx()")

    def _check_startable(self) -> None:
        self._check_not_freed()
        if self._in_use:
            raise JobError(
                f"{self!r} serves another job that has not finished: use one WaitCtx() for each "
                "job that is under way"
            )

    def _forget_changes(self) -> None:
        """Start a new set of changes: the job is being resumed."""
        if self._changed:
            self._changed = False
            self._entries = [entry for entry in self._entries if not entry.deleted]
            for entry in self._entries:
                entry.added = False


def _raise_all(errors: list[BaseException]) -> None:
    try:
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup("several cleanups of a wait context failed", errors)
    finally:
        errors.clear()  # a traceback that held its own exception would be a cycle


Callback: TypeAlias = Callable[[Any], object]
"""Called as ``callback(arg)``, from any thread."""

Cleanup: TypeAlias = Callable[[WaitCtx, Any, int, Any], object]
"""Called as ``cleanup(wait_ctx, key, fd, custom_data)``."""
