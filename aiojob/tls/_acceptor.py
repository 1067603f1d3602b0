"""A connection, from its acceptance until its application has it.

An `Acceptor` is the protocol of a plain transport. It keeps what the peer sends until the
connection's task asks for it, in which the handshake runs as a job: nobody but that job touches the
SSL object and its BIOs, and it does not while a step is in flight elsewhere.

A peer is unauthenticated all this time. Its connection gets no SSL object and no task before its
first bytes have come; no more than `RECEIVED_LIMIT` of them are kept; and its time is limited.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from asyncio import AbstractEventLoop, CancelledError, Future, Task, TimerHandle, Transport
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias, cast

from .._run import await_, run_job
from ._handover import hand_over, introduce
from ._handshake import Handshake, NewSteps
from ._steps import set_current

__all__ = ["Acceptor", "Listener"]

logger = logging.getLogger("aiojob")

Established: TypeAlias = tuple[Transport, bytes]
"""The loop's TLS transport of a connection, and what the peer has sent for it already."""
READ_SIZE: Final = 16 * 1024
"""So many bytes are read from a socket at a time."""
RECEIVED_LIMIT: Final = 64 * 1024
"""The socket is not read while more bytes than these wait for the handshake."""


@dataclass(slots=True, eq=False)
class Listener:
    """What the connections of a server share."""

    loop: AbstractEventLoop
    protocol_factory: Callable[[], asyncio.BaseProtocol]
    context: ssl.SSLContext
    new_steps: NewSteps
    handshake_timeout: float
    """Seconds."""
    shutdown_timeout: float | None
    """Seconds, None for what the loop thinks right."""
    acceptors: set[Acceptor] = field(default_factory=set)
    """Those under way."""
    is_closed: bool = False
    # One for all: a loop reads into it and calls buffer_updated() at once.
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(READ_SIZE)))

    def close(self) -> None:
        """End the handshakes that are under way."""
        self.is_closed = True
        for acceptor in tuple(self.acceptors):
            acceptor.give_up(ConnectionAbortedError("the server was closed"))

    async def wait_closed(self) -> None:
        """Wait until the handshakes that were under way have cleaned up."""
        tasks = [acceptor.task for acceptor in self.acceptors if acceptor.task is not None]
        if tasks:
            await asyncio.wait(tasks)


