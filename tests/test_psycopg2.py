"""Plain synchronous psycopg2 code in jobs, by the example's wait callback, on a real server."""

from __future__ import annotations

import asyncio
import runpy
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg2")

import psycopg2
from psycopg2.extensions import connection, set_wait_callback

from aiojob import pause_blocked, run_job

EXAMPLE = Path(__file__).parents[1] / "examples" / "psycopg2_queries.py"
CONNECTIONS = 200
LOCK = 77


@pytest.fixture(autouse=True)
def _pausing_psycopg2() -> Iterator[None]:
    set_wait_callback(runpy.run_path(str(EXAMPLE))["wait"])
    yield
    set_wait_callback(None)


def query(dsn: str, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall()


async def test_queries_in_jobs_are_all_under_way_at_once_on_one_thread(postgres: str) -> None:
    """Each waits for a lock that is released when the server says that all of them wait."""
    threads = threading.active_count()
    with closing(psycopg2.connect(postgres)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        sql = "SELECT pg_advisory_lock_shared(%s), %s::int"
        jobs = [
            asyncio.create_task(run_job(query, postgres, sql, LOCK, number))
            for number in range(CONNECTIONS)
        ]
        waiting = 0
        while waiting < CONNECTIONS:
            await run_job(
                cursor.execute,
                "SELECT count(*) FROM pg_locks WHERE objid = %s AND NOT granted",
                (LOCK,),
            )
            ((waiting,),) = cursor.fetchall()
            for job in filter(asyncio.Task.done, jobs):
                job.result()  # none can be done but by an error
        assert threading.active_count() <= threads
        cursor.execute("SELECT pg_advisory_unlock(%s)", (LOCK,))
        results = await asyncio.gather(*jobs)
    assert [number for ((_, number),) in results] == [*range(CONNECTIONS)]


def test_the_same_code_blocks_outside_a_job(postgres: str) -> None:
    assert query(postgres, "SELECT 6 * 7, pg_sleep(0.01)")[0][0] == 42


async def test_the_same_code_blocks_where_pausing_is_blocked(postgres: str) -> None:
    def job() -> Any:
        with pause_blocked():
            return query(postgres, "SELECT 6 * 7, pg_sleep(0.01)")[0][0]

    assert await run_job(job) == 42


async def test_error_of_the_server_is_raised_in_the_job(postgres: str) -> None:
    def job() -> int:
        with closing(psycopg2.connect(postgres)) as conn, conn.cursor() as cursor:
            with pytest.raises(psycopg2.errors.DivisionByZero):
                cursor.execute("SELECT 1 / 0")
            conn.rollback()
            cursor.execute("SELECT 1")
            ((one,),) = cursor.fetchall()
            return int(one)

    assert await run_job(job) == 1


async def test_large_parameters_and_results_pass(postgres: str) -> None:
    text = "aiojob " * 2_000_000  # more than the sockets' buffers take
    ((length, back),) = await run_job(query, postgres, "SELECT length(%s), %s", text, text)
    assert (length, back) == (len(text), text)


async def test_cancelled_query_closes_its_connection_and_leaves_others_alone(
    postgres: str,
) -> None:
    connections: list[connection] = []

    def job() -> None:
        conn = psycopg2.connect(postgres)
        connections.append(conn)
        with closing(conn), conn.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(300)")

    task = asyncio.create_task(run_job(job))
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    while not (
        connections
        and (connections[0].info.backend_pid,) in await run_job(query, postgres, sleeping)
    ):
        await asyncio.sleep(0)
    pid = connections[0].info.backend_pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connections[0].closed
    # The server notices only when the query ends.
    await run_job(query, postgres, "SELECT pg_terminate_backend(%s)", pid)
    assert await run_job(query, postgres, "SELECT 1") == [(1,)]
