"""State machines: wait contexts, hand-driven jobs, jobs on a loop, each against a model."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import aiojob
from aiojob import (
    Job,
    JobError,
    JobStatus,
    WaitCtx,
    WaitStatus,
    WrongThreadError,
    _fibre,
    _wakeups,
    await_,
    block_pause,
    can_pause,
    get_current_job,
    get_wait_ctx,
    init_thread,
    pause_job,
    run_job,
    start_job,
    unblock_pause,
)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
T = TypeVar("T")

SETTINGS: Final = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def in_thread(func: Callable[[], T]) -> list[T | BaseException]:
    """Call func in another thread; return what it returned or raised."""
    outcome: list[T | BaseException] = []

    def body() -> None:
        try:
            outcome.append(func())
        except BaseException as error:
            outcome.append(error.with_traceback(None))  # whose frames would keep a job's handle

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return outcome


# -- wait contexts


class Entry:
    """The model of an entry: where it is between two resumes."""

    def __init__(self, key: str, fd: int, data: object) -> None:
        self.key, self.fd, self.data = key, fd, data
        self.is_new, self.is_deleted = True, False


KEYS = st.sampled_from("abc")


class WaitCtxMachine(RuleBasedStateMachine):
    """A wait context that a hand-driven job comes, pauses on, and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.ctx = WaitCtx()
        self.entries: list[Entry] = []  # newest first
        self.cleaned: list[tuple[str, int, object]] = []
        self.freed = False
        self.job: Job | None = None
        self.stop = False

    def live(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.is_deleted]

    def cleanup(self, ctx: WaitCtx, key: str, fd: int, data: object) -> None:
        assert ctx is self.ctx
        self.cleaned.append((key, fd, data))

    def forget_changes(self) -> None:
        self.entries = self.live()
        for entry in self.entries:
            entry.is_new = False

    @rule(key=KEYS, fd=st.integers(0, 5), with_cleanup=st.booleans())
    def set_fd(self, key: str, fd: int, with_cleanup: bool) -> None:
        data = object() if with_cleanup else None
        call = partial(self.ctx.set_wait_fd, key, fd, data, self.cleanup if with_cleanup else None)
        if self.freed:
            with pytest.raises(JobError, match="freed"):
                call()
            return
        call()
        self.entries.insert(0, Entry(key, fd, data))

    @precondition(lambda self: not self.freed)
    @rule(fd=st.sampled_from([-1, 1.5, "7", None, True]))
    def set_bad_fd(self, fd: Any) -> None:
        with pytest.raises(ValueError if fd == -1 else TypeError):
            self.ctx.set_wait_fd("a", fd)

    @rule(key=KEYS)
    def clear_fd(self, key: str) -> None:
        found = [entry for entry in self.live() if entry.key == key]
        if self.freed or not found:
            with pytest.raises(JobError if self.freed else KeyError):
                self.ctx.clear_fd(key)
            return
        self.ctx.clear_fd(key)
        if found[0].is_new:
            self.entries.remove(found[0])
        else:
            found[0].is_deleted = True

    @precondition(lambda self: self.job is None and not self.freed)
    @rule()
    def start(self) -> None:
        self.stop = False
        status, self.job, _ = start_job(None, self.ctx, self.body)
        assert status is JobStatus.PAUSE

    def body(self) -> None:
        while not self.stop:
            before = self.ctx.get_changed_fds()
            pause_job()
            assert self.ctx.get_changed_fds() == ([], [])
            with aiojob.pause_blocked():
                pause_job()
        del before

    @precondition(lambda self: self.job is not None)
    @rule(stop=st.booleans())
    def resume(self, stop: bool) -> None:
        self.stop = stop
        assert self.job is not None
        status, self.job, _ = start_job(self.job, self.ctx)
        assert status is (JobStatus.FINISH if stop else JobStatus.PAUSE)
        self.forget_changes()

    @precondition(lambda self: self.job is not None)
    @rule()
    def drop(self) -> None:
        self.job = None

    @rule()
    def free(self) -> None:
        if self.job is not None:
            with pytest.raises(JobError, match="cannot be freed"):
                self.ctx.free()
            return
        expected = [(e.key, e.fd, e.data) for e in self.live() if e.data is not None]
        self.ctx.free()
        if not self.freed:
            assert self.cleaned == expected
        self.freed = True
        self.entries.clear()

    @rule(status=st.sampled_from(WaitStatus))
    def set_status(self, status: WaitStatus) -> None:
        self.ctx.status = int(status)  # type: ignore[assignment]
        assert self.ctx.status is status

    @invariant()
    def agrees(self) -> None:
        if self.freed:
            for call in (self.ctx.get_all_fds, self.ctx.get_changed_fds, self.ctx.__enter__):
                with pytest.raises(JobError, match="freed"):
                    call()
            return
        live = self.live()
        assert self.ctx.get_all_fds() == [entry.fd for entry in live]
        for key in "abc":
            found = [(entry.fd, entry.data) for entry in live if entry.key == key]
            assert self.ctx.get_fd(key) == (found[0] if found else None)
        added = [entry.fd for entry in live if entry.is_new]
        deleted = [entry.fd for entry in self.entries if entry.is_deleted]
        assert self.ctx.get_changed_fds() == (added, deleted)
        assert self.cleaned == []

    def teardown(self) -> None:
        self.job = None
        self.ctx.free()


