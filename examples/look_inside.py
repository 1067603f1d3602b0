"""What paused jobs wait for, and where: an awaitable, an fd, a worker thread.

Expected output::

    3 jobs: 0 running, 3 paused
    <BLANKLINE>
    look_up in MainThread, paused for ... s
      waits for <coroutine object sleep at 0x...>
        File "...look_inside.py", line ..., in look_up
          aiojob.await_(asyncio.sleep(60))
    <BLANKLINE>
    report in MainThread, paused for ... s
      waits for fd ... (key 'database')
        File "...look_inside.py", line ..., in report
          query(fd)
        File "...look_inside.py", line ..., in query
          aiojob.pause_job()
    <BLANKLINE>
    shrink in MainThread, paused for ... s
      waits for <Future pending cb=[Task.task_wakeup()]...>
        File "...look_inside.py", line ..., in shrink
          aiojob.offload(done.wait)
    Stats(started=3, finished=0, failed=0, cancelled=3, pauses=3, running=0, paused=0, ...)
"""

import asyncio
import os
import threading

import aiojob


def look_up() -> None:
    aiojob.await_(asyncio.sleep(60))


def report(fd: int) -> None:
    query(fd)


def query(fd: int) -> None:
    aiojob.get_wait_ctx().set_wait_fd("database", fd)
    aiojob.pause_job()


def shrink(done: threading.Event) -> None:
    aiojob.offload(done.wait)


async def main() -> None:
    reader, writer = os.pipe()
    done = threading.Event()
    jobs = [
        asyncio.create_task(aiojob.run_job(look_up)),
        asyncio.create_task(aiojob.run_job(report, reader)),
        asyncio.create_task(aiojob.run_job(shrink, done)),
    ]
    await asyncio.sleep(0)
    aiojob.print_jobs()
    for job in jobs:
        job.cancel()
    await asyncio.wait(jobs)
    print(aiojob.stats())
    done.set()
    os.close(reader)
    os.close(writer)


asyncio.run(main())
