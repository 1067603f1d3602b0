"""The bindings to libssl: what they do, and that nothing is touched that was not checked."""

from __future__ import annotations

import _ssl
import ctypes
import math
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Final

import pytest
import trustme

from aiojob import AiojobError, LibsslUnavailableError, tls
from aiojob.tls import _libssl
from aiojob.tls._libssl import (
    Connection,
    check_rebind,
    connection_of,
    has_psk_callback,
    is_async_capable,
)
from aiojob.tls._native import check_native

SSL_NOTHING: Final = 1
BIO_CB_FREE: Final = 1


def new_bios() -> tuple[ssl.MemoryBIO, ssl.MemoryBIO]:
    return ssl.MemoryBIO(), ssl.MemoryBIO()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


class Pair:
    """A server's and a client's SSL object, and the BIOs that the server's is on."""

    def __init__(self, server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = new_bios()
        self.server = server_context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.from_server, self.to_server = new_bios()
        self.client = client_context.wrap_bio(
            self.from_server, self.to_server, server_hostname="localhost"
        )

    @property
    def connection(self) -> Connection:
        return connection_of(self.server, self.incoming, self.outgoing)

    def carry(self) -> None:
        """Carry what each has to say to the other."""
        self.from_server.write(self.outgoing.read())
        self.incoming.write(self.to_server.read())

    def step(self) -> bool:
        """Take both sides a step further; say whether the server's handshake is complete."""
        with suppress(ssl.SSLWantReadError):
            self.client.do_handshake()
        self.carry()
        with suppress(ssl.SSLWantReadError):
            self.server.do_handshake()
            return True
        self.carry()
        return False

    def shake_hands(self) -> None:
        while not self.step():
            pass
        self.carry()

    def move(self) -> None:
        bios = new_bios()
        self.connection.move_to(*bios)
        self.incoming, self.outgoing = bios

    def exchange(self) -> None:
        """Check that data goes both ways."""
        self.server.write(b"from the server")
        self.carry()
        assert self.client.read() == b"from the server"
        self.client.write(b"from the client")
        self.carry()
        assert self.server.read() == b"from the client"


@pytest.fixture
def pair(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> Pair:
    return Pair(server_context, client_context)


# -- moving


def test_connections_can_be_moved_here() -> None:
    assert check_rebind() is None


def test_moved_connection_goes_on_on_its_new_bios(pair: Pair) -> None:
    pair.shake_hands()
    for _ in range(3):
        pair.move()
        pair.exchange()


def test_connection_can_be_moved_in_mid_handshake(pair: Pair) -> None:
    pair.move()
    while not pair.step():
        pair.move()
    pair.carry()
    pair.exchange()


def test_connection_can_be_moved_to_and_fro(pair: Pair) -> None:
    pair.shake_hands()
    first = pair.incoming, pair.outgoing
    connection = pair.connection
    for bios in (new_bios(), first, first):  # the last one is a move to where it is
        connection.move_to(*bios)
        pair.incoming, pair.outgoing = bios
        pair.exchange()


def test_pending_bytes_are_moved_before_those_in_the_new_bios(pair: Pair) -> None:
    pair.shake_hands()
    new_incoming, new_outgoing = new_bios()
    pair.server.write(b"1 from the server")
    pair.client.write(b"1 from the client")
    pair.incoming.write(pair.to_server.read())
    pair.client.write(b"2 from the client")
    new_incoming.write(pair.to_server.read())
    new_outgoing.write(b"?")
    pair.connection.move_to(new_incoming, new_outgoing)
    assert not pair.incoming.pending
    assert not pair.outgoing.pending
    pair.incoming = new_incoming
    assert pair.server.read() == b"1 from the client"
    assert pair.server.read() == b"2 from the client"
    sent = new_outgoing.read()
    assert sent.endswith(b"?")
    pair.from_server.write(sent[:-1])
    assert pair.client.read() == b"1 from the server"


def test_context_switched_by_sni_passes(pair: Pair, authority: trustme.CA) -> None:
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(other)

    def switch(ssl_object: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        ssl_object.context = other

    pair.server.context.sni_callback = switch
    try:
        pair.shake_hands()
    finally:
        pair.server.context.sni_callback = None
    assert pair.server.context is other
    pair.move()
    pair.exchange()


class Deaths:
    """Counts the BIOs that libcrypto frees."""

    def __init__(self) -> None:
        self.count = 0
        self._set_callback = ctypes.PyDLL(_ssl.__file__).BIO_set_callback_ex
        self._callback = ctypes.CFUNCTYPE(
            ctypes.c_long,
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_void_p),
        )(self._called)
        self._set_callback.argtypes = (ctypes.c_void_p, type(self._callback))
        self._set_callback.restype = None

    def _called(self, bio: int, operation: int, *rest: int) -> int:
        self.count += operation == BIO_CB_FREE
        return rest[4]  # what the operation returns

    def new_bios(self) -> tuple[ssl.MemoryBIO, ssl.MemoryBIO]:
        bios = new_bios()
        for bio in bios:
            self._set_callback(_libssl._bio_of(bio), self._callback)
        return bios


def test_bios_die_with_their_last_user(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    deaths = Deaths()
    pair = Pair(server_context, client_context)
    pair.shake_hands()
    for moves in range(2000):
        bios = deaths.new_bios()
        pair.connection.move_to(*bios)
        pair.incoming, pair.outgoing = bios
        assert deaths.count == 2 * moves
    del bios
    pair.exchange()
    pair.connection.move_to(pair.incoming, pair.outgoing)
    pair.exchange()
    assert deaths.count == 2 * moves
    incoming = pair.incoming
    pair.connection.move_to(incoming, incoming)
    pair.outgoing = incoming
    assert deaths.count == 2 * moves + 1
    del pair
    assert deaths.count == 2 * moves + 1
    del incoming
    assert deaths.count == 2 * moves + 2


def test_ssl_object_keeps_the_bios_that_it_was_moved_to(pair: Pair) -> None:
    deaths = Deaths()
    bios = deaths.new_bios()
    pair.connection.move_to(*bios)
    del bios
    assert deaths.count == 0
    pair.incoming = pair.outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        pair.server.do_handshake()
    pair.server = pair.client
    assert deaths.count == 2


def test_connection_keeps_its_ssl_object(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    connection = Pair(server_context, client_context).connection
    connection.set_async()
    connection.clear_async()
    assert connection.want() == SSL_NOTHING
    assert connection.async_fds() == []


def test_native_jobs_are_possible_here() -> None:
    assert is_async_capable()


# -- what is not as expected


class Untouchable:
    """A libssl with functions that must not be called."""

    def __init__(self, libssl: Any) -> None:
        self.socket_type = libssl.socket_type
        self.context_type = libssl.context_type

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called on an unknown pointer")


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a function of libssl is called."""
    libssl = Untouchable(_libssl._libssl())
    monkeypatch.setattr(_libssl, "_libssl", lambda: libssl)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Have the checks of the process made anew by the test, and by the next."""

    def forget() -> None:
        check_rebind.cache_clear()
        _libssl._libssl.cache_clear()
        _libssl._psk_callback_words.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("untouchable")
@pytest.mark.parametrize("words", [-1, 1])
def test_unknown_layout_is_refused_with_nothing_dereferenced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    monkeypatch.setattr(_libssl, "_HEAD", _libssl._HEAD + words * _libssl._WORD)
    with pytest.raises(LibsslUnavailableError, match="unknown layout"):
        _ = pair.connection


@pytest.mark.usefixtures("untouchable")
def test_too_short_a_structure_is_not_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libssl, "_HEAD", 10_000)
    with pytest.raises(LibsslUnavailableError, match=r"_SSLSocket has \d+ bytes, too few"):
        _ = pair.connection


@pytest.mark.usefixtures("forgotten")
def test_unknown_layout_is_told_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libssl, "_HEAD", _libssl._HEAD + _libssl._WORD)
    error = check_rebind()
    assert isinstance(error, LibsslUnavailableError)
    assert isinstance(error, AiojobError)
    assert "unknown layout" in str(error)
    assert error.__traceback__ is None
    assert check_rebind() is error


@pytest.mark.usefixtures("forgotten")
def test_move_without_effect_is_told_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _libssl._libssl()
    bios: dict[str, Any] = {}
    doctored = SimpleNamespace(
        **vars(real)
        | {
            "set_rbio": lambda _, bio: bios.update(r=bio),
            "set_wbio": lambda _, bio: bios.update(w=bio),
            "get_rbio": lambda ssl: bios.get("r") or real.get_rbio(ssl),
            "get_wbio": lambda ssl: bios.get("w") or real.get_wbio(ssl),
            "up_ref": lambda _: None,
        }
    )
    monkeypatch.setattr(_libssl, "_libssl", lambda: doctored)
    error = check_rebind()
    assert "did not write to the BIO" in str(error)
    monkeypatch.undo()


@pytest.mark.parametrize("which", [0, 1])
def test_other_bios_than_the_ssl_object_is_on_are_refused(pair: Pair, which: int) -> None:
    bios = [pair.incoming, pair.outgoing]
    bios[which] = ssl.MemoryBIO()
    with pytest.raises(LibsslUnavailableError, match=("incoming", "outgoing")[which]):
        connection_of(pair.server, *bios)


def test_another_context_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    libssl = _libssl._libssl()
    monkeypatch.setattr(libssl, "get_context", lambda _: libssl.get_rbio(_))
    with pytest.raises(LibsslUnavailableError, match="SSL_CTX"):
        _ = pair.connection


def test_objects_of_other_types_are_refused(pair: Pair) -> None:
    bios = pair.incoming, pair.outgoing
    fake: Any = SimpleNamespace(context=pair.server.context, _sslobj=SimpleNamespace())
    with pytest.raises(LibsslUnavailableError, match="_SSLSocket was expected"):
        connection_of(fake, *bios)
    fake = SimpleNamespace(context=pair.server.context)
    with pytest.raises(LibsslUnavailableError, match="_SSLSocket was expected, got None"):
        connection_of(fake, *bios)
    fake = SimpleNamespace()
    with pytest.raises(LibsslUnavailableError, match="MemoryBIO was expected"):
        connection_of(pair.server, fake, pair.outgoing)
    connection = pair.connection
    for fakes in ((fake, pair.outgoing), (pair.incoming, fake)):
        with pytest.raises(LibsslUnavailableError, match="MemoryBIO was expected"):
            connection.move_to(*fakes)
    pair.shake_hands()
    pair.exchange()


def no_file(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(_ssl, "__file__")


def missing_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_ssl, "__file__", "/nowhere/_ssl.so")


def another_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_ssl, "__file__", math.__file__)


def another_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ssl, "OPENSSL_VERSION_NUMBER", 0x10101000)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_file, "no shared library that can be opened: .*__file__"),
        (missing_file, "no shared library that can be opened: /nowhere"),
        (another_library, "OpenSSL_version_num is not found"),
        (another_version, "another libssl in the process"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unreachable_libssl_is_told(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    change(monkeypatch)
    with pytest.raises(LibsslUnavailableError, match=message):
        _ = pair.connection
    assert str(check_rebind())
    with pytest.raises(LibsslUnavailableError, match=message):
        is_async_capable()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    "missing", ["ASYNC_is_capable", "SSL_get_all_async_fds", "SSL_want", "SSL_ctrl"]
)
def test_libssl_without_native_jobs_can_move_connections(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """LibreSSL's and BoringSSL's."""
    function = _libssl._Libssl.function
    monkeypatch.setattr(
        _libssl._Libssl,
        "function",
        lambda self, name, *types: function(
            self, f"no_{name}" if name == missing else name, *types
        ),
    )
    assert check_rebind() is None
    pair.shake_hands()
    pair.move()
    pair.exchange()
    with pytest.raises(LibsslUnavailableError, match=f"no_{missing} is not found"):
        is_async_capable()
    assert not tls.is_native_capable()
    with pytest.raises(LibsslUnavailableError, match=f"not possible here: no_{missing} is not"):
        check_native(pair.server.context)


# -- PSK callbacks

HAS_PSK = getattr(ssl, "HAS_PSK", False)


@pytest.mark.skipif(not HAS_PSK, reason="this ssl module has no PSK callbacks")
def test_psk_callbacks_are_seen() -> None:
    server: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, set_callback in (
        (server, server.set_psk_server_callback),
        (client, client.set_psk_client_callback),
    ):
        assert not has_psk_callback(context)
        set_callback(lambda *_: b"")
        assert has_psk_callback(context)
        set_callback(None)
        assert not has_psk_callback(context)


def test_context_without_psk_support_has_no_callback(
    monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    assert not has_psk_callback(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_callback_that_is_not_found_is_an_error() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(LibsslUnavailableError, match="found in 0"):
        _libssl._word_referring_to(object(), context)


def test_word_of_something_else_is_not_read() -> None:
    fake: Any = SimpleNamespace()
    with pytest.raises(LibsslUnavailableError, match="_SSLContext was expected"):
        _libssl._word_referring_to(object(), fake)
