"""Fibres, their pools, and the switches between them. The only module that knows greenlet.

A fibre is a greenlet that runs one job function after another: a new greenlet maps fresh
memory for its frames, which costs several times as much as the switches of a short job.
Each thread has a pool of them, last in first out.

A fibre knows its way back: `Fibre.way_back`, what a pause calls with what it waits for. Usually
that is the bound ``switch`` of its driver's greenlet, so that a pause is one call and checks
nothing; states in which a pause must not happen put a function of their own there.

The frames of a fibre must not refer to the fibre itself, or one that is dropped could never
die. What its bottom frame shares with the driver is therefore a small object, the `Port`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

from greenlet import (  # type: ignore[attr-defined]
    GREENLET_USE_CONTEXT_VARS,
    GreenletExit,
    getcurrent,
    greenlet,
)

from ._waitctx import WaitCtx

if TYPE_CHECKING:
    from ._job import Job

__all__ = [
    "BOTTOM",
    "CAPABLE",
    "PAUSE",
    "Counts",
    "Fibre",
    "Interval",
    "Pool",
    "Port",
    "all_pools",
    "current_fibre",
    "getcurrent",
    "greenlet",
    "pool_of",
    "pool_of_thread",
    "run_in_own_greenlet",
    "take_idle",
    "total_counts",
]

CAPABLE: Final = bool(GREENLET_USE_CONTEXT_VARS)
"""Whether greenlets can carry what a job needs, their own contextvars among it."""

logger = logging.getLogger("aiojob")

UNLIMITED: Final = 1 << 62

KEPT: Final = 64
"""So many idle fibres are kept for good; each holds about 8 KB."""

UNMERGED: Final = 64
"""The counts of so many ended threads are kept before they are added up."""


PAUSE: Final = object()
"""What `pause_job` sends the driver; anything else that arrives is to be awaited."""


class Interval:
    """A stretch of time in which jobs paused: no clock is read at each pause.

    begin: when it began, by `time.monotonic`.
    end: when it ended, None while it lasts.
    """

    __slots__ = ("begin", "end")

    def __init__(self, begin: float, end: float | None = None) -> None:
        self.begin = begin
        self.end = end


class Counts:
    """What a pool's jobs have done so far. Only the pool's thread writes it.

    Those that are counted on the way of each job are floats, exact up to 2**53: a float comes from
    a list of free ones, whereas each int above 256 is allocated, at twice the cost.
    """

    __slots__ = ("cancelled", "failed", "pauses", "started")

    def __init__(self) -> None:
        self.started = self.pauses = 0.0
        self.failed = self.cancelled = 0

    def add(self, other: Counts) -> None:
        self.started += other.started
        self.failed += other.failed
        self.cancelled += other.cancelled
        self.pauses += other.pauses


class Port:
    """What the bottom frame of a fibre shares with its driver.

    home: where the end of a job goes: the bound ``switch`` of the driver's greenlet.
    running: whether a job runs: its driver has switched to it, and it has not come back.
    first: the first job, when the fibre is to begin. It comes this way as a greenlet keeps the
        arguments of its first switch for as long as it lives.
    func: the function of the job, None while the fibre is idle.
    number: the number of the job, or of the last one; each job of a pool has its own.
    since: when the job paused last.
    value, error: how the job ended, until the driver takes it.
    """

    __slots__ = ("counts", "error", "first", "func", "home", "number", "running", "since", "value")

    home: Callable[..., Any]
    running: bool
    first: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None
    func: Callable[..., Any] | None
    since: Interval | float
    value: Any
    error: BaseException | None

    def __init__(self, home: Callable[..., Any], counts: Counts) -> None:
        self.home = home
        self.counts = counts
        self.running = False
        self.number = 0.0
        self.since = 0.0
        self.first = self.func = self.value = self.error = None


def _serve() -> None:
    """Run the functions that drivers send, one after the other, for as long as the fibre lives."""
    port: Port = getcurrent().port  # type: ignore[attr-defined]
    counts = port.counts
    message, port.first = port.first, None
    assert message is not None
    try:
        while True:
            port.number = counts.started = counts.started + 1.0
            # The names are unbound while the fibre is idle, so that it keeps nothing of a job.
            port.func, args, kwargs = message
            del message
            try:
                port.value = port.func(*args, **kwargs) if kwargs else port.func(*args)
            except BaseException as error:
                # Without this frame, which lives on, the traceback is the job's own.
                traceback = error.__traceback__
                port.error = error.with_traceback(traceback and traceback.tb_next)
                del traceback
            port.func = None
            del args, kwargs
            message = port.home(port)
            while not port.running:  # see _leave_pool
                message = port.home(message)  # not traced
    except GreenletExit:
        raise
    except BaseException:  # not traced
        _leave_pool()
        raise


BOTTOM: Final = _serve.__code__
"""What the outermost frame of every fibre runs."""


class Fibre(greenlet):
    """A pooled greenlet.

    way_back: what a pause calls with what it waits for; see the module's text.
    port: what the fibre's own frame knows.
    pool: the pool of the thread that the fibre belongs to, for good.
    job: the handle of the job on this fibre, made when first asked for; None while a
        hand-driven job is paused, when its driver must hold the only reference.
    handle: a weak reference to the handle of a hand-driven job.
    frees_wait_ctx: whether the wait context of `job` is the job's own.
    attach: how the job's event loop is made ready for a wait context; None where a
        hand-written loop drives the job.
    paused_in: the foreign greenlet inside the job that paused it, to be resumed.
    """

    __slots__ = (
        "__sqlalchemy_greenlet_provider__",
        "attach",
        "frees_wait_ctx",
        "handle",
        "job",
        "paused_in",
        "pool",
        "port",
        "way_back",
    )

    def __init__(self, pool: Pool) -> None:
        greenlet.__init__(self, _serve, pool.home)
        self.port = Port(pool.home_switch, pool.counts)
        self.pool = pool
        self.way_back: Callable[[Any], Any] = pool.home_switch
        self.job: Job | None = None
        self.handle: ref[Job] | None = None
        self.frees_wait_ctx = False
        self.attach: Callable[[WaitCtx], None] | None = None
        self.paused_in: greenlet | None = None
        # SQLAlchemy looks for this on the current greenlet, and if it is true
        # switches to its parent with an awaitable: for the driver to await.
        self.__sqlalchemy_greenlet_provider__ = True

    def warm_up(self) -> Fibre:
        """Begin with a job that does nothing: an idle fibre has begun."""
        port = self.port
        port.first = (int, (), {})
        port.home, home = getcurrent().switch, port.home
        self.switch()
        port.home = home
        port.value = None
        port.counts.started -= 1.0  # it was no job
        return self

    def prepare(self, driver: greenlet, attach: Callable[[WaitCtx], None] | None) -> None:
        """Make an idle fibre ready for a job that `driver`, the current greenlet, begins."""
        if driver is not self.pool.home:
            self.set_home(driver)
        # Once, at the start, and to the driver's own context: setting it again at each
        # resume would break a Context.run() around a pause.
        if driver.gr_context is None:
            copy_context()  # has the thread make a context, for the two to share
        self.gr_context = driver.gr_context
        self.attach = attach

    def set_home(self, home: greenlet) -> None:
        """Make the fibre come back to `home` at its pauses and at its end.

        It is idle or paused: not blocked, then.
        """
        switch = self.pool.home_switch if home is self.pool.home else home.switch
        self.port.home = self.way_back = switch
        self.parent = home


class Waiter(Protocol):
    """Somebody in the queue for a fibre.

    func: the function of the job to come.
    since: when it came, by `time.monotonic`.
    """

    func: Callable[..., Any]
    since: float

    def offer(self, fibre: Fibre) -> bool:
        """Take the fibre, and say so; False if it is not wanted any more."""

    def call_soon_threadsafe(self, action: Callable[[], object]) -> bool:
        """Have the pool's thread call `action`; False if that cannot be any more."""


