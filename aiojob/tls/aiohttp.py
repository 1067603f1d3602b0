"""aiohttp's sites with handshakes as jobs. Needs aiohttp, which aiojob does not require."""

from __future__ import annotations

import ssl
from typing import Any

from aiohttp.web import BaseRunner, BaseSite
from yarl import URL

from ._server import HandshakeMode, create_server

__all__ = ["TLSSite"]


class TLSSite(BaseSite):
    """A site of an aiohttp runner, like `aiohttp.web.TCPSite`, whose handshakes run as jobs.

    >>> import asyncio, ssl
    >>> from aiohttp import web
    >>> async def main(context):
    ...     runner = web.AppRunner(web.Application())
    ...     await runner.setup()
    ...     await TLSSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    ...     print(len(runner.addresses))
    ...     await runner.cleanup()
    >>> asyncio.run(main(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    1

    Args:
        runner: An `aiohttp.web.AppRunner` or `aiohttp.web.ServerRunner` that was set up.
        host: The address to listen on, None for all.
        port: The port, 8443 by default, 0 for any free one.
        ssl_context: The context of the server.
        backlog: How many connections the system keeps waiting.
        options: What else `create_server` takes: handshake, ssl_handshake_timeout, reuse_port, ...

    Raises:
        RuntimeError: The runner was not set up.
        TypeError: `runner` is no runner of aiohttp's, or `ssl_context` no `ssl.SSLContext`.
    """

    __slots__ = ("_host", "_options", "_port")

    def __init__(
        self,
        runner: BaseRunner,
        host: str | None = None,
        port: int | None = None,
        *,
        ssl_context: ssl.SSLContext,
        backlog: int = 128,
        handshake: HandshakeMode = "loop",
        **options: Any,
    ) -> None:
        if not hasattr(runner, "server"):
            raise TypeError(
                f"runner must be an AppRunner or a ServerRunner of aiohttp.web, got {runner!r}"
            )
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an ssl.SSLContext, got {ssl_context!r}")
        super().__init__(runner, ssl_context=ssl_context, backlog=backlog)
        self._host = host
        self._port = 8443 if port is None else port
        self._options = {"handshake": handshake, **options}

    @property
    def port(self) -> int:
        """The port that is listened on; before the start, the one that was asked for."""
        return self._port

    @property
    def name(self) -> str:
        """The site's address, as a URL."""
        return str(URL.build(scheme="https", host=self._host or "0.0.0.0", port=self.port))

    async def start(self) -> None:
        """Listen.

        Raises:
            BaseException: What `create_server` raises.
        """
        await super().start()
        assert self._runner.server is not None
        assert self._ssl_context is not None
        self._server = await create_server(
            self._runner.server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            **self._options,
        )
        # Kept: a server that was stopped has no sockets, but the site still has its name.
        self._port = self._server.sockets[0].getsockname()[1]
