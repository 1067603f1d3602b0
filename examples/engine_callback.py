"""An engine with a thread of its own, that wakes jobs by their callbacks.

It promises the callback with the status OK, and its jobs ask for the answer in a loop, since
a pause may end early. `run_job` always provides a callback; a loop that has none polls.

Expected output::

    asked: 2
    asked: 3
    asked: 4
    in jobs: [4, 9, 16]
    asked: 5
    outside a job: 25
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from aiojob import Callback, WaitStatus, can_pause, get_wait_ctx, pause_job, run_job


@dataclass
class Request:
    number: int
    callback: tuple[Callback, Any] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    answer: int = 0


requests: SimpleQueue[Request | None] = SimpleQueue()


def serve() -> None:
    """Answer requests, in the engine's thread."""
    while (request := requests.get()) is not None:
        request.answer = request.number**2
        request.done.set()  # before the callback: the job looks at it when it is woken
        if request.callback is not None:
            callback, arg = request.callback
            callback(arg)


def square(number: int) -> int:
    """Ask the engine; pauses in a job, blocks elsewhere."""
    print(f"asked: {number}")
    request = Request(number)
    if not can_pause():
        requests.put(request)
        request.done.wait()
        return request.answer
    ctx = get_wait_ctx()
    request.callback = ctx.get_callback()
    if request.callback is not None:
        ctx.status = WaitStatus.OK
    requests.put(request)
    try:
        while not request.done.is_set():
            pause_job()
    finally:
        ctx.status = WaitStatus.UNSUPPORTED  # promises nothing to the job's next engine
    return request.answer


async def main() -> None:
    print("in jobs:", await asyncio.gather(*(run_job(square, number) for number in (2, 3, 4))))


if __name__ == "__main__":
    engine = threading.Thread(target=serve)
    engine.start()
    try:
        asyncio.run(main())
        print("outside a job:", square(5))
    finally:
        requests.put(None)
        engine.join()
