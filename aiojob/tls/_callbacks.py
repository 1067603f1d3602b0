"""Callbacks of OpenSSL's that may wait: which certificate to show, which key is shared."""

from __future__ import annotations

import functools
import inspect
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from .._run import await_
from ._steps import current_steps

__all__ = ["psk_server_callback", "sni_callback"]

T = TypeVar("T")

Choice: TypeAlias = ssl.SSLContext | int | None


def sni_callback(
    func: Callable[[ssl.SSLObject, str | None, ssl.SSLContext], Choice | Awaitable[Choice]],
) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]:
    """Make an SNI callback of a function that may wait, or of a coroutine function.

    >>> import ssl
    >>> contexts = {"example.org": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)}
    >>> context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    >>> @sni_callback
    ... async def choose(ssl_object, server_name, context):
    ...     return contexts.get(server_name, ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
    >>> context.sni_callback = choose

    Called as ``func(ssl_object, server_name, context)`` when a client's first message has come; the
    name is None if the client sent none. It returns the `ssl.SSLContext` to go on with, None to go
    on with the one that there is, or an `ssl.AlertDescription`, which ends the handshake.

    With ``handshake="loop"`` it runs in the handshake's job, which pauses in `await_` and in
    engines, while the event loop serves others; with ``"thread"`` it runs in the worker thread,
    which blocks: no more handshakes can wait at a time than there are workers. What a coroutine
    function returns is awaited by the event loop in both.

    Cancellation: when the client leaves, the time is over or the server is closed,
    `asyncio.CancelledError` is raised where the function waits.

    What it raises ends the handshake with the alert ``internal_error`` and goes to the event
    loop's exception handler. Outside aiojob's servers it works for functions that do not wait.

    Raises:
        TypeError: `func` is not callable.
    """
    _check_callable(func, "sni_callback(func), func(ssl_object, server_name, context)")

    @functools.wraps(func)
    def callback(
        ssl_object: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext
    ) -> int | None:
        after_error: Choice = ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        called = functools.partial(func, ssl_object, server_name, context)
        choice = _result_of(called, _check_choice, after_error)
        if isinstance(choice, ssl.SSLContext):
            ssl_object.context = choice
            return None
        return choice

    return callback


def psk_server_callback(
    func: Callable[[str | None], bytes | Awaitable[bytes]],
) -> Callable[[str | None], bytes]:
    """Make a pre-shared key callback of a function that may wait, or of a coroutine function.

    For `ssl.SSLContext.set_psk_server_callback`, which Python has from 3.13 on.

    >>> keys = {"device 7": bytes(32)}
    >>> @psk_server_callback
    ... async def key_of(identity):
    ...     return keys.get(identity, b"")

    Called as ``func(identity)`` with the client's identity, None if it sent none. It returns the
    shared key, or ``b""`` if there is none. Where it runs, cancellation and errors are those of
    `sni_callback`.

    Raises:
        TypeError: `func` is not callable.
    """
    _check_callable(func, "psk_server_callback(func), func(identity)")

    @functools.wraps(func)
    def callback(identity: str | None) -> bytes:
        return _result_of(functools.partial(func, identity), _check_key, b"")

    return callback


def _check_callable(func: object, calls: str) -> None:
    if not callable(func):
        raise TypeError(f"func must be callable, got {func!r}: {calls}")


def _result_of(
    func: Callable[[], T | Awaitable[T]], check: Callable[[Any], None], after_error: T
) -> T:
    """Call a function in a callback, wait for what it returns, and keep what it raises."""
    steps = current_steps()
    try:
        returned = func()
        if inspect.isawaitable(returned):
            returned = (await_ if steps is None else steps.await_in_callback)(returned)
        check(returned)
        return returned
    except BaseException as error:
        if steps is None:
            raise
        steps.fail_callback(error)
        return after_error


def _check_choice(choice: Any) -> None:
    expected = "an SNI callback returns the SSLContext to use, None or an ssl.AlertDescription"
    if not isinstance(choice, ssl.SSLContext | int | None):
        raise TypeError(f"{expected}, got {choice!r}")
    if isinstance(choice, int) and not 0 <= choice <= 255:
        raise ValueError(f"{expected}, which is a byte, got {choice!r}")


def _check_key(key: Any) -> None:
    if not isinstance(key, bytes):
        raise TypeError(
            f'a pre-shared key callback returns bytes, b"" for an unknown identity, got {key!r}'
        )
