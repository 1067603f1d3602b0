"""Handshakes of every sort, and what the connection knows of them afterwards."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from tls.conftest import Certificates
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
    Recorder,
    Recorders,
    case,
)


async def test_a_connection_of_each_version_carries_data_both_ways(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Echo)
    async with kind.client(recorders, server_context, client_context) as client:
        assert client.tls.version() == version
        await client.echo()
        recorder = await recorders.first()
        assert recorder.transport.get_extra_info("ssl_object").version() == version
        await client.send(client.close_notify())
        await recorder.lost()
        assert recorder.events == [("made",), b"over there", ("eof",), ("lost", type(None))]


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_rsa_keys_serve_too(kind: Kind, certificates: Certificates) -> None:
    context = certificates.rsa_context()
    client_context = certificates.client_context()
    client_context.maximum_version = ssl.TLSVersion.TLSv1_2  # names the key in its cipher suite
    async with kind.client(Echo, context, client_context) as client:
        cipher = client.tls.cipher()
        assert cipher is not None
        assert "RSA" in cipher[0]
        await client.echo()


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_handshake_in_segments_of_one_byte_ends_well(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with kind.connected(Echo, server_context, client_context) as client:
        for flight in (client.flight(), None):
            while not flight:
                await client.receive()
                flight = client.flight()
            for number in range(len(flight)):
                await client.send(flight[number : number + 1])
                await asyncio.sleep(0)  # the server has its turn
        await client.handshake()
        assert client.tls.version() == version
        await client.echo()


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_alpn_selects_what_both_sides_know(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server_context.set_alpn_protocols(["http/1.1", "http/1.0"])
    recorders = Recorders(Echo)
    async with kind.serving(recorders, server_context) as address:
        for offered, selected in ([], None), (["spdy/3"], None), (["h2", "http/1.1"], "http/1.1"):
            client_context.set_alpn_protocols(offered)
            with case(offered):
                async with Client(client_context) as client:
                    await client.connect(address)
                    await client.handshake()
                    assert client.tls.selected_alpn_protocol() == selected
                    await client.echo()
                    ssl_object = recorders.made[-1].transport.get_extra_info("ssl_object")
                    assert ssl_object.selected_alpn_protocol() == selected


# -- client certificates


@pytest.fixture
def demanding_context(server_context: ssl.SSLContext, certificates: Certificates) -> ssl.SSLContext:
    """A server context that wants a certificate of the client's."""
    certificates.authority.configure_trust(server_context)
    server_context.verify_mode = ssl.CERT_REQUIRED
    return server_context


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_client_certificate_that_is_asked_for_is_known_to_the_protocol(
    kind: Kind,
    version: str,
    demanding_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    certificates: Certificates,
) -> None:
    certificates.client.configure_cert(client_context)
    recorders = Recorders(Echo)
    async with kind.client(recorders, demanding_context, client_context) as client:
        await client.echo()
        certificate = (await recorders.first()).transport.get_extra_info("peercert")
        assert certificate["subjectAltName"] == (("email", "client@localhost"),)


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_a_client_without_a_valid_certificate_gets_an_alert(
    kind: Kind,
    version: str,
    demanding_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    certificates: Certificates,
) -> None:
    recorders = Recorders()
    async with kind.serving(recorders, demanding_context) as address:
        for alert in "certificate.required|handshake.failure", "unknown.ca":
            async with Client(client_context) as client:
                await client.connect(address)
                with pytest.raises(ssl.SSLError, match=f"(?i){alert}"):
                    await client.handshake()
                    await client.read()  # TLS 1.3's client learns of it only here
                assert await client.end_of_stream()
            certificates.stranger.configure_cert(client_context)
    assert not recorders.made


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_a_certificate_can_be_asked_for_after_the_handshake(
    kind: Kind,
    demanding_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    certificates: Certificates,
) -> None:
    certificates.client.configure_cert(client_context)
    client_context.post_handshake_auth = True
    demanding_context.post_handshake_auth = True
    recorders = Recorders(Echo)
    async with kind.client(recorders, demanding_context, client_context) as client:
        await client.echo()
        transport = (await recorders.first()).transport
        ssl_object = transport.get_extra_info("ssl_object")
        assert ssl_object.getpeercert() is None
        ssl_object.verify_client_post_handshake()
        await client.echo()  # the request goes out with it, the answer with the next
        await client.echo()
        assert ssl_object.getpeercert()["subjectAltName"] == (("email", "client@localhost"),)


