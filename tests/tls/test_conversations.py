"""Malformed and unusual conversations: aiojob's server answers as the loop's own does.

Some are bytes put together by hand; the others are led by tlslite-ng, a TLS implementation in
Python, whose messages are replaced, repeated or spoilt on their way.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from aiojob import tls
from tls.hostile import MODES, Echo, client_hello, server_context
from tls.kit import Address, LoopErrors, until

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
    from tlslite.api import HandshakeSettings, TLSConnection  # type: ignore[import-untyped]
    from tlslite.constants import AlertDescription, AlertLevel, ContentType, ExtensionType  # type: ignore[import-untyped]
    from tlslite.errors import TLSError  # type: ignore[import-untyped]
    from tlslite.extensions import TLSExtension  # type: ignore[import-untyped]
    from tlslite.messages import (  # type: ignore[import-untyped]
        Alert,
        ApplicationData,
        ChangeCipherSpec,
        ClientHello,
        ClientKeyExchange,
        Finished,
        Message,
    )

HASTE, PATIENCE = 0.15, (1.0, 5.0, 20.0)
"""Seconds without an answer after which a client takes it that there will be none.

Haste may err on a busy machine: what differs then is looked at again, with more and more patience.
"""


@dataclass(frozen=True)
class Outcome:
    """What a client sees of a server: its first answer, an alert, its last word."""

    answer: int | None = None
    """The type of the first record, or of the first handshake message in it."""
    alert: int | None = None
    served: bool = False
    ended: bool = False


Conversation = Callable[[socket.socket], Outcome]
CONVERSATIONS: dict[str, Conversation] = {}


# -- by hand


def record(kind: int, payload: bytes, version: int = 0x0303) -> bytes:
    return struct.pack("!BHH", kind, version, len(payload)) + payload


def handshake(kind: int, body: bytes, length: int | None = None) -> bytes:
    return bytes((kind,)) + (len(body) if length is None else length).to_bytes(3, "big") + body


HELLO = client_hello()
MESSAGE = HELLO[5:]
"""The ClientHello without its record's header."""


def pieces(size: int) -> bytes:
    return b"".join(record(22, MESSAGE[i : i + size]) for i in range(0, len(MESSAGE), size))


def with_extensions(
    *added: tuple[int, bytes], without: tuple[int, ...] = (), last: bool = True
) -> bytes:
    """Return a ClientHello with some extensions more, and some less."""
    body = MESSAGE[4:]
    place = 34  # version and random
    place += 1 + body[place]  # session id
    place += 2 + int.from_bytes(body[place : place + 2], "big")  # cipher suites
    place += 1 + body[place]  # compression
    rest, extensions = body[place + 2 :], b""
    while rest:
        kind, size = struct.unpack("!HH", rest[:4])
        if kind not in without:
            extensions += rest[: 4 + size]
        rest = rest[4 + size :]
    more = b"".join(struct.pack("!HH", kind, len(data)) + data for kind, data in added)
    extensions = extensions + more if last else more + extensions
    return record(
        22, handshake(1, body[:place] + struct.pack("!H", len(extensions)) + extensions), 0x0301
    )


KEY_SHARE, PSK, PSK_MODES, TICKET, EARLY_DATA, HEARTBEAT = 51, 41, 45, 35, 42, 15
IDENTITY = struct.pack("!HH", 38, 32) + b"i" * 32 + b"\0\0\0\0"
GARBAGE_PSK = IDENTITY + struct.pack("!HB", 33, 32) + b"b" * 32
CCS = record(20, b"\1")
WARNING = record(21, b"\1\x5a")  # user_canceled

