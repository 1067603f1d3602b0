"""SNI and PSK callbacks that wait: what they choose, how they end when nobody waits for them."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Generator
from contextvars import ContextVar
from itertools import product
from typing import Any

import pytest

from aiojob import CannotPauseError, await_, offload, sleep, tls
from aiojob.tls._acceptor import READ_SIZE, RECEIVED_LIMIT
from tls.conftest import NAMES, Certificates
from tls.kit import (
    HANDOVERS,
    PATIENCE,
    PAUSING,
    Address,
    Client,
    Echo,
    Kind,
    LoopErrors,
    Recorder,
    Recorders,
    acceptors,
    address_of,
    case,
    sockets,
    time_out,
    until,
)

pausing_kinds = pytest.mark.parametrize("kind", PAUSING, indirect=True)
loop_kind = pytest.mark.parametrize("kind", ["loop-rebind"], indirect=True)

Contexts = dict[str | None, ssl.SSLContext]


@pytest.fixture
def contexts(certificates: Certificates) -> Contexts:
    """A context for each name, and one for a client that names none."""
    return {
        None: certificates.server_context(),
        **{name: certificates.server_context(name) for name in NAMES},
    }


# -- what a callback chooses


def choose_at_once(contexts: Contexts) -> Callable[..., Any]:
    return lambda ssl_object, name, context: contexts[name]


def choose_in_a_coroutine(contexts: Contexts) -> Callable[..., Any]:
    async def choose(ssl_object: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> Any:
        await asyncio.sleep(0.001)
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, contexts[name])
        return await future

    return choose


def choose_in_an_engine(contexts: Contexts) -> Callable[..., Any]:
    def choose(ssl_object: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> Any:
        sleep(0.001)
        return offload(contexts.__getitem__, name)

    return choose


@pausing_kinds
async def test_a_callback_chooses_the_certificate_that_is_shown(
    kind: Kind, contexts: Contexts, client_contexts: dict[str, ssl.SSLContext]
) -> None:
    server_context = contexts["localhost"]
    recorders = Recorders(Echo)
    choosers = (choose_at_once, choose_in_a_coroutine, choose_in_an_engine)
    async with kind.serving(recorders, server_context) as address:
        for chooser, version, name in product(choosers, client_contexts, NAMES):
            server_context.sni_callback = tls.sni_callback(chooser(contexts))
            with case(chooser, version, name):
                async with Client(client_contexts[version], name) as client:
                    await client.connect(address)
                    await client.handshake()
                    assert client.tls.version() == version
                    assert client.name_shown == name
                    await client.echo()
                    info = recorders.made[-1].transport.get_extra_info
                    assert info("ssl_object").context is contexts[name]
                    assert info("sslcontext") == server_context


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_callback_of_a_plain_function_works_on_every_server(
    kind: Kind, contexts: Contexts, client_context: ssl.SSLContext
) -> None:
    server_context = contexts["localhost"]
    server_context.sni_callback = tls.sni_callback(choose_at_once(contexts))
    async with (
        kind.serving(Echo, server_context) as address,
        Client(client_context, "b.example") as client,
    ):
        await client.connect(address)
        await client.handshake()
        assert client.name_shown == "b.example"
        await client.echo()


@pausing_kinds
async def test_a_callback_is_called_with_the_connection_the_name_and_the_servers_context(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    calls: list[tuple[Any, ...]] = []

    async def choose(*args: Any) -> None:
        calls.append((*args, asyncio.get_running_loop()))

    client_context.check_hostname = False
    server_context.sni_callback = tls.sni_callback(choose)
    recorders = Recorders(Echo)
    async with kind.serving(recorders, server_context) as address:
        for name in ("localhost", None):
            async with Client(client_context, name) as client:
                await client.connect(address)
                await client.handshake()
                assert client.name_shown == "localhost"
                await client.echo()
                ssl_object = recorders.made[-1].transport.get_extra_info("ssl_object")
                loop = asyncio.get_running_loop()
                assert calls[-1] == (ssl_object, name, server_context, loop)
    assert len(calls) == 2


variable: ContextVar[str] = ContextVar("variable")


@pausing_kinds
async def test_a_callback_sees_the_context_variables_of_its_server(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    seen: list[str] = []

    async def choose(*args: Any) -> None:
        seen.append(variable.get())

    server_context.sni_callback = tls.sni_callback(choose)
    variable.set("the server's")
    async with kind.serving(Echo, server_context) as address, Client(client_context) as client:
        variable.set("something else")
        await client.connect(address)
        await client.handshake()
    assert seen == ["the server's"]


@pausing_kinds
async def test_sessions_are_resumed_where_a_callback_waits(
    kind: Kind, version: str, contexts: Contexts, client_context: ssl.SSLContext
) -> None:
    server_context = contexts["localhost"]
    server_context.sni_callback = tls.sni_callback(choose_in_a_coroutine(contexts))
    session = None
    async with kind.serving(Echo, server_context) as address:
        for resumed in (False, True):
            async with Client(client_context, "localhost", session=session) as client:
                await client.connect(address)
                await client.handshake()
                await client.echo()
                assert client.tls.session_reused is resumed
                session = client.tls.session
                await client.send(client.close_notify())
                await client.end_of_stream()


# -- many at a time


@loop_kind
async def test_connections_that_wait_side_by_side_never_get_each_others_certificates(
    kind: Kind, contexts: Contexts, client_context: ssl.SSLContext
) -> None:
    """All of them wait in their callback at a time, and go on in another order."""
    asyncio.get_running_loop().set_debug(False)  # which takes most of the time
    count = 200
    choose = random.Random(4)
    names = [choose.choice(NAMES) for _ in range(count)]
    waiting: list[asyncio.Future[None]] = []

    @tls.sni_callback
    async def wait_and_choose(ssl_object: Any, name: str | None, context: Any) -> Any:
        waiting.append(asyncio.get_running_loop().create_future())
        await waiting[-1]
        if choose.random() < 0.1:
            await asyncio.sleep(0)
        return contexts[name]

    async def talk(name: str) -> None:
        async with Client(client_context, name) as client:
            await client.connect(address)
            await client.handshake()
            assert client.name_shown == name
            await client.echo(name.encode() * 100)

    server_context = contexts["localhost"]
    server_context.sni_callback = wait_and_choose
    async with (
        kind.serving(Echo, server_context, backlog=2 * count) as address,
        asyncio.TaskGroup() as group,
    ):
        for name in names:
            group.create_task(talk(name))
        await until(lambda: len(waiting) == count)
        choose.shuffle(waiting)
        for future in waiting:
            future.set_result(None)


@pytest.mark.parametrize("kind", ["thread-rebind"], indirect=True)
async def test_connections_in_several_threads_never_get_each_others_certificates(
    kind: Kind, contexts: Contexts, client_context: ssl.SSLContext
) -> None:
    asyncio.get_running_loop().set_debug(False)
    server_context = contexts["localhost"]
    server_context.sni_callback = tls.sni_callback(choose_in_a_coroutine(contexts))

    async def talk(name: str) -> None:
        async with Client(client_context, name) as client:
            await client.connect(address)
            await client.handshake()
            assert client.name_shown == name
            await client.echo(name.encode() * 100)

    async with kind.serving(Echo, server_context, backlog=100) as address:
        await asyncio.gather(*(talk(name) for name in NAMES * 20))


@loop_kind
async def test_failures_around_a_handshake_that_waits_do_it_no_harm(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    loop_errors: LoopErrors,
) -> None:
    """OpenSSL's error queue is one for all that happens on a thread."""
    waiting: dict[str | None, asyncio.Future[None]] = {}

    @tls.sni_callback
    async def wait(ssl_object: Any, name: str | None, context: Any) -> Any:
        future = waiting[name] = asyncio.get_running_loop().create_future()
        await future

    server_context.sni_callback = wait
    async with (
        kind.serving(Echo, server_context) as address,
        Client(client_context) as good,
        Client(client_context, "bad.example") as bad,
        Client(client_context) as junk,
    ):
        for client in (good, bad):
            await client.connect(address)
            await client.send(client.flight())
        await until(lambda: len(waiting) == 2)
        await junk.connect(address)
        await junk.send(b"GET / HTTP/1.1\r\n\r\n")
        await junk.end_of_stream()
        waiting["bad.example"].set_exception(ZeroDivisionError())
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await bad.handshake()
        waiting["localhost"].set_result(None)
        await good.handshake()
        await good.echo()
    assert [type(error) for error in loop_errors.exceptions] == [ZeroDivisionError]


