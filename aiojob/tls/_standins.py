"""Objects that pass for an SSLContext and for an SSLObject, for one connection each.

Event loops, and what gets these from a transport's `get_extra_info`, see the real ones through
them: ``isinstance`` holds, and attributes are theirs.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["ContextStandIn", "Shuttle"]

Wrap: TypeAlias = Callable[[ssl.MemoryBIO, ssl.MemoryBIO], ssl.SSLObject]


class ContextStandIn:
    """An SSLContext that wraps the BIOs of one connection in its own way.

    Both loops want an SSLContext; to make a real one for each connection would cost 110 us.
    """

    __slots__ = ("_context", "_wrap")

    _context: ssl.SSLContext
    _wrap: Wrap | None

    def __init__(self, context: ssl.SSLContext, wrap: Wrap) -> None:
        object.__setattr__(self, "_context", context)
        object.__setattr__(self, "_wrap", wrap)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._context)

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any
    ) -> ssl.SSLObject:
        wrap = self._wrap
        if wrap is None:
            return self._context.wrap_bio(incoming, outgoing, *args, **kwargs)
        # The transport keeps the stand-in; from now on it is like the real one.
        object.__setattr__(self, "_wrap", None)
        return wrap(incoming, outgoing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._context, name, value)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._context

    def __hash__(self) -> int:
        return hash(self._context)

    def __repr__(self) -> str:
        return repr(self._context)


class Shuttle:
    """An SSLObject that stays on its own BIOs, and carries bytes between them and the loop's."""

    __slots__ = ("_incoming", "_loop_incoming", "_loop_outgoing", "_object", "_outgoing")

    def __init__(
        self,
        ssl_object: ssl.SSLObject,
        own: tuple[ssl.MemoryBIO, ssl.MemoryBIO],
        loop: tuple[ssl.MemoryBIO, ssl.MemoryBIO],
    ) -> None:
        self._object = ssl_object
        self._incoming, self._outgoing = own
        self._loop_incoming, self._loop_outgoing = loop

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._object)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._object, name)

    def _carry_in(self) -> None:
        if self._loop_incoming.pending:
            self._incoming.write(self._loop_incoming.read())

    def _carry_out(self) -> None:
        if self._outgoing.pending:
            self._loop_outgoing.write(self._outgoing.read())

    def read(self, size: int = 1024, buffer: Any = None) -> Any:
        self._carry_in()
        try:
            return self._object.read(size, buffer)
        finally:
            self._carry_out()

    def write(self, data: Any) -> int:
        try:
            return self._object.write(data)
        finally:
            self._carry_out()

    def pending(self) -> int:
        # uvloop reads on while this or its own BIO has something.
        return self._object.pending() + self._incoming.pending

    def unwrap(self) -> None:
        self._carry_in()
        try:
            self._object.unwrap()
        finally:
            self._carry_out()
