"""The server object: asyncio's, and what is said of it in asyncio's documentation."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from aiojob import tls
from tls.kit import (
    PATIENCE,
    Client,
    Echo,
    Kind,
    Recorder,
    Recorders,
    address_of,
    until,
)

SERVERS = ["reference", "loop-rebind"]
servers = pytest.mark.parametrize("kind", SERVERS, indirect=True)
ours = pytest.mark.parametrize("kind", ["loop-rebind"], indirect=True)


async def is_served(address: tuple[str, int], client_context: ssl.SSLContext) -> bool:
    async with Client(client_context) as client:
        try:
            await client.connect(address)
        except ConnectionRefusedError:
            return False
        await client.handshake()
        await client.echo()
        await client.send(client.close_notify())
        await client.end_of_stream()
    return True


@servers
async def test_a_server_serves_from_the_start_until_it_is_closed(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server = await kind.create_server(Echo, server_context)
    (sock,) = server.sockets
    address = sock.getsockname()
    assert server.get_loop() is asyncio.get_running_loop()
    assert server.is_serving()
    assert await is_served(address, client_context)
    server.close()
    server.close()
    assert not server.is_serving()
    assert not server.sockets
    await asyncio.wait_for(server.wait_closed(), PATIENCE)
    assert not await is_served(address, client_context)


@servers
async def test_a_server_can_be_told_to_start_later(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server = await kind.create_server(Echo, server_context, start_serving=False)
    assert not server.is_serving()
    await server.start_serving()
    await server.start_serving()
    assert server.is_serving()
    assert await is_served(address_of(server), client_context)
    server.close()
    await server.wait_closed()


@servers
async def test_a_server_is_closed_at_the_end_of_its_block(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with asyncio.timeout(PATIENCE):
        async with await kind.create_server(Echo, server_context) as server:
            address = address_of(server)
            assert await is_served(address, client_context)
        assert not server.is_serving()


@ours
@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_serve_forever_ends_with_the_server(
    kind: Kind, how: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """As asyncio's does; uvloop's goes on for ever when its server is closed."""
    server = await kind.create_server(Echo, server_context, start_serving=False)
    address = address_of(server)
    forever = asyncio.create_task(server.serve_forever())
    await until(server.is_serving)
    assert await is_served(address, client_context)
    with pytest.raises(RuntimeError):
        await server.serve_forever()
    if how == "cancelled":
        forever.cancel()
    else:
        server.close()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await forever
    assert not server.is_serving()
    with pytest.raises(RuntimeError):
        await server.serve_forever()


@servers
async def test_a_server_takes_a_socket(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        server = await kind.create_server(Echo, server_context, host=None, port=None, sock=sock)
        assert await is_served(address, client_context)
        server.close()
        await server.wait_closed()


@servers
async def test_a_server_listens_on_several_addresses(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server = await kind.create_server(Echo, server_context, host=["127.0.0.1", "127.0.0.2"])
    assert len(server.sockets) == 2
    for sock in server.sockets:
        assert await is_served(sock.getsockname(), client_context)
    server.close()
    await server.wait_closed()


@servers
async def test_an_address_that_is_taken_is_an_os_error(
    kind: Kind, server_context: ssl.SSLContext
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(OSError):
        await kind.create_server(Echo, server_context, port=sock.getsockname()[1])


@ours
async def test_wait_closed_waits_as_long_as_that_of_the_loops_own_server(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """From Python 3.12 on asyncio's waits for the connections; uvloop's never does."""

    async def waits(kind: Kind) -> bool:
        recorders = Recorders(Echo)
        server = await kind.create_server(recorders, server_context)
        async with Client(client_context) as client:
            await client.connect(address_of(server))
            await client.handshake()
            await client.echo()
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            await client.echo()
        await recorders[0].lost()
        await asyncio.wait_for(waiting, PATIENCE)
        return not done

    assert await waits(kind) is await waits(Kind())


@ours
@pytest.mark.parametrize("method", ["close_clients", "abort_clients"])
async def test_a_server_closes_its_clients_where_the_loops_own_can(
    kind: Kind, method: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    if not hasattr(asyncio.Server, method):
        pytest.skip("asyncio's servers can from Python 3.13 on")
    recorders = Recorders(Echo)
    server = await kind.create_server(recorders, server_context)
    async with Client(client_context) as client:
        await client.connect(address_of(server))
        await client.handshake()
        await client.echo()
        try:
            getattr(server, method)()
        except AttributeError:
            assert "uvloop" in type(asyncio.get_running_loop()).__module__
        else:
            await client.end_of_stream()
        server.close()
    await recorders[0].lost()
    await asyncio.wait_for(server.wait_closed(), PATIENCE)


@ours
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ssl": None}, TypeError, "SSLContext"),
        ({"ssl": True}, TypeError, "SSLContext"),
        ({"ssl_handshake_timeout": 0}, ValueError, "ssl_handshake_timeout"),
        ({"ssl_handshake_timeout": -1}, ValueError, "ssl_handshake_timeout"),
        ({"ssl_handshake_timeout": float("nan")}, ValueError, "ssl_handshake_timeout"),
        ({"ssl_handshake_timeout": "1"}, TypeError, "ssl_handshake_timeout.*seconds, got '1'"),
        ({"ssl_shutdown_timeout": 0}, ValueError, "ssl_shutdown_timeout"),
        ({"ssl_shutdown_timeout": "1"}, TypeError, "ssl_shutdown_timeout.*seconds, got '1'"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
async def test_wrong_arguments_are_refused_before_anything_is_listened_on(
    kind: Kind,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    server_context: ssl.SSLContext,
) -> None:
    with pytest.raises(error, match=message):
        await kind.create_server(Recorder, server_context, **options)


async def test_an_unknown_strategy_is_refused(server_context: ssl.SSLContext) -> None:
    with pytest.raises(ValueError, match="'fibre'"):
        await tls.create_server(
            Recorder,
            "127.0.0.1",
            0,
            ssl=server_context,
            handshake="fibre",  # type: ignore[arg-type]
        )


async def test_a_context_for_clients_is_refused(client_context: ssl.SSLContext) -> None:
    with pytest.raises(ssl.SSLError):
        await tls.create_server(Recorder, "127.0.0.1", 0, ssl=client_context)


@pytest.mark.parametrize("handshake", [None, 5, ["loop"]])
async def test_what_is_no_strategy_is_refused(
    handshake: Any, server_context: ssl.SSLContext
) -> None:
    with pytest.raises(ValueError, match=r"must be one of 'loop', 'thread', 'openssl', got"):
        await tls.create_server(Recorder, "", 0, ssl=server_context, handshake=handshake)


async def test_what_would_fail_at_each_connection_is_refused_at_once(
    server_context: ssl.SSLContext,
) -> None:
    wrong: Any = None
    with pytest.raises(TypeError, match=r"callable as protocol_factory\(\), got None"):
        await tls.create_server(wrong, "127.0.0.1", 0, ssl=server_context)
    with pytest.raises(TypeError, match=r"client_connected_cb\(reader, writer\), got None"):
        await tls.start_server(wrong, "127.0.0.1", 0, ssl=server_context)
    for limit, error in ((0, ValueError), (-1, ValueError), (None, TypeError), ("1", TypeError)):
        wrong = limit
        with pytest.raises(error, match="limit must be"):
            await tls.start_server(print, "127.0.0.1", 0, ssl=server_context, limit=wrong)


class SlowToStart:
    """A server of the loop's that takes its time, as asyncio's does, to start serving."""

    def __init__(self, server: Any) -> None:
        self._server = server

    async def start_serving(self) -> None:
        await self._server.start_serving()
        await asyncio.sleep(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


@ours
async def test_serve_forever_ends_with_a_server_that_is_closed_as_it_starts(
    kind: Kind, server_context: ssl.SSLContext
) -> None:
    server = await kind.create_server(Echo, server_context, start_serving=False)
    server._server = SlowToStart(server._server)
    forever = asyncio.create_task(server.serve_forever())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="already being awaited"):
        await server.serve_forever()
    server.close()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await forever
    assert not server.is_serving()


@ours
async def test_no_timeout_is_the_default_one(kind: Kind, server_context: ssl.SSLContext) -> None:
    server = await kind.create_server(Echo, server_context, ssl_handshake_timeout=None)
    assert server._listener.handshake_timeout == 60
    server.close()
    await server.wait_closed()
