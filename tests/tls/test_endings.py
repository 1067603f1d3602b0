"""How connections end: at each stage of the handshake, right behind it, and later."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from itertools import product
from typing import Any

import pytest

from tls.kit import (
    AIOJOB,
    AIOJOB_STRATEGIES,
    HANDOVERS,
    PATIENCE,
    STRATEGIES,
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
    is_limited,
    sockets,
    until,
)

# -- what comes in one segment with the client's last flight


async def session_of(address: Address, context: ssl.SSLContext) -> ssl.SSLSession:
    async with Client(context) as client:
        await client.connect(address)
        await client.handshake()
        session = client.tls.session
        assert session is not None
        await client.send(client.close_notify())
        await client.end_of_stream()
    return session


async def events_behind_last_flight(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    following: str,
    *,
    resume: bool,
) -> Any:
    """Send one segment with the last flight and what follows it; return the protocol's events."""
    recorders = Recorders()
    async with kind.serving(recorders, server_context) as address:
        session = await session_of(address, client_context) if resume else None
        earlier = len(recorders.made)
        async with Client(client_context, session=session) as client:
            await client.connect(address)
            segment = await client.last_flight()
            if "data" in following:
                segment += client.sealed(b"early")
            if "close_notify" in following:
                segment += client.close_notify()
            if "FIN" in following:
                client.send_with_fin(segment)
            else:
                await client.send(segment)
            await until(lambda: len(recorders.made) > earlier)
            recorder = recorders.made[-1]
            if "data" in following:
                await until(lambda: recorder.received)
            if following != "data":
                await recorder.lost()
        await recorder.lost()
        return recorder.events


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_what_follows_the_last_flight_comes_after_connection_made_and_in_order(
    kind: Kind,
    version: str,
    server_context: ssl.SSLContext,
    client_contexts: dict[str, ssl.SSLContext],
) -> None:
    """In TLS 1.2 the client's flight is the last of all only when it resumes a session."""
    for following in (
        "data",
        "data FIN",
        "data close_notify",
        "data close_notify FIN",
        "close_notify FIN",
        "FIN",
    ):
        with case(following):
            ours, expected = [
                await events_behind_last_flight(
                    each,
                    server_context,
                    client_contexts[version],
                    following,
                    resume=version == "TLSv1.2",
                )
                for each in (kind, Kind())
            ]
            assert ours == expected
            assert ours[0] == ("made",)
            assert (b"early" in ours) is ("data" in following)


