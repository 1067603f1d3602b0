"""`offload` to executors: threads, processes, interpreters, a Dask cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import json
import multiprocessing
import os
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from aiojob import offload, offload_async, pause_blocked, run_job
from aiojob.testing import Gate

# Functions for other processes are the standard library's: those cannot import this module.


def new_process_pool() -> Executor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def new_interpreter_pool() -> Executor:
    if not hasattr(concurrent.futures, "InterpreterPoolExecutor"):
        pytest.skip("needs InterpreterPoolExecutor (Python 3.14)")
    return concurrent.futures.InterpreterPoolExecutor(1)  # type: ignore[no-any-return, unused-ignore]


@pytest.fixture(scope="session", autouse=True)
def _resource_tracker() -> None:
    """Have multiprocessing start the process that it keeps for good."""
    resource_tracker.ensure_running()


@contextmanager
def signals_blocked_in_new_threads() -> Iterator[None]:
    """Have threads that outlive the tests take no signal that a later test sends its process.

    Taken by a thread that sleeps, a signal does not wake the main thread, which handles it.
    """
    ours = {signal.SIGALRM, signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def dask_cluster() -> Iterator[Callable[[], Executor]]:
    from distributed import Client, LocalCluster

    gc.freeze()  # Dask's modules are many: each test's search for garbage would go through them
    http = "127.0.0.1:0"  # None would be port 8787 of every interface
    with ExitStack() as stack:
        with signals_blocked_in_new_threads():
            cluster = stack.enter_context(
                LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=1,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address=http,
                    worker_dashboard_address=http,
                )
            )
            client = stack.enter_context(Client(cluster))  # type: ignore[no-untyped-call]
        # Equal calls that are pure would be one, and be cancelled together.
        yield lambda: client.get_executor(pure=False)
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # what Dask leaves is none of the next test's


POOLS: dict[str, Callable[[], Executor]] = {
    "processes": new_process_pool,
    "threads": lambda: ThreadPoolExecutor(1),
    "interpreters": new_interpreter_pool,
}
DASK = pytest.param("dask", marks=pytest.mark.background_fds)


# Not scoped to a function: what the executors keep is there before a test is watched, and gone
# before those of the next kind are.
@pytest.fixture(scope="module", params=[DASK, *POOLS])
def new_executor(request: pytest.FixtureRequest) -> Iterator[Callable[[], Executor]]:
    if request.param == "dask":
        with dask_cluster() as new_dask_executor:
            yield new_dask_executor
    else:
        yield POOLS[request.param]


@pytest.fixture(scope="module")
def executor(new_executor: Callable[[], Executor]) -> Iterator[Executor]:
    with new_executor() as executor:
        executor.submit(os.getpid).result()  # starts its thread or process
        yield executor


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """An executor for one test."""
    with POOLS[request.param]() as executor:
        yield executor


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def of_kinds(*kinds: Any) -> pytest.MarkDecorator:
    """Run a test with executors of these kinds alone: the first ones of `new_executor`."""
    return pytest.mark.parametrize("new_executor", kinds, indirect=True)


async def in_job(func: Callable[..., Any], *args: Any, executor: Executor) -> Any:
    return await run_job(offload, func, *args, executor=executor)


async def in_blocked_job(func: Callable[..., Any], *args: Any, executor: Executor) -> Any:
    def job() -> Any:
        with pause_blocked():
            return offload(func, *args, executor=executor)

    return await run_job(job)


async def outside(func: Callable[..., Any], *args: Any, executor: Executor) -> Any:
    return offload(func, *args, executor=executor)


async def in_coroutine(func: Callable[..., Any], *args: Any, executor: Executor) -> Any:
    return await offload_async(func, *args, executor=executor)


WAYS = [in_job, in_blocked_job, outside, in_coroutine]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param  # type: ignore[no-any-return]


async def test_result_comes_from_the_executor(way: Callable[..., Any], executor: Executor) -> None:
    assert await way(divmod, 7, 2, executor=executor) == (3, 1)


async def test_exception_comes_from_the_executor(
    way: Callable[..., Any], executor: Executor
) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await way(int, "seven", executor=executor)


@of_kinds(DASK, "processes", "threads")
async def test_exception_comes_with_the_traceback_of_the_call(
    way: Callable[..., Any], executor: Executor
) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        await way(json.loads, "{", executor=executor)
    assert "raw_decode" in "".join(traceback.format_exception(caught.value))


@of_kinds(DASK, "processes")
async def test_function_runs_in_another_process(
    way: Callable[..., Any], executor: Executor
) -> None:
    assert await way(os.getpid, executor=executor) != os.getpid()


async def test_calls_of_many_jobs_and_coroutines_each_get_their_own_result(
    executor: Executor,
) -> None:
    ways = (in_job, in_coroutine)
    calls = [way(pow, 2, number, executor=executor) for number in range(10) for way in ways]
    assert await asyncio.gather(*calls) == [2**number for number in range(10) for _ in ways]


async def test_stop_iteration_reaches_a_coroutine_as_a_runtime_error(executor: Executor) -> None:
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        await offload_async(next, iter(()), executor=executor)
    assert isinstance(caught.value.__cause__, StopIteration)


async def test_stop_iteration_reaches_synchronous_code_as_itself(executor: Executor) -> None:
    def stop() -> None:
        with pytest.raises(StopIteration):
            offload(next, iter(()), executor=executor)

    def stop_blocked() -> None:
        with pause_blocked():
            stop()

    stop()
    await run_job(stop)
    await run_job(stop_blocked)


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


async def test_context_variables_travel_to_threads_as_a_copy(
    way: Callable[..., Any], threads: Executor
) -> None:
    variable.set(5)
    assert await way(variable.get, executor=threads) == 5
    await way(variable.set, 6, executor=threads)
    assert variable.get() == 5


async def test_cancelled_call_that_has_not_begun_is_dropped(threads: Executor) -> None:
    gate = Gate()
    begun: list[str] = []
    first = offload_async(gate.wait, executor=threads)
    await run_job(gate.reached)
    job = asyncio.create_task(in_job(begun.append, "job", executor=threads))
    coroutine = asyncio.create_task(in_coroutine(begun.append, "coroutine", executor=threads))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in (job, coroutine):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.open()
    await first
    assert await in_job(divmod, 7, 2, executor=threads) == (3, 1)
    assert begun == []


@pytest.mark.parametrize("way", [in_job, in_coroutine])
async def test_cancelled_call_to_a_pool_is_dropped_if_it_has_not_begun(
    way: Callable[..., Any], pool: Executor, tmp_path: Path
) -> None:
    fifo, begun = tmp_path / "fifo", tmp_path / "begun"
    os.mkfifo(fifo)
    first = offload_async(os.open, fifo, os.O_RDONLY, executor=pool)  # blocks
    # A pool sends a few calls ahead; these can't be cancelled any more.
    ahead = [offload_async(divmod, number, 2, executor=pool) for number in range(4)]
    task = asyncio.create_task(way(Path.touch, begun, executor=pool))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(await offload_async(os.open, fifo, os.O_WRONLY))  # lets the first one go on
    await asyncio.gather(*ahead)
    await in_job(os.close, await first, executor=pool)
    assert not begun.exists()


@of_kinds(DASK)
@pytest.mark.parametrize("way", [in_job, in_coroutine])
async def test_cancelled_call_to_a_cluster_is_not_waited_for(
    way: Callable[..., Any], executor: Executor, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first = offload_async(os.open, fifo, os.O_RDONLY, executor=executor)  # blocks the worker
    task = asyncio.create_task(way(divmod, 7, 2, executor=executor))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not first.done()
    os.close(await offload_async(os.open, fifo, os.O_WRONLY))
    await in_job(os.close, await first, executor=executor)


@of_kinds(DASK)
@pytest.mark.parametrize("way", [in_job, in_coroutine])
async def test_cancelled_call_to_a_cluster_is_dropped_if_it_has_not_begun(
    way: Callable[..., Any], executor: Executor, tmp_path: Path
) -> None:
    from distributed import default_client

    client = default_client()  # type: ignore[no-untyped-call]
    fifo, begun = tmp_path / "fifo", tmp_path / "begun"
    os.mkfifo(fifo)
    first = offload_async(os.open, fifo, os.O_RDONLY, executor=executor)  # blocks the worker
    task = asyncio.create_task(way(Path.touch, begun, executor=executor))
    while not (keys := [key for key in await all_keys(client) if key.startswith("touch")]):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Each event of the story begins with who tells it: the scheduler, or the worker's address.
    while not any(
        event[0] != "scheduler" and "forgotten" in event
        for event in await offload_async(client.story, *keys)
    ):
        await asyncio.sleep(0)
    os.close(await offload_async(os.open, fifo, os.O_WRONLY))  # lets the worker go on
    await in_job(os.close, await first, executor=executor)
    assert not begun.exists()


async def all_keys(client: Any) -> list[str]:
    """Return the keys of the calls that the cluster's scheduler has given to its workers."""
    return [key for keys in (await offload_async(client.processing)).values() for key in keys]


