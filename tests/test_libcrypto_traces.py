"""The core against libcrypto itself: the same operations must have the same results.

A scenario is a list of lines, ``<script> <operation> <numbers>``: what the driver does (script
``main``) and what the function of each job does (``job0``, ...). `libcrypto/driver.c` carries it
out on libcrypto, `Interpreter` on aiojob; each returns a trace: every operation, in the order in
which they ended, with its result. The first scenario whose traces differ is shrunk and shown.

An operation that the state forbids is ``skipped`` on both sides, so that every list of lines is
a scenario and any line of it can be left out. Scenarios avoid what is undefined in C:

- contexts: anything on one that was freed, free while a job is on it, two jobs on one, a job
  without one, anything on it in its own cleanups;
- jobs: to resume one that has finished, or on another thread; to look into its handle then.

They also avoid where aiojob differs on purpose (see the notes below the reference's table):

- pause blocks count per job, in libcrypto per thread: each job undoes what it left blocked;
- start and resume inside a job raise `JobError`: only ``main`` does them;
- ``init_thread(0, n)``, refused by libcrypto, is allowed: never generated;
- ``init_thread`` and ``cleanup_thread`` with jobs under way raise `JobError`: skipped then;
- negative fds and unknown statuses raise, libcrypto takes anything: never generated.

An unblock too many is not avoided: both ignore it.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, takewhile, zip_longest
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import pytest
from support import unavailable

import aiojob

Scenario: TypeAlias = list[str]
Trace: TypeAlias = list[str]
Run: TypeAlias = Callable[[Scenario], Trace]

SCENARIOS: Final = int(os.environ.get("AIOJOB_TRACE_SCENARIOS", "500"))
SOURCE: Final = Path(__file__).with_name("libcrypto") / "driver.c"

# -- scenarios

JOBS: Final = 4
CONTEXTS: Final = 3

LIMITS: Final = {
    "job": JOBS,
    "ctx": CONTEXTS,
    "key": 4,  # key 0 is NULL, or None
    "fd": 10,
    "data": 4,
    "cleanup": 2,
    "callback": 3,
    "status": 4,
    "ret": 10,
    "max": 4,
    "init": 4,
}
"""Below what limit the numbers in an operation are."""

OPERATIONS: Final = {
    "new": "ctx",
    "free": "ctx",
    "set": "ctx key fd data cleanup",
    "get": "ctx key",
    "all": "ctx",
    "changed": "ctx",
    "clear": "ctx key",
    "set_callback": "ctx callback data",
    "callback": "ctx",
    "set_status": "ctx status",
    "status": "ctx",
    "start": "job ctx ret",
    "resume": "job ctx",
    "finish": "job",
    "pause": "",
    "block": "",
    "unblock": "",
    "current": "",
    "wait_ctx": "job",
    "capable": "",
    "init": "max init",
    "cleanup": "",
}

ANYWHERE: Final = {
    "new": 3,
    "free": 1,
    "set": 14,
    "get": 4,
    "all": 4,
    "changed": 8,
    "clear": 12,
    "set_callback": 3,
    "callback": 3,
    "set_status": 3,
    "status": 3,
    "pause": 1,
    "block": 1,
    "unblock": 1,
    "current": 2,
    "wait_ctx": 2,
    "capable": 1,
}
IN_JOB: Final = ANYWHERE | {"pause": 24, "block": 8, "unblock": 9}
IN_MAIN: Final = ANYWHERE | {"start": 24, "resume": 30, "finish": 3, "init": 2, "cleanup": 1}

PROLOGUE: Final = [f"main new {ctx}" for ctx in range(CONTEXTS)]
EPILOGUE: Final = [
    *(f"main finish {job}" for job in range(JOBS)),
    *(f"main {operation} {ctx}" for ctx in range(CONTEXTS) for operation in ("changed", "free")),
    "main cleanup",
    "main current",
]


class Generator:
    """Makes the scenario of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # The smaller they are, the more operations meet on one job, context or key.
        self.limits = {what: self.random.randint(1, limit) for what, limit in LIMITS.items()}

    def scenario(self) -> Scenario:
        first = self.script("main", {"init": 1}, self.random.randrange(2))
        main = self.script("main", IN_MAIN, self.random.randrange(5, 60))
        jobs = [self.script(f"job{job}", IN_JOB, self.random.randrange(20)) for job in range(JOBS)]
        return list(chain(first, main, *jobs))

    def script(self, name: str, weights: dict[str, int], length: int) -> Scenario:
        operations = self.random.choices(list(weights), list(weights.values()), k=length)
        return [f"{name} {self.with_numbers(operation)}" for operation in operations]

    def with_numbers(self, operation: str) -> str:
        numbers = [self.random.randrange(self.limits[of]) for of in OPERATIONS[operation].split()]
        if operation == "init" and numbers[0] == 0:
            numbers[1] = 0
        return " ".join(map(str, (operation, *numbers)))