# -- callbacks that refuse or fail


@pausing_kinds
async def test_an_alert_that_a_callback_returns_goes_to_the_client(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    @tls.sni_callback
    async def refuse(*args: Any) -> ssl.AlertDescription:
        return ssl.AlertDescription.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    server_context.sni_callback = refuse
    recorders = Recorders()
    async with kind.connected(recorders, server_context, client_context) as client:
        with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"):
            await client.handshake()
        assert await client.end_of_stream()
    assert not recorders.made


def raise_at_once(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def raise_after_a_while(error: BaseException) -> Callable[..., Any]:
    async def fail(*args: Any) -> Any:
        await asyncio.sleep(0.001)
        raise error

    return fail


def raise_in_an_engine(error: BaseException) -> Callable[..., Any]:
    return lambda *args: offload(raise_at_once(error))


@pausing_kinds
async def test_what_a_callback_raises_is_reported_and_the_client_gets_an_alert(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    loop_errors: LoopErrors,
) -> None:
    recorders = Recorders()
    async with kind.serving(recorders, server_context) as address:
        for failing, error in product(
            (raise_at_once, raise_after_a_while, raise_in_an_engine),
            (KeyError("no such name"), ConnectionError("no database"), ssl.SSLError("tangled")),
        ):
            server_context.sni_callback = tls.sni_callback(failing(error))
            with case(failing, error):
                async with Client(client_context) as client:
                    await client.connect(address)
                    with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
                        await client.handshake()
                    assert await client.end_of_stream()
                assert loop_errors.exceptions == [error]
            loop_errors.contexts.clear()
    assert not recorders.made


@pausing_kinds
async def test_a_callback_that_returns_no_choice_is_reported(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    loop_errors: LoopErrors,
) -> None:
    server_context.sni_callback = tls.sni_callback(lambda *args: "localhost")  # type: ignore[arg-type]
    async with kind.connected(Recorder, server_context, client_context) as client:
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await client.handshake()
    (error,) = loop_errors.exceptions
    assert isinstance(error, TypeError)
    assert "'localhost'" in str(error)


@pausing_kinds
async def test_a_callback_that_is_cancelled_from_elsewhere_ends_its_handshake(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    loop_errors: LoopErrors,
) -> None:
    """The handshake does not go on without its answer."""
    futures: list[asyncio.Future[None]] = []

    @tls.sni_callback
    async def wait(*args: Any) -> None:
        futures.append(asyncio.get_running_loop().create_future())
        await futures[0]

    server_context.sni_callback = wait
    recorders = Recorders()
    async with kind.connected(recorders, server_context, client_context) as client:
        await client.send(client.flight())
        await until(lambda: futures)
        futures[0].cancel()
        await client.end_of_stream()
    assert not recorders.made


# -- callbacks that nobody waits for any more


class Waiting:
    """A callback that waits for ever, and records how it ended."""

    def __init__(self, *, swallow: bool = False) -> None:
        self.swallow = swallow
        self.events: list[str] = []

    async def __call__(self, *args: Any) -> None:
        self.events.append("called")
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.events.append("cancelled")
            if not self.swallow:
                raise
        finally:
            await asyncio.sleep(0)  # it may wait while it cleans up
            self.events.append("ended")

    async def end(self) -> None:
        await until(lambda: "ended" in self.events)


async def paused_in_callback(address: Address, client: Client, waiting: Waiting) -> None:
    await client.connect(address)
    await client.send(client.flight())
    await until(lambda: waiting.events)


@pausing_kinds
@pytest.mark.parametrize("swallow", [False, True], ids=["", "swallowed"])
async def test_a_callback_is_cancelled_when_its_client_leaves(
    kind: Kind, swallow: bool, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    async with kind.serving(recorders, server_context) as address:
        before = sockets()
        for with_reset in (False, True):
            waiting = Waiting(swallow=swallow)
            server_context.sni_callback = tls.sni_callback(waiting)
            with case(with_reset):
                async with Client(client_context) as client:
                    await paused_in_callback(address, client, waiting)
                    if with_reset:
                        client.reset()
                    else:
                        client.send_with_fin(b"")
                        await client.end_of_stream()
                    await waiting.end()
                await until(lambda: sockets() <= before)
                assert waiting.events == ["called", "cancelled", "ended"]
    assert not recorders


@pausing_kinds
@pytest.mark.parametrize("swallow", [False, True], ids=["", "swallowed"])
async def test_a_callback_is_cancelled_when_its_time_is_over(
    kind: Kind, swallow: bool, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    waiting = Waiting(swallow=swallow)
    server_context.sni_callback = tls.sni_callback(waiting)
    recorders = Recorders()
    server = await kind.create_server(recorders, server_context)
    async with server, Client(client_context) as client:
        await paused_in_callback(address_of(server), client, waiting)
        (acceptor,) = acceptors(server)
        time_out(acceptor)
        await client.end_of_stream()
        await waiting.end()
    assert waiting.events == ["called", "cancelled", "ended"]
    assert not recorders


@pausing_kinds
@pytest.mark.parametrize("swallow", [False, True], ids=["", "swallowed"])
async def test_a_callback_is_cancelled_when_its_server_closes(
    kind: Kind, swallow: bool, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    waiting = Waiting(swallow=swallow)
    server_context.sni_callback = tls.sni_callback(waiting)
    recorders = Recorders()
    server = await kind.create_server(recorders, server_context)
    async with Client(client_context) as client, asyncio.timeout(PATIENCE):
        await paused_in_callback(address_of(server), client, waiting)
        server.close()
        await server.wait_closed()
        await client.end_of_stream()
        await waiting.end()
    assert waiting.events == ["called", "cancelled", "ended"]
    assert not recorders


@loop_kind
async def test_cancellation_is_raised_in_a_plain_function_where_it_waits(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    events: list[str] = []

    @tls.sni_callback
    def wait(*args: Any) -> None:
        events.append("called")
        try:
            await_(asyncio.get_running_loop().create_future())
        except asyncio.CancelledError:
            sleep(0)  # it may pause while it cleans up
            events.append("cancelled")
            raise

    server_context.sni_callback = wait
    async with kind.serving(Recorder, server_context) as address:
        async with Client(client_context) as client:
            await client.connect(address)
            await client.send(client.flight())
            await until(lambda: events)
            client.reset()
        await until(lambda: events == ["called", "cancelled"])


@pausing_kinds
async def test_a_client_gets_no_memory_for_what_it_sends_while_a_callback_waits(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """Its junk fills the buffers of the system, and then it has to wait."""
    waiting = Waiting()
    server_context.sni_callback = tls.sni_callback(waiting)
    server = await kind.create_server(Recorder, server_context)
    async with server, Client(client_context) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        await paused_in_callback(address_of(server), client, waiting)
        (acceptor,) = acceptors(server)
        sending = asyncio.create_task(client.send(bytes(30_000_000)))
        await until(lambda: len(acceptor._received) > RECEIVED_LIMIT)
        assert not acceptor._transport.is_reading()
        _, pending = await asyncio.wait([sending], timeout=0.05)
        assert pending
        assert len(acceptor._received) <= RECEIVED_LIMIT + READ_SIZE
        sending.cancel()
        time_out(acceptor)  # nobody reads its socket
    await waiting.end()


@loop_kind
async def test_many_handshakes_that_are_dropped_in_their_callback_leave_nothing(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    count = 100
    waiting = Waiting()
    server_context.sni_callback = tls.sni_callback(waiting)
    async with kind.serving(Recorder, server_context, backlog=2 * count) as address:
        before = sockets()
        clients = [Client(client_context) for _ in range(count)]
        for client in clients:
            await client.connect(address)
            await client.send(client.flight())
        await until(lambda: waiting.events == ["called"] * count)
        for client in clients:
            client.reset()
        await until(lambda: sockets() <= before)
        await until(lambda: waiting.events.count("ended") == count)
    assert waiting.events.count("cancelled") == count


# -- pre-shared keys

psk = pytest.mark.skipif(
    not getattr(ssl, "HAS_PSK", False), reason="Python has PSK callbacks from 3.13 on"
)
KEY = bytes(range(32))


@pytest.fixture
def psk_contexts(version: str) -> tuple[Any, Any]:
    """A server's context without a certificate, and a client's with a key."""
    server_context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    if version == "TLSv1.2":
        client_context.maximum_version = ssl.TLSVersion.TLSv1_2
        server_context.set_ciphers("PSK")
        client_context.set_ciphers("PSK")
    client_context.set_psk_client_callback(lambda hint: ("device 7", KEY))
    return server_context, client_context


def key_at_once(identity: str | None) -> bytes:
    return KEY if identity == "device 7" else b""


async def key_in_a_coroutine(identity: str | None) -> bytes:
    await asyncio.sleep(0.001)
    return key_at_once(identity)


def key_from_an_engine(identity: str | None) -> bytes:
    return offload(key_at_once, identity)


@psk
@pausing_kinds
async def test_a_callback_finds_the_shared_key(
    kind: Kind, version: str, psk_contexts: tuple[Any, Any]
) -> None:
    server_context, client_context = psk_contexts
    recorders = Recorders(Echo)
    async with kind.serving(recorders, server_context) as address:
        for key_of in (key_at_once, key_in_a_coroutine, key_from_an_engine):
            server_context.set_psk_server_callback(tls.psk_server_callback(key_of))
            with case(key_of):
                async with Client(client_context) as client:
                    await client.connect(address)
                    await client.handshake()
                    assert client.tls.version() == version
                    assert client.tls.getpeercert() is None
                    await client.echo()


@psk
@pausing_kinds
async def test_a_key_that_is_not_known_ends_the_handshake(
    kind: Kind, version: str, psk_contexts: tuple[Any, Any]
) -> None:
    server_context, client_context = psk_contexts
    client_context.set_psk_client_callback(lambda hint: ("device 8", KEY))
    server_context.set_psk_server_callback(tls.psk_server_callback(key_in_a_coroutine))
    recorders = Recorders()
    async with kind.connected(recorders, server_context, client_context) as client:
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            await client.handshake()
        assert await client.end_of_stream()
    assert not recorders.made


@psk
@pausing_kinds
async def test_what_a_key_callback_raises_is_reported(
    kind: Kind, version: str, psk_contexts: tuple[Any, Any], loop_errors: LoopErrors
) -> None:
    server_context, client_context = psk_contexts
    error = KeyError("no such device")
    server_context.set_psk_server_callback(tls.psk_server_callback(raise_after_a_while(error)))
    recorders = Recorders()
    async with kind.connected(recorders, server_context, client_context) as client:
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            await client.handshake()
        assert await client.end_of_stream()
    assert loop_errors.exceptions == [error]
    assert not recorders.made


@psk
@pausing_kinds
async def test_a_key_callback_is_cancelled_when_its_client_leaves(
    kind: Kind, psk_contexts: tuple[Any, Any]
) -> None:
    server_context, client_context = psk_contexts
    waiting: Any = Waiting()
    server_context.set_psk_server_callback(tls.psk_server_callback(waiting))
    async with kind.connected(Recorder, server_context, client_context) as client:
        flights = asyncio.create_task(client.handshake())  # two, in TLS 1.2
        await until(lambda: waiting.events)
        flights.cancel()
        client.reset()
        await waiting.end()
    assert waiting.events == ["called", "cancelled", "ended"]


# -- what is no coroutine, and where there is no handshake


class Lookup:
    """Something to await that is no coroutine."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def __await__(self) -> Generator[Any, Any, ssl.SSLContext]:
        yield from asyncio.sleep(0.001).__await__()
        return self.context


@pausing_kinds
async def test_a_callback_may_return_anything_that_can_be_awaited(
    kind: Kind, contexts: Contexts, client_context: ssl.SSLContext
) -> None:
    server_context = contexts["localhost"]
    server_context.sni_callback = tls.sni_callback(lambda *_: Lookup(contexts["a.example"]))
    async with (
        kind.serving(Echo, server_context) as address,
        Client(client_context, "a.example") as client,
    ):
        await client.connect(address)
        await client.handshake()
        assert client.name_shown == "a.example"


def test_outside_a_handshake_a_callback_raises_its_error() -> None:
    wrong: Any = "no bytes"
    with pytest.raises(TypeError, match="returns bytes"):
        tls.psk_server_callback(lambda identity: wrong)("device 7")

    async def waits(*_: Any) -> None:
        await asyncio.sleep(0)

    with pytest.raises(CannotPauseError):
        tls.sni_callback(waits)(None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [tls.sni_callback, tls.psk_server_callback])
def test_what_cannot_be_called_is_no_callback(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"func must be callable, got None: \w+_callback\(func\)"):
        wrap(None)