# -- what remains of a handshake


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_session_is_resumed(
    kind: Kind, version: str, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    recorders = Recorders(Echo)
    async with kind.serving(recorders, server_context) as address:
        session = None
        for resumed in (False, True, True):
            async with Client(client_context, session=session) as client:
                await client.connect(address)
                await client.handshake()
                await client.echo()
                assert client.tls.session_reused is resumed
                ssl_object = recorders.made[-1].transport.get_extra_info("ssl_object")
                assert ssl_object.session_reused is resumed
                session = client.tls.session
                await client.send(client.close_notify())
                await recorders.made[-1].lost()


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_a_session_kept_by_the_server_is_resumed(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """By its number, in TLS 1.2 without tickets."""
    server_context.options |= ssl.OP_NO_TICKET
    client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    session = None
    async with kind.serving(Echo, server_context) as address:
        for resumed in (False, True):
            async with Client(client_context, session=session) as client:
                await client.connect(address)
                await client.handshake()
                await client.echo()
                assert client.tls.session_reused is resumed
                session = client.tls.session
                await client.send(client.close_notify())  # or the server would forget the session
                await client.end_of_stream()
    assert server_context.session_stats()["hits"] == 1


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_the_tickets_come_before_the_server_has_anything_to_say(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """They are the last flight of the server's, which no data of the protocol's pushes out."""
    client_context.minimum_version = ssl.TLSVersion.TLSv1_3
    async with kind.client(Recorder, server_context, client_context) as client:
        assert not client.tls.session or not client.tls.session.has_ticket
        while not client.tls.session or not client.tls.session.has_ticket:
            await client.receive()
            with pytest.raises(ssl.SSLWantReadError):
                client.tls.read()


async def extra_info(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> dict[str, Any]:
    """Have a connection; return what get_extra_info tells, in a form that can be compared."""
    recorders = Recorders(Echo)
    async with (
        kind.serving(recorders, server_context) as address,
        Client(client_context) as client,
    ):
        await client.connect(address)
        await client.handshake()
        await client.echo()
        transport = (await recorders.first()).transport
        info = transport.get_extra_info
        assert info("sockname") == address
        assert info("peername") == client.sock.getsockname()
        assert info("socket").getsockname() == address
        assert info("socket").getpeername() == client.sock.getsockname()
        assert info("ssl_object").context is server_context
        assert isinstance(info("sslcontext"), ssl.SSLContext)
        assert info("sslcontext") == server_context
        assert info("nothing of the sort", "default") == "default"
        return {
            "socket": (info("socket").family, info("socket").type, info("socket").gettimeout()),
            "peercert": info("peercert"),
            "cipher": info("cipher"),
            "compression": info("compression"),
            "nothing of the sort": info("nothing of the sort"),
            "sslcontext": context_of(info("sslcontext")),
            "ssl_object": ssl_object_of(info("ssl_object")),
        }


def context_of(context: ssl.SSLContext) -> dict[str, Any]:
    return {
        "options": context.options,
        "verify_mode": context.verify_mode,
        "minimum_version": context.minimum_version,
        "ciphers": context.get_ciphers(),
        "authorities": context.get_ca_certs(),
    }


def ssl_object_of(ssl_object: ssl.SSLObject) -> dict[str, Any]:
    return {
        "is one": isinstance(ssl_object, ssl.SSLObject),
        "context": context_of(ssl_object.context),
        "server side": ssl_object.server_side,
        "server name": ssl_object.server_hostname,
        "version": ssl_object.version(),
        "cipher": ssl_object.cipher(),
        "shared ciphers": ssl_object.shared_ciphers(),
        "compression": ssl_object.compression(),
        "alpn": ssl_object.selected_alpn_protocol(),
        "resumed": ssl_object.session_reused,
        "certificate": ssl_object.getpeercert(),
        "encoded certificate": ssl_object.getpeercert(binary_form=True),
        "binding": len(ssl_object.get_channel_binding("tls-unique") or b""),
        "pending": ssl_object.pending(),
    }


@pytest.mark.parametrize("kind", AIOJOB, indirect=True)
async def test_get_extra_info_tells_what_the_loops_own_server_tells(
    kind: Kind,
    version: str,
    demanding_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    certificates: Certificates,
) -> None:
    certificates.client.configure_cert(client_context)
    client_context.set_alpn_protocols(["http/1.1"])
    demanding_context.set_alpn_protocols(["http/1.1"])
    ours = await extra_info(kind, demanding_context, client_context)
    assert ours == await extra_info(Kind(), demanding_context, client_context)
    assert ours["peercert"] == ours["ssl_object"]["certificate"]


# -- handshakes that fail


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_a_version_that_the_server_does_not_speak_gets_an_alert(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    server_context.minimum_version = ssl.TLSVersion.TLSv1_3
    client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with kind.connected(Recorder, server_context, client_context) as client:
        with pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version"):
            await client.handshake()
        assert await client.end_of_stream()


async def answer_to(address: Address, data: bytes) -> tuple[bytes, bool]:
    """Send something that is no TLS; return the answer, and whether the end was no RST."""
    answer = b""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        async with asyncio.timeout(PATIENCE):
            await loop.sock_connect(sock, address)
            await loop.sock_sendall(sock, data)
            try:
                while data := await loop.sock_recv(sock, 1000):
                    answer += data
            except ConnectionResetError:
                return answer, False
            return answer, True


JUNK = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(1000),
    "ssl 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(40),
    "broken hello": b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    "other record": b"\x17\x03\x03\x00\x05hello",
    "alert": b"\x15\x03\x01\x00\x02\x02\x28",
}


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_what_is_no_client_hello_is_answered_as_openssl_has_it(
    kind: Kind, server_context: ssl.SSLContext
) -> None:
    """With an alert mostly, which the loop's own servers keep for themselves."""
    recorders = Recorders()
    async with kind.serving(recorders, server_context) as address:
        for name, data in JUNK.items():
            with case(name):
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                incoming.write(data)
                with pytest.raises(ssl.SSLError):
                    server_context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
                assert await answer_to(address, data) == (outgoing.read(), True)
    assert not recorders


@pytest.mark.parametrize("kind", AIOJOB_STRATEGIES, indirect=True)
async def test_what_an_unknown_peer_may_send_is_limited(
    kind: Kind, server_context: ssl.SSLContext
) -> None:
    """A hello that never ends, in records that are well-formed, is not kept without a limit."""
    recorders = Recorders()
    record = b"\x16\x03\x01\x40\x00" + b"\x01\xff\xff\xff".ljust(0x4000, b"\0")
    loop = asyncio.get_running_loop()
    async with kind.serving(recorders, server_context) as address:
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                async with asyncio.timeout(PATIENCE):
                    for _ in range(10_000):
                        await loop.sock_sendall(sock, record)
    assert not recorders


@pytest.mark.parametrize("kind", STRATEGIES, indirect=True)
async def test_one_failed_handshake_spoils_none_beside_it(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """OpenSSL's error queue is one per thread, whoever's error it was."""
    async with kind.serving(Echo, server_context) as address, Client(client_context) as client:
        await client.connect(address)
        hello = client.flight()
        await client.send(hello[:100])
        await answer_to(address, JUNK["http"])
        await client.send(hello[100:])
        await answer_to(address, JUNK["broken hello"])
        await client.handshake()
        await answer_to(address, JUNK["zeros"])
        await client.echo()
