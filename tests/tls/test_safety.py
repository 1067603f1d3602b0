"""Peers, callbacks, servers and loops that end at the wrong moment: nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest

import aiojob
from aiojob import tls
from aiojob.testing import Gate
from aiojob.tls import HandshakeMode
from aiojob.tls._acceptor import Acceptor
from tls.hostile import (
    MODES,
    NAMES,
    CountedObject,
    Echo,
    authority,
    certificate,
    client_context,
    client_hello,
    connect,
    many_fds,
    server_context,
    serving,
)
from tls.kit import (
    PATIENCE,
    Client,
    LoopErrors,
    acceptors,
    address_of,
    is_limited,
    reset,
    sockets,
    time_out,
    until,
)

modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _no_ssl_object_is_left() -> Any:
    yield
    deadline = time.monotonic() + PATIENCE  # for a worker's last step
    while gc.collect() is not None and CountedObject.alive and time.monotonic() < deadline:
        time.sleep(0.001)
    left = list(CountedObject.alive)
    CountedObject.alive.clear()
    assert not left, f"SSL objects were left behind: {left}"


class Lookups:
    """An SNI callback that never gets its answer, and counts what becomes of its calls."""

    def __init__(self) -> None:
        self.waiting = self.cancelled = 0

    async def __call__(self, ssl_object: ssl.SSLObject, name: str | None, context: Any) -> None:
        self.waiting += 1
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    @property
    def context(self) -> ssl.SSLContext:
        context = server_context()
        context.sni_callback = tls.sni_callback(self)
        return context


async def paused_clients(server: tls.Server, lookups: Lookups, count: int) -> list[socket.socket]:
    hello = client_hello()
    clients = []
    for _ in range(count):
        clients.append(await connect(address_of(server)))
        clients[-1].send(hello)
    await until(lambda: lookups.waiting == count)
    return clients


# -- handshakes that are dropped


async def test_a_thousand_handshakes_paused_in_their_callback_are_dropped_in_all_ways() -> None:
    asyncio.get_running_loop().set_debug(False)  # which takes most of the time
    lookups = Lookups()
    with many_fds(4000):
        async with serving(lookups.context) as server:
            clients = await paused_clients(server, lookups, 1000)
            for client in clients[:250]:
                client.close()
            await until(lambda: server.handshakes == 750)
            for client in clients[250:500]:
                reset(client)
            await until(lambda: server.handshakes == 500)
            cancel_tasks(acceptors(server)[:250])
            await until(lambda: server.handshakes == 250)
            server.close()
            await server.wait_closed()
            assert (lookups.cancelled, lookups.waiting) == (1000, 0)
            for client in clients[500:]:
                client.close()
        await until(lambda: gc.collect() is not None and not CountedObject.alive)


def cancel_tasks(some: list[Acceptor]) -> None:
    for acceptor in some:
        assert acceptor.task is not None
        acceptor.task.cancel()


@pytest.mark.parametrize("waits", [False, True])
def test_a_loop_that_ends_cancels_hundreds_of_handshakes(loop_factory: Any, waits: bool) -> None:
    lookups = Lookups()

    async def main() -> None:
        server = await tls.create_server(Echo, "127.0.0.1", 0, ssl=lookups.context, backlog=2000)
        clients.extend(await paused_clients(server, lookups, 200))
        try:
            raise ZeroDivisionError
        finally:
            if waits:
                async with server:
                    pass
            else:
                server.close()

    clients: list[socket.socket] = []
    # Debug mode would take most of the time.
    runner = asyncio.Runner(loop_factory=loop_factory, debug=False)
    with pytest.raises(ZeroDivisionError), runner:
        runner.run(main())
    assert (lookups.cancelled, lookups.waiting) == (200, 0)
    for client in clients:
        client.close()


async def test_workers_blocked_in_callbacks_are_released_when_connections_go() -> None:
    lookups = Lookups()
    async with serving(lookups.context, "thread") as server:
        hello = client_hello()
        clients = [await connect(address_of(server)) for _ in range(100)]
        for client in clients:
            client.send(hello)
        await until(lambda: lookups.waiting)
        for client in clients:
            client.close()
        await until(lambda: not server.handshakes and not lookups.waiting)
        assert lookups.cancelled


async def test_the_cleanup_of_a_cancelled_callback_is_not_cancelled_again() -> None:
    """The peer leaves and resets its connection, the time is over, the server is closed."""
    events: list[str] = []
    cleaned_up = asyncio.Event()

    async def choose(ssl_object: ssl.SSLObject, name: str | None, context: Any) -> None:
        try:
            events.append("waits")
            await asyncio.get_running_loop().create_future()
        finally:
            events.append("cleans up")
            await cleaned_up.wait()
            events.append("is clean")

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    async with serving(context) as server:
        client = await connect(address_of(server))
        client.send(client_hello())
        await until(lambda: "waits" in events)
        (acceptor,) = acceptors(server)
        client.shutdown(socket.SHUT_WR)
        await until(lambda: "cleans up" in events)
        time_out(acceptor)
        reset(client)
        await asyncio.sleep(0)
        server.close()
        await asyncio.sleep(0)
        cleaned_up.set()
    assert events == ["waits", "cleans up", "is clean"]


async def test_a_peer_that_does_not_read_is_dropped_after_an_alert() -> None:
    """The certificates and the alert behind them never leave the transport's buffer."""
    context = server_context()
    chain = certificate("localhost").private_key_and_cert_chain_pem.bytes()
    with tempfile.NamedTemporaryFile() as file:
        file.write(chain + 400 * authority().cert_pem.bytes())
        file.flush()
        context.load_cert_chain(file.name)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = await tls.create_server(Echo, sock=listening, ssl=context)
    async with server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address_of(server))
            client.setblocking(False)
            await until(lambda: server.handshakes)
            (acceptor,) = acceptors(server)
            client.send(client_hello() + b"garbage" * 10)
            await until(lambda: not server.handshakes)
            assert await asyncio.get_running_loop().sock_recv(client, 1)
            assert not acceptor._lost
            time_out(acceptor)
            await until(lambda: acceptor._lost)
            assert not is_limited(acceptor)


