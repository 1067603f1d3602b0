"""The scheme of the worker threads, in every interleaving of a few preemptions.

The real code runs here, with greenlets for threads. Before each step on what threads share, the
running one can be preempted; a schedule says where, and in whose favour. Schedules are tried
one after the other until there are no more, and at the end of each, nothing may be left undone
that only the end of somebody's idle time would get done.

That this finds what it is for is tested too: with any two steps swapped whose order the text of
`aiojob.engines._workers` gives, some schedule fails.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from aiojob.engines import _workers

PREEMPTIONS = 2
STEPS = 1000
"""A run that takes so many goes on for ever."""


class SchemeError(AssertionError):
    """A schedule by which the scheme fails."""


class Known(BaseException):
    """The run has come to a state in which an earlier one was: from here on all has been tried."""


class Thread:
    """A greenlet that stands for a thread."""

    def __init__(self, run: Run, func: Callable[..., object], *args: Any) -> None:
        self._run = run
        self._greenlet = greenlet(lambda: func(*args), run.scheduler)
        self._waits_for: Callable[[], bool] | None = None
        self.can_time_out = False
        self.seen = 0
        """A digest of what its steps brought so far: all that it goes by."""

    @property
    def can_run(self) -> bool:
        return not self._greenlet.dead and (self._waits_for is None or self._waits_for())

    def switch(self) -> None:
        self._run.running = self
        self._greenlet.switch()

    def block_until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            self._waits_for = condition
            self._run.scheduler.switch()
            self._waits_for = None

    def end(self) -> None:
        self._greenlet.throw()


class Run:
    """One run of a scenario, by a schedule: which option is taken at each choice."""

    def __init__(self, schedule: list[tuple[int, int]], known: set[int]) -> None:
        self.scheduler = getcurrent()
        self.shared: Callable[[], tuple[Any, ...]]
        """Returns what the threads share."""
        self._known = known
        self.threads: list[Thread] = []
        self.running = Thread(self, bool)  # who sets the scene
        self.choices = schedule
        """What was taken, and of how many options; the first ones are given."""
        self._made = self._preemptions = self._timeouts = self._steps = 0

    def start(self, func: Callable[..., object], *args: Any) -> None:
        self.threads.append(Thread(self, func, *args))

    def go_on(self, preemptions: int = 0, timeouts: int = 0) -> None:
        """Run the threads until all of them wait."""
        self._preemptions, self._timeouts = preemptions, timeouts
        while any(thread.can_run for thread in self.threads):
            options = self._options()
            taken = self._choose(len(options)) if preemptions and len(options) > 1 else 0
            options[taken].switch()

    def _options(self) -> list[Thread]:
        return [
            thread
            for thread in self.threads
            if thread.can_run or (thread.can_time_out and self._timeouts)
        ]

    def _choose(self, options: int) -> int:
        if self._made == len(self.choices):
            self._check_known()
            self.choices.append((0, options))
        self._made += 1
        return self.choices[self._made - 1][0]

    def _check_known(self) -> None:
        threads = tuple(thread.seen for thread in self.threads)
        at = self.threads.index(self.running), self._preemptions, self._timeouts
        state = hash((threads, at, self.shared()))
        if state in self._known:
            self._preemptions = 0
            raise Known
        self._known.add(state)

    def step(self) -> None:
        """Come before each step on what threads share: here others may go first."""
        self._steps += 1
        self.seen(None)
        if self._steps > STEPS:
            raise SchemeError("it goes on for ever")
        if not self._preemptions:
            return
        if self._made < len(self.choices) and not self.choices[self._made][0]:
            self._made += 1
            return
        others = [thread for thread in self._options() if thread is not self.running]
        if taken := self._choose(1 + len(others)):
            self._preemptions -= 1
            others[taken - 1].switch()

    def seen(self, what: Any) -> Any:
        """Take note of what a step brought to its thread."""
        thread = self.running
        thread.seen = hash((thread.seen, what))
        return what

    def wait(self, woken: Callable[[], bool]) -> bool:
        """Block the running thread until it is woken, or the schedule has its time end."""
        self.step()
        thread = self.running
        thread.can_time_out = True
        thread.block_until(woken)
        thread.can_time_out = False
        self._timeouts -= not woken()
        return bool(self.seen(woken()))

    def end(self) -> None:
        self._preemptions = 0
        for thread in self.threads:
            thread.end()


# -- what the threads share, made of steps


class Calls(deque[Any]):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._step = run.step
        self._seen = run.seen

    def __len__(self) -> int:
        self._step()
        return int(self._seen(super().__len__()))

    def append(self, item: Any) -> None:
        self._step()
        super().append(item)

    def popleft(self) -> Any:
        self._step()
        return self._seen(super().popleft())


class Idle(list[Any]):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._step = run.step
        self._seen = run.seen

    def __len__(self) -> int:
        self._step()
        return int(self._seen(super().__len__()))

    def __iter__(self) -> Iterator[Any]:
        self._step()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._step()
        return self._seen(super().__getitem__(index))

    def append(self, item: Any) -> None:
        self._step()
        super().append(item)

    def remove(self, item: Any) -> None:
        self._step()
        super().remove(item)


class Unfinished(set[Any]):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._step = run.step
        self._seen = run.seen

    def __len__(self) -> int:
        self._step()
        return int(self._seen(super().__len__()))

    def add(self, item: Any) -> None:
        self._step()
        super().add(item)

    def remove(self, item: Any) -> None:
        self._step()
        super().remove(item)


class Lock:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_free = True

    def __enter__(self) -> None:
        self._run.step()
        self._run.running.block_until(lambda: self._is_free)
        self._is_free = False

    def __exit__(self, *_: object) -> None:
        self._run.step()
        self._is_free = True


def stepping(name: str) -> Any:
    """Return an attribute; reading and writing it is a step each."""

    def read(self: Any) -> Any:
        self.run_.step()
        return self.run_.seen(getattr(self, name))

    def write(self: Any, value: Any) -> None:
        self.run_.step()
        setattr(self, name, value)

    return property(read, write)


class Worker:
    """In place of the thread."""

    is_resting = stepping("is_resting_")

    def __init__(self, workers: Any) -> None:
        self.run_: Run = workers.run_
        self.number = len(self.run_.threads)
        self._workers = workers
        self._is_woken = False
        self.is_resting_ = False

    def __hash__(self) -> int:
        return self.number

    def start(self) -> None:
        self.run_.start(self._workers.serve, self)

    def wake(self) -> None:
        self.run_.step()
        self._is_woken = True

    def wait(self, block: bool, seconds: float) -> bool:
        woken = self.run_.wait(lambda: self._is_woken)
        self._is_woken = False
        return woken


def stepping_workers(module: ModuleType, limit_changes: bool) -> type[Any]:
    """Return the real `Workers`, with all that threads share and change made of steps."""

    class SteppingWorkers(module.Workers):  # type: ignore[misc, name-defined]
        if limit_changes:
            limit = stepping("limit_")
        _waking = stepping("waking_")
        _workers = stepping("workers_")

        def __init__(self, run: Run, limit: int) -> None:
            self.run_ = run
            super().__init__(0, limit)
            self.limit_ = limit
            self._calls = Calls(run)
            self._idle = Idle(run)
            self._unfinished = Unfinished(run)
            self._changing = Lock(run)

    module.Worker = Worker  # type: ignore[attr-defined]
    return SteppingWorkers


# -- scenarios


class Meeting:
    """A call that ends when so many run at the same time: they need a worker each."""

    def __init__(self, scene: Scene, parties: int) -> None:
        self._scene = scene
        self._parties = parties
        self._digest = scene.run.running.seen
        self.runs = 0

    def __hash__(self) -> int:
        return self._digest

    def run(self, ended: Callable[[Any], object]) -> None:
        self.runs += 1
        self._scene.met += 1
        run = self._scene.run
        run.running.block_until(lambda: self._scene.met >= self._parties)
        ended(self)


class Scene:
    """The workers and calls of one run."""

    def __init__(self, workers: Any, run: Run) -> None:
        self.run = run
        self.met = 0
        self.calls: list[Meeting] = []
        self.workers = workers
        run.shared = self.shared

    def warm_up(self, number: int) -> None:
        """Have so many workers started, and idle."""
        self.run.start(self.submit, *[number] * number)
        self.run.go_on()
        self.met = 0

    def submit(self, *parties: int) -> None:
        """Submit calls; for each is said how many have to meet."""
        for number in parties:
            call = Meeting(self, number)
            self.calls.append(call)
            self.workers.submit(call)

    def shared(self) -> tuple[Any, ...]:
        workers = self.workers
        return (
            tuple(deque.__iter__(workers._calls)),
            tuple(list.__iter__(workers._idle)),
            frozenset(workers._unfinished),
            workers.waking_,
            workers.limit_,
            workers.workers_,
            tuple((worker.is_resting_, worker._is_woken) for worker in workers.workers_),
            workers._changing._is_free,
            self.met,
        )

    def check(self) -> None:
        """All is done that can be, while nobody's idle time ends."""
        workers = self.workers
        if any(call.runs != 1 for call in self.calls) or workers._unfinished:
            raise SchemeError("a call was not run, or not once")
        if len(workers.workers_) > workers.limit_:
            raise SchemeError("a worker too many is left")
        if workers.waking_:
            raise SchemeError("a wake-up stays under way")
        if {*workers._idle} != {*workers.workers_}:
            raise SchemeError("a worker is idle and not there, or the other way round")


