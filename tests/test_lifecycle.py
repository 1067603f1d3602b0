"""Ends and beginnings: of threads, of the interpreter, of forked processes.

Each test runs a program of its own, in development mode and with warnings as errors; it must
end by itself, with the expected output and nothing on stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from support import PATIENCE

import aiojob

PRELUDE = """
import asyncio, atexit, contextlib, gc, logging, os, signal, sys, threading, weakref
from functools import partial

import uvloop

import aiojob
from aiojob import *
from aiojob import _fibre

logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of slow steps in debug mode


def eager_loop():
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


LOOPS = {
    "asyncio": asyncio.new_event_loop,
    "asyncio-eager": eager_loop,
    "uvloop": uvloop.new_event_loop,
}
new_loop = LOOPS[sys.argv[1]]
fibres = weakref.WeakSet()


def remember_fibre():
    fibres.add(_fibre.current_fibre())


def pausing(name, pauses=1):
    remember_fibre()
    try:
        for _ in range(pauses):
            pause_job()
    except BaseException as error:
        print(name, type(error).__name__)
        raise
    print(name, "done")
    return name


def waiting():
    "A job that only a callback wakes, which never comes."
    remember_fibre()
    get_wait_ctx().status = WaitStatus.OK
    pause_job()


def awaiting():
    "A job that awaits what never comes."
    remember_fibre()
    await_(asyncio.get_running_loop().create_future())


def run(main):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


def in_thread(func, *args):
    thread = threading.Thread(target=func, args=args)
    thread.start()
    thread.join()


