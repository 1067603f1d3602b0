"""TLS handshakes under fire: ``python -m benchmarks.soak.tls --handshakes 20000``.

Clients connect to a server whose SNI callback waits, offloads, refuses or fails. They shake hands
and talk, or leave at some moment in some way, send garbage, refuse the certificate, say nothing
until they are dropped. Each has to see what it is meant to see, its own certificate above all; the
event loop's exception handler has to hear of each callback that failed and of nothing else; and
no job, task, fd, thread or SSL object may be left. The exit status is 1 if that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import socket
import ssl
import struct
import sys
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar, get_args

import psutil
import trustme

import aiojob
from aiojob import tls
from aiojob.testing import nothing_left
from aiojob.tls import HandshakeMode

from ..measure import LOOPS

T = TypeVar("T")

NAMES: Final = tuple(f"{name}.example" for name in "abcde")
CLIENTS: Final = 40
"""At a time."""
PATIENCE: Final = 60.0
"""Seconds after which a client is taken to hang."""
TIMEOUT: Final = 30.0
"""Seconds for a handshake."""
WARM_UP: Final = 0.2
"""This part of the handshakes is done before memory is looked at."""


class CallbackError(Exception):
    """Raised by the SNI callback."""


class Counted(ssl.SSLObject):
    """An SSL object of the server's."""

    alive: Final[weakref.WeakSet[ssl.SSLObject]] = weakref.WeakSet()

    @classmethod
    def _create(cls, *args: Any, **kwargs: Any) -> Any:
        self = super()._create(*args, **kwargs)  # type: ignore[misc]
        cls.alive.add(self)
        return self


