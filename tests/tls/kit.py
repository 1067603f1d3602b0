"""What tests of TLS servers share: kinds of servers, a client by hand, recording protocols."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar

from aiojob import tls
from aiojob.testing import open_fds
from aiojob.tls._acceptor import Acceptor

T = TypeVar("T")
Address: TypeAlias = tuple[str, int]

MORE: Final = getattr(socket, "MSG_MORE", 0)
PATIENCE: Final = 60.0
"""Seconds after which a test is taken to hang."""


@dataclass(frozen=True)
class Kind:
    """A way of serving TLS: a strategy and a hand-over of aiojob's, or the loop's own server."""

    handshake: tls.HandshakeMode | None = None
    rebind: bool = True

    @property
    def is_reference(self) -> bool:
        return self.handshake is None

    async def create_server(
        self, factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext, **options: Any
    ) -> Any:
        options = {"host": "127.0.0.1", "port": 0, "ssl": context, **options}
        if self.handshake is None:
            return await asyncio.get_running_loop().create_server(factory, **options)
        return await tls.create_server(factory, handshake=self.handshake, **options)

    async def start_server(
        self, connected: Callable[..., Any], context: ssl.SSLContext, **options: Any
    ) -> Any:
        options = {"host": "127.0.0.1", "port": 0, "ssl": context, **options}
        if self.handshake is None:
            return await asyncio.start_server(connected, **options)
        return await tls.start_server(connected, handshake=self.handshake, **options)

    @asynccontextmanager
    async def serving(
        self, factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext, **options: Any
    ) -> AsyncIterator[Address]:
        """Serve for the length of the block; at its end no connection may be left."""
        if self.is_reference:  # which reports failed handshakes in debug mode
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        before = sockets()
        server = await self.create_server(factory, context, **options)
        try:
            yield address_of(server)
        finally:
            server.close()
        await until(lambda: sockets() <= before)

    @asynccontextmanager
    async def connected(
        self,
        factory: Callable[[], asyncio.BaseProtocol],
        context: ssl.SSLContext,
        client_context: ssl.SSLContext,
        **options: Any,
    ) -> AsyncIterator[Client]:
        """Serve a client for the length of the block, which has said nothing yet."""
        async with (
            self.serving(factory, context, **options) as address,
            Client(client_context) as client,
        ):
            yield await client.connect(address)

    @asynccontextmanager
    async def client(self, *args: Any, **options: Any) -> AsyncIterator[Client]:
        """Serve a client as `connected` does; its handshake is complete."""
        async with self.connected(*args, **options) as client:
            await client.handshake()
            yield client


KINDS: Final = {
    "reference": Kind(),
    "loop-rebind": Kind("loop"),
    "loop-shuttle": Kind("loop", rebind=False),
    "thread-rebind": Kind("thread"),
    "thread-shuttle": Kind("thread", rebind=False),
    "openssl-rebind": Kind("openssl"),
}
# For what depends on the strategy but not on the hand-over, and the other way round:
STRATEGIES: Final = ["reference", "loop-rebind", "thread-rebind", "openssl-rebind"]
HANDOVERS: Final = ["reference", "loop-rebind", "loop-shuttle"]
AIOJOB: Final = [name for name, kind in KINDS.items() if not kind.is_reference]
AIOJOB_STRATEGIES: Final = [name for name in STRATEGIES if name in AIOJOB]
# For callbacks that wait.
PAUSING: Final = ["loop-rebind", "thread-rebind"]


def address_of(server: Any) -> Address:
    host, port = server.sockets[0].getsockname()
    return host, port


def acceptors(server: tls.Server) -> list[Acceptor]:
    """Return the connections whose handshakes are under way."""
    return list(server._listener.acceptors)


def is_limited(acceptor: Acceptor) -> bool:
    """Whether a connection has a limited time to go on."""
    return acceptor._timer is not None and not acceptor._timer.cancelled()


def time_out(acceptor: Acceptor) -> None:
    """Have the time of a connection be over, at a moment that the test knows."""
    assert is_limited(acceptor)
    acceptor._time_out()


def sockets() -> set[int]:
    """Return the numbers of the process's open sockets."""
    return {fd for fd in open_fds() if stat.S_ISSOCK(os.fstat(fd).st_mode)}


@contextmanager
def case(*what: object) -> Iterator[None]:
    """Name one of several cases of a test in the error that it raises."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {what}")
        raise


def reset(sock: socket.socket) -> None:
    """Leave with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop go on until the condition holds."""
    if condition():
        return
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError("this was waited for in vain") from None


async def in_thread(func: Callable[..., T], *args: Any) -> T:
    """Run a blocking client beside the loop."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, func, *args)


