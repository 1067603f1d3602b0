"""Handshakes whose step is under way in a worker thread when something happens to them."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from typing import Any

import pytest

from aiojob import tls
from aiojob.testing import Gate
from tls.kit import (
    PATIENCE,
    Client,
    Echo,
    Kind,
    Recorders,
    address_of,
    case,
    sockets,
    until,
)

pytestmark = pytest.mark.parametrize("kind", ["thread-rebind"], indirect=True)


@pytest.fixture
def gate(server_context: ssl.SSLContext) -> Gate:
    """Holds every step with a client's hello in its worker, inside ``do_handshake``."""
    gate = Gate()

    def wait_in_worker(*args: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        gate.wait(PATIENCE)

    server_context.sni_callback = tls.sni_callback(wait_in_worker)
    return gate


async def fin(client: Client) -> None:
    client.send_with_fin(b"")


async def reset(client: Client) -> None:
    client.reset()


async def junk_and_reset(client: Client) -> None:
    with pytest.raises(TimeoutError):  # nobody reads it
        async with asyncio.timeout(0.05):
            await client.send(bytes(10_000_000))
    client.reset()


async def silence(client: Client) -> None:
    pass


async def test_a_step_that_nobody_waits_for_goes_on_alone(
    kind: Kind, gate: Gate, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """The connection is given up at once, whatever its worker does."""
    recorders = Recorders(Echo)
    endings: list[Callable[[Client], Any]] = [fin, reset, junk_and_reset, silence]
    async with kind.serving(recorders, server_context, ssl_handshake_timeout=0.5) as address:
        before = sockets()
        for number, end in enumerate(endings):
            with case(end):
                async with Client(client_context) as client:
                    await client.connect(address)
                    await client.send(client.flight())
                    await until(lambda: gate.waiting > number)  # noqa: B023
                    await end(client)
                    if end is fin or end is silence:
                        await client.end_of_stream()
                await until(lambda: sockets() <= before)
        assert gate.waiting == len(endings)
        gate.open()
        await until(lambda: not gate.waiting)
        async with Client(client_context) as client:
            await client.connect(address)
            await client.handshake()
            await client.echo()
    assert len(recorders) == 1


async def test_closing_the_server_does_not_wait_for_a_worker(
    kind: Kind, gate: Gate, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    server = await kind.create_server(recorders, server_context)
    async with Client(client_context) as client, asyncio.timeout(PATIENCE):
        await client.connect(address_of(server))
        await client.send(client.flight())
        await until(lambda: gate.waiting)
        server.close()
        await server.wait_closed()
        await client.end_of_stream()
        assert gate.waiting
        gate.open()
    assert not recorders


async def test_what_comes_while_a_step_is_under_way_waits_for_the_next(
    kind: Kind, gate: Gate, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """The worker alone has the BIOs meanwhile."""
    async with kind.serving(Echo, server_context) as address, Client(client_context) as client:
        await client.connect(address)
        await client.send(client.flight())
        await until(lambda: gate.waiting)
        await client.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        await asyncio.sleep(0.01)  # enough for the server to read it
        gate.open()
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            await client.handshake()
            await client.read()


async def test_the_loop_serves_others_while_steps_are_under_way(
    kind: Kind, gate: Gate, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    count = 5
    async with kind.serving(Echo, server_context) as address:
        clients = [Client(client_context) for _ in range(count)]
        for client in clients:
            await client.connect(address)
            await client.send(client.flight())
        await until(lambda: gate.waiting == count)
        gate.open()
        for client in clients:
            await client.handshake()
            await client.echo()
            client.reset()
