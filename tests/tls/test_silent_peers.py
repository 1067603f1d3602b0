"""Peers that say nothing, or hardly anything: they cost little, and not for long."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from aiojob import tls
from aiojob.tls import HandshakeMode
from tls.hostile import (
    MODES,
    client_hello,
    connect,
    many_fds,
    server_context,
    serving,
)
from tls.kit import PATIENCE, LoopErrors, address_of, sockets, until

modes = pytest.mark.parametrize("mode", MODES)

COUNT = 1000
WAITS_FOR_HELLO = 25 * 1024
"""Bytes of memory, at most, for a connection that waits for its ClientHello,"""
PAUSED = 72 * 1024
"""and for a handshake that is paused in its SNI callback."""


async def test_thousands_of_silent_peers_are_dropped_in_time() -> None:
    asyncio.get_running_loop().set_debug(False)
    errors = LoopErrors()
    before = sockets()
    with many_fds(6000):
        async with serving(server_context(), ssl_handshake_timeout=0.5) as server:
            silent = [await connect(address_of(server)) for _ in range(2000)]
            await until(lambda: all(map(is_closed, silent)))
            await until(lambda: len(sockets()) <= len(before) + 1 + len(silent))
            assert not server.handshakes
            for sock in silent:
                sock.close()
    assert not errors.contexts


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@modes
async def test_a_peer_that_sends_a_byte_now_and_then_is_dropped_in_time(
    mode: HandshakeMode,
) -> None:
    errors = LoopErrors()
    hello = client_hello()
    loop = asyncio.get_running_loop()
    async with serving(server_context(), mode, ssl_handshake_timeout=0.3) as server:
        began = loop.time()
        with await connect(address_of(server)) as sock:
            for byte in hello:
                try:
                    sock.send(bytes((byte,)))
                except OSError:
                    break
                await asyncio.sleep(0.01)
            else:
                pytest.fail("it got more time")
            assert is_closed(sock)
            assert loop.time() - began > 0.25
    assert not errors.contexts


async def test_a_first_flight_without_an_end_is_not_kept() -> None:
    """A ClientHello of 126 KiB, the largest that libssl takes, and then more and more."""
    loop = asyncio.get_running_loop()
    start, more = b"\1\1\xf0\0" + bytes(16_380), bytes(16_384)
    endless = b"".join(b"\x16\x03\x01\x40\x00" + part for part in (start, *[more] * 100))
    async with serving(server_context()) as server:
        with await connect(address_of(server)) as sock:
            sending = asyncio.ensure_future(loop.sock_sendall(sock, endless))
            received = b""
            with suppress(ConnectionResetError):
                while data := await loop.sock_recv(sock, 1000):
                    received += data
            assert received in (b"", b"\x15\x03\x03\0\2\2\x32")  # decode_error, if it gets through
            sending.cancel()
            await asyncio.wait([sending])


PR_SET_THP_DISABLE = 41


def use_small_pages() -> None:
    """Have memory be resident from when it is used on, and not 2 MB at a time."""
    if sys.platform == "linux":
        assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


async def measure() -> None:
    """Print how many bytes a silent connection costs, and one that waits in its callback."""
    paused = 0

    async def choose(*_: object) -> None:
        nonlocal paused
        paused += 1
        await asyncio.get_running_loop().create_future()

    async def cost(data: bytes, are_there: Callable[[], int], count: int = COUNT) -> int:
        expected, before = are_there() + count, memory()
        for _ in range(count):
            sock = await connect(address_of(server))
            sock.send(data)
            fds.append(sock.detach())
        await until(lambda: are_there() == expected)
        return (memory() - before) // count

    use_small_pages()
    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    hello = client_hello()
    fds: list[int] = []
    async with serving(context) as server:
        await cost(hello, lambda: paused, 50)  # what is needed once is there by now
        silent = await cost(b"", lambda: server.handshakes)
        waiting = await cost(hello, lambda: paused)
        for fd in fds:
            os.close(fd)
    print(silent, waiting)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_silent_peer_and_a_paused_handshake_cost_little_memory(loop: str) -> None:
    """In a process of its own, where no memory is free that earlier tests had."""
    program = "from tls import test_silent_peers as this; import sys, asyncio, uvloop;"
    program += f"asyncio.Runner(loop_factory={loop}.new_event_loop).run(this.measure())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDEVMODE": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    silent, waiting = map(int, done.stdout.split())
    assert silent < WAITS_FOR_HELLO
    assert waiting < PAUSED
