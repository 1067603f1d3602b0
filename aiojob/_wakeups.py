"""What wakes paused jobs in an event loop: fd readers, callbacks from any thread, polling.

Guarantees. A wake-up that comes while nobody waits is remembered for the next pause of the same
job (a callback) or happens again by itself (a readable fd), so that none is lost. None
reaches another job: each job has a `Waker` of its own, which is what its callback calls.
A wake-up never raises into the thread that it comes from, not even after the loop was closed.

Assumptions. The methods of a loop's `Hub` and of its wakers are called in that loop's thread,
but for `Waker.wake` and `Hub.post`. Only public methods of the loop are used.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from _thread import get_ident
from asyncio import Future, InvalidStateError, get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from os import fstat, get_inheritable
from stat import S_IFMT
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from ._errors import EngineError, WaitFdError
from ._fibre import Pool
from ._waitctx import WaitCtx, WaitFd, WaitStatus

__all__ = ["NEXT_ITERATION", "Hub", "Waker", "attach", "current_hub", "loop_runs"]

logger = logging.getLogger("aiojob")

# Bound here, as an enumeration is slow to look its members up.
ERR, OK, EAGAIN = WaitStatus.ERR, WaitStatus.OK, WaitStatus.EAGAIN

POLLS_AT_ONCE: Final = 8
"""How often a job that has nothing to wait for is resumed in the loop's next iteration."""
POLL_SHORTEST: Final = 100e-6
"""Seconds to the poll after those; each next one takes twice as long, up to:"""
POLL_LONGEST: Final = 20e-3
POLL_BUSY_LONGEST: Final = 1e-3
"""For an engine that says EAGAIN."""
TRIM_INTERVAL: Final = 10.0
"""Idle fibres that no job needed for so many seconds are dropped."""
TRIM_AT_ONCE: Final = 500
"""So many of them in one step, lest the loop stalls."""
TRIM_PAUSE: Final = 10e-3
"""Seconds between such steps."""


Delivery = tuple[Callable[[Any], object], Any]
"""What a thread posts to an event loop: a callback for the loop's thread, and its argument."""


class Waker:
    """Wakes one job, in any of its pauses. The job's callback is ``Waker.wake(waker)``."""

    __slots__ = ("_fired", "_future", "_hub", "_polls")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._future: Future[None] | None = None
        self._fired = False
        self._polls = 0

    def wake(self) -> None:
        """End the job's pause, or its next one. Any thread may call this."""
        if get_ident() != self._hub.ident:
            self._hub.post(Waker.wake, self)
            return
        self._polls = 0
        future = self._future
        if future is None or future.done():
            self._fired = True
            return
        try:
            future.set_result(None)
        except RuntimeError:
            logger.debug("a job was woken after its event loop had been closed")

    def end_pause(self) -> bool:
        """End the job's pause, and say whether it was paused. The running loop alone calls this."""
        future = self._future
        if future is None or future.done():
            return False
        if type(future) is FdPause:
            future.end()
        else:
            future.set_result(None)
        return True

    def pause(self, ctx: WaitCtx) -> Awaitable[None] | None:
        """Return what a pause of the job awaits; None if it may go on at once.

        Raises:
            EngineError: The context's status is ERR.
            WaitFdError: An fd of the context cannot be watched.
        """
        status = ctx._status
        if status is ERR:
            raise EngineError(
                f"the engine reported a fatal error (status ERR) on {ctx!r}: "
                "clean up what belongs to the wait context, or set its status anew"
            )
        if self._fired:
            self._fired = False
            return None
        if status is EAGAIN:
            return self._poll(POLL_BUSY_LONGEST)
        if ctx._entries and self._hub.watch(ctx):
            self._polls = 0
            future = self._future = self._hub.fd_pause()
            return future
        if status is OK:
            self._polls = 0
            future = self._future = Future()
            return future
        return self._poll(POLL_LONGEST)

    def forget_pause(self) -> None:
        """Take note that the pause has ended without a wake-up."""
        self._future = None

    def _poll(self, longest: float) -> Awaitable[None]:
        self._polls += 1
        if self._polls <= POLLS_AT_ONCE:
            return NEXT_ITERATION
        doublings = min(self._polls - POLLS_AT_ONCE - 1, 16)
        return self._sleep(min(longest, POLL_SHORTEST * 2**doublings))

    async def _sleep(self, seconds: float) -> None:
        future = self._future = Future()
        timer = get_running_loop().call_later(seconds, self.end_pause)
        try:
            await future
        finally:
            timer.cancel()


