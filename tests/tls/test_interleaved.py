"""Many handshakes at a time in one thread, which pause inside libssl: none sees another's state."""

from __future__ import annotations

import _ssl
import asyncio
import contextlib
import ctypes
import hashlib
import random
import ssl
from typing import Any

import pytest

import aiojob
from aiojob import tls
from aiojob.tls import HandshakeMode
from tls.hostile import (
    MODES,
    NAMES,
    Echo,
    client_context,
    client_hello,
    connect,
    server_context,
    serving,
)
from tls.kit import Client, address_of, reset

modes = pytest.mark.parametrize("mode", MODES)


class SaysItsName(Echo):
    """Sends the name in the certificate of its connection, as the server sees it."""

    def __init__(self, names: dict[ssl.SSLContext, str]) -> None:
        self.names = names

    def data_received(self, data: bytes) -> None:
        ssl_object = self.transport.get_extra_info("ssl_object")
        self.transport.write(self.names[ssl_object.context].encode())


async def visit(
    server: tls.Server, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None
) -> tuple[ssl.SSLSession | None, bool]:
    """Connect, and check on both sides whose certificate it is."""
    async with await Client(context, name, session).connect(address_of(server)) as client:
        await client.handshake()
        assert client.name_shown == name
        await client.echo(name.encode())
        return client.tls.session, bool(client.tls.session_reused)


@modes
@pytest.mark.parametrize("rebind", [True, False], ids=["rebind", "shuttle"])
async def test_certificates_are_never_mixed_up(
    mode: HandshakeMode, rebind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without resumption, in both versions, lookups of random lengths."""
    asyncio.get_running_loop().set_debug(False)
    if not rebind:
        monkeypatch.setattr("aiojob.tls._handover.can_rebind", lambda: False)
    chance = random.Random(7)
    contexts = {name: server_context(name) for name in NAMES}
    front = server_context()

    @tls.sni_callback
    def choose(ssl_object: ssl.SSLObject, name: str | None, context: Any) -> Any:
        assert name is not None
        if chance.random() < 0.5:
            return aiojob.offload(contexts.get, name)  # pauses, or blocks the worker
        return look_up(name)

    async def look_up(name: str) -> ssl.SSLContext:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        await asyncio.sleep(chance.random() * 0.005)
        return contexts[name]

    front.sni_callback = choose
    names = {context: name for name, context in contexts.items()}
    resumed = 0

    async def client(number: int) -> None:
        nonlocal resumed
        version = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)[number % 2]
        resumes = number % 3 > 0
        visits = random.Random(number)
        context = client_context()
        context.minimum_version = context.maximum_version = version
        sessions: dict[str, ssl.SSLSession | None] = {}
        for _ in range(6):
            name = visits.choice(NAMES)
            session, reused = await visit(server, context, name, sessions.get(name))
            resumed += reused
            if resumes:
                sessions[name] = session

    async with (
        serving(front, mode, lambda: SaysItsName(names)) as server,
        asyncio.TaskGroup() as group,
    ):
        for number in range(18):
            group.create_task(client(number))
    assert resumed > 10


# -- the thread's error queue

libcrypto = ctypes.PyDLL(_ssl.__file__)
libcrypto.ERR_peek_error.restype = ctypes.c_ulong


def no_error_is_queued() -> None:
    assert libcrypto.ERR_peek_error() == 0


def fails_in_openssl() -> None:
    """Have `ssl` and `hashlib` fail in some ways."""
    with contextlib.suppress(ValueError):
        hashlib.new("md0")
    with contextlib.suppress(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers("none such")
    with contextlib.suppress(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=b"\x30\x03\x02\x01\x01"
        )
    with contextlib.suppress(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(__file__)


def works_in_openssl() -> None:
    """Have `ssl` and `hashlib` do what a stale error would spoil."""
    assert hashlib.new("sha256", b"aiojob").hexdigest() == hashlib.sha256(b"aiojob").hexdigest()
    assert len(client_hello()) > 100


@modes
async def test_failing_handshakes_leave_the_error_queue_alone(mode: HandshakeMode) -> None:
    asyncio.get_running_loop().set_debug(False)
    chance = random.Random(3)
    front = server_context()
    context = server_context("a.example")
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    @tls.sni_callback
    async def choose(ssl_object: ssl.SSLObject, name: str | None, _: Any) -> Any:
        no_error_is_queued()
        for _ in range(chance.randrange(1, 4)):
            await asyncio.sleep(0.001)
            works_in_openssl()
        fails_in_openssl()
        no_error_is_queued()
        if name == "b.example":
            raise ZeroDivisionError
        return None if name == "c.example" else context

    front.sni_callback = choose
    trust, distrust = client_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls12 = client_context()
    tls12.maximum_version = ssl.TLSVersion.TLSv1_2
    mismatch = client_context()
    mismatch.maximum_version = ssl.TLSVersion.TLSv1_2
    mismatch.set_ciphers("AES128-SHA")
    hello = client_hello("a.example")

    async def garbage() -> None:
        data = chance.choice(
            (
                b"GET / HTTP/1.1\r\n\r\n",
                hello + b"garbage",
                hello[:30] + b"\xff" * 200,
                hello + b"\x15\x03\x03\x00\x02\x02\x28",
                hello[:200],
            )
        )
        sock = await connect(address_of(server))
        sock.send(data)
        await asyncio.sleep(chance.random() * 0.01)
        chance.choice((reset, type(sock).close))(sock)

    async def fails(client: ssl.SSLContext, name: str) -> None:
        async with await Client(client, name).connect(address_of(server)) as connection:
            with contextlib.suppress(OSError):
                await connection.handshake()
                await connection.echo()  # TLS 1.3: the server refuses afterwards
                raise AssertionError("a handshake that cannot work did")

    async def works(client: ssl.SSLContext) -> None:
        async with await Client(client, "a.example").connect(address_of(server)) as connection:
            await connection.handshake()
            for _ in range(3):
                await connection.echo()
                await asyncio.sleep(0)

    async def visitor() -> None:
        for _ in range(6):
            await chance.choice(
                (
                    garbage,
                    lambda: fails(distrust, "a.example"),
                    lambda: fails(mismatch, "a.example"),
                    lambda: fails(trust, "b.example"),
                    lambda: fails(trust, "c.example"),
                    lambda: works(trust),
                    lambda: works(tls12),
                    lambda: works(trust),
                )
            )()
            no_error_is_queued()
            works_in_openssl()

    async with serving(front, mode) as server, asyncio.TaskGroup() as group:
        for _ in range(15):
            group.create_task(visitor())
    no_error_is_queued()