def test_wait_ctx_agrees_with_its_model() -> None:
    run_state_machine_as_test(WaitCtxMachine, settings=SETTINGS)


# -- hand-driven jobs

COMMANDS = st.lists(
    st.sampled_from(["pause", "pause", "block", "unblock", "finish", "raise"]), max_size=6
)


class Failed(Exception):  # noqa: N818
    """What a job raises on command."""


class Body:
    """What a job does: the commands that it is given, then it pauses for more."""

    def __init__(self, commands: list[str]) -> None:
        self.commands = deque(commands)
        self.ends: list[str] = []

    def __call__(self) -> str:
        try:
            while True:
                match self.commands.popleft() if self.commands else "pause for more":
                    case "pause":
                        pause_job()
                    case "block":
                        block_pause()
                    case "unblock":
                        unblock_pause()
                    case "finish":
                        self.ends.append("finished")
                        return "finished"
                    case "raise":
                        self.ends.append("raised")
                        raise Failed
                    case _:
                        while not can_pause():
                            unblock_pause()
                        pause_job()
        except GeneratorExit:
            self.ends.append("dropped")
            assert not can_pause()
            raise


class ModelJob:
    """The model of a job: what it will do when it is resumed."""

    def __init__(self, commands: list[str], ctx: WaitCtx | None) -> None:
        self.commands = deque(commands)
        self.body = Body(commands)
        self.ctx = ctx
        self.handle: Job | None = None
        self.blocks = 0

    def give(self, commands: list[str]) -> None:
        self.commands.extend(commands)
        self.body.commands.extend(commands)

    def expected(self) -> str:
        """Go through the commands to the next pause or the end; say which."""
        while self.commands:
            match self.commands.popleft():
                case "pause" if not self.blocks:
                    return "paused"
                case "block":
                    self.blocks += 1
                case "unblock":
                    self.blocks = max(0, self.blocks - 1)
                case "finish":
                    return "finished"
                case "raise":
                    return "raised"
        self.blocks = 0
        return "paused"