class Pool:
    """The fibres of one thread.

    `take` and `give` are the list methods ``pop`` and ``append`` of the idle fibres. States
    that need more put methods of this class there, so that the usual job checks nothing.

    home: the greenlet that drivers usually run in: the thread's main greenlet, or the one
        that `run` made for the event loop. Idle fibres always have it as their parent.
    thread: the thread, None where `threading` does not know it.
    take: pops an idle fibre, which has begun; `IndexError` when there is none.
    give: takes a fibre back whose job has ended.
    counts: what the jobs have done so far.
    interval: when jobs pause that pause now; None if that is to be found out at the next pause.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_closing",
        "_fibres",
        "_idle",
        "_inbox",
        "_kept",
        "_main",
        "_reserve",
        "_waiters",
        "counts",
        "give",
        "home",
        "home_switch",
        "ident",
        "interval",
        "max_size",
        "take",
        "thread",
    )

    take: Callable[[], Fibre]
    give: Callable[[Fibre], object]

    def __init__(self) -> None:
        # Not current_thread(), which makes a dummy for a thread that has all but ended.
        ident = self.ident = threading.get_ident()
        self.thread = next((one for one in threading.enumerate() if one.ident == ident), None)
        self.counts = Counts()
        self.interval: Interval | None = None
        self._main = self.home = _main_greenlet()
        self.home_switch: Callable[..., Any] = self.home.switch
        self.max_size = UNLIMITED
        self._fibres: set[Fibre] = set()
        self._idle: list[Fibre] = []
        self._reserve: list[Fibre] = []
        # In their order; a list would take long to find each of many that are cancelled at once.
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()
        self._inbox: deque[Callable[[], object]] = deque()
        self._kept = KEPT
        self._closed = False
        self._closing = threading.RLock()  # the garbage collector may post in the middle of post
        self.take = self._idle.pop
        self.give = self._idle.append

    @property
    def is_here(self) -> bool:
        """Whether this is the pool of the current thread.

        Neither the thread's ident would do, which the next thread may get, nor its local data,
        which is gone while the thread ends.
        """
        return not is_shut_down() and _main_greenlet() is self._main

    @property
    def idle(self) -> int:
        """How many fibres wait for a job."""
        return len(self._idle) + len(self._reserve)

    @property
    def outstanding(self) -> int:
        """How many fibres are on a job."""
        return len(self._fibres) - self.idle

    def on_jobs(self) -> list[Fibre]:
        """Return the fibres whose jobs have begun and not ended. Any thread may call this."""
        return [fibre for fibre in self._fibres.copy() if fibre.port.func is not None]

    def acquire(self) -> Fibre | None:
        """Take a fibre, an idle one or a new one; None when none may be had now."""
        try:
            return self.take()
        except IndexError:
            pass
        if self._reserve:
            return self._reserve.pop()
        if self._waiters or len(self._fibres) >= self.max_size:
            return None
        return self._make()

    def resize(self, max_size: int, init_size: int) -> None:
        """Limit the fibres to `max_size`, and have at least `init_size` of them."""
        self.drop_reserve(len(self._reserve))
        self.max_size = max_size
        self._kept = max(init_size, KEPT)
        self._fibres.difference_update(self._idle[max_size:])
        del self._idle[max_size:]
        while len(self._fibres) < init_size:
            self._idle.append(self._make_idle())

    # -- trimming: what no job has needed for a while is dropped

    @property
    def is_large(self) -> bool:
        """Whether there are more fibres than are kept without need."""
        return len(self._fibres) > self._kept

    def renew_reserve(self) -> None:
        """Set the fibres aside that have been idle longest, all but those to be kept.

        `acquire` takes from them when nothing else is idle; what is still there some time later
        was not needed.
        """
        surplus = max(0, len(self._idle) - self._kept)
        self._reserve.extend(self._idle[:surplus])
        del self._idle[:surplus]

    def drop_reserve(self, limit: int) -> bool:
        """Drop up to `limit` fibres of the reserve; say whether there were any."""
        dropped = self._reserve[:limit]
        self._fibres.difference_update(dropped)
        del self._reserve[:limit]
        return bool(dropped)

    # -- waiting for a fibre, first come first served

    @property
    def waiters(self) -> int:
        """How many wait for a fibre."""
        return len(self._waiters)

    def queue(self) -> list[Waiter]:
        """Return those that wait for a fibre, first come first. Any thread may call this."""
        return list(self._waiters.copy())

    def add_waiter(self, waiter: Waiter) -> None:
        """Have the next free fibre offered to `waiter`."""
        self._waiters[waiter] = None
        self.give = self._give_to_waiter
        if self._inbox:  # posted between the waiter's look at the pool and this call
            self.do_posted()

    def remove_waiter(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)

    def _give_to_waiter(self, fibre: Fibre) -> None:
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if waiter.offer(fibre):
                return
        self.give = self._idle.append
        self._idle.append(fibre)

    def withdraw(self, fibre: Fibre) -> None:
        """Give up an idle fibre."""
        self._fibres.discard(fibre)
        for idle in (self._idle, self._reserve):
            if fibre in idle:
                idle.remove(fibre)

    def forget(self, fibre: Fibre) -> None:
        """Give up a fibre that did not come back from its job; its place is free again."""
        self._fibres.discard(fibre)
        fibre.port.func = None  # to whoever looks, the job has ended
        fibre.port.home = _die
        if self._waiters:
            self.give(self._make_idle())

    # -- work that other threads leave for this one

    def post(self, action: Callable[[], object]) -> None:
        """Have this pool's thread call `action` when it next takes a fibre, or ends.

        If somebody waits for a fibre, then soon. Any thread may call this. After the end of the
        pool's thread, or the interpreter's, nothing happens.
        """
        # Append before anything else: the owner restores `take`, then empties the inbox; and a
        # waiter enters the queue, then looks at the inbox.
        with self._closing:
            if self._closed or is_shut_down():
                return
            self._inbox.append(action)
        self.take = self._take_after_inbox
        for waiter in self._waiters.copy():
            if waiter.call_soon_threadsafe(self.do_posted):
                break

    def do_posted(self) -> None:
        """Do what other threads left for this one."""
        self.take = self._idle.pop
        while True:
            try:
                action = self._inbox.popleft()
            except IndexError:
                return
            try:
                action()
            except BaseException:
                logger.exception("error in a job that was dropped by another thread")

    def _take_after_inbox(self) -> Fibre:
        self.do_posted()
        return self._idle.pop()

    # -- home

    @contextmanager
    def at_home(self, home: greenlet) -> Iterator[None]:
        """Have the thread's drivers run in the greenlet `home` for a while."""
        before = self.home
        self._move(home)
        try:
            yield
        finally:
            self._move(before)

    def _move(self, home: greenlet) -> None:
        self.home = home
        self.home_switch = home.switch
        for fibre in (*self._idle, *self._reserve):
            fibre.set_home(home)

    def _make(self) -> Fibre:
        fibre = Fibre(self)
        self._fibres.add(fibre)
        return fibre

    def _make_idle(self) -> Fibre:
        fibre = Fibre(self).warm_up()
        self._fibres.add(fibre)  # by now it is seen to be on no job
        return fibre

    def close(self) -> None:
        """End the idle fibres: the thread is ending."""
        # Not so for the daemon threads that an exit finds, and for those that a fork did not take
        # over: another thread clears their data, and cannot switch to their fibres.
        if self.is_here:
            self.do_posted()
            with self._closing:
                self._closed = True
            self.do_posted()  # what was posted in between; nothing comes any more
            for fibre in (*self._idle, *self._reserve):
                fibre.throw()  # now: a traceback may hold it for longer than its thread lives
        self._closed = True
        self.counts.cancelled += len(self.on_jobs())  # they are dropped with their thread
        self._fibres.clear()
        self._idle.clear()
        self._reserve.clear()
        self.give = _drop