@dataclass(frozen=True)
class Scenario:
    """What threads do at a time, each by a method of `Scene` or of `Workers`."""

    limit: int
    warm: int
    submits: tuple[tuple[int, ...], ...]
    """For each thread the calls that it submits: how many have to meet."""
    resize: int | None = None
    timeouts: int = 0

    def set_up(self, workers: type[Any], run: Run) -> Scene:
        scene = Scene(workers(run, self.limit), run)
        scene.warm_up(self.warm)
        for parties in self.submits:
            run.start(scene.submit, *parties)
        if self.resize is not None:
            run.start(scene.workers.resize, self.resize)
        return scene


SCENARIOS = {
    "two submits, no worker": Scenario(2, 0, ((2,), (2,))),
    "two submits in turn, two idle workers": Scenario(2, 2, ((2, 2),)),
    "two submits, two idle workers": Scenario(2, 2, ((2,), (2,))),
    "two submits, one idle worker": Scenario(2, 1, ((2,), (2,))),
    "a submit, an idle time that ends": Scenario(1, 1, ((1,),), timeouts=1),
    "two submits, an idle time that ends": Scenario(2, 2, ((2, 2),), timeouts=1),
    "two submits, a limit that is lowered": Scenario(2, 0, ((1, 1),), resize=1),
    "two submits, a limit that is raised": Scenario(1, 0, ((2, 2),), resize=2),
}