@dataclass
class Client:
    """A TLS client that a test drives by hand: what it sends when, and in which segments.

    As a context manager, it is closed at the end, which has to come in time.
    """

    context: ssl.SSLContext
    server_hostname: str | None = "localhost"
    session: ssl.SSLSession | None = None
    incoming: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)
    outgoing: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)

    def __post_init__(self) -> None:
        self.tls = self.context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_hostname=self.server_hostname,
            session=self.session,
        )
        self.sock = socket.socket()
        self.sock.setblocking(False)

    async def __aenter__(self) -> Self:
        # One for all that it does: in debug mode, each timer takes longer than most of that.
        self._timeout = await asyncio.timeout(PATIENCE).__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()
        await self._timeout.__aexit__(exc_type, exc, traceback)

    async def connect(self, address: Address) -> Self:
        await asyncio.get_running_loop().sock_connect(self.sock, address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    # -- bytes on the wire

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def send_with_fin(self, data: bytes) -> None:
        """Send a few bytes and a FIN in one segment."""
        assert self.sock.send(data, MORE) == len(data)
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.sock)

    async def receive(self) -> bytes:
        """Receive what has come, or the end, for the TLS layer to read."""
        data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()
        return data

    async def end_of_stream(self) -> bool:
        """Receive to the end of the stream; tell whether it was not a RST."""
        try:
            while await self.receive():
                pass
        except ConnectionResetError:
            return False
        return True

    # -- TLS

    def flight(self) -> bytes:
        """Take a step of the handshake; return what it has to send."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    async def last_flight(self) -> bytes:
        """Shake hands up to the last flight; return it, unsent."""
        await self.send(self.flight())
        while not (flight := self.flight()):
            await self.receive()
        return flight

    async def do(self, func: Callable[..., T], *args: Any) -> T:
        """Call a function of the SSLObject until it has what it needs from the peer."""
        while True:
            try:
                return func(*args)
            except ssl.SSLWantReadError:
                await self.flush()
                await self.receive()
            finally:
                await self.flush()

    async def flush(self) -> None:
        if self.outgoing.pending:
            await self.send(self.outgoing.read())

    async def handshake(self) -> None:
        await self.do(self.tls.do_handshake)

    async def write(self, data: bytes) -> None:
        await self.do(self.tls.write, data)

    async def read(self, size: int = 65536) -> bytes:
        """Read some bytes; none at the close_notify."""
        return await self.do(self.tls.read, size)

    async def read_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = await self.read(size - len(data))
            assert chunk, f"the peer closed after {len(data)} of {size} bytes"
            data += chunk
        return bytes(data)

    def sealed(self, data: bytes) -> bytes:
        """Encrypt bytes without sending them."""
        self.tls.write(data)
        return self.outgoing.read()

    def close_notify(self) -> bytes:
        """Return a close_notify alert, unsent."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.outgoing.read()

    async def echo(self, data: bytes = b"over there") -> None:
        """Check that the server sends back what it gets."""
        await self.write(data)
        assert await self.read_exactly(len(data)) == data

    @property
    def name_shown(self) -> str:
        """The name in the certificate that the server has shown."""
        certificate: Any = self.tls.getpeercert()
        ((_, name),) = certificate["subjectAltName"]
        return str(name)


class Recording:
    """Records the events of a connection; data that comes in a row counts as one."""

    transport: Any = None

    def __init__(self) -> None:
        self.events: list[Any] = []

    @property
    def names(self) -> list[Any]:
        return [event if isinstance(event, bytes) else event[0] for event in self.events]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.events.append(("made",))

    def data_received(self, data: bytes) -> None:
        if isinstance(self.events[-1], bytes):
            self.events[-1] += data
        else:
            self.events.append(bytes(data))

    def eof_received(self) -> bool | None:
        self.events.append(("eof",))
        return None

    def pause_writing(self) -> None:
        self.events.append(("pause",))

    def resume_writing(self) -> None:
        self.events.append(("resume",))

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append(("lost", type(exc)))

    @property
    def received(self) -> bytes:
        return b"".join(event for event in self.events if isinstance(event, bytes))

    async def lost(self) -> None:
        await until(lambda: "lost" in self.names)


class Recorder(Recording, asyncio.Protocol):
    """A protocol that does nothing but record."""


class Recorders(list[Any]):
    """A protocol factory that keeps the protocols that it made."""

    def __init__(self, cls: Callable[[], Recording] = Recorder) -> None:
        super().__init__()
        self.cls = cls

    def __call__(self) -> Any:
        self.append(self.cls())
        return self[-1]

    @property
    def made(self) -> list[Any]:
        """Those that got a connection; the loop's own server makes protocols before."""
        return [recorder for recorder in self if recorder.events]

    async def first(self) -> Any:
        await until(lambda: self.made)
        return self.made[0]


class Echo(Recorder):
    """Sends back what it gets."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


class LoopErrors:
    """What the running loop's exception handler is called with, instead of the default."""

    def __init__(self) -> None:
        self.contexts: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(self._add)

    def _add(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.contexts.append(context)

    @property
    def exceptions(self) -> list[BaseException | None]:
        return [context.get("exception") for context in self.contexts]