class CoreMachine(RuleBasedStateMachine):
    """Several jobs of one thread, interleaved."""

    def __init__(self) -> None:
        super().__init__()
        aiojob.cleanup_thread()
        self.limit = 0
        self.jobs: list[ModelJob] = []
        self.dropped_elsewhere: list[ModelJob] = []

    def outcome(self, job: ModelJob, call: Callable[[], aiojob.StartResult[Any]]) -> str:
        """Start or resume a job; return what came of it, and check what must go with that."""
        try:
            status, handle, ret = call()
        except Failed:
            return "raised"
        if status is JobStatus.PAUSE:
            assert ret is None
            assert handle is not None
            assert job.handle in (None, handle)
            assert handle.status is JobStatus.PAUSE
            job.handle = handle
            return "paused"
        assert (status, handle, ret) == (JobStatus.FINISH, None, "finished")
        return "finished"

    def check(self, job: ModelJob, call: Callable[[], aiojob.StartResult[Any]]) -> None:
        expected = job.expected()
        assert self.outcome(job, call) == expected
        if expected != "paused":
            self.jobs.remove(job)
            assert job.body.ends == [expected]
            self.check_finished(job)

    def check_finished(self, job: ModelJob) -> None:
        if job.handle is not None:
            assert job.handle.status is JobStatus.FINISH
            with pytest.raises(JobError, match="finished"):
                start_job(job.handle, None)
        if job.ctx is not None:
            job.ctx.free()

    def posted_drops_happened(self) -> None:
        for job in self.dropped_elsewhere:
            assert job.body.ends == ["dropped"]
        self.dropped_elsewhere.clear()

    @rule(commands=COMMANDS, own_ctx=st.booleans())
    def start(self, commands: list[str], own_ctx: bool) -> None:
        job = ModelJob(commands, None if own_ctx else WaitCtx())
        if self.limit and len(self.jobs) >= self.limit:
            assert start_job(None, job.ctx, job.body) == (JobStatus.NO_JOBS, None, None)
            assert (job.body.ends, len(job.body.commands)) == ([], len(commands))
        else:
            self.jobs.append(job)
            self.check(job, partial(start_job, None, job.ctx, job.body))
        self.posted_drops_happened()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), commands=COMMANDS)
    def resume(self, data: st.DataObject, commands: list[str]) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        job.give(commands)
        self.check(job, partial(start_job, job.handle, job.ctx))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), inside_another=st.booleans())
    def drop(self, data: st.DataObject, inside_another: bool) -> None:
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        room = not self.limit or len(self.jobs) + 1 < self.limit

        def let_go() -> str:
            outer = get_current_job()
            job.handle = None
            assert get_current_job() is outer
            return "let go"

        if inside_another and room:
            assert start_job(None, None, let_go).ret == "let go"
            self.posted_drops_happened()
        else:
            let_go()
        assert job.body.ends == ["dropped"]
        self.check_finished(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def drop_in_another_thread(self, data: st.DataObject) -> None:
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        in_thread(partial(setattr, job, "handle", None))
        assert job.body.ends == []
        self.dropped_elsewhere.append(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def resume_in_another_thread(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        (error,) = in_thread(partial(start_job, job.handle, job.ctx))
        assert isinstance(error, WrongThreadError)

    @precondition(lambda self: any(job.ctx for job in self.jobs))
    @rule()
    def use_a_context_twice(self) -> None:
        ctx = next(job.ctx for job in self.jobs if job.ctx)
        with pytest.raises(JobError, match="serves another job"):
            start_job(None, ctx, len, "abc")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def start_and_resume_inside_a_job(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))

        def nest() -> None:
            for call in (
                partial(start_job, None, None, len, "abc"),
                partial(start_job, job.handle, None),
            ):
                with pytest.raises(JobError, match="inside a running job"):
                    call()

        if start_job(None, None, nest).status is JobStatus.NO_JOBS:
            assert len(self.jobs) == self.limit
        self.posted_drops_happened()

    @rule(limit=st.integers(0, 3), init_size=st.integers(0, 4))
    def init_thread(self, limit: int, init_size: int) -> None:
        if init_size > limit > 0:
            with pytest.raises(ValueError, match="init_size"):
                init_thread(limit, init_size)
            return
        if self.jobs:
            with pytest.raises(JobError, match="under way"):
                init_thread(limit, init_size)
        else:
            init_thread(limit, init_size)
            self.limit = limit
            assert _fibre.pool_of_thread().idle >= init_size
        self.posted_drops_happened()

    @rule()
    def cleanup_thread(self) -> None:
        if self.jobs:
            with pytest.raises(JobError, match="under way"):
                aiojob.cleanup_thread()
        else:
            aiojob.cleanup_thread()
            self.limit = 0
            assert _fibre.pool_of_thread().idle == 0
        self.posted_drops_happened()

    @invariant()
    def agrees(self) -> None:
        assert get_current_job() is None
        assert not can_pause()
        pool = _fibre.pool_of_thread()
        assert pool.outstanding == len(self.jobs) + len(self.dropped_elsewhere)
        assert not self.limit or pool.outstanding + pool.idle <= self.limit
        for job in self.jobs:
            assert job.body.ends == []
            assert job.handle is not None
            assert job.handle.status is JobStatus.PAUSE

    def teardown(self) -> None:
        for job in self.jobs:
            job.handle = None
            assert job.body.ends == ["dropped"]
        self.jobs.clear()
        aiojob.cleanup_thread()
        self.posted_drops_happened()


def test_hand_driven_jobs_agree_with_their_model() -> None:
    run_state_machine_as_test(CoreMachine, settings=SETTINGS)


# -- jobs on a loop

CLEANUPS = ("none", "pause", "await", "swallow")


class LoopJob:
    """A job that waits in one of several ways, and what is known of it."""

    def __init__(self, kind: str, cleanup: str) -> None:
        self.kind, self.cleanup = kind, cleanup
        self.done = self.cleaning_done = False
        self.begun = self.cancelled = self.is_cleaning = False
        self.ends: list[str] = []
        self.wake: Callable[[], object] | None = None
        self.fds = os.pipe()
        self.gate = self.cleaning_gate = _no_future

    def complete_by(self) -> None:
        """Make the condition true, and wake the job in its own way."""
        self.done = True
        if self.kind == "fd":
            os.write(self.fds[1], b"x")
        elif self.kind == "await":
            self.gate()
        elif self.kind == "callback" and self.wake is not None:
            self.wake()

    def complete_cleaning(self) -> None:
        self.cleaning_done = True
        if self.cleanup == "pause" and self.wake is not None:
            self.wake()
        self.cleaning_gate()

    def __call__(self) -> str:
        self.begun = True
        callback_and_arg = get_wait_ctx().get_callback()
        assert callback_and_arg is not None
        callback, arg = callback_and_arg
        self.wake = partial(callback, arg)
        try:
            self.wait()
        except asyncio.CancelledError:
            self.is_cleaning = True
            self.clean_up()
            if self.cleanup != "swallow":
                raise
        except GeneratorExit:
            self.ends.append("closed")
            raise
        finally:
            self.ends.append("ended")
        return "returned"

    def wait(self) -> None:
        ctx = get_wait_ctx()
        if self.kind == "fd":
            ctx.set_wait_fd(self, self.fds[0])
        try:
            while not self.done:
                match self.kind:
                    case "callback":
                        ctx.status = WaitStatus.OK
                        pause_job()
                    case "fd":
                        ctx.status = WaitStatus.UNSUPPORTED
                        pause_job()
                    case "poll":
                        ctx.status = WaitStatus.EAGAIN
                        pause_job()
                    case "await":
                        future = asyncio.get_running_loop().create_future()
                        self.gate = partial(_set, future)
                        await_(future)
        finally:
            if self.kind == "fd":
                ctx.clear_fd(self)

    def clean_up(self) -> None:
        if self.cleanup == "pause":
            get_wait_ctx().status = WaitStatus.OK
            while not self.cleaning_done:
                pause_job()
        elif self.cleanup == "await":
            future = asyncio.get_running_loop().create_future()
            self.cleaning_gate = partial(_set, future)
            if not self.cleaning_done:
                await_(future)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def _no_future() -> None:
    """Where nothing is awaited."""


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LoopMachine(RuleBasedStateMachine):
    """Several jobs on one loop, with a limit: woken, cancelled, waiting for a fibre."""

    jobs = Bundle("jobs")

    def __init__(self, loop_factory: LoopFactory) -> None:
        super().__init__()
        aiojob.cleanup_thread()
        self.loop = loop_factory()
        self.loop.set_debug(False)  # it warns of slow steps
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.tasks: dict[LoopJob, asyncio.Task[str]] = {}
        self.limit = 0

    def settle(self) -> None:
        """Let the loop turn until all that can happen at once has happened."""

        async def iterations() -> None:
            for _ in range(15):
                await asyncio.sleep(0)

        self.loop.run_until_complete(iterations())

    @initialize(limit=st.integers(0, 2))
    def limit_jobs(self, limit: int) -> None:
        init_thread(limit)
        self.limit = limit

    @rule(
        target=jobs,
        kind=st.sampled_from(["callback", "fd", "poll", "await"]),
        cleanup=st.sampled_from(CLEANUPS),
    )
    def start(self, kind: str, cleanup: str) -> LoopJob:
        job = LoopJob(kind, cleanup)
        self.tasks[job] = self.loop.create_task(run_job(job))
        self.settle()
        return job

    @rule(
        target=jobs,
        kinds=st.lists(st.sampled_from(["callback", "await"]), min_size=2, max_size=3),
    )
    def start_together(self, kinds: list[str]) -> Any:
        started = [LoopJob(kind, "none") for kind in kinds]
        for job in started:
            self.tasks[job] = self.loop.create_task(run_job(job))
        self.settle()
        return multiple(*started)

    @rule(job=jobs, from_thread=st.booleans())
    def wake_too_early_or_late(self, job: LoopJob, from_thread: bool) -> None:
        if job.wake is None:
            return
        if from_thread:
            assert in_thread(job.wake) == [None]
        else:
            job.wake()
        self.settle()

    @rule(job=jobs, times=st.integers(1, 3))
    def complete(self, job: LoopJob, times: int) -> None:
        if not job.begun or job.ends:
            return
        if job.kind in {"callback", "fd"}:
            for _ in range(times):
                in_thread(job.complete_by)
        else:
            job.complete_by()
        self.settle()
        if not job.cancelled:
            assert job.ends == ["ended"]
            assert self.tasks[job].result() == "returned"

    @rule(job=jobs, complete_too=st.sampled_from(["no", "before", "after"]))
    def cancel(self, job: LoopJob, complete_too: str) -> None:
        if self.tasks[job].done():
            return
        if complete_too == "before" and job.begun:
            job.complete_by()
        self.tasks[job].cancel()
        job.cancelled = True
        if complete_too == "after" and job.begun:
            job.complete_by()
        self.settle()
        if not job.begun:
            assert self.tasks[job].cancelled()

    @rule(job=jobs, from_thread=st.booleans())
    def end_cleaning(self, job: LoopJob, from_thread: bool) -> None:
        if not job.is_cleaning or job.ends:
            return
        if from_thread and job.cleanup == "pause":
            in_thread(job.complete_cleaning)
        else:
            job.complete_cleaning()
        self.settle()
        assert job.ends == ["ended"]

    @rule(job=jobs)
    def let_go_of_two_at_once(self, job: LoopJob) -> None:
        """Wake all that wait for a callback, in one go, from another thread."""

        def wake_all() -> None:
            for other in self.tasks:
                if other.kind == "callback" and other.begun and not other.ends:
                    other.complete_by()

        in_thread(wake_all)
        self.settle()

    @invariant()
    def agrees(self) -> None:
        assert self.complaints == []
        pool = _fibre.pool_of_thread()
        running = [job for job in self.tasks if job.begun and not job.ends]
        waiting = [job for job in self.tasks if not job.begun and not self.tasks[job].done()]
        assert pool.outstanding == len(running)
        assert pool.waiters == len(waiting)
        if self.limit:
            assert len(running) <= self.limit
            assert not waiting or len(running) == self.limit
        else:
            assert waiting == []
        self.served_in_order()
        for job, task in self.tasks.items():
            assert job.ends in ([], ["ended"])
            assert task.done() == (bool(job.ends) or (job.cancelled and not job.begun))

    def served_in_order(self) -> None:
        """Those that have begun came before those that wait still."""
        begun = [job.begun for job in self.tasks if job.begun or not self.tasks[job].done()]
        assert begun == sorted(begun, reverse=True)

    def teardown(self) -> None:
        try:
            self.end_all()
            pool = _fibre.pool_of_thread()
            assert (pool.outstanding, pool.waiters) == (0, 0)
            for job in self.tasks:
                assert not self.loop.remove_reader(job.fds[0])
        finally:
            self.loop.close()
            for job in self.tasks:
                job.close()
        for job in self.tasks:
            if job.wake is not None:
                job.wake()
                assert in_thread(job.wake) == [None]
        assert self.complaints == []
        aiojob.cleanup_thread()

    def end_all(self) -> None:
        for job, task in self.tasks.items():
            job.cleaning_done = True
            if not task.done():
                task.cancel()
                job.cancelled = True
                if job.is_cleaning:
                    job.complete_cleaning()
        self.settle()
        if self.tasks:
            self.loop.run_until_complete(asyncio.wait(list(self.tasks.values())))
        for job, task in self.tasks.items():
            assert job.ends == (["ended"] if job.begun else [])
            assert task.cancelled() or task.result() == "returned"


def test_jobs_on_a_loop_agree_with_their_model(
    loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Polled in each iteration: a timer could end a job between the last one and the checks.
    monkeypatch.setattr(_wakeups, "POLLS_AT_ONCE", 1 << 60)

    class Machine(LoopMachine):
        def __init__(self) -> None:
            super().__init__(loop_factory)

    run_state_machine_as_test(Machine, settings=SETTINGS)
