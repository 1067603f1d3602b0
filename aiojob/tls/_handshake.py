"""A handshake as plain synchronous code: bytes in, steps, bytes out. No I/O of its own."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Protocol, TypeAlias

from ._steps import Steps

__all__ = ["Handshake", "NewSteps", "Peer"]

NewSteps: TypeAlias = Callable[[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO], Steps]


class Peer(Protocol):
    """The other end of a handshake."""

    def receive(self) -> bytes | bytearray:
        """Pause until the peer has sent something; return it."""

    def send(self, data: bytes) -> None:
        """Send something to the peer."""


class Handshake:
    """One connection's SSL object, on BIOs of its own, on its way through the handshake."""

    __slots__ = ("incoming", "outgoing", "ssl_object", "steps")

    def __init__(self, context: ssl.SSLContext, new_steps: NewSteps) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.steps = new_steps(self.ssl_object, self.incoming, self.outgoing)

    def run(self, peer: Peer) -> None:
        """Shake hands with a peer; in a job.

        What the peer sent behind its part of the handshake is left in the incoming BIO, and in the
        outgoing one what completes the handshake for the peer, or, after an error, an alert.
        """
        while True:
            self.incoming.write(peer.receive())
            try:
                self.steps.step()
            except ssl.SSLWantReadError:
                if self.steps.callback_failed:  # it was the callback that wanted something
                    raise
                peer.send(self.outgoing.read())
            else:
                break
        self.steps.finish()
