"""What the safety tests share: servers that can be looked into, and clients that misbehave."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from typing import Any, Final

import trustme

from aiojob import tls
from aiojob.tls import HandshakeMode
from tls.kit import Address, until

MODES: Final[tuple[HandshakeMode, ...]] = ("loop", "thread")
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