class FdPause(Future[None]):
    """What a job awaits that waits for fds, on asyncio: its task goes on within `end`.

    A future's task goes on in the next iteration. asyncio polls before that, and would find the
    fd readable once more, as the job has not read from it yet.
    """

    __slots__ = ("_task_wakeup",)

    def __init__(self) -> None:
        Future.__init__(self)
        self._task_wakeup: tuple[Callable[[Any], object], Context] | None = None

    def add_done_callback(
        self, fn: Callable[[Any], object], /, *, context: Context | None = None
    ) -> None:
        """Have `fn` called when the pause has ended; the first one is the awaiting task's."""
        if context is None or self._task_wakeup is not None:
            Future.add_done_callback(self, fn, context=context)
            return
        self._task_wakeup = fn, context
        if self.done():  # a signal handler came in between
            self._defer()

    def end(self) -> None:
        """End the pause, in a callback of the loop: no task is running."""
        Future.set_result(self, None)
        if self._task_wakeup is not None:
            (fn, context), self._task_wakeup = self._task_wakeup, None
            context.run(fn, self)

    def set_result(self, result: None, /) -> None:
        """End the pause, anywhere in the loop's thread: the task goes on later."""
        Future.set_result(self, result)
        self._defer()

    def cancel(self, msg: Any | None = None) -> bool:
        self._defer()
        return Future.cancel(self, msg)

    def _defer(self) -> None:
        """Have the task go on as one that awaits any other future."""
        if self._task_wakeup is not None:
            (fn, context), self._task_wakeup = self._task_wakeup, None
            Future.add_done_callback(self, fn, context=context)


class _NextIteration:
    """Awaiting this goes on in the loop's next iteration."""

    def __await__(self) -> Generator[None, None, None]:
        yield


NEXT_ITERATION: Final = _NextIteration()


class _FdWatch:
    """A reader that is registered with a loop, for all the contexts that hold the fd."""

    __slots__ = ("_contexts", "_file", "_hub", "fd", "registered")

    def __init__(self, hub: Hub, fd: int) -> None:
        self._hub = hub
        self.fd = fd
        self.registered = False
        self._contexts: list[WaitCtx] = []
        self._file: tuple[int, ...] = ()

    def add(self, ctx: WaitCtx) -> None:
        self._contexts.append(ctx)

    def register(self, loop: asyncio.AbstractEventLoop) -> None:
        # Unregister first: the loop may still have a closed file by this number, and would
        # take the new one for watched.
        self.unregister()
        self._file = _file_of(self.fd)
        loop.add_reader(self.fd, self._ready)
        self.registered = True

    def is_current(self, hub: Hub) -> bool:
        """Whether the loop of `hub` watches what now has this fd's number."""
        if not self.registered or self._hub is not hub:
            return False
        if self._file:
            return _file_of(self.fd) == self._file
        get_inheritable(self.fd)  # the cheapest call that raises if the fd is closed
        return True

    def unregister(self) -> None:
        if not self.registered:
            return
        self.registered = False
        loop = self._hub.loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.remove_reader(self.fd)
        except RuntimeError:
            # The number belongs to a transport of the loop by now, and so does its reader.
            logger.debug("fd %d was closed while a job's wait context still held it", self.fd)

    def release(self, ctx: WaitCtx) -> None:
        self._contexts.remove(ctx)
        if not self._contexts:
            self.unregister()
            self._hub.forget(self)

    def _ready(self) -> None:
        woken = False
        for ctx in tuple(self._contexts):  # the jobs that go on change them
            if ctx._waker is not None and ctx._waker.end_pause():
                woken = True
        if not woken:
            # Left readable while nobody waits: the loop would spin. A pause registers it again.
            self.unregister()


def _file_of(fd: int) -> tuple[int, ...]:
    """Return what tells an open file from others; nothing for those that share one inode."""
    status = fstat(fd)
    return status[1:3] if S_IFMT(status[0]) else ()


