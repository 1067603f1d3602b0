"""Synchronous psycopg2 code that pauses: hundreds of queries at a time, on one thread.

psycopg2 calls a function of ours whenever it would wait for the server. In a job that function
pauses; elsewhere it blocks, and so does the very same code. The server's address is in the
environment variable AIOJOB_POSTGRES, such as "host=127.0.0.1 user=me dbname=postgres".

Expected output::

    outside a job: 1 query, answer 42
    in jobs: 50 queries of 1 s each, answers right
    sooner than the 50 s of one after another: True
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, connection, set_wait_callback

from aiojob import run_job, wait_readable, wait_writable


def wait(conn: connection) -> None:
    while (state := conn.poll()) != POLL_OK:
        if state == POLL_READ:
            wait_readable(conn)
        else:
            wait_writable(conn)


def multiply(number: int, factor: int, seconds: float) -> int:
    """Ordinary database code: it knows nothing of jobs."""
    with closing(psycopg2.connect(os.environ["AIOJOB_POSTGRES"])) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT %s * %s, pg_sleep(%s)", (number, factor, seconds))
        (product, _), *_ = cursor.fetchall()
        return int(product)


async def main() -> None:
    begin = time.monotonic()
    numbers = range(50)
    answers = await asyncio.gather(*(run_job(multiply, number, 2, 1) for number in numbers))
    assert answers == [2 * number for number in numbers]
    print(f"in jobs: {len(answers)} queries of 1 s each, answers right")
    print("sooner than the 50 s of one after another:", time.monotonic() - begin < 50)


if __name__ == "__main__":
    set_wait_callback(wait)
    print("outside a job: 1 query, answer", multiply(6, 7, 0))
    asyncio.run(main())
