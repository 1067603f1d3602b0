"""What the application has after the hand-over: a transport like that of the loop's own server."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import ssl
from contextvars import ContextVar
from typing import Any

import pytest

from tls.kit import (
    HANDOVERS,
    PATIENCE,
    Address,
    Client,
    Echo,
    Kind,
    Recorder,
    Recorders,
    Recording,
    address_of,
    in_thread,
    until,
)

pytestmark = pytest.mark.parametrize("kind", HANDOVERS, indirect=True)


class BufferedEcho(Recording, asyncio.BufferedProtocol):
    """Sends back what it gets in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = memoryview(bytearray(1000))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))
        self.transport.write(bytes(self.buffer[:nbytes]))


@pytest.mark.parametrize("early", [b"", b"early"])
async def test_a_buffered_protocol_gets_its_data_in_its_buffer(
    kind: Kind, early: bytes, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(BufferedEcho)
    data = random.Random(1).randbytes(50_000)
    async with kind.connected(recorders, server_context, client_context) as client:
        flight = await client.last_flight()
        await client.send(flight + (client.sealed(early) if early else b""))
        assert await client.read_exactly(len(early)) == early
        await client.echo(data)
        await client.send(client.close_notify())
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.events == [("made",), early + data, ("eof",), ("lost", type(None))]


# -- streams


async def test_streams_serve_lines_to_a_client_of_streams(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line.upper())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await kind.start_server(shout, server_context)
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(
            *address_of(server), ssl=client_context, server_hostname="localhost"
        )
        for line in (b"first\n", b"x" * 20_000 + b"\n"):
            writer.write(line)
            assert await reader.readline() == line.upper()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()


async def test_streams_have_the_limit_that_was_asked_for(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    overrun: list[type[Exception]] = []

    async def read_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readline()
        except ValueError as error:
            overrun.append(type(error))
        writer.write(b"done\n")
        writer.close()

    server = await kind.start_server(read_line, server_context, limit=100)
    async with Client(client_context) as client:
        await client.connect(address_of(server))
        await client.handshake()
        await client.write(bytes(500))
        assert await client.read_exactly(5) == b"done\n"
        server.close()
        assert await client.read() == b""
    assert overrun == [ValueError]


async def test_a_plain_function_serves_streams_too(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await kind.start_server(greet, server_context)
    async with Client(client_context) as client:
        await client.connect(address_of(server))
        await client.handshake()
        assert await client.read_exactly(5) == b"hello"
        server.close()
        assert await client.read() == b""


# -- flow control


class PausedAtFirst(Recorder):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        assert not self.transport.is_reading()


@pytest.mark.parametrize("early", [False, True], ids=["", "early data"])
async def test_a_protocol_that_pauses_reading_in_connection_made_gets_nothing_until_it_resumes(
    kind: Kind, early: bool, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(PausedAtFirst)
    async with kind.connected(recorders, server_context, client_context) as client:
        flight = await client.last_flight()
        await client.send(flight + (client.sealed(b"early ") if early else b""))
        recorder = await recorders.first()
        await client.write(b"late")
        await client.send(client.close_notify())
        for _ in range(10):
            await asyncio.sleep(0.001)  # time enough for what must not happen
        assert recorder.events == [("made",)]
        recorder.transport.resume_reading()
        assert recorder.transport.is_reading()
        await until(lambda: recorder.received == (b"early late" if early else b"late"))
        await recorder.lost()
        assert recorder.names == ["made", recorder.received, "eof", "lost"]


async def test_a_protocol_that_does_not_read_stops_its_peer(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    total = 5_000_000
    async with (
        kind.serving(recorders, server_context) as address,
        Client(client_context) as client,
    ):
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        await client.connect(address)
        await client.handshake()
        transport = (await recorders.first()).transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        transport.pause_reading()
        sending = asyncio.create_task(client.write(bytes(total)))
        _, pending = await asyncio.wait([sending], timeout=0.1)
        assert pending
        transport.resume_reading()
        await sending
        await until(lambda: len(recorders[0].received) == total)


async def test_a_peer_that_does_not_read_pauses_the_protocol_at_its_limits(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class Measuring(Recorder):
        """Records how much waits to be written when it is paused and resumed."""

        def pause_writing(self) -> None:
            self.events.append(("pause", self.transport.get_write_buffer_size()))

        def resume_writing(self) -> None:
            self.events.append(("resume", self.transport.get_write_buffer_size()))

    recorders = Recorders(Measuring)
    async with kind.client(recorders, server_context, client_context) as client:
        recorder = await recorders.first()
        transport = recorder.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        transport.set_write_buffer_limits(high=200_000, low=100_000)
        written = 0
        while "pause" not in recorder.names:
            transport.write(bytes(10_000))
            written += 10_000
            await asyncio.sleep(0)
        await client.read_exactly(written)
        await until(lambda: "resume" in recorder.names)
        (_, (paused, high), (resumed, low)) = recorder.events
        assert (paused, resumed) == ("pause", "resume")
        assert high >= 200_000
        assert low <= 100_000


async def test_a_protocol_can_write_more_than_its_limits_in_connection_made(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class Lavish(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.set_write_buffer_limits(high=1000)
            self.transport.write(data)

    data = random.Random(2).randbytes(5_000_000)
    recorders = Recorders(Lavish)
    async with kind.client(recorders, server_context, client_context) as client:
        assert await client.read_exactly(len(data)) == data


# -- the rest of a transport


async def test_a_transport_has_its_protocol_and_takes_another(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    async with kind.client(recorders, server_context, client_context) as client:
        await client.write(b"to the first")
        recorder = await recorders.first()
        await until(lambda: recorder.received == b"to the first")
        transport = recorder.transport
        assert transport.get_protocol() is recorder
        echo = Echo()
        echo.connection_made(transport)
        transport.set_protocol(echo)
        assert transport.get_protocol() is echo
        await client.echo(b"to the second")
    await echo.lost()
    assert recorder.events == [("made",), b"to the first"]
    assert echo.received == b"to the second"


async def test_a_protocol_can_step_back_for_another_in_connection_made(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class Chooser(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.set_protocol(echo)
            echo.connection_made(transport)

    echo = Echo()
    async with kind.connected(Chooser, server_context, client_context) as client:
        await client.send(await client.last_flight() + client.sealed(b"early"))
        assert await client.read_exactly(5) == b"early"
        await client.echo()
    await echo.lost()


async def test_a_transport_answers_as_one_of_tls(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    async with kind.client(recorders, server_context, client_context) as client:
        transport = (await recorders.first()).transport
        assert not transport.can_write_eof()
        with pytest.raises(NotImplementedError):
            transport.write_eof()
        with pytest.raises(TypeError):
            transport.write("text")
        assert transport.is_reading()
        assert transport.get_write_buffer_size() == 0
        transport.write(b"")
        transport.write(bytearray(b"one "))
        transport.writelines([b"two ", memoryview(b"three")])
        assert await client.read_exactly(13) == b"one two three"
        assert not transport.is_closing()
        transport.close()
        transport.close()
        assert transport.is_closing()
        assert await client.read() == b""
        await client.do(client.tls.unwrap)


variable: ContextVar[str] = ContextVar("variable")


@pytest.mark.parametrize("early", [False, True], ids=["", "early data"])
async def test_a_protocol_is_called_in_the_context_of_its_server_and_in_no_task(
    kind: Kind, early: bool, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    seen: list[Any] = []

    class Seeing(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.see()
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            self.see()
            super().data_received(data)

        def see(self) -> None:
            seen.append((variable.get(), asyncio.current_task()))

    variable.set("the server's")
    async with kind.serving(Seeing, server_context) as address, Client(client_context) as client:
        variable.set("something else")
        await client.connect(address)
        flight = await client.last_flight()
        await client.send(flight + (client.sealed(b"early") if early else b""))
        await client.read_exactly(5 if early else 0)
        await client.echo()
    assert set(seen) == {("the server's", None)}


# -- a lot of data


def transfer(address: Address, context: ssl.SSLContext, chunk: bytes, count: int) -> bytes:
    """Send chunks with a plain blocking client; return the checksum of all that comes back."""
    checksum = hashlib.sha256()
    with (
        socket.create_connection(address, timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        for _ in range(count):
            sock.sendall(chunk)
        buffer = memoryview(bytearray(256 * 1024))
        left = count * len(chunk)
        while left and (size := sock.recv_into(buffer)):
            checksum.update(buffer[:size])
            left -= size
        sock.unwrap().close()
    return checksum.digest()


class Mirror(asyncio.Protocol):
    """Checks what it gets; sends as much back when all of it has come."""

    def __init__(self, chunk: bytes, count: int) -> None:
        self.chunk = chunk
        self.count = count
        self.left = count * len(chunk)
        self.checksum = hashlib.sha256()
        self.may_write = asyncio.Event()
        self.may_write.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.checksum.update(data)
        self.left -= len(data)
        if not self.left:
            self.sending = asyncio.get_running_loop().create_task(self.send())

    async def send(self) -> None:
        for _ in range(self.count):
            await self.may_write.wait()
            self.transport.write(self.chunk)

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_100_mb_go_each_way_unharmed(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    asyncio.get_running_loop().set_debug(False)
    chunk = random.Random(3).randbytes(1_000_000)
    count = 100
    mirror = Mirror(chunk, count)
    expected = hashlib.sha256(chunk * count).digest()
    async with kind.serving(lambda: mirror, server_context) as address:
        assert await in_thread(transfer, address, client_context, chunk, count) == expected
    assert mirror.checksum.digest() == expected
    await mirror.sending