SENT: dict[str, bytes] = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(500),
    "a hello": HELLO,
    "a hello in records of one byte": pieces(1),
    "a hello in records of ten bytes": pieces(10),
    "an empty record, then a hello": record(22, b"") + HELLO,
    "forty empty records, then a hello": 40 * record(22, b"") + HELLO,
    "a hello in a record of version 0": record(22, MESSAGE, 0),
    "a hello in a record of version 5.5": record(22, MESSAGE, 0x0505),
    "a hello in a record of DTLS": record(22, MESSAGE, 0xFEFD),
    "a hello of SSL 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(40),
    "an oversized record": b"\x16\x03\x01\x48\x80" + bytes(18_560),
    "a record of 64 KiB": b"\x16\x03\x01\xff\xff" + bytes(65_535),
    "a record of application data": record(23, b"early") + HELLO,
    "a heartbeat": record(24, b"\1\xff\xff") + HELLO,
    "a record of unknown type": record(99, b"?") + HELLO,
    "a ChangeCipherSpec, then a hello": CCS + HELLO,
    "a hello, then ChangeCipherSpecs": HELLO + 3 * CCS,
    "a hello, then 40 ChangeCipherSpecs": HELLO + 40 * CCS,
    "a bad ChangeCipherSpec": HELLO + record(20, b"\2"),
    "a fatal alert": record(21, b"\2\x28"),
    "a warning, then a hello": WARNING + HELLO,
    "ten warnings, then a hello": 10 * WARNING + HELLO,
    "half an alert": record(21, b"\2"),
    "a close_notify": record(21, b"\1\0"),
    "a hello, then a fatal alert": HELLO + record(21, b"\2\x28"),
    "a hello, then a close_notify": HELLO + record(21, b"\1\0"),
    "two hellos": HELLO + HELLO,
    "a hello, then garbage": HELLO + b"garbage" * 9,
    "a hello that promises 16 MB": record(22, handshake(1, MESSAGE[4:], 0xFFFFFF), 0x0301),
    "a hello that is too short": record(22, handshake(1, MESSAGE[4:90])),
    "a hello with bytes left over": record(22, handshake(1, MESSAGE[4:] + b"more")),
    "an empty hello": record(22, handshake(1, b"")),
    "a HelloRequest": record(22, handshake(0, b"")) + HELLO,
    "a ServerHello": record(22, handshake(2, MESSAGE[4:])),
    "a Finished": record(22, handshake(20, b"f" * 32)),
    "a KeyUpdate": record(22, handshake(24, b"\1")),
    "an unknown handshake message": record(22, handshake(77, b"?")),
    "an unknown extension": with_extensions((0xFAFA, b"unknown")),
    "an extension twice": with_extensions((0xFF01, b"\0"), (0xFF01, b"\0")),
    "a garbage key share": with_extensions((KEY_SHARE, b"\0\6garbage"), without=(KEY_SHARE,)),
    "a bad point as a key share": with_extensions(
        (KEY_SHARE, struct.pack("!HHH", 69, 23, 65) + b"\4" + b"x" * 64), without=(KEY_SHARE,)
    ),
    "no key share": with_extensions((KEY_SHARE, b"\0\0"), without=(KEY_SHARE,)),
    "a garbage pre-shared key": with_extensions((PSK, GARBAGE_PSK)),
    "a pre-shared key that is not last": with_extensions((PSK, GARBAGE_PSK), last=False),
    "a pre-shared key with a bad length": with_extensions((PSK, b"\xff" * 20)),
    "a garbage ticket": with_extensions((TICKET, b"t" * 200), without=(TICKET,)),
    "early data": with_extensions((EARLY_DATA, b""), (PSK, GARBAGE_PSK)) + record(23, b"e" * 500),
    "early data without a key": with_extensions((EARLY_DATA, b"")) + record(23, b"e" * 500),
    "20 kB of early data": with_extensions((EARLY_DATA, b""), (PSK, GARBAGE_PSK))
    + 2 * record(23, b"e" * 10_000),
    "the heartbeat extension": with_extensions((HEARTBEAT, b"\1")),
    "a name that is not ASCII": with_extensions((0, b"\0\x0a\0\0\7caf\xc3\xa9!\xff"), without=(0,)),
    "a name with a NUL": with_extensions((0, b"\0\x0a\0\0\7local\0t"), without=(0,)),
    "an empty name": with_extensions((0, b"\0\3\0\0\0"), without=(0,)),
}


def says(data: bytes) -> Conversation:
    def conversation(sock: socket.socket) -> Outcome:
        with suppress(OSError):
            sock.sendall(data)
        received, ended = b"", False
        try:
            while chunk := sock.recv(65536):
                received += chunk
            ended = True
        except TimeoutError:
            pass
        except OSError:
            ended = True
        return seen_in(received, ended)

    return conversation


def seen_in(received: bytes, ended: bool) -> Outcome:
    records = list(records_of(received))
    first = records[0] if records else None
    answer = None if first is None else first[1][0] if first[0] == 22 else first[0]
    alerts = [payload[1] for kind, payload in records if kind == 21 and len(payload) == 2]
    return Outcome(answer, alerts[0] if alerts else None, ended=ended)


def records_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 5:
        kind, _, size = struct.unpack("!BHH", data[:5])
        yield kind, data[5 : 5 + size]
        data = data[5 + size :]


for name, data in SENT.items():
    CONVERSATIONS[name] = says(data)


# -- led by tlslite-ng


