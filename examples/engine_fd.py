"""An engine that wakes jobs by a file descriptor, as OpenSSL's documentation advises.

It keeps one fd for as long as the wait context lives, and finds it again by its key. Where
there is no job to pause, the same function blocks.

Expected output::

    Outside a job:
      signal opened
      signal closed
      secret: 2d4df0b3b309b13f
    Two jobs of a session:
      signal opened
      swordfish: dde18d7668657118
      letmein: de156e612720b962
      signal closed
"""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import pbkdf2_hmac

from aiojob import Session, WaitCtx, can_pause, get_current_job, get_wait_ctx, pause_job

KEY = object()  # this engine's
ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd reads and writes; a pipe takes it as well
worker = ThreadPoolExecutor(1)


def signal_of(ctx: WaitCtx) -> tuple[int, int]:
    """Return the fd that wakes the context's job, and the fd to write to for that."""
    known = ctx.get_fd(KEY)
    if known is not None:
        return known
    if hasattr(os, "eventfd"):
        read_fd = write_fd = os.eventfd(0)
    else:
        read_fd, write_fd = os.pipe()
    print("  signal opened")
    ctx.set_wait_fd(KEY, read_fd, write_fd, close_signal)
    return read_fd, write_fd


def close_signal(ctx: WaitCtx, key: object, read_fd: int, write_fd: int) -> None:
    for fd in {read_fd, write_fd}:
        os.close(fd)
    print("  signal closed")


def derive_key(password: str) -> str:
    """Have the worker derive a key; pauses in a job, blocks elsewhere."""
    if get_current_job() is not None:
        return derive_key_on(get_wait_ctx(), password)
    with WaitCtx() as ctx:
        return derive_key_on(ctx, password)


def derive_key_on(ctx: WaitCtx, password: str) -> str:
    read_fd, write_fd = signal_of(ctx)
    future = worker.submit(pbkdf2_hmac, "sha256", password.encode(), b"salt", 10_000, 8)
    future.add_done_callback(lambda _: os.write(write_fd, ONE))
    try:
        while not future.done() and can_pause():
            pause_job()
    finally:
        # Clears the signal, and first waits for it where the loop did not: without a job, or when
        # the job is cancelled. The worker must not write to an fd that is closed by then.
        os.read(read_fd, len(ONE))
    return future.result().hex()


async def main() -> None:
    print("Two jobs of a session:")
    async with Session() as session:
        for password in ("swordfish", "letmein"):
            print(f"  {password}: {await session.run_job(derive_key, password)}")


if __name__ == "__main__":
    print("Outside a job:")
    print(f"  secret: {derive_key('secret')}")
    asyncio.run(main())
