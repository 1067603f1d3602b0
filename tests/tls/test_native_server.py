"""Servers with handshake="openssl", an engine that pauses natively, and clients that leave."""

from __future__ import annotations

import asyncio
import gc
import random
import select
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

from aiojob import LibsslUnavailableError, tls
from aiojob.tls._acceptor import RECEIVED_LIMIT
from aiojob.tls._native import abandoned
from tls.kit import acceptors, reset, time_out, until
from tls.native_engine import NativeEngine


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def serving(context: ssl.SSLContext, **options: Any) -> AsyncIterator[tls.Server]:
    server = await tls.start_server(
        echo, "127.0.0.1", 0, ssl=context, handshake="openssl", **options
    )
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


async def say_hello(server: tls.Server, context: ssl.SSLContext) -> str | None:
    """Be a client; return the version of TLS that it was."""
    host, port = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(
        host, port, ssl=context, server_hostname="localhost"
    )
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    version: str = writer.get_extra_info("ssl_object").version()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return version


@contextmanager
def client_in_mid_handshake(server: tls.Server, context: ssl.SSLContext) -> Iterator[socket.socket]:
    """Connect, and send a ClientHello."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    with socket.create_connection(server.sockets[0].getsockname()) as sock:
        sock.sendall(outgoing.read())
        sock.setblocking(False)
        yield sock


@pytest.mark.parametrize("uses_fds", [True, False], ids=["fds", "polled"])
async def test_handshakes_overlap_in_the_engine(
    engine: NativeEngine,
    engine_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    version: str,
    uses_fds: bool,
) -> None:
    engine.use_fds(uses_fds)
    engine.hold()
    async with serving(engine_context) as server:
        clients = [asyncio.create_task(say_hello(server, client_context)) for _ in range(16)]
        await engine.reached(len(clients))
        assert server.handshakes == len(clients)
        engine.release()
        assert set(await asyncio.gather(*clients)) == {version}
    assert engine.counts.most_in_flight == len(clients)
    assert engine.counts.finished == len(clients)
    assert engine.counts.in_place == 0


def shut_down(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def peer_resets(sock: socket.socket, server: tls.Server) -> None:
    reset(sock)


def peer_shuts_down(sock: socket.socket, server: tls.Server) -> None:
    shut_down(sock)


def time_is_over(sock: socket.socket, server: tls.Server) -> None:
    (acceptor,) = acceptors(server)
    time_out(acceptor)


def server_closes(sock: socket.socket, server: tls.Server) -> None:
    server.close()


@pytest.mark.parametrize("leave", [peer_resets, peer_shuts_down, time_is_over, server_closes])
async def test_native_job_ends_though_its_connection_has(
    engine: NativeEngine,
    engine_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    leave: Callable[[socket.socket, tls.Server], None],
) -> None:
    engine.hold()
    async with serving(engine_context) as server:
        with client_in_mid_handshake(server, client_context) as sock:
            await engine.reached(1)
            leave(sock, server)
            await until(lambda: not server.handshakes)
            assert len(abandoned) == 1
            with ExitStack() as stack:
                # Those that open files now must not get what the engine writes.
                pairs = [stack.enter_context(new_pair()) for _ in range(20)]
                engine.release()
                await until(lambda: not abandoned)
                here = [pair[0] for pair in pairs]
                assert select.select(here, [], [], 0) == ([], [], [])
    assert engine.counts.finished == 1
    assert engine.counts.orphans == 0


@contextmanager
def new_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


async def test_native_jobs_that_others_leave_do_not_disturb_a_connection(
    engine: NativeEngine, engine_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with serving(engine_context) as server:
        for _ in range(10):
            engine.hold()
            with ExitStack() as stack:
                socks = [
                    stack.enter_context(client_in_mid_handshake(server, client_context))
                    for _ in range(10)
                ]
                stays = asyncio.create_task(say_hello(server, client_context))
                await engine.reached(11)
                for sock in socks[::2]:
                    reset(sock)
                await until(lambda: len(abandoned) == 5)
                engine.release()
                await stays
                await until(lambda: not abandoned)
        await until(lambda: not server.handshakes and not abandoned)
    assert engine.counts.finished == 110
    assert engine.counts.orphans == 0


async def test_clients_may_leave_at_any_moment(
    engine: NativeEngine, engine_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    asyncio.get_running_loop().set_debug(False)  # which takes most of the time
    moments = random.Random(1)
    engine.take(0.002)

    async def leave(sock: socket.socket) -> None:
        await asyncio.sleep(moments.uniform(0, 0.01))
        moments.choice([reset, shut_down])(sock)

    async with serving(engine_context) as server:
        for _ in range(3):
            with ExitStack() as stack:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(20):
                        sock = stack.enter_context(client_in_mid_handshake(server, client_context))
                        tasks.create_task(leave(sock))
                        tasks.create_task(say_hello(server, client_context))
        await until(lambda: not server.handshakes and not abandoned)
    assert engine.counts.in_flight == 0
    assert engine.counts.orphans == 0


async def test_junk_behind_a_client_hello_fails_after_the_native_job(
    engine: NativeEngine, engine_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    engine.hold()
    async with serving(engine_context) as server:
        with client_in_mid_handshake(server, client_context) as sock:
            await engine.reached(1)
            loop = asyncio.get_running_loop()
            junk = asyncio.create_task(loop.sock_sendall(sock, bytes(300_000)))
            (acceptor,) = acceptors(server)
            await until(lambda: len(acceptor._received) > RECEIVED_LIMIT)
            assert server.handshakes == 1
            engine.release()
            await until(lambda: not server.handshakes)
            with suppress(OSError):
                await junk
            with suppress(ConnectionResetError):
                while await loop.sock_recv(sock, 65536):
                    pass
    assert not abandoned
    assert engine.counts.finished == 1


async def test_connections_and_native_jobs_are_freed(
    engine: NativeEngine, engine_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with serving(engine_context) as server:
        for _ in range(3):
            engine.hold()
            with client_in_mid_handshake(server, client_context) as sock:
                await engine.reached(1)
                reset(sock)
                await until(lambda: abandoned)
            engine.release()
            await until(lambda: not abandoned)
            await say_hello(server, client_context)
        await until(lambda: not ssl_objects_of(engine_context))


def ssl_objects_of(context: ssl.SSLContext) -> list[ssl.SSLObject]:
    gc.collect()
    return [
        tracked
        for tracked in gc.get_objects()
        if type(tracked) is ssl.SSLObject and tracked.context is context
    ]


async def test_context_with_a_callback_is_refused(engine_context: ssl.SSLContext) -> None:
    engine_context.sni_callback = lambda *_: None
    with pytest.raises(LibsslUnavailableError, match="sni_callback is set"):
        await tls.create_server(
            asyncio.Protocol, "127.0.0.1", 0, ssl=engine_context, handshake="openssl"
        )


async def test_connection_is_refused_if_a_callback_was_set_later(
    engine_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
    async with serving(engine_context) as server:
        await say_hello(server, client_context)
        engine_context.sni_callback = lambda *_: pytest.fail("it was called")
        with client_in_mid_handshake(server, client_context) as sock, suppress(OSError):
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        engine_context.sni_callback = None
        await say_hello(server, client_context)
    (report,) = reports
    assert isinstance(report["exception"], LibsslUnavailableError)
