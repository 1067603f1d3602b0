"""Checked access, through ctypes, to the libssl that Python's `ssl` module uses.

`_ssl` has no way to move a connection to other BIOs, or to set ``SSL_MODE_ASYNC``. libssl has,
but the ``SSL *`` and ``BIO *`` lie in C structures that only `_ssl` knows. Their places are guessed
here, and no guess is trusted unchecked:

- The symbols come from the handle of `_ssl`'s own file, and so from the library that it is linked
  to; the version must be the one that `_ssl` reports.
- Only words of our own Python objects are read, and only below their type's ``__basicsize__``.
- In ``_ssl._SSLSocket``, the word behind the ``SSL *`` must be the address of the context object,
  or nothing is dereferenced. ``SSL_get_SSL_CTX`` must then return the context's ``SSL_CTX *``, and
  ``SSL_get_rbio`` and ``SSL_get_wbio`` the ``BIO *`` of the very `ssl.MemoryBIO` it was made on.

Everything is loaded when first needed: importing this module cannot fail.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
from contextlib import suppress
from ctypes import POINTER, byref, c_int, c_long, c_size_t, c_ulong, c_void_p
from functools import cache, cached_property
from typing import Any, Final

from .._errors import LibsslUnavailableError

__all__ = [
    "SSL_ASYNC_NO_JOBS",
    "SSL_ASYNC_PAUSED",
    "Connection",
    "check_rebind",
    "connection_of",
    "has_psk_callback",
    "is_async_capable",
]

SSL_ASYNC_PAUSED: Final = 5
"""What `Connection.want` returns when a native job has paused,"""
SSL_ASYNC_NO_JOBS: Final = 6
"""and when the thread's pool of native jobs is exhausted."""

_SSL_MODE_ASYNC: Final = 0x100
_SSL_CTRL_MODE: Final = 33
_SSL_CTRL_CLEAR_MODE: Final = 78

_HEAD: Final = object.__basicsize__
"""Bytes before the first word of a C structure that is an object's own."""
_WORD: Final = ctypes.sizeof(c_void_p)


class _Libssl:
    """The functions of libssl and libcrypto that are needed to move connections."""

    def __init__(self) -> None:
        try:
            # PyDLL keeps the interpreter's lock. These calls are shorter than handing it over, and
            # a busy thread that took it would not give it back before its switch interval.
            self._library = ctypes.PyDLL(_ssl.__file__)
        except (AttributeError, OSError) as error:
            raise LibsslUnavailableError(
                f"Python's _ssl is no shared library that can be opened: {error}"
            ) from error
        self.socket_type: type = _ssl._SSLSocket  # type: ignore[attr-defined]
        self.context_type: type = _ssl._SSLContext
        version = self.function("OpenSSL_version_num", c_ulong)()
        if version != ssl.OPENSSL_VERSION_NUMBER:
            raise LibsslUnavailableError(
                f"_ssl uses OpenSSL {ssl.OPENSSL_VERSION_NUMBER:#x}, but {_ssl.__file__} leads to "
                f"version {version:#x}: is there another libssl in the process?"
            )
        void = c_void_p
        self.get_context = self.function("SSL_get_SSL_CTX", void, void)
        self.get_rbio = self.function("SSL_get_rbio", void, void)
        self.get_wbio = self.function("SSL_get_wbio", void, void)
        self.set_rbio = self.function("SSL_set0_rbio", None, void, void)
        self.set_wbio = self.function("SSL_set0_wbio", None, void, void)
        self.up_ref = self.function("BIO_up_ref", c_int, void)

    @cached_property
    def native(self) -> _Native:
        """What native jobs need as well."""
        return _Native(self)

    def function(self, name: str, returns: Any, *takes: Any) -> Any:
        try:
            function = self._library[name]  # a new object each time: nobody else's to declare
        except AttributeError:
            raise LibsslUnavailableError(
                f"{name} is not found through {self._library._name}: is OpenSSL linked statically, "
                "or is it another library?"
            ) from None
        function.restype, function.argtypes = returns, takes
        return function


