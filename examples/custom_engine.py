"""An engine of about thirty lines: a device with a thread of its own, and a `Completion`.

Expected output::

    outside a job: 9
    in jobs: [0, 1, 4, 9]
    cancelled in time: True
    aborted: 1
"""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue
from typing import Self

from aiojob import Completion, run_job


class Device:
    """Squares numbers, one after the other, in its thread."""

    def __init__(self) -> None:
        self.aborted = 0
        self._requests: SimpleQueue[tuple[int, Completion[int]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            number, completion = request
            if number >= 0:  # it never answers for others
                completion.set_result(number**2)

    def square(self, number: int) -> int:
        """Ask the device; pauses in a job, blocks elsewhere."""
        completion: Completion[int] = Completion(on_cancel=self._abort)
        self._requests.put((number, completion))
        return completion.wait()

    def _abort(self) -> None:
        self.aborted += 1


async def main(device: Device) -> None:
    print("in jobs:", await asyncio.gather(*(run_job(device.square, n) for n in range(4))))
    try:
        async with asyncio.timeout(0.05):
            await run_job(device.square, -1)
    except TimeoutError:
        print("cancelled in time:", True)


if __name__ == "__main__":
    with Device() as device:
        print("outside a job:", device.square(3))
        asyncio.run(main(device))
    print("aborted:", device.aborted)