def explore(module: ModuleType, scenario: Scenario) -> int:
    """Run a scenario by each schedule; return how many there are."""
    workers = stepping_workers(module, scenario.resize is not None)
    schedule: list[tuple[int, int]] = []
    known: set[int] = set()
    runs = 0
    while True:
        run = Run(schedule, known)
        try:
            scene = scenario.set_up(workers, run)
            run.go_on(PREEMPTIONS, scenario.timeouts)
            scene.check()
        except Known:
            pass
        finally:
            run.end()
        runs += 1
        while schedule and schedule[-1][0] + 1 == schedule[-1][1]:
            schedule.pop()
        if not schedule:
            return runs
        taken, options = schedule[-1]
        schedule[-1] = (taken + 1, options)


@pytest.fixture(autouse=True)
def _real_workers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workers, "Worker", _workers.Worker)


@pytest.fixture(autouse=True)
def _without_coverage() -> Iterator[None]:
    """The same lines a hundred thousand times: traced, that takes five times as long."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_no_schedule_makes_the_scheme_fail(scenario: Scenario) -> None:
    assert explore(_workers, scenario) > 100


class Swap:
    """Steps in another order than the text of `aiojob.engines._workers` says."""

    def __init__(self, scenario: str, *texts: str) -> None:
        self.scenario = SCENARIOS[scenario]
        """Where it shows."""
        self._texts = zip(texts[::2], texts[1::2], strict=True)

    def module(self) -> ModuleType:
        source = inspect.getsource(_workers)
        for right, wrong in self._texts:
            assert source.count(right) == 1
            source = source.replace(right, wrong)
        swapped = ModuleType("swapped")
        exec(source, swapped.__dict__)
        return swapped


SWAPS = {
    "a submit compares, then adds its call to the unfinished ones": Swap(
        "a submit, an idle time that ends",
        """\
        self._unfinished.add(call)
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
        if len(self._workers) < self.limit and len(self._workers) < len(self._unfinished):
""",
        """\
        lacks = len(self._workers) < min(self.limit, len(self._unfinished) + 1)
        self._unfinished.add(call)
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
        if lacks:
