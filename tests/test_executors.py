"""`offload` to executors: threads, processes, interpreters, a Dask cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from aiojob import offload, offload_async, pause_blocked, run_job
from aiojob.testing import Gate

pytestmark = pytest.mark.background_fds  # Dask's


@pytest.fixture
def threads() -> Iterator[Executor]:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        executor.submit(os.getpid).result()  # starts what it keeps
        yield executor


@pytest.fixture(scope="module")
def interpreters() -> Iterator[Executor]:
    if not hasattr(concurrent.futures, "InterpreterPoolExecutor"):
        pytest.skip("needs InterpreterPoolExecutor (Python 3.14)")
    with concurrent.futures.InterpreterPoolExecutor(1) as executor:
        executor.submit(os.getpid).result()
        yield executor


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dask's own
        from distributed import Client, LocalCluster

        with (
            LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
            ) as cluster,
            Client(cluster) as client,  # type: ignore[no-untyped-call]
            client.get_executor() as executor,
        ):
            executor.submit(os.getpid).result()
            yield executor


@pytest.fixture(params=["threads", "processes", "interpreters", "dask"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


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


@pytest.mark.parametrize("name", ["processes", "dask"])
async def test_function_runs_in_another_process(
    way: Callable[..., Any], name: str, request: pytest.FixtureRequest
) -> None:
    assert await way(os.getpid, executor=request.getfixturevalue(name)) != os.getpid()


async def test_stop_iteration_reaches_a_coroutine_as_a_runtime_error(threads: Executor) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await offload_async(next, iter(()), executor=threads)


async def test_stop_iteration_reaches_a_job_as_itself(threads: Executor) -> None:
    def job() -> None:
        with pytest.raises(StopIteration):
            offload(next, iter(()), executor=threads)

    await run_job(job)


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


async def test_context_variables_travel_to_threads(
    way: Callable[..., Any], threads: Executor
) -> None:
    variable.set(5)
    assert await way(variable.get, executor=threads) == 5


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
    way: Callable[..., Any], threads: Executor
) -> None:
    threads.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await way(divmod, 7, 2, executor=threads)


def test_broken_process_pool_is_an_error() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        for way in (in_job, in_coroutine):
            with pytest.raises(BrokenProcessPool):
                asyncio.run(way(os._exit, 3, executor=executor))


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
