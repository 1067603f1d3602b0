"""`create_server` and `start_server`: asyncio's functions, with handshakes as jobs."""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from asyncio import AbstractEventLoop, AbstractServer, CancelledError, Future
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

from ._acceptor import Acceptor, Listener
from ._handshake import NewSteps
from ._native import NativeSteps, check_native
from ._steps import LoopSteps, ThreadSteps

__all__ = ["HANDSHAKE_TIMEOUT", "HandshakeMode", "Server", "create_server", "start_server"]

HandshakeMode: TypeAlias = Literal["loop", "thread", "openssl"]
"""Where the steps of handshakes run; see `create_server`."""

HANDSHAKE_TIMEOUT: Final = 60.0
"""Seconds."""
STREAM_LIMIT: Final = 64 * 1024
"""Bytes, as in asyncio."""

_STEPS: Final[dict[HandshakeMode, NewSteps]] = {
    "loop": LoopSteps,
    "thread": ThreadSteps,
    "openssl": NativeSteps,
}


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str | Sequence[str] | None = None,
    port: int | None = None,
    *,
    ssl: ssl_module.SSLContext,
    handshake: HandshakeMode = "loop",
    ssl_handshake_timeout: float | None = HANDSHAKE_TIMEOUT,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    **options: Any,
) -> Server:
    """Create a TLS server whose handshakes run as jobs; the rest is `loop.create_server`.

    >>> import asyncio, ssl
    >>> async def main(context):
    ...     server = await create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
    ...     async with server:
    ...         print(server.is_serving())
    >>> asyncio.run(main(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    True

    After its handshake, a connection is one of the event loop's own TLS connections. The
    protocol is made then, and not when the connection is accepted.

    Args:
        protocol_factory: Called without arguments for each connection, like asyncio's.
        host: The address or addresses to listen on, None for all.
        port: The port, 0 for any free one.
        ssl: The context. See `sni_callback` for callbacks that may wait.
        handshake: ``"loop"`` runs the handshakes on the event loop's thread; callbacks may pause.
            ``"thread"`` runs each step in a worker thread, so that the loop goes on (a signature
            with an RSA key takes milliseconds); there are as many as `set_offload_threads` says.
            ``"openssl"`` runs them as OpenSSL's own jobs, which an engine or a provider may pause;
            no callbacks in Python then. See `is_native_capable`.
        ssl_handshake_timeout: Seconds that a connection has from its acceptance until its handshake
            is complete, a silent one as well. None is the default, 60 seconds.
        ssl_shutdown_timeout: Seconds for the end of a connection, None for the loop's default.
        start_serving: Whether to accept connections at once.
        options: What else the loop's ``create_server`` takes: family, flags, sock, backlog,
            reuse_address, reuse_port.

    A handshake that fails is told of at debug level by the logger ``aiojob``, one that fails by an
    error of a callback by the event loop's exception handler.

    Raises:
        TypeError: `ssl` is not an `ssl.SSLContext`, `protocol_factory` is not callable, or a
            timeout is no number.
        ValueError: An unknown `handshake`, or a timeout that is not positive.
        ssl.SSLError: The context is none for servers.
        LibsslUnavailableError: ``handshake="openssl"`` is not possible; the message says why.
        OSError: The address cannot be listened on.
    """
    _check_callable("protocol_factory", protocol_factory, "protocol_factory()")
    _check_context(ssl, handshake)
    if ssl_handshake_timeout is None:
        ssl_handshake_timeout = HANDSHAKE_TIMEOUT
    _check_positive("ssl_handshake_timeout", ssl_handshake_timeout, "seconds")
    if ssl_shutdown_timeout is not None:
        _check_positive("ssl_shutdown_timeout", ssl_shutdown_timeout, "seconds")
    loop = asyncio.get_running_loop()
    listener = Listener(
        loop,
        protocol_factory,
        ssl,
        _STEPS[handshake],
        ssl_handshake_timeout,
        ssl_shutdown_timeout,
    )
    server = await loop.create_server(
        lambda: Acceptor(listener), host, port, start_serving=start_serving, **options
    )
    return Server(server, listener)