""",
    ),
    "a submit looks for idle workers, then appends its call": Swap(
        "two submits in turn, two idle workers",
        """\
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
""",
        """\
        has_idle = self._idle and not self._waking
        self._calls.append(call)
        if has_idle:
            self._wake_one()
""",
    ),
    "a worker looks for calls, then enters the idle ones": Swap(
        "two submits, two idle workers",
        """\
        self._idle.append(worker)
        is_needed = (
            self._calls or""",
        """\
        has_calls = bool(self._calls)
        self._idle.append(worker)
        is_needed = (
            has_calls or""",
    ),
    "a submit counts the workers, then appends its call": Swap(
        "a submit, an idle time that ends",
        """\
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
        if len(self._workers) < self.limit and len(self._workers) < len(self._unfinished):
""",
        """\
        lacks = len(self._workers) < min(self.limit, len(self._unfinished))
        self._calls.append(call)
        if self._idle and not self._waking:
            self._wake_one()
        if lacks:
""",
    ),
    "a worker that ends looks for calls, then leaves the number": Swap(
        "a submit, an idle time that ends",
        """\
            self._workers = tuple(other for other in self._workers if other is not worker)
            if not self._calls or""",
        """\
            has_calls = bool(self._calls)
            self._workers = tuple(other for other in self._workers if other is not worker)
            if not has_calls or""",
    ),
    "a resize wakes the idle workers, then sets the limit": Swap(
        "two submits, a limit that is lowered",
        """\
        self.limit = limit
        self._wake_all()
""",
        """\
        self._wake_all()
        self.limit = limit
""",
    ),
    "a worker looks at the limit, then enters the idle ones": Swap(
        "two submits, a limit that is lowered",
        """\
        self._idle.append(worker)
        is_needed = (
            self._calls or len(self._workers) > self.limit or""",
        """\
        has_surplus = len(self._workers) > self.limit
        self._idle.append(worker)
        is_needed = (
            self._calls or has_surplus or""",
    ),
    "a worker clears the mark, then leaves the idle ones": Swap(
        "two submits in turn, two idle workers",
        """\
        self._idle.remove(worker)
        worker.is_resting = False
        self._waking = False
""",
        """\
        worker.is_resting = False
        self._waking = False
        self._idle.remove(worker)
""",
    ),
    "a worker clears the mark, then rests no more": Swap(
        "two submits, two idle workers",
        """\
        worker.is_resting = False
        self._waking = False
""",
        """\
        self._waking = False
        worker.is_resting = False
""",
    ),
    "a worker takes a call and wakes another worker, then clears the mark": Swap(
        "two submits in turn, two idle workers",
        """\
                self._wake_one()
            call.run(ended)
""",
        """\
                self._wake_one()
            self._waking = False
            call.run(ended)
""",
        """\
        worker.is_resting = False
        self._waking = False
""",
        """\
        worker.is_resting = False
        if not self._calls:
            self._waking = False
""",
    ),
    "a worker runs its call, then wakes another worker": Swap(
        "two submits in turn, two idle workers",
        """\
            if calls and idle and not self._waking:
                self._wake_one()
            call.run(ended)
""",
        """\
            call.run(ended)
            if calls and idle and not self._waking:
                self._wake_one()
""",
    ),
    "who starts a worker looks at the limit, then counts it": Swap(
        "two submits, a limit that is lowered",
        """\
        self._workers = (*self._workers, worker)
        if len(self._workers) > self.limit:
            self._wake_all()
""",
        """\
        if len(self._workers) > self.limit:
            self._wake_all()
        self._workers = (*self._workers, worker)
""",
    ),
    "who wakes a worker does so, then sets the mark": Swap(
        "two submits in turn, two idle workers",
        """\
            self._waking = True
            worker.wake()
""",
        """\
            worker.wake()
            self._waking = True
""",
    ),
    "who wakes a worker looks whether it rests, then sets the mark": Swap(
        "two submits in turn, two idle workers",
        """\
            self._waking = True
            worker.wake()
            if worker.is_resting:
                return
""",
        """\
            worker.wake()
            if worker.is_resting:
                self._waking = True
                return
""",
    ),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_some_schedule_makes_a_swap_of_steps_fail(swap: Swap) -> None:
    with pytest.raises(SchemeError):
        explore(swap.module(), swap.scenario)
