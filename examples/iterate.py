"""A plain generator whose steps pause, in an ``async for`` loop.

`iterate` runs each step as a job, and the generator's ``finally`` too. `contextlib.aclosing`
has that happen at once when the loop is left early.

Expected output::

    connected
    row 1
    row 2
    row 3
    disconnected
    after the loop
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from itertools import count

from aiojob import await_, iterate


def rows() -> Iterator[str]:
    await_(asyncio.sleep(0.01))  # each sleep stands for I/O
    print("connected")
    try:
        for number in count(1):
            await_(asyncio.sleep(0.01))
            yield f"row {number}"
    finally:
        await_(asyncio.sleep(0.01))
        print("disconnected")


async def main() -> None:
    async with aclosing(iterate(rows())) as stream:
        async for row in stream:
            print(row)
            if row == "row 3":
                break
    print("after the loop")


if __name__ == "__main__":
    asyncio.run(main())
