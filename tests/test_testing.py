"""`aiojob.testing`: what engine authors test with."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from aiojob import (
    JobError,
    JobStatus,
    await_,
    init_thread,
    offload,
    offload_async,
    pause_blocked,
    run_job,
    start_job,
)
from aiojob.engines import _offload
from aiojob.engines._workers import Worker, Workers
from aiojob.testing import Barrier, DummyEngine, Gate, nothing_left


class OpError(Exception):
    pass


async def test_dummy_engine_pauses_each_call_once() -> None:
    engine = DummyEngine()
    assert await run_job(engine.call, divmod, 7, 2) == (3, 1)
    result = start_job(None, None, engine.call, divmod, 7, 2)
    assert result.status is JobStatus.PAUSE
    assert result.job is not None
    assert start_job(result.job, None).ret == (3, 1)
    assert engine.calls == 2


def test_dummy_engine_outside_a_job_calls_at_once() -> None:
    assert DummyEngine().call(divmod, 7, 2) == (3, 1)


async def test_held_calls_go_on_in_their_order_when_the_test_says_so() -> None:
    engine = DummyEngine(hold=True)
    ended: list[int] = []
    jobs = [asyncio.create_task(run_job(engine.call, ended.append, n)) for n in range(3)]
    await asyncio.sleep(0)
    assert engine.pending == 3
    engine.complete(1)
    await jobs[0]
    assert ended == [0]
    engine.fail(OpError())
    with pytest.raises(OpError):
        await jobs[1]
    engine.complete()
    await jobs[2]
    assert (ended, engine.pending, engine.calls) == ([0, 2], 0, 3)


@pytest.mark.parametrize("hold", [True, False])
def test_dummy_engine_counts_what_is_cancelled(hold: bool) -> None:
    engine = DummyEngine(hold=hold)
    result = start_job(None, None, engine.call, divmod, 7, 2)
    assert engine.cancelled == 0
    del result
    assert (engine.cancelled, engine.pending) == (1, 0)


async def test_gate_lets_all_through_when_it_opens() -> None:
    gate = Gate()
    jobs = [asyncio.create_task(run_job(gate.wait)) for _ in range(2)]
    thread = offload_async(gate.wait)
    await run_job(gate.reached, 3)
    assert gate.waiting == 3
    gate.open()
    await asyncio.gather(*jobs, thread)
    assert gate.waiting == 0
    gate.wait()  # it stays open
    gate.open()


async def test_gate_that_does_not_open_times_out() -> None:
    gate = Gate()
    for wait in (gate.wait, gate.reached):
        with pytest.raises(TimeoutError):
            await run_job(lambda: wait(timeout=0.01))  # noqa: B023
    assert gate.waiting == 0


async def test_gate_forgets_who_gave_up_waiting_for_others() -> None:
    gate = Gate()
    task = asyncio.create_task(run_job(gate.reached))
    await asyncio.sleep(0)
    assert len(gate._arrivals) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate._arrivals == []


async def test_barrier_lets_all_go_on_when_the_last_has_come_and_again() -> None:
    barrier = Barrier(3)
    for _ in range(2):
        parties = [run_job(barrier.wait), run_job(barrier.wait)]
        results: list[Any] = await asyncio.gather(*parties, offload_async(barrier.wait))
        assert sorted(results) == [0, 1, 2]


async def test_party_that_gives_up_is_not_counted() -> None:
    barrier = Barrier(2)
    with pytest.raises(TimeoutError):
        await run_job(barrier.wait, 0.01)
    assert sorted(await asyncio.gather(run_job(barrier.wait), run_job(barrier.wait))) == [0, 1]


async def test_party_that_is_cancelled_when_all_have_come_was_counted() -> None:
    barrier = Barrier(2)
    first = asyncio.create_task(run_job(barrier.wait))
    await asyncio.sleep(0)
    assert start_job(None, None, barrier.wait).ret == 1
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert sorted(await asyncio.gather(run_job(barrier.wait), run_job(barrier.wait))) == [0, 1]


def test_barrier_for_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one party"):
        Barrier(0)


def test_nothing_left_accepts_what_cleans_up() -> None:
    with nothing_left():
        offload(divmod, 7, 2)
        with pause_blocked():
            os.close(os.dup(0))


def test_nothing_left_waits_for_a_worker_whose_idle_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no worker any more, but its thread has yet to end."""
    left, waited_for = threading.Event(), threading.Event()
    serve, join = Workers.serve, Worker.join

    def serve_and_linger(workers: Workers, worker: Worker) -> None:
        serve(workers, worker)
        left.set()
        waited_for.wait()

    def wait_for(worker: Worker, timeout: float | None = None) -> None:
        waited_for.set()
        join(worker, timeout)

    monkeypatch.setattr(Workers, "serve", serve_and_linger)
    monkeypatch.setattr(Worker, "join", wait_for)
    monkeypatch.setattr(_offload._levels[0], "idle_seconds", 0)
    with nothing_left():
        offload(divmod, 7, 2)
        left.wait()