async def events_of_fin_in_tls_1_2(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> Any:
    recorders = Recorders()
    async with kind.connected(recorders, server_context, client_context) as client:
        client.send_with_fin(await client.last_flight())
        recorder = await recorders.first()
        await recorder.lost()
        await client.end_of_stream()
        client.tls.do_handshake()  # the server's Finished has come
    return recorder.events


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
async def test_a_fin_behind_the_last_flight_of_tls_1_2_comes_after_connection_made(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    events = await events_of_fin_in_tls_1_2(kind, server_context, client_context)
    assert events == await events_of_fin_in_tls_1_2(Kind(), server_context, client_context)


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
async def test_early_data_of_any_size_is_whole(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """Some of it comes with the last flight, the rest in and after the hand-over."""
    async with kind.serving(Echo, server_context) as address:
        for size in (1, 16_384, 50_000, 200_000):
            with case(size):
                data = random.Random(size).randbytes(size)
                async with Client(client_context) as client:
                    await client.connect(address)
                    await client.send(await client.last_flight() + client.sealed(data))
                    assert await client.read_exactly(size) == data


# -- peers that leave, or are silent


async def to_nothing(client: Client) -> None:
    pass


async def to_half_the_hello(client: Client) -> None:
    await client.send(client.flight()[:200])


async def to_the_hello(client: Client) -> None:
    await client.send(client.flight())


async def to_the_answer(client: Client) -> None:
    await client.last_flight()


async def to_half_the_last_flight(client: Client) -> None:
    await client.send((await client.last_flight())[:-20])


async def to_the_last_flight(client: Client) -> None:
    await client.send(await client.last_flight())


async def to_the_end(client: Client) -> None:
    await client.handshake()
    await client.echo()


UNFINISHED = [
    to_nothing,
    to_half_the_hello,
    to_the_hello,
    to_the_answer,
    to_half_the_last_flight,
]
FINISHED = [to_the_last_flight, to_the_end]


async def leave(client: Client, *, with_reset: bool) -> None:
    if with_reset:
        client.reset()
    else:
        client.send_with_fin(b"")
        await client.end_of_stream()


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_peer_that_leaves_in_the_handshake_leaves_nothing_behind(
    kind: Kind, server_context: ssl.SSLContext, client_contexts: dict[str, ssl.SSLContext]
) -> None:
    recorders = Recorders()
    async with kind.serving(recorders, server_context) as address:
        before = sockets()
        for version, stage, with_reset in product(client_contexts, UNFINISHED, [False, True]):
            with case(version, stage, with_reset):
                async with Client(client_contexts[version]) as client:
                    await client.connect(address)
                    await stage(client)
                    await leave(client, with_reset=with_reset)
                await until(lambda: sockets() <= before)
    assert not recorders.made


async def protocols_left(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    stage: Callable[[Client], Awaitable[None]],
    *,
    with_reset: bool,
) -> list[Echo]:
    """Have a client leave; return the protocols that had its connection, and lost it."""
    recorders = Recorders(Echo)
    async with kind.serving(recorders, server_context) as address:
        before = sockets()
        async with Client(client_context) as client:
            await client.connect(address)
            await stage(client)
            await leave(client, with_reset=with_reset)
        await until(lambda: sockets() <= before)
        await until(lambda: all("lost" in recorder.names for recorder in recorders.made))
    return recorders.made


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
async def test_a_peer_that_leaves_behind_the_handshake_is_lost_to_the_protocol(
    kind: Kind, server_context: ssl.SSLContext, client_contexts: dict[str, ssl.SSLContext]
) -> None:
    """A RST may come before the protocol has the connection; then it never learns of it."""
    for version, stage, with_reset in product(client_contexts, FINISHED, [False, True]):
        with case(version, stage, with_reset):
            left = await protocols_left(
                kind, server_context, client_contexts[version], stage, with_reset=with_reset
            )
            if stage is to_the_end or not with_reset:
                reason = ConnectionResetError if with_reset else type(None)
                assert [protocol.events[-1] for protocol in left] == [("lost", reason)]


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
async def test_peers_that_leave_anywhere_are_cleaned_up_after_side_by_side(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Echo)

    async def leave_somewhere(number: int) -> None:
        choose = random.Random(number)
        async with Client(client_context) as client:
            await client.connect(address)
            await choose.choice([*UNFINISHED, *FINISHED])(client)
            for _ in range(choose.randrange(4)):
                await asyncio.sleep(0)
            if choose.getrandbits(1):
                client.reset()
            else:
                client.send_with_fin(choose.randbytes(choose.randrange(30)))

    async with kind.serving(recorders, server_context) as address:
        before = sockets()
        await asyncio.gather(*(leave_somewhere(number) for number in range(50)))
        async with Client(client_context) as client:
            await client.connect(address)
            await client.handshake()
            await client.echo()
        await until(lambda: sockets() <= before)
        await until(lambda: all("lost" in recorder.names for recorder in recorders.made))


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_peer_that_falls_silent_in_the_handshake_is_left_when_its_time_is_over(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def fall_silent(stage: Callable[[Client], Awaitable[None]]) -> None:
        with case(stage):
            async with Client(client_context) as client:
                await client.connect(address)
                with suppress(ssl.SSLEOFError, ConnectionError):  # on a slow machine it's over here
                    await stage(client)
                await client.end_of_stream()

    recorders = Recorders()
    async with kind.serving(recorders, server_context, ssl_handshake_timeout=0.2) as address:
        await asyncio.gather(*map(fall_silent, UNFINISHED))
    assert not recorders.made


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_peer_that_is_slow_on_purpose_gets_no_more_time(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    async with kind.connected(
        recorders, server_context, client_context, ssl_handshake_timeout=0.1
    ) as client:
        end = asyncio.create_task(client.end_of_stream())
        with suppress(ConnectionError):
            for byte in client.flight():
                if end.done():
                    break
                await client.send(bytes([byte]))
                await asyncio.sleep(0.01)
            assert end.done()
        await end
    assert not recorders.made


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_the_time_for_the_handshake_is_no_limit_for_the_connection(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server = await kind.create_server(Echo, server_context)
    async with server, Client(client_context) as client:
        await client.connect(address_of(server))
        await until(lambda: server.handshakes)
        (acceptor,) = acceptors(server)
        assert is_limited(acceptor)
        await client.handshake()
        await client.echo()
        assert not is_limited(acceptor)
        await client.send(client.close_notify())
        await client.end_of_stream()


# -- the server closes


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_closing_the_server_ends_the_handshakes_under_way(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders()
    server = await kind.create_server(recorders, server_context)
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        clients = [await stack.enter_async_context(Client(client_context)) for _ in UNFINISHED]
        for client, stage in zip(clients, UNFINISHED, strict=True):
            await client.connect(address_of(server))
            await stage(client)
        server.close()
        for client in clients:
            await client.end_of_stream()
        await server.wait_closed()
    assert not recorders


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_closing_the_server_leaves_its_connections_alone(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Echo)
    server = await kind.create_server(recorders, server_context)
    async with Client(client_context) as client:
        await client.connect(address_of(server))
        await client.handshake()
        await client.echo()
        server.close()
        await client.echo()
    await recorders[0].lost()


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_protocol_that_closes_its_server_keeps_its_connection(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class Closing(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            server.close()

    recorders = Recorders(Closing)
    server = await kind.create_server(recorders, server_context)
    async with Client(client_context) as client:
        await client.connect(address_of(server))
        await client.handshake()
        await client.echo()
        await client.echo()
    await recorders[0].lost()


# -- the ends of connections


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_client_that_unwraps_is_answered(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Echo)
    async with kind.client(recorders, server_context, client_context) as client:
        await client.echo()
        await client.do(client.tls.unwrap)
        assert await client.end_of_stream()
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.events == [("made",), b"over there", ("eof",), ("lost", type(None))]


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_what_is_written_before_the_clients_close_notify_is_answered_to(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with kind.client(Echo, server_context, client_context) as client:
        data = bytes(100_000)
        await client.send(client.sealed(data) + client.close_notify())
        assert await client.read_exactly(len(data)) == data
        with pytest.raises(ssl.SSLZeroReturnError):
            await client.read()


class Farewell(Recorder):
    """Says something and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(b"farewell")
        self.transport.close()
        assert self.transport.is_closing()


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_transport_that_is_closed_sends_what_it_has_and_a_close_notify(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Farewell)
    async with kind.client(recorders, server_context, client_context) as client:
        assert await client.read_exactly(8) == b"farewell"
        assert await client.read() == b""
        await client.do(client.tls.unwrap)
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.events[-1] == ("lost", type(None))


async def events_without_an_answer(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> Any:
    recorders = Recorders(Farewell)
    async with kind.client(recorders, server_context, client_context, ssl_shutdown_timeout=0.1):
        recorder = await recorders.first()
        await recorder.lost()
        return recorder.events


@pytest.mark.parametrize("kind", HANDOVERS[1:], indirect=True)
async def test_a_close_notify_that_is_not_answered_is_waited_for_as_long_as_was_asked(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    events = await events_without_an_answer(kind, server_context, client_context)
    assert events == await events_without_an_answer(Kind(), server_context, client_context)


class Abort(Recorder):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(b"never seen, perhaps")
        self.transport.abort()


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_transport_that_is_aborted_sends_no_close_notify(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Abort)
    async with kind.connected(recorders, server_context, client_context) as client:
        with pytest.raises((ssl.SSLEOFError, ConnectionError)):
            await client.handshake()
            while await client.read():
                pass
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.events == [("made",), ("lost", type(None))]


# -- applications that fail


@pytest.mark.parametrize("kind", HANDOVERS[1:], indirect=True)
async def test_a_protocol_factory_that_raises_is_reported_and_the_connection_ended(
    kind: Kind,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    loop_errors: LoopErrors,
) -> None:
    error = ZeroDivisionError("no protocol")

    def raising() -> asyncio.Protocol:
        raise error

    async with kind.client(raising, server_context, client_context) as client:
        await client.end_of_stream()
    assert loop_errors.exceptions == [error]


class Broken(Recorder):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        raise ZeroDivisionError("in connection_made")


@pytest.mark.parametrize("early", [False, True], ids=["", "early data"])
@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_connection_made_that_raises_is_reported_and_the_connection_ended(
    kind: Kind,
    early: bool,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
) -> None:
    recorders = Recorders(Broken)
    async with (
        kind.serving(recorders, server_context) as address,
        Client(client_context) as client,
    ):
        errors = LoopErrors()
        await client.connect(address)
        flight = await client.last_flight()
        await client.send(flight + (client.sealed(b"early") if early else b""))
        await client.end_of_stream()
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.names == ["made", "lost"]
    assert {type(error) for error in errors.exceptions} == {ZeroDivisionError}


class BrokenLater(Recorder):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        raise ZeroDivisionError("in data_received")


@pytest.mark.parametrize("early", [False, True], ids=["", "early data"])
@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_data_received_that_raises_is_reported_and_the_connection_ended(
    kind: Kind,
    early: bool,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
) -> None:
    recorders = Recorders(BrokenLater)
    async with (
        kind.serving(recorders, server_context) as address,
        Client(client_context) as client,
    ):
        errors = LoopErrors()
        await client.connect(address)
        flight = await client.last_flight()
        if early:
            await client.send(flight + client.sealed(b"data"))
        else:
            await client.send(flight)
            await recorders.first()
            await client.write(b"data")
        await client.end_of_stream()
        recorder = await recorders.first()
        await recorder.lost()
        assert recorder.events == [("made",), b"data", ("lost", ZeroDivisionError)]
    assert [type(error) for error in errors.exceptions] == [ZeroDivisionError]