class Hub:
    """One for each event loop: its fd readers, and the completions from other threads."""

    __slots__ = (
        "__weakref__",
        "_loop",
        "_posted",
        "_scheduled",
        "_trims",
        "_watches",
        "fd_pause",
        "ident",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self.ident = get_ident()
        self.fd_pause = FdPause if isinstance(loop, asyncio.BaseEventLoop) else Future
        self._posted: deque[Delivery] = deque()
        self._scheduled = False
        self._watches: dict[int, _FdWatch] = {}
        self._trims = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop, None when it is gone."""
        return self._loop()

    # -- completions from other threads

    def post(self, callback: Callable[[Any], object], arg: Any) -> None:
        """Call ``callback(arg)`` in the loop's thread; calls that come together share a wake-up.

        The callback ends somebody's wait. It should raise no more than `InvalidStateError`: the
        future that it sets is done, and nobody waits any more. What else it raises goes to the
        loop's exception handler.

        Append, then test the flag; the drain clears the flag, then delivers until the deque is
        empty. If the flag were tested first, the drain could empty the deque between the test
        and the append, and the delivery would lie there with no drain to come.
        """
        self._posted.append((callback, arg))
        loop = self._loop()
        if self._scheduled and loop is not None and not loop.is_closed():
            return
        self._scheduled = True
        try:
            if loop is not None:
                loop.call_soon_threadsafe(_Drain(self))
                if not loop.is_closed():  # since that call had looked: it would never drain
                    return
        except RuntimeError:  # the loop is closed
            pass
        except BaseException:  # a KeyboardInterrupt, say: the next post has to schedule
            self._scheduled = False
            raise
        self.drop_posted()

    @property
    def has_posted(self) -> bool:
        """Whether there is something to deliver."""
        return bool(self._posted)

    def drop_posted(self) -> None:
        """Drop what was posted: the loop is closed. What it holds may hold the loop itself."""
        # The flag first, as in the drain: who appends after it is cleared finds the loop closed.
        self._scheduled = False
        self._posted.clear()
        logger.debug("a job was woken after its event loop had been closed")

    def drain(self) -> None:
        """Deliver what was posted, in the loop's thread."""
        self._scheduled = False
        self.ident = get_ident()
        posted = self._posted
        try:
            # Those that come while this runs are bounded too: the loop has others to serve.
            for _ in range(len(posted) + 16):
                try:
                    callback, arg = posted[0]
                except IndexError:
                    return
                try:
                    callback(arg)
                except InvalidStateError:
                    logger.debug("a job or a coroutine was woken that does not wait any more")
                except Exception:
                    posted.popleft()  # or it would hold up the others for ever
                    raise
                posted.popleft()  # only now, lest an interrupt loses it
        finally:  # a KeyboardInterrupt leaves the others to the loop's next run
            if posted:
                get_running_loop().call_soon(_Drain(self))

    # -- the size of the pool

    def trim_by_and_by(self, pool: Pool) -> None:
        """Drop what a pool no longer needs, in small steps, until it is small again."""
        if not self._trims:
            self._trims = True
            get_running_loop().call_later(TRIM_INTERVAL, self._trim, pool)

    def _trim(self, pool: Pool) -> None:
        dropped = pool.drop_reserve(TRIM_AT_ONCE)
        delay = TRIM_PAUSE if dropped else TRIM_INTERVAL
        if not dropped:
            pool.renew_reserve()
        self._trims = pool.is_large
        if self._trims:
            get_running_loop().call_later(delay, self._trim, pool)

    # -- file descriptors

    def watch(self, ctx: WaitCtx) -> bool:
        """Have the loop watch all fds of a context; say whether there are any."""
        for entry in ctx._entries:
            watch: Any = entry.watch
            try:
                if watch is None or not watch.is_current(self):
                    self._register(ctx, entry)
            except (OSError, RuntimeError, ValueError) as error:
                raise _unwatchable(ctx, entry, error) from error
        return bool(ctx._entries)

    def _register(self, ctx: WaitCtx, entry: WaitFd) -> None:
        entry.unwatch(ctx)
        watch = self._watches.get(entry.fd)
        if watch is None:
            watch = self._watches[entry.fd] = _FdWatch(self, entry.fd)
        watch.add(ctx)
        entry.watch = watch
        watch.register(get_running_loop())

    def forget(self, watch: _FdWatch) -> None:
        del self._watches[watch.fd]


class _Drain:
    """A drain that a loop is to call. One that is closed before lets go of it, and it tells."""

    __slots__ = ("_hub",)

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __call__(self) -> None:
        self._hub.drain()

    def __del__(self) -> None:
        loop = self._hub.loop
        if self._hub.has_posted and (loop is None or loop.is_closed()):
            self._hub.drop_posted()


def _unwatchable(ctx: WaitCtx, entry: WaitFd, error: Exception) -> WaitFdError:
    entry.unwatch(ctx)
    what = f"fd {entry.fd} (key {entry.key!r}) cannot be watched"
    if isinstance(error, NotImplementedError):
        return WaitFdError(
            errno.ENOTSUP,
            f"{what}: this event loop has no add_reader; use the wait context's callback",
        )
    if not isinstance(error, OSError):
        return WaitFdError(errno.EBUSY, f"{what}: {error}")
    if error.errno == errno.EPERM:
        return WaitFdError(errno.EPERM, f"{what}: regular files are always ready")
    if error.errno == errno.EBADF:
        return WaitFdError(errno.EBADF, f"{what}: it is closed; call clear_fd() before closing")
    return WaitFdError(error.errno, f"{what}: {error.strerror}")


_latest: Hub | None = None
_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


def hub_of(loop: asyncio.AbstractEventLoop) -> Hub:
    """Return the hub of the running event loop, made when first asked for."""
    global _latest
    hub = _latest
    if hub is not None and hub._loop() is loop:
        return hub
    try:
        hub = _hubs[loop]
    except KeyError:
        hub = _hubs[loop] = Hub(loop)
    _latest = hub
    return hub


def current_hub() -> Hub:
    """Return the hub of the event loop that runs in this thread."""
    return hub_of(get_running_loop())


def loop_runs() -> bool:
    """Return whether an event loop is running in this thread."""
    try:
        get_running_loop()
    except RuntimeError:
        return False
    return True


def attach(ctx: WaitCtx) -> None:
    """Set the callback of a wait context, for a job that the running loop drives."""
    hub = current_hub()
    hub.ident = get_ident()  # a loop may be run by one thread, and later by another
    waker = ctx._waker = Waker(hub)
    ctx._callback = (Waker.wake, waker)