class _Native:
    """The functions for native jobs, which LibreSSL and BoringSSL do not have."""

    def __init__(self, libssl: _Libssl) -> None:
        void, integer = c_void_p, c_int
        self.ctrl = libssl.function("SSL_ctrl", c_long, void, integer, c_long, void)
        self.want = libssl.function("SSL_want", integer, void)
        self.is_async_capable = libssl.function("ASYNC_is_capable", integer)
        self.get_async_fds = libssl.function(
            "SSL_get_all_async_fds", integer, void, POINTER(c_int), POINTER(c_size_t)
        )


_libssl: Final = cache(_Libssl)


def _word_of(instance: object, of_type: type, index: int) -> int:
    """Return a word of an object's C structure, as `of_type` declares it.

    Raises:
        LibsslUnavailableError: It is not such an object, or the structure is shorter than that.
    """
    if not isinstance(instance, of_type):
        raise LibsslUnavailableError(f"a {of_type.__name__} was expected, got {instance!r}")
    place = _HEAD + index * _WORD
    if place + _WORD > of_type.__basicsize__:
        raise LibsslUnavailableError(
            f"{of_type.__name__} has {of_type.__basicsize__} bytes, too few for a word at {place}"
        )
    return c_size_t.from_address(id(instance) + place).value


class Connection:
    """The ``SSL *`` of an `ssl.SSLObject`, and the BIOs that it is on.

    It keeps the SSL object alive. Only one thread may use it at a time, and not while the SSL
    object is in a call.
    """

    __slots__ = ("_incoming", "_libssl", "_outgoing", "_ssl", "_ssl_object")

    def __init__(
        self,
        libssl: _Libssl,
        pointer: int,
        ssl_object: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        self._libssl = libssl
        self._ssl = pointer
        self._ssl_object = ssl_object
        self._incoming = incoming
        self._outgoing = outgoing

    def move_to(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        """Have the SSL object read from and write to another pair of BIOs from now on.

        What is pending in the old ones goes to the new ones, before what is pending there.

        Raises:
            LibsslUnavailableError: One of them is no `ssl.MemoryBIO`; nothing was changed.
        """
        libssl, pointer = self._libssl, self._ssl
        # Of the type whose layout `connection_of` has checked.
        rbio, wbio = _bio_of(incoming), _bio_of(outgoing)
        _pour(self._incoming, incoming)
        _pour(self._outgoing, outgoing)
        # These take over a reference each, and drop the one on the old BIO; SSL_set_bio takes
        # none, one or two, depending on which BIOs are the same.
        libssl.up_ref(rbio)
        libssl.set_rbio(pointer, rbio)
        libssl.up_ref(wbio)
        libssl.set_wbio(pointer, wbio)
        self._incoming, self._outgoing = incoming, outgoing

    def set_async(self) -> None:
        """Have libssl run the handshake as a native job (``SSL_MODE_ASYNC``)."""
        self._libssl.native.ctrl(self._ssl, _SSL_CTRL_MODE, _SSL_MODE_ASYNC, None)

    def clear_async(self) -> None:
        """Undo `set_async`. No native job may be paused."""
        self._libssl.native.ctrl(self._ssl, _SSL_CTRL_CLEAR_MODE, _SSL_MODE_ASYNC, None)

    def want(self) -> int:
        """Return what the last call waits for (``SSL_want``)."""
        return self._libssl.native.want(self._ssl)  # type: ignore[no-any-return]

    def async_fds(self) -> list[int]:
        """Return the fds that wake the paused native job (``SSL_get_all_async_fds``)."""
        count = c_size_t()
        self._libssl.native.get_async_fds(self._ssl, None, byref(count))
        fds = (c_int * count.value)()
        self._libssl.native.get_async_fds(self._ssl, fds, byref(count))
        return list(fds)


def _bio_of(bio: ssl.MemoryBIO) -> int:
    return _word_of(bio, ssl.MemoryBIO, 0)


def _pour(old: ssl.MemoryBIO, new: ssl.MemoryBIO) -> None:
    if old.pending and old is not new:
        new.write(old.read() + new.read())


def connection_of(
    ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> Connection:
    """Return the ``SSL *`` of an SSL object that was made on these two BIOs.

    Raises:
        LibsslUnavailableError: libssl cannot be reached, or a check of the layouts failed.
    """
    libssl = _libssl()
    context, socket = ssl_object.context, getattr(ssl_object, "_sslobj", None)
    context_address = _word_of(socket, libssl.socket_type, 2)
    if context_address != id(context):
        raise LibsslUnavailableError(
            "_ssl._SSLSocket has an unknown layout: the word behind the SSL* is "
            f"{context_address:#x}, not the context's address, {id(context):#x}"
        )
    pointer = _word_of(socket, libssl.socket_type, 1)
    for what, get, expected in (
        ("SSL_CTX*", libssl.get_context, _word_of(context, libssl.context_type, 0)),
        ("incoming BIO*", libssl.get_rbio, _bio_of(incoming)),
        ("outgoing BIO*", libssl.get_wbio, _bio_of(outgoing)),
    ):
        if not pointer or get(pointer) != expected:
            raise LibsslUnavailableError(
                f"the {what} of libssl is not the one that Python has: the SSL object is on other "
                "BIOs, or the layouts are unknown"
            )
    return Connection(libssl, pointer, ssl_object, incoming, outgoing)


@cache
def check_rebind() -> LibsslUnavailableError | None:
    """Return None if connections can be moved to other BIOs, or else the error that says why not.

    Tried once, on an SSL object made for that.
    """
    try:
        _move_one()
    except LibsslUnavailableError as error:
        return error.with_traceback(None)
    return None


def _move_one() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ssl_object = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        incoming, outgoing, server_hostname="localhost"
    )
    connection = connection_of(ssl_object, incoming, outgoing)
    new_incoming, new_outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection.move_to(new_incoming, new_outgoing)
    connection_of(ssl_object, new_incoming, new_outgoing)
    with suppress(ssl.SSLWantReadError):
        ssl_object.do_handshake()
    if outgoing.pending or not new_outgoing.pending:
        raise LibsslUnavailableError("libssl did not write to the BIO that it was moved to")


def is_async_capable() -> bool:
    """Return whether libcrypto can pause jobs on this platform (``ASYNC_is_capable``).

    Raises:
        LibsslUnavailableError: libssl cannot be reached, or has no native jobs.
    """
    return bool(_libssl().native.is_async_capable())


def has_psk_callback(context: ssl.SSLContext) -> bool:
    """Return whether a PSK callback is set on a context; `ssl` has no way to ask.

    Raises:
        LibsslUnavailableError: It cannot be found out.
    """
    context_type = _libssl().context_type
    return any(_word_of(context, context_type, index) for index in _psk_callback_words())


@cache
def _psk_callback_words() -> tuple[int, ...]:
    """Return which words of a context refer to its PSK callbacks."""
    if not getattr(ssl, "HAS_PSK", False):  # before Python 3.13, or an OpenSSL without them
        return ()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.set_psk_client_callback(_marker)  # type: ignore[attr-defined, unused-ignore]
    server.set_psk_server_callback(_marker)  # type: ignore[attr-defined, unused-ignore]
    return _word_referring_to(_marker, client), _word_referring_to(_marker, server)


def _marker(*_: Any) -> Any:
    """Be found."""


def _word_referring_to(target: object, context: ssl.SSLContext) -> int:
    context_type = _libssl().context_type
    count = (context_type.__basicsize__ - _HEAD) // _WORD
    found = [i for i in range(count) if _word_of(context, context_type, i) == id(target)]
    if len(found) != 1:
        raise LibsslUnavailableError(
            f"a PSK callback was expected in one word of {context!r}, found in {len(found)}"
        )
    return found[0]