def _leave_pool() -> None:
    """End the current fibre, idle as it is: a stranger's exception came to it.

    Whoever made a greenlet inside a job made the job's fibre its parent, and what the greenlet
    sends or raises later comes to the fibre, though another job may have it by then or none.
    While the fibre is idle it passes all that on to where drivers are. (SQLAlchemy's bridge does
    this, in an eager task that a job begins.)
    """
    fibre: Fibre = getcurrent()  # type: ignore[assignment]
    fibre.pool.withdraw(fibre)


def _drop(fibre: Fibre) -> None:
    """Take back a fibre whose thread has ended."""


def _die(*_: object) -> None:
    raise GreenletExit


def is_shut_down() -> bool:
    """Whether the interpreter has come so far in its exit that greenlets cannot switch."""
    try:
        getcurrent()
    except RuntimeError:
        return True
    return False


def _main_greenlet() -> greenlet:
    current = getcurrent()
    while current.parent is not None:
        current = current.parent
    return current


class _ThreadEnd:
    """Closes a thread's pool in that thread, when its thread-local data goes away."""

    __slots__ = ("last", "pool", "registry")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        # The module's names may be gone before the main thread's data.
        self.last = _last
        self.registry = _registry
        _registry.add(pool)

    def __del__(self) -> None:
        if self.last.pool is self.pool:
            self.last.pool = None
        self.pool.close()
        self.registry.remove(self.pool)


