"""An aiohttp service that looks its certificates up in a database, in the TLS handshake.

The SNI callback is a coroutine function: while it awaits the database, the loop serves others. A
certificate that is put into the database is in use from the next connection on.

Needs aiohttp, aiosqlite and trustme.

Expected output::

    rome.example: looked up, hello
    oslo.example: looked up, hello
    lima.example: looked up, refused, TLSV1_UNRECOGNIZED_NAME
"""

import asyncio
import ssl
import tempfile
from pathlib import Path

import aiohttp
import aiosqlite
import trustme
from aiohttp import web

from aiojob.tls import sni_callback
from aiojob.tls.aiohttp import TLSSite


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="hello")


async def main(directory: Path) -> None:
    authority = trustme.CA()
    async with aiosqlite.connect(":memory:") as database:
        await database.execute("CREATE TABLE certificates (name TEXT PRIMARY KEY, file TEXT)")
        for name in ("rome.example", "oslo.example"):
            file = directory / f"{name}.pem"
            authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(file)
            await database.execute("INSERT INTO certificates VALUES (?, ?)", (name, str(file)))

        @sni_callback
        async def certificate(
            ssl_object: ssl.SSLObject, name: str | None, context: ssl.SSLContext
        ) -> ssl.SSLContext | int:
            print(f"{name}: looked up", end=", ")
            query = "SELECT file FROM certificates WHERE name = ?"
            async with database.execute(query, (name,)) as rows:
                row = await rows.fetchone()
            if row is None:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            found.load_cert_chain(row[0])
            return found

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = certificate
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = TLSSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        for name in ("rome.example", "oslo.example", "lima.example"):
            await ask(site.port, name, trust)
        await runner.cleanup()


async def ask(port: int, name: str, trust: ssl.SSLContext) -> None:
    async with aiohttp.ClientSession() as client:
        try:
            url = f"https://127.0.0.1:{port}/"
            async with client.get(url, ssl=trust, server_hostname=name) as response:
                print(await response.text())
        except aiohttp.ClientConnectorError as error:
            print("refused,", getattr(error.os_error, "reason", None))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))
