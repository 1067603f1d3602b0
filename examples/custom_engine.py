"""An engine of about thirty lines: a device with a thread of its own, and a `Completion`.

Expected output::

    given up while the device was off: True
    requests left: 0
    outside a job: 9
    in jobs: [0, 1, 4, 9]
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from queue import SimpleQueue
from typing import Self

from aiojob import Completion, run_job


class Device:
    """Squares numbers, one after the other, in its thread."""

    def __init__(self) -> None:
        self.requests: dict[object, tuple[int, Completion[int]]] = {}
        self._tickets: SimpleQueue[object] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._tickets.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (ticket := self._tickets.get()) is not None:
            if request := self.requests.pop(ticket, None):  # it was not withdrawn
                number, completion = request
                completion.set_result(number**2)

    def square(self, number: int) -> int:
        """Ask the device; pauses in a job, blocks elsewhere."""
        ticket = object()
        completion: Completion[int] = Completion(on_cancel=partial(self.requests.pop, ticket, None))
        self.requests[ticket] = number, completion
        self._tickets.put(ticket)
        return completion.wait()


async def give_up(device: Device) -> None:
    task = asyncio.create_task(run_job(device.square, 7))
    await asyncio.sleep(0)  # it asks
    task.cancel()
    await asyncio.wait([task])
    print("given up while the device was off:", task.cancelled())
    print("requests left:", len(device.requests))


async def main(device: Device) -> None:
    print("in jobs:", await asyncio.gather(*(run_job(device.square, n) for n in range(4))))


if __name__ == "__main__":
    device = Device()
    asyncio.run(give_up(device))
    with device:
        print("outside a job:", device.square(3))
        asyncio.run(main(device))