class Meddling(TLSConnection):  # type: ignore[misc]
    """A client whose messages are replaced by what `meddle` makes of them."""

    meddle: Callable[[Any, Any], list[Any]]

    def _sendMsg(self, message: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:  # noqa: N802
        for one in self.meddle(self, message):
            yield from super()._sendMsg(one, *args, **kwargs)


def led(
    meddle: Callable[[Any, Any], list[Any]] = lambda connection, message: [message],
    *,
    version: tuple[int, int] = (3, 4),
    then: Callable[[Any], None] = lambda connection: None,
    **settings: Any,
) -> Conversation:
    """Shake hands, do something more, and see whether what is sent comes back."""

    def conversation(sock: socket.socket) -> Outcome:
        connection = Meddling(sock)
        connection.meddle = meddle
        how = HandshakeSettings()
        how.minVersion = how.maxVersion = version
        for setting, value in settings.items():
            setattr(how, setting, value)
        answered = False
        try:
            connection.handshakeClientCert(settings=how, serverName="localhost")
            answered = True
            then(connection)
            connection.write(b"ping")
            served = connection.read(min=4, max=4) == b"ping"
        except (TLSError, OSError, ValueError, AssertionError) as error:
            alert = (
                getattr(error, "description", None) if "Remote" in type(error).__name__ else None
            )
            return Outcome(answered, alert, ended=not isinstance(error, TimeoutError))
        return Outcome(answered, None, served)

    return conversation


def before(kind: type, *messages: Any) -> Callable[[Any, Any], list[Any]]:
    return lambda connection, message: (
        [*messages, message] if isinstance(message, kind) else [message]
    )


def instead_of(kind: type, *messages: Any) -> Callable[[Any, Any], list[Any]]:
    return lambda connection, message: list(messages) if isinstance(message, kind) else [message]


def twice(kind: type) -> Callable[[Any, Any], list[Any]]:
    return lambda connection, message: [message] * (1 + isinstance(message, kind))


def spoil_finished(connection: Any, message: Any) -> list[Any]:
    if isinstance(message, Finished):
        message.verify_data = bytearray(len(message.verify_data))
    return [message]


def spoil_key(connection: Any, message: Any) -> list[Any]:
    if isinstance(message, ClientKeyExchange):
        message.ecdh_Yc = bytearray(b"\4" + b"x" * 64)
    return [message]


def alert(description: int, level: int = AlertLevel.fatal) -> Any:
    return Alert().create(description, level)


def unknown_extension(connection: Any, message: Any) -> list[Any]:
    if isinstance(message, ClientHello):
        message.extensions.insert(0, TLSExtension(extType=0xFAFA).create(bytearray(b"?")))
    return [message]


def sends(*messages: Any) -> Callable[[Any], None]:
    def then(connection: Any) -> None:
        for message in messages:
            for _ in connection._sendMsg(message):
                pass

    return then


def renegotiates(connection: Any) -> None:
    hello = ClientHello().create((3, 3), bytearray(32), bytearray(), [0xC02B, 0xC02F])
    sends(hello)(connection)


def updates_keys(count: int) -> Callable[[Any], None]:
    def then(connection: Any) -> None:
        for _ in range(count):
            for _ in connection.send_keyupdate_request(0):
                pass

    return then


TLS12 = (3, 3)
EMPTY = Message(ContentType.application_data, bytearray())
UNKNOWN = Message(ContentType.handshake, bytearray(handshake(77, b"?")))

CONVERSATIONS |= {
    "TLS 1.3": led(),
    "TLS 1.2": led(version=TLS12),
    "TLS 1.1": led(version=(3, 2)),
    "another first group, so a HelloRetryRequest": led(keyShares=["secp521r1"]),
    "no key share, so a HelloRetryRequest": led(keyShares=[]),
    "an unknown extension in TLS 1.2": led(unknown_extension, version=TLS12),
    "small records": led(record_size_limit=64),
    "encrypt-then-MAC and CBC": led(cipherNames=["aes128"], useEncryptThenMAC=True, version=TLS12),
    "a spoilt Finished in TLS 1.3": led(spoil_finished),
    "a spoilt Finished in TLS 1.2": led(spoil_finished, version=TLS12),
    "a spoilt key in TLS 1.2": led(spoil_key, version=TLS12),
    "a Finished twice in TLS 1.3": led(twice(Finished)),
    "a Finished twice in TLS 1.2": led(twice(Finished), version=TLS12),
    "a ChangeCipherSpec twice in TLS 1.2": led(twice(ChangeCipherSpec), version=TLS12),
    "no ChangeCipherSpec in TLS 1.2": led(instead_of(ChangeCipherSpec), version=TLS12),
    "a key twice in TLS 1.2": led(twice(ClientKeyExchange), version=TLS12),
    "no key in TLS 1.2": led(instead_of(ClientKeyExchange), version=TLS12),
    "an alert instead of a Finished in TLS 1.3": led(
        instead_of(Finished, alert(AlertDescription.bad_certificate))
    ),
    "an alert instead of a key in TLS 1.2": led(
        instead_of(ClientKeyExchange, alert(AlertDescription.bad_certificate)), version=TLS12
    ),
    "a close_notify instead of a Finished": led(
        instead_of(Finished, alert(AlertDescription.close_notify, AlertLevel.warning))
    ),
    "a close_notify before a key in TLS 1.2": led(
        before(ClientKeyExchange, alert(AlertDescription.close_notify, AlertLevel.warning)),
        version=TLS12,
    ),
    "application data before a Finished in TLS 1.3": led(
        before(Finished, ApplicationData().create(bytearray(b"early")))
    ),
    "application data before a key in TLS 1.2": led(
        before(ClientKeyExchange, ApplicationData().create(bytearray(b"early"))), version=TLS12
    ),
    "an empty record before a Finished": led(before(Finished, EMPTY)),
    "an unknown message before a Finished": led(before(Finished, UNKNOWN)),
    "a renegotiation in TLS 1.2": led(then=renegotiates, version=TLS12),
    "a renegotiation in TLS 1.3": led(then=renegotiates),
    "a change of keys": led(then=updates_keys(1)),
    "twenty changes of keys": led(then=updates_keys(20)),
    "a hundred changes of keys": led(then=updates_keys(100)),
    "empty records of application data": led(then=sends(*[EMPTY] * 5)),
    "forty empty records of application data": led(then=sends(*[EMPTY] * 40)),
    "an unknown message behind the handshake": led(then=sends(UNKNOWN)),
    "a ChangeCipherSpec behind the handshake": led(then=sends(ChangeCipherSpec())),
    "a fatal alert behind the handshake": led(then=sends(alert(AlertDescription.internal_error))),
    "warnings behind the handshake": led(
        then=sends(*[alert(AlertDescription.user_canceled, AlertLevel.warning)] * 3), version=TLS12
    ),
    "a heartbeat behind the handshake": led(
        then=sends(Message(ContentType.heartbeat, bytearray(b"\1\xff\xff"))), version=TLS12
    ),
}
assert ExtensionType.heartbeat == HEARTBEAT


def outcome_of(name: str, address: Address, seconds: float) -> Outcome:
    with socket.create_connection(address) as sock:
        sock.settimeout(seconds)
        return CONVERSATIONS[name](sock)


async def outcomes(
    create_server: Callable[..., Any], names: Iterable[str], seconds: float, **options: Any
) -> dict[str, Outcome]:
    context = server_context()
    server = await create_server(Echo, "127.0.0.1", 0, ssl=context, **options)
    address = server.sockets[0].getsockname()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(8) as clients:
        found = await asyncio.gather(
            *(loop.run_in_executor(clients, outcome_of, name, address, seconds) for name in names)
        )
    server.close()
    await until(lambda: not getattr(server, "handshakes", 0))
    return dict(zip(names, found, strict=True))


@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_conversations_go_as_with_the_loops_own_server() -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(False)  # in which asyncio reports what its peers do
    reference = await outcomes(loop.create_server, CONVERSATIONS, HASTE)
    for mode in MODES:
        errors = LoopErrors()
        found = await outcomes(tls.create_server, CONVERSATIONS, HASTE, handshake=mode)
        doubtful = worse(found, reference)
        for seconds in PATIENCE:
            if doubtful:
                reference |= await outcomes(loop.create_server, doubtful, seconds)
                found = await outcomes(tls.create_server, doubtful, seconds, handshake=mode)
                doubtful = worse(found, reference)
        assert doubtful == {}
        assert not errors.contexts
    usual = await outcomes(tls.create_server, ["TLS 1.2", "TLS 1.3"], PATIENCE[-1])
    assert all(outcome.served for outcome in usual.values())


def worse(
    found: dict[str, Outcome], reference: dict[str, Outcome]
) -> dict[str, tuple[Outcome, Outcome]]:
    return {
        name: (outcome, reference[name])
        for name, outcome in found.items()
        if not is_no_worse(outcome, reference[name])
    }


def is_no_worse(outcome: Outcome, expected: Outcome) -> bool:
    """Whether it is the same, but for an alert that says why where there was none."""
    if outcome == expected:
        return True
    return (
        expected.alert is None
        and not expected.served
        and not outcome.served
        and (outcome.ended or not expected.ended)
    )