class Echo(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Client:
    """A TLS client over a socket, whose flights are sent one by one."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str, **how: Any) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name, **how)

    async def do(self, func: Callable[..., T], *args: Any) -> T:
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
        data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        if not data:
            raise ConnectionResetError
        self.incoming.write(data)

    def flight(self) -> bytes:
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    async def last_flight(self) -> bytes:
        """Shake hands but for the last flight; return that."""
        flight = self.flight()
        while self.tls.version() is None or self.tls.cipher() is None or not flight:
            await asyncio.get_running_loop().sock_sendall(self.sock, flight)
            await self.receive()
            flight = self.flight()
        return flight

    async def say(self, data: bytes) -> bytes:
        await self.do(self.tls.write, data)
        return await self.do(self.tls.read, len(data))


class Soak:
    """One run, on one event loop and in one mode."""

    def __init__(self, handshakes: int, mode: HandshakeMode, seed: int) -> None:
        self.left = handshakes
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[int] = []
        self._warm = int(handshakes * (1 - WARM_UP))
        self._mode = mode
        self._chance = random.Random(seed)
        self._told = 0
        self._authority = authority = trustme.CA()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._trust, self._tls12 = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
        self._tls12.maximum_version = ssl.TLSVersion.TLSv1_2
        for context in (self._trust, self._tls12):
            authority.configure_trust(context)
        self._distrust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._sessions: dict[tuple[ssl.SSLContext, str], Any] = {}
        self._hello = Client(None, self._trust, "a.example").flight()  # type: ignore[arg-type]
        self._fates: list[Callable[[socket.socket], Awaitable[str]]] = [
            *([self.is_served] * 12),
            self.is_served_byte_by_byte,
            self.distrusts,
            self.sees_a_callback_fail,
            self.is_refused,
            self.sends_garbage,
            self.leaves_at_once,
            self.leaves_in_the_callback,
            self.leaves_before_the_last_flight,
            self.leaves_with_the_last_flight,
        ]

    def _context(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(name).configure_cert(context)
        context.sslobject_class = Counted
        return context

    async def _choose(
        self, ssl_object: ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> ssl.SSLContext | int:
        if self._chance.random() < 0.3:
            await aiojob.offload_async(time.sleep, 0.0001)
        await asyncio.sleep(self._chance.random() * 0.003)
        if name == "fails.example":
            self.counts["callbacks that failed"] += 1
            raise CallbackError
        return self._contexts.get(name or "", ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)

    def _exception_handler(self, loop: object, context: dict[str, Any]) -> None:
        self._told += 1
        if not isinstance(context.get("exception"), CallbackError):
            self.faults.append(f"the exception handler was called: {context}")

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._exception_handler)
        while self.left:
            await self._serve(min(self.left, 2000))
            self._contexts.clear()
            self._sessions.clear()
            gc.collect()
            if self.left <= self._warm:
                self.memory.append(psutil.Process().memory_info().rss)
        if self._told != self.counts["callbacks that failed"]:
            self.faults.append(f"the exception handler was called {self._told} times")

    async def _serve(self, handshakes: int) -> None:
        """Have one server do so many, and close it with some under way.

        Its contexts are its own, as libssl keeps thousands of sessions in each.
        """
        self.left -= handshakes
        self._contexts |= {name: self._context(name) for name in NAMES}
        front = self._context("front.example")
        front.sni_callback = tls.sni_callback(self._choose)
        tickets = iter(range(handshakes))
        server = await tls.create_server(
            Echo,
            "127.0.0.1",
            0,
            ssl=front,
            handshake=self._mode,
            ssl_handshake_timeout=TIMEOUT,
            backlog=1000,
        )
        address = server.sockets[0].getsockname()
        silent = [await self._connect(address) for _ in range(20)]
        await asyncio.gather(*(self._visit(address, tickets) for _ in range(CLIENTS)))
        for sock in silent[:10]:
            sock.send(self._hello)
        await asyncio.sleep(0.001)
        server.close()
        await server.wait_closed()
        self.counts["dropped with the server"] += len(silent)
        for sock in silent:
            sock.close()
        if server.handshakes:
            self.faults.append(f"left behind: {server!r}")

    @staticmethod
    async def _connect(address: Any) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    async def _visit(self, address: Any, tickets: Any) -> None:
        for _ in tickets:
            fate = self._chance.choice(self._fates)
            with await self._connect(address) as sock:
                try:
                    async with asyncio.timeout(PATIENCE):
                        self.counts[await fate(sock)] += 1
                except Exception as error:
                    self.faults.append(f"{fate.__name__}: {error!r}")

    # -- what becomes of a client

    async def is_served(self, sock: socket.socket) -> str:
        context, name = self._chance.choice((self._trust, self._tls12)), self._chance.choice(NAMES)
        session = self._sessions.get((context, name)) if self._chance.random() < 0.5 else None
        client = Client(sock, context, name, session=session)
        await client.do(client.tls.do_handshake)
        await self._talk(client, name)
        if (context, name) not in self._sessions:  # Python never frees what it returns here
            self._sessions[context, name] = client.tls.session
        return "served after a resumption" if client.tls.session_reused else "served"

    async def is_served_byte_by_byte(self, sock: socket.socket) -> str:
        name = self._chance.choice(NAMES)
        client = Client(sock, self._trust, name)
        for byte in client.flight():
            sock.send(bytes((byte,)))
            await asyncio.sleep(0)
        await client.do(client.tls.do_handshake)
        await self._talk(client, name)
        return "served byte by byte"

    async def _talk(self, client: Client, name: str) -> None:
        shown: Any = client.tls.getpeercert()
        if shown["subjectAltName"] != (("DNS", name),):
            self.faults.append(f"{name} was asked for, {shown} was shown")
        if await client.say(name.encode()) != name.encode():
            self.faults.append("not what was sent came back")

    async def distrusts(self, sock: socket.socket) -> str:
        await self._expect(sock, self._distrust, "a.example", "CERTIFICATE_VERIFY_FAILED")
        return "refused the certificate"

    async def sees_a_callback_fail(self, sock: socket.socket) -> str:
        await self._expect(sock, self._trust, "fails.example", "INTERNAL_ERROR")
        return "saw the callback fail"

    async def is_refused(self, sock: socket.socket) -> str:
        await self._expect(sock, self._trust, "unknown.example", "UNRECOGNIZED_NAME")
        return "refused by the callback"

    async def _expect(
        self, sock: socket.socket, context: ssl.SSLContext, name: str, reason: str
    ) -> None:
        client = Client(sock, context, name)
        try:
            await client.do(client.tls.do_handshake)
        except ssl.SSLError as error:
            if reason not in str(error):
                self.faults.append(f"{error!r} instead of {reason}")
        else:
            self.faults.append(f"no {reason}")

    async def sends_garbage(self, sock: socket.socket) -> str:
        cut = self._chance.randrange(len(self._hello))
        sock.send(self._hello[:cut] + self._chance.randbytes(200))
        await asyncio.sleep(self._chance.random() * 0.005)
        self._leave(sock)
        return "sent garbage"

    async def leaves_at_once(self, sock: socket.socket) -> str:
        self._leave(sock)
        return "left at once"

    async def leaves_in_the_callback(self, sock: socket.socket) -> str:
        sock.send(self._hello)
        await asyncio.sleep(self._chance.random() * 0.005)
        self._leave(sock)
        return "left in the callback"

    async def leaves_before_the_last_flight(self, sock: socket.socket) -> str:
        await Client(sock, self._trust, "b.example").last_flight()
        self._leave(sock)
        return "left before the last flight"

    async def leaves_with_the_last_flight(self, sock: socket.socket) -> str:
        sock.send(await Client(sock, self._trust, "c.example").last_flight())
        for _ in range(self._chance.randrange(3)):
            await asyncio.sleep(0)
        self._leave(sock)
        return "left with the last flight"

    def _leave(self, sock: socket.socket) -> None:
        if self._chance.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def soaked(handshakes: int, loop: str, mode: HandshakeMode, seed: int) -> bool:
    """Run it; print what happened, and return whether nothing was wrong."""
    soak = Soak(handshakes, mode, seed)
    began = time.perf_counter()
    try:
        with nothing_left(), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(soak.run())
    except AssertionError as error:
        soak.faults.append(f"left behind: {error}")
    seconds = time.perf_counter() - began
    deadline = time.monotonic() + 1  # for what is on its way to the collector
    while gc.collect() is not None and Counted.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    if Counted.alive:
        soak.faults.append(f"{len(Counted.alive)} SSL object(s) were left behind")
    print(f"{loop}, {mode}: {handshakes:,} connections, {handshakes / seconds:,.0f} a second")
    for what, count in sorted(soak.counts.items()):
        print(f"    {what:32} {count:>8,}")
    if len(soak.memory) > 1:
        growth = (soak.memory[-1] - soak.memory[0]) / 2**20
        print(f"    {'memory grew by':32} {growth:>8.1f} MiB")
    for fault in soak.faults[:20]:
        print(f"FAULT {fault} (--seed {seed})")
    if not soak.faults:
        print(f"    {'faults, and things left':32} {'none':>8}")
    return not soak.faults


def main() -> int:
    modes = [mode for mode in get_args(HandshakeMode) if mode != "openssl"]  # no callbacks there
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.tls", description=__doc__)
    parser.add_argument("--handshakes", type=int, default=20_000, help="on each loop in each mode")
    parser.add_argument("--loop", action="append", choices=LOOPS, help="default: both")
    parser.add_argument("--mode", action="append", choices=modes, help="default: both")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    for factory in LOOPS.values():
        factory().close()  # what is opened once and kept for good is there by now
    passed = [
        soaked(options.handshakes, loop, mode, options.seed)
        for loop in options.loop or LOOPS
        for mode in options.mode or modes
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
