"""What happens while a worker takes a step of a handshake: nobody touches the BIOs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

import aiojob
from aiojob import tls
from aiojob.testing import Gate
from aiojob.tls import _acceptor
from aiojob.tls._acceptor import READ_SIZE, RECEIVED_LIMIT
from aiojob.tls._handshake import Handshake
from tls.hostile import (
    client_context,
    client_hello,
    connect,
    server_context,
    serving,
)
from tls.kit import Client, acceptors, address_of, reset, sockets, time_out, until


class Watched:
    """Stands for a BIO or an SSL object of a handshake, and records uses of it."""

    uses: list[str]
    """Those that came while a step was in flight elsewhere."""

    def __init__(self, target: object, handshake: Handshake) -> None:
        self._target, self._handshake = target, handshake

    def __getattr__(self, name: str) -> Any:
        if self._handshake.steps.in_flight:
            self.uses.append(f"{name} in {threading.current_thread().name}")
        return getattr(self._target, name)


class WatchedHandshake(Handshake):
    """A handshake whose parts are watched; what libssl does with them is not."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.incoming: Any = Watched(self.incoming, self)
        self.outgoing: Any = Watched(self.outgoing, self)
        self.ssl_object: Any = Watched(self.ssl_object, self)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of uses while a step is in flight."""
    monkeypatch.setattr(_acceptor, "Handshake", WatchedHandshake)
    monkeypatch.setattr(Watched, "uses", [], raising=False)
    return Watched.uses


async def the_server_closes(server: tls.Server, client: socket.socket) -> None:
    server.close()


async def its_task_is_cancelled(server: tls.Server, client: socket.socket) -> None:
    (acceptor,) = acceptors(server)
    assert acceptor.task is not None
    acceptor.task.cancel()


async def the_time_is_over(server: tls.Server, client: socket.socket) -> None:
    (acceptor,) = acceptors(server)
    time_out(acceptor)


async def the_peer_resets(server: tls.Server, client: socket.socket) -> None:
    reset(client)


async def the_peer_leaves(server: tls.Server, client: socket.socket) -> None:
    client.close()


async def the_peer_sends_no_more(server: tls.Server, client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert await asyncio.get_running_loop().sock_recv(client, 1) == b""


async def junk_and_a_reset(server: tls.Server, client: socket.socket) -> None:
    """Send 300 kB; what the server does not want stays in the kernel's buffers."""
    (acceptor,) = acceptors(server)
    sending = asyncio.ensure_future(
        asyncio.get_running_loop().sock_sendall(client, b"\x16\x03\x03\x40\x00junk!" * 30_000)
    )
    await until(lambda: len(acceptor._received) > RECEIVED_LIMIT)
    assert not acceptor._transport.is_reading()
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(acceptor._received) <= RECEIVED_LIMIT + READ_SIZE
    sending.cancel()
    await asyncio.wait([sending])
    time_out(acceptor)  # its socket is not read: nobody would learn of a reset


Event = Callable[[tls.Server, socket.socket], Awaitable[None]]


@pytest.mark.parametrize(
    "event",
    [
        the_server_closes,
        its_task_is_cancelled,
        the_time_is_over,
        the_peer_resets,
        the_peer_leaves,
        the_peer_sends_no_more,
        junk_and_a_reset,
    ],
)
async def test_nobody_touches_a_step_in_flight_when(event: Event, uses: list[str]) -> None:
    """Its connection is given up at once, whatever its worker does."""
    gate = Gate()
    context = server_context()
    context.sni_callback = tls.sni_callback(lambda *_: gate.wait())
    async with serving(context, "thread") as server:
        before = sockets()
        with await connect(address_of(server)) as client:
            client.send(client_hello())
            await aiojob.run_job(gate.reached)
            await event(server, client)
            await until(lambda: not server.handshakes)
            await until(lambda: sockets() <= before | {client.fileno()})
            assert gate.waiting
            assert uses == []
            gate.open()


async def test_what_comes_while_a_step_is_in_flight_waits_for_its_turn(uses: list[str]) -> None:
    """The second half of the first flight, byte by byte, while the first half is worked on."""
    gate = Gate()
    loop = asyncio.get_running_loop()
    entered: list[bool] = []
    context = server_context()
    do_handshake = context.sslobject_class.do_handshake

    def slow(self: ssl.SSLObject, *args: Any) -> None:
        entered.append(True)
        gate.wait()
        do_handshake(self, *args)

    context.sslobject_class = type("Slow", (context.sslobject_class,), {"do_handshake": slow})
    hello = client_hello()
    async with serving(context, "thread") as server:
        with await connect(address_of(server)) as client:
            client.send(hello[:100])
            await aiojob.run_job(gate.reached)
            (acceptor,) = acceptors(server)
            for i in range(100, len(hello)):
                await loop.sock_sendall(client, hello[i : i + 1])
            await until(lambda: len(acceptor._received) == len(hello) - 100)
            assert uses == []
            gate.open()
            answer = await loop.sock_recv(client, 1)
            assert answer == b"\x16"  # a handshake record: the server's hello
            assert len(entered) == 2
            reset(client)


async def test_the_loop_serves_others_while_steps_are_in_flight() -> None:
    gate = Gate()
    context = server_context()
    context.sni_callback = tls.sni_callback(lambda *_: gate.wait())
    count = 5
    async with serving(context, "thread") as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(client_context())) for _ in range(count)]
        for client in clients:
            await client.connect(address_of(server))
            await client.send(client.flight())
        await aiojob.run_job(gate.reached, count)
        gate.open()
        for client in clients:
            await client.handshake()
            await client.echo()