async def iterations(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


def paused_on_closed_loop(*funcs):
    "Tasks with paused jobs, whose loop was closed."
    loop = new_loop()
    loop.set_exception_handler(lambda *_: None)  # it complains of tasks that are destroyed
    logging.getLogger("aiojob").setLevel(logging.ERROR)  # as does aiojob, of their jobs
    tasks = [loop.create_task(run_job(func)) for func in funcs]
    loop.run_until_complete(iterations())
    loop.close()
    return tasks
"""

LOOPS = ["asyncio", "uvloop", *(["asyncio-eager"] if sys.version_info >= (3, 12) else [])]


@pytest.fixture(params=LOOPS)
def loop_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def run_program(source: str, loop_name: str = "asyncio", returncode: int = 0) -> list[str]:
    """Run a program, check how it ended, and return the lines that it printed."""
    directory = os.path.dirname(os.path.dirname(os.path.abspath(aiojob.__file__)))
    program = PRELUDE + textwrap.dedent(source)
    process = subprocess.run(
        [sys.executable, "-P", "-X", "dev", "-W", "error", "-c", program, loop_name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.stderr == ""
    assert process.returncode == returncode
    return process.stdout.splitlines()


# -- the end of a thread


def test_thread_that_ends_with_idle_fibres_frees_them() -> None:
    printed = run_program("""
        def thread():
            init_thread(0, 5)
            jobs = [start_job(None, None, pausing, "job").job for _ in range(8)]
            for job in jobs:
                start_job(job, None)
            print(len(fibres), _fibre.pool_of_thread().idle)

        in_thread(thread)
        print(len(fibres))
    """)
    assert printed == ["job done"] * 8 + ["8 8", "0"]


def test_thread_that_ends_after_running_a_loop_frees_its_fibres(loop_name: str) -> None:
    printed = run_program(
        """
        async def main():
            await asyncio.gather(*(run_job(pausing, "job") for _ in range(3)))
            print(len(fibres))

        in_thread(run, main())
        gc.collect()
        print(len(fibres))
        """,
        loop_name,
    )
    assert printed == ["job done"] * 3 + ["3", "0"]


def test_many_threads_leave_no_fibres_threads_or_pools_behind(loop_name: str) -> None:
    printed = run_program(
        """
        def silent():
            remember_fibre()
            pause_job()

        async def main():
            await asyncio.gather(*(run_job(silent) for _ in range(5)))

        pools = weakref.WeakSet()

        def thread():
            run(main())
            start_job(start_job(None, None, silent).job, None)
            dropped = start_job(None, None, silent).job
            pools.add(_fibre.pool_of_thread())

        for _ in range(10):
            threads = [threading.Thread(target=thread) for _ in range(4)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        del threads, each
        gc.collect()
        print(len(fibres), len(pools), threading.active_count())
        """,
        loop_name,
    )
    assert printed == ["0 0 1"]


def test_thread_that_ends_drops_its_paused_jobs() -> None:
    printed = run_program("""
        local = threading.local()

        def thread():
            local.job = start_job(None, None, pausing, "in a thread-local").job
            job = start_job(None, None, pausing, "in a local").job

        in_thread(thread)
        print(len(fibres))
    """)
    assert printed[0] == "in a local GeneratorExit"
    assert printed[-1] == "0"


def test_job_whose_thread_has_ended_is_refused_and_dropped_silently() -> None:
    printed = run_program("""
        jobs = []
        in_thread(lambda: jobs.append(start_job(None, None, pausing, "job").job))
        for _ in range(2):
            try:
                start_job(jobs[0], None)
            except WrongThreadError:
                print("refused")
        print(jobs[0].status.name, jobs[0].thread.is_alive())
        in_thread(jobs.clear)
        print(start_job(None, None, len, "abc").ret)
        in_thread(lambda: print(start_job(None, None, len, "abc").ret))
    """)
    assert printed[:3] == ["refused", "refused", "PAUSE False"]
    assert printed[-2:] == ["3", "3"]


def test_job_whose_thread_has_ended_can_live_until_the_interpreter_ends() -> None:
    printed = run_program("""
        jobs = []
        in_thread(lambda: jobs.append(start_job(None, None, pausing, "job").job))
        print("end")
    """)
    assert printed[0] == "end"


def test_job_dropped_by_another_thread_is_unwound_when_its_own_thread_ends() -> None:
    printed = run_program("""
        jobs = []
        started, dropped = threading.Event(), threading.Event()

        def thread():
            jobs.append(start_job(None, None, pausing, "job").job)
            started.set()
            dropped.wait()
            print("thread ends")

        thread = threading.Thread(target=thread)
        thread.start()
        started.wait()
        jobs.clear()
        dropped.set()
        thread.join()
        print(len(fibres))
    """)
    assert printed == ["thread ends", "job GeneratorExit", "0"]


def test_thread_that_ends_with_tasks_paused_on_a_closed_loop_is_silent(loop_name: str) -> None:
    printed = run_program(
        """
        def thread():
            tasks = paused_on_closed_loop(waiting, awaiting, pause_job)

        in_thread(thread)
        gc.collect()
        print("end")
        """,
        loop_name,
    )
    assert printed == ["end"]


def test_late_callback_of_a_thread_that_has_ended_is_dropped(loop_name: str) -> None:
    printed = run_program(
        """
        callbacks = []

        def job():
            callbacks.append(get_wait_ctx().get_callback())
            waiting()

        def thread():
            tasks = paused_on_closed_loop(job)

        in_thread(thread)
        for callback, arg in callbacks * 2:
            print(callback(arg))
            in_thread(callback, arg)
        """,
        loop_name,
    )
    assert printed == ["None", "None"]


# -- fork

FORK = """
def fork(child):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(0)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_child_forked_with_jobs_paused_and_pooled_runs_its_own_jobs(loop_name: str) -> None:
    printed = run_program(
        FORK
        + textwrap.dedent("""
        init_thread(0, 3)
        tasks = paused_on_closed_loop(waiting, awaiting)
        job = start_job(None, None, pausing, "hand-driven").job

        async def main():
            name = await run_job(pausing, "awaited", 3)
            assert await run_job(await_, asyncio.sleep(0, name)) == name

        def child():
            print("in the child")
            run(main())
            print(start_job(job, None).ret)
            sys.stdout.flush()

        fork(child)
        print(start_job(job, None).ret)
        run(main())
        """),
        loop_name,
    )
    both = ["hand-driven done", "hand-driven"]
    assert printed == ["in the child", "awaited done", *both, "child 0", *both, "awaited done"]


def test_child_forked_with_a_loop_running_and_jobs_paused_runs_its_own_jobs() -> None:
    printed = run_program(
        FORK
        + textwrap.dedent("""
        def child():
            # The parent's loop is not this process's: only what the child makes is used.
            run(run_job(pausing, "of the child"))
            sys.stdout.flush()
            os._exit(0)

        async def main():
            task = asyncio.ensure_future(run_job(waiting))
            await iterations()
            fork(child)
            task.cancel()
            await asyncio.wait([task])
            print(task.cancelled())

        run(main())
        """)
    )
    assert printed == ["of the child done", "child 0", "True"]


def test_child_forked_inside_a_job_is_in_that_job() -> None:
    printed = run_program(
        FORK
        + textwrap.dedent("""
        def job():
            fork(partial(print, "in a job:", can_pause()))
            pause_job()

        handle = start_job(None, None, job).job
        if handle is not None:
            start_job(handle, None)
        """)
    )
    assert printed == ["in a job: True", "child 0"]


def test_child_forked_in_a_thread_runs_its_own_jobs() -> None:
    printed = run_program(
        FORK
        + textwrap.dedent("""
        import warnings

        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        job = start_job(None, None, pausing, "of the main thread").job

        def child():
            run(run_job(pausing, "of the child"))
            sys.stdout.flush()
            os._exit(0)

        in_thread(fork, child)
        start_job(job, None)
        """)
    )
    assert printed == ["of the child done", "child 0", "of the main thread done"]


# -- the end of the interpreter


def test_exit_with_idle_fibres_is_silent(loop_name: str) -> None:
    printed = run_program(
        """
        init_thread(0, 3)
        run(run_job(pausing, "job"))
        print(_fibre.pool_of_thread().idle)
        """,
        loop_name,
    )
    assert printed == ["job done", "3"]


HOLDERS = {
    "in a global": "job = start_job(None, None, pausing, 'job').job",
    "in a reference cycle": """
class Cycle:
    pass

cycle = Cycle()
cycle.itself = cycle
cycle.job = start_job(None, None, pausing, 'job').job
del cycle
gc.disable()
""",
    "in an imported module": "aiojob.job = start_job(None, None, pausing, 'job').job",
    "in the job's own frames": """
def keeps_itself():
    me = get_current_job()
    pausing('job')

start_job(None, None, keeps_itself)
""",
    "in an exit function": """
atexit.register(print, start_job(None, None, pausing, 'job').job is not None)
job = start_job(None, None, pausing, 'job').job
atexit.register(lambda: print(job.status.name))
""",
    "in a thread-local": """
local = threading.local()
local.job = start_job(None, None, pausing, 'job').job
""",
    "in another job": """
def outer(inner):
    pause_job()

job = start_job(None, None, outer, start_job(None, None, pausing, 'job').job).job
""",
    "in a foreign greenlet": """
import greenlet

job = start_job(None, None, lambda: greenlet.greenlet(pausing).switch('job')).job
""",
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_exit_with_a_paused_job_is_silent(holder: str) -> None:
    printed = run_program(holder + "\nprint('end')")
    assert "end" in printed


@pytest.mark.parametrize("func", ["waiting", "awaiting", "pause_job"])
def test_exit_with_a_job_paused_on_a_closed_loop_is_silent(func: str, loop_name: str) -> None:
    printed = run_program(f"tasks = paused_on_closed_loop({func})\nprint('end')", loop_name)
    assert printed == ["end"]


@pytest.mark.parametrize("func", ["waiting", "awaiting", "pause_job"])
def test_exit_with_a_coroutine_paused_by_hand_is_silent(func: str, loop_name: str) -> None:
    printed = run_program(
        f"""
        coroutines = []

        async def main():
            coroutines.append(run_job({func}))
            coroutines[0].send(None)

        run(main())
        print("end")
        """,
        loop_name,
    )
    assert printed == ["end"]


def test_exit_with_a_fd_watched_on_a_closed_loop_is_silent(loop_name: str) -> None:
    printed = run_program(
        """
        reading, writing = os.pipe()

        def job():
            get_wait_ctx().set_wait_fd("key", reading)
            while True:
                pause_job()

        tasks = paused_on_closed_loop(job, job)
        print("end")
        """,
        loop_name,
    )
    assert printed == ["end"]


def test_exit_with_paused_jobs_in_daemon_threads_is_silent(loop_name: str) -> None:
    printed = run_program(
        """
        ready = threading.Barrier(3)

        def by_hand():
            job = start_job(None, None, pausing, "job").job
            ready.wait()
            threading.Event().wait()

        async def on_a_loop():
            task = asyncio.ensure_future(run_job(waiting))
            await iterations()
            ready.wait()
            await task

        threading.Thread(target=by_hand, daemon=True).start()
        threading.Thread(target=run, args=[on_a_loop()], daemon=True).start()
        ready.wait()
        print("end")
        """,
        loop_name,
    )
    assert printed == ["end"]


def test_exit_with_idle_fibres_in_a_daemon_thread_is_silent() -> None:
    printed = run_program("""
        ready = threading.Event()

        def thread():
            init_thread(0, 3)
            start_job(None, None, len, "abc")
            ready.set()
            threading.Event().wait()

        threading.Thread(target=thread, daemon=True).start()
        ready.wait()
        print("end")
    """)
    assert printed == ["end"]


@pytest.mark.parametrize("pauses", [0, 2])
def test_system_exit_in_a_job_ends_the_program_with_its_code(pauses: int, loop_name: str) -> None:
    printed = run_program(
        f"""
        def job():
            pausing("job", {pauses})
            sys.exit(3)

        run(run_job(job))
        """,
        loop_name,
        returncode=3,
    )
    assert printed == ["job done"]


def test_system_exit_in_a_hand_driven_job_ends_the_program_with_its_code() -> None:
    printed = run_program(
        """
        def job():
            pausing("job")
            sys.exit(3)

        other = start_job(None, None, pausing, "other").job
        start_job(start_job(None, None, job).job, None)
        """,
        returncode=3,
    )
    assert printed[0] == "job done"


def test_interrupt_while_a_job_is_paused_cancels_it_and_ends_the_run(loop_name: str) -> None:
    printed = run_program(
        """
        def job():
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            try:
                awaiting()
            except BaseException as error:
                print(type(error).__name__)
                raise

        try:
            run(run_job(job))
        except KeyboardInterrupt:
            print("interrupted")
        print(run(run_job(len, "abc")))
        """,
        loop_name,
    )
    assert printed == ["CancelledError", "interrupted", "3"]


def test_exit_function_that_runs_jobs_works(loop_name: str) -> None:
    printed = run_program(
        """
        atexit.register(lambda: run(run_job(pausing, "at exit")))
        run(run_job(pausing, "before"))
        """,
        loop_name,
    )
    assert printed == ["before done", "at exit done"]


# -- repeated loops in one thread


def test_many_loops_in_one_thread_leave_nothing_behind(loop_name: str) -> None:
    printed = run_program(
        """
        from aiojob import _wakeups

        loops = weakref.WeakSet()

        def job():
            with contextlib.closing(os.fdopen(os.open(os.devnull, os.O_RDONLY))):
                waiting()

        async def main():
            loops.add(asyncio.get_running_loop())
            task = asyncio.ensure_future(run_job(job))
            await iterations()
            task.cancel()
            await asyncio.wait([task])
            async with Session() as session:
                await session.run_job(pause_job)

        for _ in range(20):
            run(main())
        gc.collect()
        print(len(loops), len(_wakeups._hubs), _fibre.pool_of_thread().outstanding)
        """,
        loop_name,
    )
    assert printed == ["0 0 0"]


def test_thread_that_starts_jobs_at_its_very_end_is_silent() -> None:
    printed = run_program("""
        class Late:
            def __del__(self):
                print(start_job(None, None, len, "abc").ret)

        local = threading.local()

        def thread():
            local.late = Late()
            start_job(None, None, len, "abc")

        in_thread(thread)
    """)
    assert printed == ["3"]