class Acceptor(asyncio.BufferedProtocol):
    """Has one connection's handshake run, then hands the connection over."""

    __slots__ = (
        "_answered",
        "_eof",
        "_handshake",
        "_listener",
        "_lost",
        "_reason",
        "_received",
        "_timer",
        "_transport",
        "_waiter",
        "task",
    )

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._transport: Transport = None  # type: ignore[assignment]  # until connection_made()
        self._timer: TimerHandle | None = None
        self._received = bytearray()
        self._eof = self._lost = self._answered = False
        self._reason: BaseException | None = None
        self._waiter: Future[None] | None = None
        self._handshake: Handshake | None = None
        self.task: Task[Established | None] | None = None

    # -- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        listener = self._listener
        self._transport = cast(Transport, transport)
        if listener.is_closed:  # after this connection was accepted
            transport.close()
            return
        listener.acceptors.add(self)
        self._timer = listener.loop.call_later(listener.handshake_timeout, self._time_out)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._listener.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received += self._listener.buffer[:nbytes]
        if len(self._received) > RECEIVED_LIMIT:
            self._transport.pause_reading()
        if self.task is not None:
            self._wake()
        else:
            self.task = self._listener.loop.create_task(self._main())
            self.task.add_done_callback(self._ended)

    def eof_received(self) -> bool:
        self._eof = True
        if self._received or self._answered:
            self._wake()
        else:
            # It cannot have sent its part without an answer. The job need not be waiting for more:
            # it may be paused in a callback, or have a step in flight.
            self.give_up(ConnectionResetError("the peer left in the TLS handshake"))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._end_timer()
        self.give_up(exc or ConnectionResetError("the connection was lost in the TLS handshake"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the job calls

    def receive(self) -> bytearray:
        while not self._received:
            if self._eof:
                raise ConnectionResetError("the peer left in the TLS handshake")
            self._waiter = self._listener.loop.create_future()
            await_(self._waiter)
        received, self._received = self._received, bytearray()
        if len(received) > RECEIVED_LIMIT:
            self._transport.resume_reading()
        return received

    def send(self, data: bytes) -> None:
        self._raise_if_given_up()
        if data:
            self._answered = True
            self._transport.write(data)

    def _raise_if_given_up(self) -> None:
        if self._reason is not None:  # and a callback swallowed the cancellation
            raise self._reason

    # -- the connection's task

    async def _main(self) -> Established | None:
        try:
            established = await self._establish()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception | CancelledError):
                raise
            return None
        self._end_timer()
        return established

    async def _establish(self) -> Established | None:
        """Shake hands; return None if the peer leaves in the hand-over."""
        listener = self._listener
        handshake = self._handshake = Handshake(listener.context, listener.new_steps)
        token = set_current(handshake.steps)
        try:  # and no context manager, which would cost half a KiB for each that is paused
            await run_job(handshake.run, self)
        finally:
            token.var.reset(token)
        self._raise_if_given_up()
        received = handshake.incoming.read() + self._received
        tls_transport = await hand_over(
            listener.loop, self._transport, handshake, listener.context, listener.shutdown_timeout
        )
        return None if tls_transport is None else (tls_transport, received)

    def _introduce(self, tls_transport: Transport, received: bytes) -> None:
        if self._transport.is_closing():  # since the task ended
            return
        try:
            introduce(self._listener.protocol_factory(), tls_transport, self._transport, received)
        except Exception as error:
            self._call_exception_handler("a TLS server's protocol failed", error)
            self._transport.abort()

    # -- the end

    def give_up(self, reason: Exception) -> None:
        """End the handshake; the first reason counts."""
        if self._reason is not None:
            return  # a callback that cleans up is not to be cancelled by what the peer does next
        self._reason = reason
        if self.task is not None:
            self.task.cancel()
        elif self._leave():
            self._fail(reason)

    def _time_out(self) -> None:
        if self not in self._listener.acceptors:  # the peer does not read what it was sent last
            self._transport.abort()
            return
        seconds = self._listener.handshake_timeout
        self.give_up(TimeoutError(f"the TLS handshake took longer than {seconds} s"))

    def _ended(self, task: Task[Established | None]) -> None:
        # Not by the task itself: one that is cancelled before its first step does nothing; and to
        # the application, no task is current, and the context is that of the server.
        self._leave()
        if task.cancelled():
            self._fail(CancelledError())
        elif task.exception() is None and (established := task.result()) is not None:
            self._introduce(*established)

    def _leave(self) -> bool:
        if self not in self._listener.acceptors:
            return False
        self._listener.acceptors.discard(self)
        return True

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fail(self, error: BaseException) -> None:
        self._report(error)
        handshake = self._handshake
        if handshake is not None:
            if handshake.steps.in_flight:
                handshake.steps.abandon()
            elif handshake.outgoing.pending and not self._lost:
                self._transport.write(handshake.outgoing.read())  # the alert
                self._transport.close()  # when that is sent: the timer goes on
                return
        self._end_timer()
        self._transport.abort()

    def _report(self, error: BaseException) -> None:
        """Tell whom it concerns: of what a peer did, nobody who does not ask for it."""
        if isinstance(error, CancelledError) and self._reason is not None:
            error = self._reason
        callback_failed = self._handshake is not None and self._handshake.steps.callback_failed
        is_ours = callback_failed or not isinstance(error, OSError)
        if is_ours and error is not self._reason and isinstance(error, Exception):
            self._call_exception_handler("a TLS handshake failed", error)
        else:
            peer = _peer_of(self._transport)
            logger.debug("the TLS handshake with %s failed: %r", peer, error)

    def _call_exception_handler(self, message: str, error: Exception) -> None:
        self._listener.loop.call_exception_handler(
            {
                "message": message,
                "exception": error,
                "transport": self._transport,
                "protocol": self,
            }
        )


def _peer_of(transport: Transport) -> object:
    try:
        return transport.get_extra_info("peername")
    except AttributeError:  # uvloop, when the connection is closed and nobody asked before
        return None
