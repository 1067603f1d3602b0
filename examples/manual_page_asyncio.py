"""The manual page's job in a coroutine: `run_job` is the loop that `manual_page.py` wrote by hand.

The job is the same. The wait context, the job handle, the statuses and the select call
are not the application's any more, and the event loop serves others during the pause.

Expected output::

    Starting...
    Executing within a job
    Passed in message is: Hello world!
    Somebody else was served
    Resumed the job after a pause
    Job finished with return value 1
    Finishing
"""

from __future__ import annotations

import asyncio

from manual_page import jobfunc

from aiojob import run_job


async def main() -> None:
    print("Starting...")
    asyncio.get_running_loop().call_soon(print, "Somebody else was served")
    ret = await run_job(jobfunc, "Hello world!")
    print(f"Job finished with return value {ret}")
    print("Finishing")


if __name__ == "__main__":
    asyncio.run(main())
