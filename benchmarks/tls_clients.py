"""The clients of the TLS benchmarks, in a process of their own, so that they take no server's time.

It reads a command a line, as JSON, and answers each with a line. One thread drives all handshakes,
on sockets that do not block, as raw as Python allows.
"""

from __future__ import annotations

import json
import selectors
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import closing
from time import monotonic
from typing import Any

TIMEOUT = 60.0
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
CONTEXT.check_hostname = False
CONTEXT.verify_mode = ssl.CERT_NONE
LOCALHOST = "127.0.0.1"

kept: list[socket.socket] = []
"""Connections that stay."""


class Handshake:
    """A connection that goes on until the server's greeting has come."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((LOCALHOST, port), TIMEOUT)
        self.socket.setblocking(False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = CONTEXT.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._advance()

    def send(self) -> None:
        """Send what is to be sent; at first, that is the ClientHello."""
        self.socket.sendall(self._outgoing.read())

    def receive(self) -> bool:
        """Go on with what has come, and return whether that was all."""
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the server closed the connection in the handshake")
        self._incoming.write(received)
        is_over = self._advance()
        if self._outgoing.pending:
            self.send()
        return is_over

    def _advance(self) -> bool:
        try:
            self._tls.do_handshake()
            return bool(self._tls.read(1))
        except ssl.SSLWantReadError:
            return False


def handshakes(port: int, at_a_time: int, number: int = 0, seconds: float = 0) -> tuple[int, float]:
    """Do so many handshakes, or as many as end in so many seconds.

    Return how many those were and how long they took.
    """
    done = 0
    with selectors.DefaultSelector() as selector:

        def begin(count: int) -> None:
            some = [Handshake(port) for _ in range(count)]
            for handshake in some:  # all are connected by now, and begin together
                selector.register(handshake.socket, selectors.EVENT_READ, handshake)
                handshake.send()

        first = min(at_a_time, number or at_a_time)
        more = number - first
        began = monotonic()
        begin(first)
        while selector.get_map() and not (seconds and done and monotonic() - began > seconds):
            waiting = selector.select(TIMEOUT)
            over = [key.data for key, _ in waiting if key.data.receive()]
            for handshake in over:
                selector.unregister(handshake.socket)
                handshake.socket.close()
            done += len(over)
            following = len(over) if seconds else min(len(over), more)
            more -= following
            begin(following)
        taken = monotonic() - began
        for key in selector.get_map().values():
            key.data.socket.close()
    return done, taken


def silent(port: int, number: int) -> None:
    """Connect so often, and say nothing."""
    kept.extend(socket.create_connection((LOCALHOST, port), TIMEOUT) for _ in range(number))


def hello(port: int, number: int) -> None:
    """Connect so often, and send a ClientHello each."""
    for _ in range(number):
        handshake = Handshake(port)
        handshake.send()
        kept.append(handshake.socket)


def messages(port: int, number: int) -> None:
    """Send a small message and wait for its echo, so many times."""
    message = bytes(64)
    with closing(connected(port)) as tls:
        for _ in range(number):
            tls.sendall(message)
            receive(tls, len(message))


def upload(port: int, number: int) -> None:
    """Send so many MiB; the server confirms each with a byte."""
    with closing(connected(port)) as tls:
        tls.sendall(bytes(number << 20))
        receive(tls, number)


def download(port: int, number: int) -> None:
    """Ask for so many MiB, with a byte for each."""
    with closing(connected(port)) as tls:
        tls.sendall(bytes(number))
        receive(tls, number << 20)


def receive(tls: ssl.SSLSocket, size: int) -> None:
    buffer = memoryview(bytearray(1 << 18))
    while size > 0:
        received = tls.recv_into(buffer[:size])
        if not received:
            raise ConnectionError(f"the server closed the connection {size} bytes too early")
        size -= received


def connected(port: int) -> ssl.SSLSocket:
    return CONTEXT.wrap_socket(socket.create_connection((LOCALHOST, port), TIMEOUT))


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command for command in (handshakes, silent, hello, messages, upload, download)
}


def main() -> None:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(COMMANDS[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
