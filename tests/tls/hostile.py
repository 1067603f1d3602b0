"""What the safety tests share: servers that can be looked into, and clients that misbehave."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
import stat
import struct
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from typing import Any, Final, Self, TypeAlias, TypeVar

import trustme

from aiojob import tls
from aiojob.testing import open_fds
from aiojob.tls import HandshakeMode
from aiojob.tls._acceptor import Acceptor

T = TypeVar("T")
Address: TypeAlias = tuple[str, int]

MODES: Final[tuple[HandshakeMode, ...]] = ("loop", "thread")
PATIENCE: Final = 5.0
"""Seconds after which a test is taken to hang."""

NAMES: Final = tuple(f"{name}.example" for name in ("a", "b", "c", "d", "e"))


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@cache
def certificate(name: str, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> trustme.LeafCert:
    return authority().issue_cert(name, key_type=key_type)


class CountedObject(ssl.SSLObject):
    """An SSLObject that `server_context` counts."""

    alive: Final[weakref.WeakSet[ssl.SSLObject]] = weakref.WeakSet()

    @classmethod
    def _create(cls, *args: Any, **kwargs: Any) -> Any:
        self = super()._create(*args, **kwargs)  # type: ignore[misc]
        cls.alive.add(self)
        return self


def server_context(name: str = "localhost") -> ssl.SSLContext:
    """Make a context whose SSL objects are counted in `CountedObject.alive`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate(name).configure_cert(context)
    context.sslobject_class = CountedObject
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


def client_hello(name: str = "localhost") -> bytes:
    """Return a client's first flight."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


# -- servers


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@asynccontextmanager
async def serving(
    context: ssl.SSLContext,
    handshake: HandshakeMode = "loop",
    factory: Callable[[], asyncio.BaseProtocol] = Echo,
    **options: Any,
) -> AsyncIterator[tls.Server]:
    """Serve; check at the end that no connection, task or SSL object is left."""
    tasks = asyncio.all_tasks()
    server = await tls.create_server(
        factory, "127.0.0.1", 0, ssl=context, handshake=handshake, backlog=2000, **options
    )
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()
    await until(lambda: not server.handshakes)
    await until(lambda: asyncio.all_tasks() <= tasks)


def address_of(server: tls.Server) -> Address:
    host, port = server.sockets[0].getsockname()
    return host, port


def acceptors(server: tls.Server) -> list[Acceptor]:
    return list(server._listener.acceptors)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop go on until the condition holds."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(what or "this was waited for in vain") from None


class LoopErrors:
    """What the running loop's exception handler was called with, instead of the default."""

    def __init__(self) -> None:
        self.contexts: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(self._add)

    def _add(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.contexts.append(context)

    @property
    def exceptions(self) -> list[BaseException | None]:
        return [context.get("exception") for context in self.contexts]


def open_sockets() -> set[int]:
    return {fd for fd in open_fds() if stat.S_ISSOCK(os.fstat(fd).st_mode)}


# -- clients


@contextmanager
def many_fds(count: int) -> Iterator[None]:
    """Allow so many open files for the length of a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def connect(address: Address) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def reset(sock: socket.socket) -> None:
    """Leave with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Client:
    """A TLS client over a socket, flight by flight."""

    def __init__(
        self,
        context: ssl.SSLContext,
        name: str = "localhost",
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_hostname=name, session=session
        )
        self.sock: socket.socket = None  # type: ignore[assignment]  # until connect()

    async def connect(self, address: Address) -> Client:
        self.sock = await connect(address)
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sock.close()

    async def do(self, func: Callable[..., T], *args: Any) -> T:
        """Call a method of the SSL object, and move bytes until it has done its work."""
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
            await asyncio.get_running_loop().sock_sendall(self.sock, self.outgoing.read())

    async def receive(self) -> None:
        if data := await asyncio.get_running_loop().sock_recv(self.sock, 65536):
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def handshake(self) -> Client:
        await self.do(self.tls.do_handshake)
        return self

    async def last_flight(self) -> bytes:
        """Shake hands but for the last flight; return that."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            else:
                return self.outgoing.read()
            await self.flush()
            await self.receive()

    async def exchange(self, data: bytes) -> bytes:
        await self.do(self.tls.write, data)
        return await self.do(self.tls.read, len(data))


def names_of(client: Client) -> list[str]:
    """Return the names in the certificate that the client was shown."""
    peer: Any = client.tls.getpeercert()
    return [name for _, name in peer["subjectAltName"]]
