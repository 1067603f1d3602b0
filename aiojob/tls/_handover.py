"""The hand-over of a connection whose handshake is complete to the event loop's own TLS transport.

`loop.start_tls` is the public way to such a transport. It asks an SSLContext for an SSL object;
ours is a stand-in made for this one connection, and returns the finished SSL object. (A context
variable could not tell which: on uvloop all connections of a server share one context.)

From then on, the finished SSL object has to read and write the BIOs of the loop's transport. Where
libssl can be reached it is moved to them, and the data path is the loop's own; elsewhere a
`Shuttle` carries the bytes.

No byte of the application may come before its protocol is in place, and the end of the stream
neither. Whatever `start_tls` sets up gets bytes before its caller goes on; so what the peer sent
behind its handshake is kept aside, and the socket is not read until `connection_made` has returned.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import AbstractEventLoop, Transport
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar, cast

from ._handshake import Handshake
from ._libssl import check_rebind, connection_of
from ._standins import ContextStandIn, Shuttle

__all__ = ["can_rebind", "hand_over"]

T = TypeVar("T")


async def hand_over(
    loop: AbstractEventLoop,
    transport: Transport,
    handshake: Handshake,
    context: ssl.SSLContext,
    shutdown_timeout: float | None,
) -> Transport | None:
    """Return the loop's TLS transport for a connection, None if the peer has left meanwhile.

    Its protocol is nobody's, and its socket is not read: see `introduce`.
    """
    if transport.is_closing():
        return None
    last_flight = handshake.outgoing.read()
    stand_in = ContextStandIn(context, partial(_finished, handshake))
    starting = loop.start_tls(
        transport,
        asyncio.Protocol(),  # nothing is read and nothing written before it is replaced
        cast(ssl.SSLContext, stand_in),
        server_side=True,
        ssl_shutdown_timeout=shutdown_timeout,
    )
    # It has the loop call connection_made() of a protocol of its own, and then resume_reading();
    # uvloop reads before this coroutine goes on. The pause is queued right behind these two.
    tls_transport = await _WithHook(starting, lambda: loop.call_soon(transport.pause_reading))
    if transport.is_closing():
        return None
    # Not earlier: uvloop's start_tls reports a connection as an error of its own that is lost in
    # the meantime, and writing is what would find that out.
    transport.write(last_flight)
    return tls_transport


def introduce(
    protocol: asyncio.BaseProtocol,
    tls_transport: Transport,
    transport: Transport,
    received: bytes | bytearray,
) -> None:
    """Give a connection to the application, with what its peer has sent so far."""
    tls_transport.set_protocol(protocol)
    protocol.connection_made(tls_transport)
    if received:
        # As if it came from the socket.
        ours = cast(asyncio.BufferedProtocol, transport.get_protocol())
        memoryview(ours.get_buffer(len(received)))[: len(received)] = received
        ours.buffer_updated(len(received))
    transport.resume_reading()


def can_rebind() -> bool:
    """Whether a finished SSL object can be moved to other BIOs."""
    return check_rebind() is None


def _finished(
    handshake: Handshake, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> ssl.SSLObject:
    """Return the SSL object of a handshake, working on the loop's BIOs."""
    own = handshake.incoming, handshake.outgoing
    if can_rebind():
        connection_of(handshake.ssl_object, *own).move_to(incoming, outgoing)
        return handshake.ssl_object
    return cast(ssl.SSLObject, Shuttle(handshake.ssl_object, own, (incoming, outgoing)))


class _WithHook(Generic[T]):
    """Awaits a coroutine, and calls a hook when that is first suspended."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], hook: Callable[[], object]) -> None:
        self._coroutine = coroutine
        self._hook = hook

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._coroutine.__await__()
        first = next(steps)
        self._hook()
        try:
            yield first
        except BaseException as error:
            steps.throw(error)  # start_tls cleans up, and raises it
        return (yield from steps)
