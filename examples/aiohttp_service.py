"""An aiohttp service on uvloop, with a handler and an object layer that are plain functions.

Attributes that load themselves cannot be awaited; in a job they pause, and the server goes on.

Expected output::

    /users/1: Ada knows Grace
    /users/2: Grace knows Barbara
    /users/3: Barbara knows Ada
"""

from __future__ import annotations

import asyncio

import uvloop
from aiohttp import ClientSession, web

import aiojob

ROWS = {"1": ("Ada", "2"), "2": ("Grace", "3"), "3": ("Barbara", "1")}
NAME, FRIEND = 0, 1
three_queries = asyncio.Barrier(3)


async def select(number: str, column: int) -> str:
    """Stand for a database that answers three queries at a time: no request may block another."""
    await three_queries.wait()
    return ROWS[number][column]


class User:
    def __init__(self, number: str) -> None:
        self.number = number

    @property
    def name(self) -> str:
        return aiojob.await_(select(self.number, NAME))

    @property
    def friend(self) -> User:
        return User(aiojob.await_(select(self.number, FRIEND)))


def user_page(request: web.Request) -> web.Response:
    user = User(request.match_info["number"])
    return web.Response(text=f"{user.name} knows {user.friend.name}")


async def fetch(client: ClientSession, path: str) -> str:
    async with client.get(path) as response:
        return f"{path}: {await response.text()}"


async def main() -> None:
    app = web.Application()
    app.router.add_get("/users/{number}", aiojob.as_coroutine(user_page))
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        async with ClientSession(f"http://{host}:{port}") as client:
            requests = (fetch(client, f"/users/{number}") for number in (1, 2, 3))
            print(*await asyncio.gather(*requests), sep="\n")
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    aiojob.run(main(), loop_factory=uvloop.new_event_loop)