class _Last:
    """The pool that was used last: found by comparing greenlets, without a thread-local."""

    __slots__ = ("pool",)

    pool: Pool | None


class _Registry:
    """The pools of all threads, and what the jobs of ended threads did."""

    __slots__ = ("_ended", "_lock", "_pools")

    def __init__(self) -> None:
        self._pools: dict[int, ref[Pool]] = {}
        self._ended: deque[Counts] = deque()
        self.unlock()

    def unlock(self) -> None:
        """Have a lock that nobody holds: in a forked process its holder may be missing."""
        self._lock = threading.Lock()

    def add(self, pool: Pool) -> None:
        self._pools[id(pool)] = ref(pool)

    def remove(self, pool: Pool) -> None:
        # Add first, then remove: whoever counts looks at the pools first, then at these, and
        # takes none twice.
        self._ended.append(pool.counts)
        self._pools.pop(id(pool), None)
        # Never wait here: a daemon thread may hold the lock for ever in an exit.
        if len(self._ended) > UNMERGED and self._lock.acquire(blocking=False):
            try:
                self._merge()
            finally:
                self._lock.release()

    def _merge(self) -> None:
        merged = Counts()
        for _ in range(len(self._ended)):
            merged.add(self._ended.popleft())
        self._ended.append(merged)

    def pools(self) -> list[Pool]:
        references = self._pools.copy().values()
        return [pool for reference in references if (pool := reference()) is not None]

    def counts(self) -> Counts:
        with self._lock:
            some = [pool.counts for pool in self.pools()]
            some += self._ended.copy()
            total = Counts()
            for counts in {id(counts): counts for counts in some}.values():
                total.add(counts)
        return total


