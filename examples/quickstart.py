"""Plain functions that pause: while one waits, the others run, in one thread.

Expected output::

    Rome: asking
    Oslo: asking
    Lima: asking
    Rome: answered
    Oslo: answered
    Lima: answered
    ['ROME', 'OSLO', 'LIMA']
"""

from __future__ import annotations

import asyncio

from aiojob import await_, run_job


def look_up(city: str) -> str:
    print(f"{city}: asking")
    await_(asyncio.sleep(0.1))  # stands for a query: any awaitable, in a plain function
    print(f"{city}: answered")
    return city.upper()


def report(city: str) -> str:
    return look_up(city)  # callers in between need not know


async def main() -> None:
    print(await asyncio.gather(*(run_job(report, city) for city in ("Rome", "Oslo", "Lima"))))


if __name__ == "__main__":
    asyncio.run(main())