@modes
async def test_a_reset_behind_the_last_flight_is_not_reported(mode: HandshakeMode) -> None:
    """It may be seen before the hand-over, in its midst, or afterwards."""
    errors = LoopErrors()
    context = client_context()
    async with serving(server_context(), mode) as server:
        for turns in range(24):
            client = await Client(context).connect(address_of(server))
            client.sock.send(await client.last_flight())
            for _ in range(turns % 6):
                await asyncio.sleep(0)
            reset(client.sock)
        await until(lambda: not server.handshakes)
    assert not errors.contexts


async def test_callbacks_that_offload_cannot_use_up_the_workers_that_they_need() -> None:
    """With as many handshakes in workers as there are workers, each awaits a worker."""

    async def choose(ssl_object: ssl.SSLObject, name: str | None, context: Any) -> None:
        await asyncio.sleep(0.01)
        await aiojob.offload_async(time.sleep, 0.001)
        await aiojob.run_job(aiojob.offload, time.sleep, 0.001)

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    trust = client_context()
    async with serving(context, "thread") as server:
        clients = [await Client(trust).connect(address_of(server)) for _ in range(40)]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(client.handshake() for client in clients))
        for client in clients:
            await client.echo()
            client.sock.close()


# -- callbacks that fail


class CallbackError(Exception):
    pass


def _recurse() -> None:
    _recurse()


def _raise(error: BaseException) -> Any:
    raise error


FAULTS: dict[str, tuple[Callable[[], Any], type[BaseException]]] = {
    "raises": (lambda: _raise(CallbackError("no")), CallbackError),
    "oserror": (lambda: _raise(OSError("no")), OSError),
    "sslerror": (lambda: _raise(ssl.SSLError("no")), ssl.SSLError),
    "want read": (lambda: _raise(ssl.SSLWantReadError("no")), ssl.SSLWantReadError),
    "timeout": (lambda: _raise(TimeoutError("no")), TimeoutError),
    "stop iteration": (lambda: _raise(StopIteration()), RuntimeError),
    "memory": (lambda: _raise(MemoryError()), MemoryError),
    "recursion": (_recurse, RecursionError),
    "an object": (object, TypeError),
    "a string": (lambda: "localhost", TypeError),
    "a list": (list, TypeError),
    "a class": (lambda: ssl.SSLContext, TypeError),
    "too large an alert": (lambda: 256, ValueError),
    "far too large an alert": (lambda: 1 << 80, ValueError),
    "a negative alert": (lambda: -1, ValueError),
}