async def start_server(
    client_connected_cb: Callable[
        [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
    ],
    host: str | Sequence[str] | None = None,
    port: int | None = None,
    *,
    ssl: ssl_module.SSLContext,
    limit: int = STREAM_LIMIT,
    **options: Any,
) -> Server:
    """Create a TLS server of streams whose handshakes run as jobs: `asyncio.start_server`.

    >>> import asyncio, ssl
    >>> async def serve(reader, writer):
    ...     writer.write(await reader.readline())
    ...     writer.close()
    >>> async def main(context):
    ...     async with await start_server(serve, "127.0.0.1", 0, ssl=context) as server:
    ...         print(len(server.sockets))
    >>> asyncio.run(main(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    1

    Args:
        client_connected_cb: Called as ``client_connected_cb(reader, writer)`` for each connection
            whose handshake is complete; a coroutine function, whose coroutine becomes a task, or a
            plain one.
        host: As in `create_server`.
        port: As in `create_server`.
        ssl: As in `create_server`.
        limit: Bytes that a `asyncio.StreamReader` buffers, half of what stops it from reading.
        options: What else `create_server` takes.

    Raises:
        TypeError: `client_connected_cb` is not callable, or `limit` is no number.
        ValueError: `limit` is not positive.
        BaseException: What `create_server` raises.
    """
    _check_callable(
        "client_connected_cb", client_connected_cb, "client_connected_cb(reader, writer)"
    )
    _check_positive("limit", limit, "bytes")
    loop = asyncio.get_running_loop()

    def new_protocol() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit, loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop)

    return await create_server(new_protocol, host, port, ssl=ssl, **options)


class Server(AbstractServer):
    """A TLS server: `asyncio.Server`, whose `close` ends handshakes that are under way too.

    `create_server` and `start_server` make it. Use it in the thread of its event loop.
    """

    def __init__(self, server: AbstractServer, listener: Listener) -> None:
        self._server = server
        self._listener = listener
        self._forever: Future[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} sockets={self.sockets!r}, {self.handshakes} handshake(s)>"

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The sockets that are listened on; none when it is closed."""
        return tuple(self._server.sockets)  # type: ignore[attr-defined]

    @property
    def handshakes(self) -> int:
        """How many handshakes are under way, those of silent peers among them."""
        return len(self._listener.acceptors)

    def get_loop(self) -> AbstractEventLoop:
        """Return the server's event loop."""
        return self._listener.loop

    def is_serving(self) -> bool:
        """Return whether connections are accepted."""
        return self._server.is_serving()

    async def start_serving(self) -> None:
        """Accept connections; no effect if they are."""
        await self._server.start_serving()

    async def serve_forever(self) -> None:
        """Accept connections until this is cancelled or the server closed; then close it.

        Raises:
            RuntimeError: The server is closed, or this is awaited already.
        """
        if self._forever is not None:
            raise RuntimeError(f"{self!r} is already being awaited on serve_forever()")
        if self._listener.is_closed:
            raise RuntimeError(f"{self!r} is closed")
        # Before start_serving() gives way: close() may be called then, or this in another task.
        forever = self._forever = self._listener.loop.create_future()
        try:
            await self.start_serving()
            await forever
        except CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Accept no connection any more, and end the handshakes that are under way.

        Connections whose handshake is complete go on.
        """
        self._server.close()
        self._listener.close()
        if self._forever is not None:
            self._forever.cancel()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and its connections are, as the loop's server does."""
        await self._listener.wait_closed()
        await self._server.wait_closed()

    def close_clients(self) -> None:
        """Close all connections, where the loop's server can (asyncio's from Python 3.13 on)."""
        self._server.close_clients()  # type: ignore[attr-defined, unused-ignore]

    def abort_clients(self) -> None:
        """Close all connections at once, where the loop's server can."""
        self._server.abort_clients()  # type: ignore[attr-defined, unused-ignore]


def _check_context(context: ssl_module.SSLContext, handshake: str) -> None:
    if not isinstance(context, ssl_module.SSLContext):
        raise TypeError(f"ssl must be an ssl.SSLContext, got {context!r}")
    if handshake not in tuple(_STEPS):  # also what has no hash
        known = ", ".join(map(repr, _STEPS))
        raise ValueError(f"handshake must be one of {known}, got {handshake!r}")
    # Raises if this is not for servers.
    context.wrap_bio(ssl_module.MemoryBIO(), ssl_module.MemoryBIO(), server_side=True)
    if handshake == "openssl":
        check_native(context)


def _check_callable(name: str, func: object, call: str) -> None:
    if not callable(func):
        raise TypeError(f"{name} must be callable as {call}, got {func!r}")


def _check_positive(name: str, number: float, unit: str) -> None:
    try:
        is_positive = number > 0  # nan is not
    except TypeError:
        raise TypeError(f"{name} must be a number of {unit}, got {number!r}") from None
    if not is_positive:
        raise ValueError(f"{name} must be a positive number of {unit}, got {number!r}")
