"""Work in other threads, from the middle of a synchronous call stack.

The same function runs in jobs, many at a time, and outside a job, where it blocks. What comes of
concurrent work is printed when all of it is done.

Expected output::

    outside a job: f0189f06dcf03ac1
    in jobs: ['f0189f06dcf03ac1', '54d6fd685c052e89', '0b8be5d6ff77ddf6']
    the loop went on meanwhile: True
    in a coroutine: f0189f06dcf03ac1
"""

from __future__ import annotations

import asyncio
from hashlib import pbkdf2_hmac

from aiojob import offload, offload_async, run_job


def stretch(password: str) -> bytes:
    return pbkdf2_hmac("sha256", password.encode(), b"salt", 200_000, 8)


def log_in(password: str) -> str:
    """Synchronous code, which need not know who calls it."""
    return offload(stretch, password).hex()


async def count_iterations(counted: list[int]) -> None:
    while True:
        await asyncio.sleep(0.001)
        counted[0] += 1


async def main() -> None:
    counted = [0]
    counting = asyncio.create_task(count_iterations(counted))
    passwords = ("rosebud", "swordfish", "letmein")
    print("in jobs:", await asyncio.gather(*(run_job(log_in, one) for one in passwords)))
    print("the loop went on meanwhile:", counted[0] > 0)
    counting.cancel()
    print("in a coroutine:", (await offload_async(stretch, "rosebud")).hex())


if __name__ == "__main__":
    print("outside a job:", log_in("rosebud"))
    asyncio.run(main())