def random_scenario(seed: int) -> Scenario:
    return Generator(seed).scenario()


# -- on aiojob


class Skip(Exception):  # noqa: N818
    """The state forbids the operation."""


class Interpreter:
    """Carries a scenario out on aiojob, as driver.c does on libcrypto."""

    def __init__(self, scenario: Scenario) -> None:
        self.trace: Trace = []
        self.scripts: defaultdict[str, Scenario] = defaultdict(list)
        for line in scenario:
            self.scripts[line.split()[0]].append(line)
        self.contexts: dict[int, aiojob.WaitCtx] = {}
        self.under_way: dict[int, aiojob.WaitCtx] = {}
        self.handles: dict[int, aiojob.Job | None] = {}
        self.blocks: Counter[int | None] = Counter()

    def perform(self, script: str) -> None:
        for line in self.scripts[script]:
            _, name, *numbers = line.split()
            try:
                result = getattr(self, f"do_{name}")(*map(int, numbers))
            except Skip:
                result = "skipped"
            self.trace.append(f"{line} -> {result}".rstrip())

    def label(self, labelled: aiojob.Job | aiojob.WaitCtx | None) -> str:
        if labelled is None:
            return "null"
        name, known = (
            ("job", self.handles) if isinstance(labelled, aiojob.Job) else ("ctx", self.contexts)
        )
        for number, value in known.items():
            if value is labelled:
                return f"{name}{number}"
        return f"unknown {name}"

    # -- wait contexts

    def context(self, number: int) -> aiojob.WaitCtx:
        if number not in self.contexts:
            raise Skip
        return self.contexts[number]

    def idle_context(self, number: int) -> aiojob.WaitCtx:
        ctx = self.context(number)
        if ctx in self.under_way.values():
            raise Skip
        return ctx

    def clean_up(self, ctx: aiojob.WaitCtx, key: str | None, fd: int, data: int | None) -> None:
        self.trace.append(f"cleanup {self.label(ctx)} {key or 0} {fd} {data or 0}")

    def call_back_1(self, arg: int) -> None:
        self.trace.append(f"callback 1 {arg}")

    def call_back_2(self, arg: int) -> None:
        self.trace.append(f"callback 2 {arg}")

    def do_new(self, ctx: int) -> int:
        if ctx in self.contexts:
            raise Skip
        self.contexts[ctx] = aiojob.WaitCtx()
        return 1

    def do_free(self, ctx: int) -> str:
        self.idle_context(ctx).free()
        del self.contexts[ctx]
        return "freed"

    def do_set(self, ctx: int, key: int, fd: int, data: int, with_cleanup: int) -> int:
        cleanup = self.clean_up if with_cleanup else None
        self.context(ctx).set_wait_fd(key_of(key), fd, data or None, cleanup)
        return 1

    def do_get(self, ctx: int, key: int) -> str:
        found = self.context(ctx).get_fd(key_of(key))
        return "none" if found is None else f"{found[0]} {found[1] or 0}"

    def do_all(self, ctx: int) -> str:
        return fds("fds", self.context(ctx).get_all_fds())

    def do_changed(self, ctx: int) -> str:
        added, deleted = self.context(ctx).get_changed_fds()
        return f"{fds('added', added)} {fds('deleted', deleted)}"

    def do_clear(self, ctx: int, key: int) -> int:
        try:
            self.context(ctx).clear_fd(key_of(key))
        except KeyError:
            return 0
        return 1

    def do_set_callback(self, ctx: int, callback: int, arg: int) -> int:
        callbacks = (None, self.call_back_1, self.call_back_2)
        self.context(ctx).set_callback(callbacks[callback], arg)
        return 1

    def do_callback(self, ctx: int) -> str:
        found = self.context(ctx).get_callback()
        if found is None:
            return "none"
        callback, arg = found
        callback(arg)
        return "called"

    def do_set_status(self, ctx: int, status: int) -> int:
        self.context(ctx).status = aiojob.WaitStatus(status)
        return 1

    def do_status(self, ctx: int) -> int:
        return self.context(ctx).status.value

    # -- jobs

    def body(self, job: int, ret: int) -> int:
        self.handles[job] = aiojob.get_current_job()
        self.blocks[job] = 0
        self.perform(f"job{job}")
        for _ in range(self.blocks[job]):
            aiojob.unblock_pause()
        return ret

    def running(self) -> int | None:
        current = aiojob.get_current_job()
        return next((job for job, handle in self.handles.items() if handle is current), None)

    def outcome(self, job: int, result: aiojob.StartResult[int]) -> str:
        if result.status is aiojob.JobStatus.PAUSE:
            return f"PAUSE {self.label(result.job)}"
        assert result.job is None
        self.handles.pop(job, None)
        del self.under_way[job]
        finished = result.status is aiojob.JobStatus.FINISH
        return f"FINISH {result.ret}" if finished else result.status.name

    def advance(self, job: int, wait_ctx: aiojob.WaitCtx | None) -> str:
        if job not in self.under_way:
            raise Skip
        handle = self.handles[job]
        assert handle is not None
        return self.outcome(job, aiojob.start_job(handle, wait_ctx))

    def do_start(self, job: int, ctx: int, ret: int) -> str:
        wait_ctx = self.idle_context(ctx)
        if job in self.under_way:
            raise Skip
        self.under_way[job] = wait_ctx
        return self.outcome(job, aiojob.start_job(None, wait_ctx, self.body, job, ret))

    def do_resume(self, job: int, ctx: int) -> str:
        return self.advance(job, self.contexts.get(ctx))

    def do_finish(self, job: int) -> str:
        resumes = 1
        while (outcome := self.advance(job, None)).startswith("PAUSE"):
            resumes += 1
        return f"{outcome} after {resumes}"

    def do_pause(self) -> int:
        aiojob.pause_job()
        return 1

    def do_block(self) -> str:
        self.blocks[self.running()] += 1
        aiojob.block_pause()
        return ""

    def do_unblock(self) -> str:
        if self.blocks[job := self.running()]:
            self.blocks[job] -= 1
        aiojob.unblock_pause()
        return ""

    def do_current(self) -> str:
        return self.label(aiojob.get_current_job())

    def do_wait_ctx(self, job: int) -> str:
        if job not in self.under_way:
            raise Skip
        return self.label(aiojob.get_wait_ctx(self.handles[job]))

    def do_capable(self) -> int:
        return int(aiojob.is_capable())

    # -- the thread's pool

    def do_init(self, max_size: int, init_size: int) -> int:
        if self.under_way:
            raise Skip
        try:
            aiojob.init_thread(max_size, init_size)
        except ValueError:
            return 0
        return 1

    def do_cleanup(self) -> str:
        if self.under_way:
            raise Skip
        aiojob.cleanup_thread()
        return ""