def test_nothing_left_finds_an_fd() -> None:
    with pytest.raises(AssertionError, match="fds were left behind"), nothing_left():
        fd = os.dup(0)
    os.close(fd)


def test_nothing_left_finds_a_thread() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    with pytest.raises(AssertionError, match="threads were left behind"), nothing_left():
        thread.start()
    stop.set()
    thread.join()


def test_nothing_left_finds_a_job() -> None:
    with pytest.raises(AssertionError, match="1 job"), nothing_left():
        result = start_job(None, None, DummyEngine(hold=True).call, divmod, 7, 2)
    del result


async def test_nothing_left_finds_a_waiter_for_the_pool() -> None:
    init_thread(1)
    blocker = asyncio.get_running_loop().create_future()
    first = asyncio.create_task(run_job(await_, blocker))
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="waits for the pool"), nothing_left():
        second = asyncio.create_task(run_job(divmod, 7, 2))
        await asyncio.sleep(0)
    blocker.set_result(None)
    await asyncio.gather(first, second)


def test_nothing_left_finds_an_offloaded_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiojob.testing._GRACE", 0.01)
    gate = Gate()
    result = start_job(None, None, offload, gate.wait)
    gate.reached()
    with pytest.raises(AssertionError, match="still under way"), nothing_left():
        pass
    gate.open()
    del result


def test_dummy_engine_that_is_passed_no_exception_keeps_its_calls() -> None:
    engine = DummyEngine(hold=True)
    _, job, _ = start_job(None, None, engine.call, divmod, 7, 2)
    assert job is not None
    not_one: Any = OpError
    with pytest.raises(TypeError, match="an exception is needed"):
        engine.fail(not_one)
    assert engine.pending == 1
    engine.complete()
    assert start_job(job, None).ret == (3, 1)


def test_dummy_engine_completes_no_more_calls_than_it_holds() -> None:
    engine = DummyEngine(hold=True)
    _, job, _ = start_job(None, None, engine.call, divmod, 7, 2)
    assert job is not None
    with pytest.raises(JobError, match=r"complete\(2\): 1 call"):
        engine.complete(2)
    assert engine.pending == 1
    engine.complete(1)
    with pytest.raises(JobError, match="no call is held"):
        engine.fail(OpError())
    assert start_job(job, None).ret == (3, 1)


def test_call_that_is_cancelled_while_it_is_completed_is_only_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its job goes away between the moments when it is taken and when it is completed."""
    engine = DummyEngine(hold=True)
    jobs = [start_job(None, None, engine.call, divmod, 7, 2).job]
    taken = engine._take

    def take() -> Any:
        completion = taken()
        jobs.clear()
        return completion

    monkeypatch.setattr(engine, "_take", take)
    engine.complete()
    assert (engine.cancelled, engine.pending) == (1, 0)


def test_counts_that_are_none_are_refused() -> None:
    count: Any = 1.5
    for call in (Barrier, Gate().reached, DummyEngine().complete):
        with pytest.raises(TypeError, match=r"must be an int, got 1\.5"):
            call(count)
