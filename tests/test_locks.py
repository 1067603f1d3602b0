"""Locks that are held over a pause: found in asyncio's debug mode."""

from __future__ import annotations

import asyncio
import linecache
import logging
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import greenlet
import pytest

from aiojob import await_, pause_blocked, pause_job, run_job, start_job

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOCK = threading.Lock()


def pause() -> None:
    await_(asyncio.sleep(0))


class Account:
    """Where programs have their locks."""

    __slots__ = ("__lock", "_property", "lock", "locks", "unset")

    shared = threading.RLock()

    def __init__(self) -> None:
        self.__lock = threading.Lock()
        self.lock = threading.RLock()
        self.locks = [threading.Lock()]
        self._property = threading.Lock()

    @property
    def behind_property(self) -> Any:
        return self._property

    def in_slot(self) -> None:
        with self.lock:
            pause()

    def private(self) -> None:
        with self.__lock:
            pause()

    def of_class(self) -> None:
        with self.shared:
            pause()

    def of_module(self) -> None:
        with LOCK:
            pause()

    def in_namespace(self) -> None:
        namespace = SimpleNamespace(deep=SimpleNamespace(lock=threading.Lock()))
        with namespace.deep.lock:
            pause()

    def on_one_line(self) -> None:
        with self.lock: pause()  # fmt: skip # noqa: E701

    def in_an_except_block(self) -> None:
        try:
            raise ValueError
        except ValueError:
            with self.lock as _, nullcontext():
                pause()

    def while_the_next_is_entered(self) -> None:
        with self.lock, Pausing():
            pass

    def in_closure(self) -> None:
        lock = threading.Lock()

        def inner() -> None:
            with lock:
                pause()

        inner()

    def in_comprehension(self) -> None:
        with self.lock:
            assert [pause() for _ in range(1)] == [None]  # type: ignore[func-returns-value]

    def by_pause_job(self) -> None:
        with self.lock:
            pause_job()

    def in_greenlet(self) -> None:
        with self.lock:
            greenlet.greenlet(pause).switch()

    # -- not reported

    def released(self) -> None:
        with self.lock:
            pass
        pause()

    def released_by_hand(self) -> None:
        with LOCK:
            LOCK.release()
            pause()
            LOCK.acquire()

    def held_by_another_thread(self) -> None:
        with self.lock:
            self.lock.release()
            ready, end = threading.Event(), threading.Event()

            def hold() -> None:
                with self.lock:
                    ready.set()
                    end.wait()

            thread = threading.Thread(target=hold)
            thread.start()
            ready.wait()
            pause()
            end.set()
            thread.join()
            self.lock.acquire()

    def defined_inside(self) -> None:
        with self.lock:

            def inner() -> None:
                pause()

        inner()

    def no_lock(self) -> None:
        with nullcontext(), nullcontext():
            pause()

    def unseen(self) -> None:
        with self.locks[0], self.behind_property, ExitStack() as stack:
            stack.enter_context(LOCK)
            pause()

    def name_deleted(self) -> None:
        lock = threading.Lock()
        with lock:
            del lock
            pause()

    def slot_deleted(self) -> None:
        self.unset = threading.Lock()
        with self.unset:
            del self.unset
            pause()

    def blocked(self) -> None:
        with pause_blocked(), self.lock:
            pause_job()


class Pausing:
    def __enter__(self) -> None:
        pause()

    def __exit__(self, *_: object) -> None: ...


REPORTED = [
    "in_slot", "private", "of_class", "of_module", "in_namespace", "on_one_line", "in_closure",
    "in_an_except_block", "in_comprehension", "by_pause_job",
    "in_greenlet",
]  # fmt: skip
if sys.version_info >= (3, 13):  # until then, code has no better place for this than the statement
    REPORTED.append("while_the_next_is_entered")
NOT_REPORTED = [
    "released", "released_by_hand", "held_by_another_thread", "defined_inside", "no_lock", "unseen",
    "name_deleted", "slot_deleted", "blocked",
]  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
async def test_lock_held_over_a_pause_is_reported(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_job(getattr(Account(), name))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aiojob", logging.WARNING)
    message = record.getMessage()
    assert re.match("a job pauses while it holds [a-zA-Z_.]+, <locked _thread.", message)
    taken, pauses = message.split("The lock was taken here:\n")[1].split("The job pauses here:\n")
    assert "    with " in taken.splitlines()[-1]
    assert f'{__file__}", line' in taken
    assert len(pauses.splitlines()) >= len(taken.splitlines())
    assert "aiojob/" not in pauses


@pytest.mark.parametrize("name", NOT_REPORTED)
async def test_lock_not_held_over_a_pause_or_out_of_sight_is_not_reported(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run_job(getattr(Account(), name))
    assert not caplog.records


async def test_each_lock_that_is_held_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def work(account: Account) -> None:
        with account.lock, LOCK:
            account.of_class()

    await run_job(work, Account())
    assert len(caplog.records) == 3


def test_nothing_is_reported_outside_debug_mode(
    loop_factory: LoopFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with asyncio.Runner(loop_factory=loop_factory, debug=False) as runner:
        runner.run(run_job(Account().of_module))
    assert not caplog.records


def test_hand_driven_job_has_no_debug_mode(caplog: pytest.LogCaptureFixture) -> None:
    _, job, _ = start_job(None, None, Account().by_pause_job)
    assert job is not None
    start_job(job, None)
    assert not caplog.records


SOURCE = """
def work():
    with LOCK:
        pause()
"""


@pytest.mark.parametrize(
    ("lines", "reports"),
    [
        ([], 0),
        (["def work(:\n"] * 4, 0),
        (["(\n"] * 4, 0),
        (["\n"] * 4, 0),
        (["\n", "def work():\n", "    with LOCK:\n", "        pa\0use()\n", "#\n"], 0),
        (SOURCE.splitlines(keepends=True), 1),
    ],
)
async def test_code_is_reported_if_its_source_is_there(
    lines: list[str],
    reports: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: dict[str, Any] = {"LOCK": LOCK, "pause": pause}
    file = f"<source of {len(lines)} lines, {lines[:2]}>"
    exec(compile(SOURCE, file, "exec"), names)
    monkeypatch.setitem(linecache.cache, file, (0, None, lines, file))
    await run_job(names["work"])
    assert len(caplog.records) == reports


async def test_code_of_a_whole_module_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    source = "with LOCK:\n    pause()\n"
    linecache.cache["<module>"] = (len(source), None, source.splitlines(True), "<module>")
    try:
        await run_job(exec, compile(source, "<module>", "exec"), {"LOCK": LOCK, "pause": pause})
    finally:
        del linecache.cache["<module>"]
    assert len(caplog.records) == 1


def test_code_without_positions_is_not_reported(tmp_path: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import asyncio, threading
            from aiojob import await_, run_job

            LOCK = threading.Lock()

            def work():
                with LOCK:
                    await_(asyncio.sleep(0))

            asyncio.run(run_job(work), debug=True)
        """)
    )
    for options, reports in ([], 1), (["-X", "no_debug_ranges"], 0):
        command = [sys.executable, *options, str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.count("a job pauses while it holds") == reports