def key_of(number: int) -> str | None:
    return str(number) if number else None


def fds(title: str, numbers: list[int]) -> str:
    return " ".join(map(str, (title, f"{len(numbers)}:", *numbers)))


def run_on_aiojob(scenario: Scenario) -> Trace:
    """Run a scenario in a thread of its own, where a failure leaves nothing to the next one."""
    interpreter = Interpreter([*PROLOGUE, *scenario, *EPILOGUE])

    def run() -> None:
        try:
            interpreter.perform("main")
        except Exception as error:  # a difference, to be shown as one
            interpreter.trace.append(f"aiojob raised {error!r}")
        finally:
            interpreter.handles.clear()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return interpreter.trace


# -- on libcrypto

PROBE: Final = """
#include <openssl/async.h>
#include <openssl/opensslv.h>
#if OPENSSL_VERSION_NUMBER < 0x30000000L
#error "OpenSSL 3.0 or newer is needed"
#endif
int main(void) { return !ASYNC_is_capable(); }
"""


def compile_driver(directory: Path) -> Path:
    """Compile driver.c; where that cannot be, skip the test, or in CI fail it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        unavailable("there is no C compiler")
    probe, program = directory / "probe", directory / "driver"
    flags = libcrypto_flags()
    compiled = subprocess.run(
        [compiler, "-o", probe, "-x", "c", "-", *flags],
        input=PROBE,
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        unavailable(f"there are no libcrypto 3 headers to compile with:\n{compiled.stderr}")
    if subprocess.run([probe], check=False).returncode:
        unavailable("this libcrypto has no asynchronous jobs")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, "-std=c11", *warnings, "-o", program, SOURCE, *flags], check=True)
    return program


def libcrypto_flags() -> list[str]:
    if shutil.which("pkg-config"):
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "libcrypto"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            return shlex.split(found.stdout)
    return ["-lcrypto"]


class Libcrypto:
    """The compiled driver.c, one process for many scenarios."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([self.program], stdin=pipe, stdout=pipe, text=True)

    def close(self) -> None:
        self.process.communicate()

    def run(self, scenario: Scenario) -> Trace:
        # The program reads all of a scenario before it writes: neither side can block the other.
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        lines = [*PROLOGUE, *scenario, *EPILOGUE, "run"]
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()
        trace: Trace = []
        for line in self.process.stdout:
            if line == "end\n":
                return trace
            trace.append(line.rstrip("\n"))
        self.close()
        trace.append(f"driver.c ended with code {self.process.returncode}")
        self.process = self._start()
        return trace


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("libcrypto"))