async def test_call_that_somebody_else_cancels_is_cancelled(threads: Executor) -> None:
    gate = Gate()
    first = offload_async(gate.wait, executor=threads)
    await run_job(gate.reached)
    job = asyncio.create_task(in_job(divmod, 7, 2, executor=threads))
    coroutine = offload_async(divmod, 7, 2, executor=threads)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    threads.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(concurrent.futures.CancelledError):
        await job
    with pytest.raises(asyncio.CancelledError):
        await coroutine
    gate.open()
    await first


async def test_executor_that_was_shut_down_is_an_error(
    way: Callable[..., Any], new_executor: Callable[[], Executor]
) -> None:
    executor = new_executor()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await way(divmod, 7, 2, executor=executor)


async def test_process_that_ends_breaks_the_calls_to_its_pool(way: Callable[..., Any]) -> None:
    with new_process_pool() as executor:
        with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
            await way(os._exit, 3, executor=executor)  # while it waits
        with pytest.raises(BrokenProcessPool, match="not usable anymore"):
            await way(divmod, 7, 2, executor=executor)  # when it submits


async def test_late_result_of_an_executor_for_a_cancelled_future_is_dropped(
    threads: Executor,
) -> None:
    gate = Gate()
    ended = threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()

    future = offload_async(work, executor=threads)
    await run_job(gate.reached)
    future.cancel()
    gate.open()
    await offload_async(ended.wait)
    await offload_async(divmod, 7, 2, executor=threads)


async def test_keyword_arguments_are_the_functions_own(executor: Executor) -> None:
    def call(executor: Executor) -> Any:
        return offload(dict, key="k", retries=1, executor=executor)

    assert await run_job(call, executor) == {"key": "k", "retries": 1}


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_threads_that_dask_leaves_take_no_signal_of_later_tests() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("Dask"):
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            (blocked,) = re.findall(r"SigBlk:\s+(\w+)", status)
            assert int(blocked, 16) & (1 << (signal.SIGUSR1 - 1)), thread