@modes
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_callbacks_fault_goes_to_the_exception_handler_once(
    mode: HandshakeMode, fault: str
) -> None:
    func, expected = FAULTS[fault]
    context = server_context()
    context.sni_callback = tls.sni_callback(lambda *_: func())
    errors = LoopErrors()
    async with (
        serving(context, mode) as server,
        await Client(client_context()).connect(address_of(server)) as client,
    ):
        with pytest.raises(ssl.SSLError, match="ALERT_INTERNAL_ERROR"):
            await client.handshake()
    assert [type(error) for error in errors.exceptions] == [expected]


@modes
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_callback_ends_the_loop(
    loop_factory: Any, mode: HandshakeMode, error: type[BaseException]
) -> None:
    async def main() -> None:
        # An eager task cannot be asked for what it raises in its first step; asyncio complains.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        context = server_context()
        context.sni_callback = tls.sni_callback(lambda *_: _raise(error("now")))
        async with (
            serving(context, mode) as server,
            await Client(client_context()).connect(address_of(server)) as client,
        ):
            with pytest.raises(ssl.SSLError):
                await client.handshake()

    with pytest.raises(error, match="now"), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


async def test_a_callback_that_fails_after_its_connection_has_gone_is_told_of() -> None:
    gate = Gate()

    def choose(*_: object) -> None:
        gate.wait()
        raise CallbackError

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    errors = LoopErrors()
    async with serving(context, "thread") as server:
        client = await connect(address_of(server))
        client.send(client_hello())
        await aiojob.run_job(gate.reached)
        client.close()
        await until(lambda: not server.handshakes)
        gate.open()
        await until(lambda: errors.contexts)
    assert [type(error) for error in errors.exceptions] == [CallbackError]


async def test_what_a_callback_returns_after_its_connection_has_gone_is_cancelled() -> None:
    gate, lookups = Gate(), Lookups()

    def choose(*args: Any) -> Any:
        gate.wait()
        return lookups(*args)

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    async with serving(context, "thread") as server:
        client = await connect(address_of(server))
        client.send(client_hello())
        await aiojob.run_job(gate.reached)
        client.close()
        await until(lambda: not server.handshakes)
        gate.open()
    assert lookups.waiting == 0


async def test_a_callback_that_swallows_its_cancellation_does_not_save_its_connection() -> None:
    lookups = Lookups()

    async def choose(*args: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await lookups(*args)

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    async with serving(context) as server:
        with await connect(address_of(server)) as client:
            client.send(client_hello())
            await until(lambda: lookups.waiting)
            (acceptor,) = acceptors(server)
            time_out(acceptor)
            await until(lambda: lookups.cancelled)
            await until(lambda: not server.handshakes)


@modes
async def test_the_collector_and_changes_of_contexts_in_a_callback(mode: HandshakeMode) -> None:
    contexts = [server_context(name) for name in NAMES]
    first = server_context()

    @tls.sni_callback
    async def choose(ssl_object: ssl.SSLObject, name: str | None, context: Any) -> ssl.SSLContext:
        gc.collect()
        context.set_ciphers("ECDHE")
        context.set_alpn_protocols(["other"])
        context.sni_callback = None
        await asyncio.sleep(0)
        for other in contexts:
            ssl_object.context = other
        gc.collect()
        await asyncio.sleep(0)
        context.sni_callback = choose
        return server_context("c.example")

    first.sni_callback = choose
    async with serving(first, mode) as server:
        for _ in range(5):
            client = Client(client_context(), "c.example")
            async with await client.connect(address_of(server)):
                await client.handshake()
                assert client.name_shown == "c.example"
                await client.echo()


@modes
async def test_no_cycle_keeps_the_ssl_objects_of_handshakes_that_fail(
    mode: HandshakeMode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "aiojob")  # pytest keeps the records, and so the errors

    async def fails(*_: object) -> None:
        await asyncio.sleep(0)
        raise CallbackError

    async def waits(*_: object) -> None:
        await asyncio.get_running_loop().create_future()

    def refuses(*_: object) -> None:
        raise CallbackError

    callbacks: list[Any] = [
        None,
        tls.sni_callback(fails),
        tls.sni_callback(waits),
        tls.sni_callback(refuses),
        tls.sni_callback(lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME),
    ]
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    asyncio.get_running_loop().set_debug(False)
    gc.collect()
    gc.disable()
    try:
        for callback in callbacks:
            context = server_context()
            context.sni_callback = callback
            async with serving(context, mode) as server:
                for data in (client_hello(), client_hello() + b"garbage", b"garbage", b"\x16"):
                    sock = await connect(address_of(server))
                    sock.send(data)
                    await asyncio.sleep(0.01)
                    reset(sock)
                    await until(lambda: not server.handshakes)
                    await until(lambda: not CountedObject.alive)
    finally:
        gc.enable()


@modes
async def test_what_a_callback_starts_does_not_keep_its_connection(mode: HandshakeMode) -> None:
    """Tasks and timers take the callback's context variables with them."""
    tasks: list[asyncio.Task[Any]] = []

    async def choose(*_: object) -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(60)))

    context = server_context()
    context.sni_callback = tls.sni_callback(choose)
    async with serving(context, mode) as server:
        async with await Client(client_context()).connect(address_of(server)) as client:
            await client.handshake()
            await client.echo()
        gc.collect()
        await until(lambda: gc.collect() is not None and len(CountedObject.alive) <= 0)
        for task in tasks:
            task.cancel()