_last = _Last()
_last.pool = None
_registry = _Registry()
_local = threading.local()

if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_registry.unlock)


def all_pools() -> list[Pool]:
    """Return the pools of all threads."""
    return _registry.pools()


def total_counts() -> Counts:
    """Return what the jobs of all threads have done so far, of ended threads too."""
    return _registry.counts()


def pool_of_thread() -> Pool:
    """Return the pool of the current thread, made when first asked for."""
    try:
        end: _ThreadEnd = _local.end
    except AttributeError:
        end = _local.end = _ThreadEnd(Pool())
    return end.pool


def take_idle(driver: greenlet, attach: Callable[[WaitCtx], None]) -> Fibre | None:
    """Take an idle fibre and prepare it, if `driver` is at home and one is there."""
    pool = _last.pool
    if pool is None or pool.home is not driver:
        return None
    try:
        fibre = pool.take()
    except IndexError:
        return None
    fibre.gr_context = driver.gr_context
    fibre.attach = attach
    return fibre


def pool_of(driver: greenlet) -> Pool:
    """Return the current thread's pool, and let `take_idle` find it for `driver` next time."""
    pool = pool_of_thread()
    if pool.home is driver:
        _last.pool = pool
    return pool


def current_fibre() -> Fibre | None:
    """Return the fibre of the running job that the current greenlet is in, if any.

    This follows the greenlets' parents: a thread-local would be wrong for the greenlets that
    an awaited SQLAlchemy coroutine runs while the job is paused. The parents alone would be
    wrong for a greenlet of a paused job that others switched to.
    """
    current: greenlet | None = getcurrent()
    while current is not None:
        if type(current) is Fibre:
            return current if current.port.running else None
        current = current.parent
    return None


def run_in_own_greenlet(func: Callable[[], Any]) -> Any:
    """Call `func` in a new greenlet that is the home of this thread's drivers meanwhile.

    Between this greenlet and the fibres, switches do not pass the caller's frames, which
    would cost time for each frame from Python 3.12 on.
    """
    pool = pool_of_thread()

    def body() -> Any:
        with pool.at_home(getcurrent()):
            return func()

    own = greenlet(body)
    own.gr_context = getcurrent().gr_context
    return own.switch()