@pytest.fixture
def libcrypto(driver: Path) -> Iterator[Libcrypto]:
    libcrypto = Libcrypto(driver)
    yield libcrypto
    libcrypto.close()


# -- comparing


def first_difference(seeds: Iterable[int], expected: Run, actual: Run) -> Scenario | None:
    """Return the first scenario whose traces differ, shrunk; None when there is none."""

    def differs(scenario: Scenario) -> bool:
        return expected(scenario) != actual(scenario)

    for seed in seeds:
        scenario = random_scenario(seed)
        if differs(scenario):
            return shrink(scenario, differs)
    return None


def shrink(scenario: Scenario, differs: Callable[[Scenario], bool]) -> Scenario:
    """Leave lines out, many at a time and then one, for as long as the traces differ."""
    before: Scenario | None = None
    while scenario != before:
        before, size = scenario, len(scenario)
        while size:
            start = 0
            while start < len(scenario):
                candidate = scenario[:start] + scenario[start + size :]
                if differs(candidate):
                    scenario = candidate
                else:
                    start += size
            size //= 2
    return scenario


def report(scenario: Scenario, expected: Run, actual: Run) -> str:
    traces = [
        [line for line in run(scenario) if not line.endswith("skipped")]
        for run in (expected, actual)
    ]
    pairs = list(zip_longest(*traces, fillvalue="(nothing more)"))
    same = [line for line, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    libcrypto, ours = pairs[len(same)]
    return "\n".join(
        (
            f"aiojob and libcrypto differ in a scenario of {len(scenario)} lines:",
            *(f"    {line}" for line in scenario),
            "after the same results:",
            *(f"    {line}" for line in same),
            f"libcrypto: {libcrypto}",
            f"aiojob:    {ours}",
        )
    )


@pytest.mark.timeout(120 + SCENARIOS // 20)
def test_random_scenarios_have_the_results_of_libcrypto(libcrypto: Libcrypto) -> None:
    scenario = first_difference(range(SCENARIOS), libcrypto.run, run_on_aiojob)
    if scenario is not None:
        pytest.fail(report(scenario, libcrypto.run, run_on_aiojob), pytrace=False)


REACHED: Final = """
    main start # # # -> FINISH #
    main start # # # -> NO_JOBS
    main start # # # -> PAUSE job#
    main start # # # -> skipped
    main resume # # -> FINISH #
    main resume # # -> PAUSE job#
    main resume # # -> skipped
    main finish # -> FINISH # after #
    main init # # -> 0
    main init # # -> 1
    main init # # -> skipped
    main cleanup ->
    main cleanup -> skipped
    main current -> null
    main pause -> 1
    main block ->
    main unblock ->
    main wait_ctx # -> ctx#
    main changed # -> added #: # # deleted #: #
    main changed # -> added #: deleted #: # #
    main free # -> freed
    main free # -> skipped
    job# current -> job#
    job# pause -> 1
    job# block ->
    job# unblock ->
    job# wait_ctx # -> ctx#
    job# set # # # # # -> 1
    job# get # # -> none
    job# get # # -> 3 #
    job# clear # # -> 0
    job# clear # # -> 1
    job# all # -> fds #: # # #
    job# changed # -> added #: deleted #:
    job# changed # -> added #: # deleted #: #
    job# callback # -> none
    job# callback # -> called
    job# status # -> 0
    job# status # -> 1
    job# status # -> 2
    job# status # -> 3
    job# free # -> freed
    cleanup ctx# # # #
    callback # #
"""


def test_random_scenarios_reach_every_result() -> None:
    lines = {
        re.sub(r"(?<!-> )\d+", "#", line)
        for seed in range(500)
        for line in run_on_aiojob(random_scenario(seed))
    }
    missing = {line.strip() for line in REACHED.strip().splitlines()} - lines
    assert not missing
    assert not any("raised" in line or "unknown" in line for line in lines)


# -- that the comparison can fail: each of these makes aiojob wrong in one respect


def list_oldest_fd_first(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.WaitCtx.get_all_fds
    patch.setattr(aiojob.WaitCtx, "get_all_fds", lambda ctx: right(ctx)[::-1])


def clean_up_oldest_fd_first(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.WaitCtx.free

    def free(ctx: aiojob.WaitCtx) -> None:
        ctx._entries.reverse()
        right(ctx)

    patch.setattr(aiojob.WaitCtx, "free", free)


def keep_changes_at_resume(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aiojob.WaitCtx, "_forget_changes", lambda ctx: None)


def forget_changes_at_start(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.start_job

    def start_job(job: Any, ctx: Any, *args: Any) -> Any:
        if job is None:
            ctx._forget_changes()
        return right(job, ctx, *args)

    patch.setattr(aiojob, "start_job", start_job)


def forget_changes_at_blocked_pause(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.pause_job

    def pause_job() -> None:
        if aiojob.get_current_job() is not None and not aiojob.can_pause():
            aiojob.get_wait_ctx()._forget_changes()
        right()

    patch.setattr(aiojob, "pause_job", pause_job)


def allow_one_job_more(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.init_thread

    def init_thread(max_size: int, init_size: int) -> None:
        right(max_size, init_size)
        if max_size:
            right(max_size + 1, init_size)

    patch.setattr(aiojob, "init_thread", init_thread)


def forget_inner_block(patch: pytest.MonkeyPatch) -> None:
    right = aiojob.block_pause
    patch.setattr(aiojob, "block_pause", lambda: right() if aiojob.can_pause() else None)


@pytest.mark.parametrize(
    "make_wrong",
    [
        list_oldest_fd_first,
        clean_up_oldest_fd_first,
        keep_changes_at_resume,
        forget_changes_at_start,
        forget_changes_at_blocked_pause,
        allow_one_job_more,
        forget_inner_block,
    ],
)
def test_wrong_core_is_found_and_shrunk_to_few_lines(
    make_wrong: Callable[[pytest.MonkeyPatch], None],
    libcrypto: Libcrypto,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_wrong(monkeypatch)
    scenario = first_difference(range(500), libcrypto.run, run_on_aiojob)
    assert scenario is not None
    assert len(scenario) <= 8
    assert libcrypto.run(scenario) != run_on_aiojob(scenario)


def test_report_of_a_difference_shows_both_results(
    libcrypto: Libcrypto, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_oldest_fd_first(monkeypatch)
    scenario = ["main set 1 0 3 0 0", "main set 1 0 4 0 0", "main all 1"]
    lines = report(scenario, libcrypto.run, run_on_aiojob).splitlines()
    assert lines[-2:] == [
        "libcrypto: main all 1 -> fds 2: 4 3",
        "aiojob:    main all 1 -> fds 2: 3 4",
    ]
    assert "    main set 1 0 4 0 0 -> 1" in lines


def test_error_raised_by_aiojob_is_a_difference(
    libcrypto: Libcrypto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("broken")

    monkeypatch.setattr(aiojob, "pause_job", fail)
    scenario = first_difference(range(500), libcrypto.run, run_on_aiojob)
    assert scenario is not None
    assert len(scenario) <= 2
    assert run_on_aiojob(scenario)[-1] == "aiojob raised RuntimeError('broken')"


def test_end_of_the_c_program_is_in_the_trace_and_the_next_scenario_runs(
    libcrypto: Libcrypto,
) -> None:
    assert libcrypto.run(["main nonsense"]) == ["driver.c ended with code 2"]
    assert "main capable -> 1" in libcrypto.run(["main capable"])


@pytest.mark.parametrize("reason", ["there is no C compiler", "no libcrypto 3 headers"])
def test_driver_that_cannot_be_compiled_skips_but_fails_in_ci(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "headers" in reason:
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho 'openssl/async.h: not found' >&2\nexit 1\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        compile_driver(tmp_path)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=reason):
        compile_driver(tmp_path)