# -- ends of servers and loops


async def silent(server: tls.Server) -> Any:
    return await connect(address_of(server))


async def half_a_hello(server: tls.Server) -> Any:
    sock = await connect(address_of(server))
    sock.send(client_hello()[:50])
    return sock


async def in_a_callback(server: tls.Server) -> Any:
    sock = await connect(address_of(server))
    sock.send(client_hello("paused.example"))
    return sock


async def before_the_last_flight(server: tls.Server) -> Any:
    client = await Client(client_context()).connect(address_of(server))
    await client.last_flight()
    return client.sock


async def with_the_last_flight(server: tls.Server) -> Any:
    """The hand-over may be under way, or not."""
    client = await Client(client_context()).connect(address_of(server))
    client.sock.send(await client.last_flight())
    return client.sock


async def connected(server: tls.Server) -> Any:
    client = await Client(client_context()).connect(address_of(server))
    await client.handshake()
    await client.echo()
    return client.sock


STATES = [
    silent,
    half_a_hello,
    in_a_callback,
    before_the_last_flight,
    with_the_last_flight,
    connected,
]


def pausing_context() -> ssl.SSLContext:
    @tls.sni_callback
    async def choose(ssl_object: ssl.SSLObject, name: str | None, context: Any) -> None:
        if name == "paused.example":
            await asyncio.get_running_loop().create_future()

    context = server_context()
    context.sni_callback = choose
    return context


@modes
async def test_a_server_is_closed_in_each_state(mode: HandshakeMode) -> None:
    before = sockets()
    for turns in (0, 1, 2, 3, 30):
        async with serving(pausing_context(), mode) as server:
            socks = [await state(server) for state in STATES]
            for _ in range(turns):
                await asyncio.sleep(0)
            server.close()
            for sock in socks:
                sock.close()
        await until(lambda: sockets() <= before)


@modes
@pytest.mark.parametrize("state", STATES)
# A connection may be established while the loop ends, as one of the loop's own server.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_loop_ends_by_an_exception_in_each_state(
    loop_factory: Any, mode: HandshakeMode, state: Any
) -> None:
    for turns in (0, 1, 2, 3, 30):
        end_a_loop_after(turns, loop_factory, mode, state)


def end_a_loop_after(turns: int, loop_factory: Any, mode: HandshakeMode, state: Any) -> None:
    socks: list[socket.socket] = []
    echoes: list[Echo] = []

    def factory() -> Echo:
        echoes.append(Echo())
        return echoes[-1]

    async def main() -> None:
        server = await tls.create_server(
            factory, "127.0.0.1", 0, ssl=pausing_context(), handshake=mode
        )
        socks.append(await state(server))
        for _ in range(turns):
            await asyncio.sleep(0)
        server.close()
        for echo in echoes:
            echo.transport.abort()
        raise ZeroDivisionError

    # In debug mode asyncio reports a connection of which it was about to make a transport.
    runner = asyncio.Runner(loop_factory=loop_factory, debug=False)
    with runner, pytest.raises(ZeroDivisionError):
        runner.run(main())
    socks[0].close()


LEFT_LOOP = """
import asyncio, sys
from tls import test_safety as states
from tls.hostile import Echo
from aiojob import tls

async def main():
    context = states.pausing_context()
    server = await tls.create_server(Echo, "127.0.0.1", 0, ssl=context, handshake=sys.argv[1])
    kept.append([await state(server) for state in states.STATES])
    await asyncio.sleep(0.01)

kept = []
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
"""


@modes
def test_an_interpreter_exits_after_a_loop_that_was_closed_without_ending_its_tasks(
    mode: HandshakeMode,
) -> None:
    """As asyncio says itself then: a task was destroyed. Nothing else is reported."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEFT_LOOP, mode],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
