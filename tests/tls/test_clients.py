"""Clients that other people wrote: curl, openssl s_client, http.client, aiohttp."""

from __future__ import annotations

import asyncio
import http.client
import io
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import unavailable

from tls.conftest import Certificates
from tls.kit import HANDOVERS, KINDS, PATIENCE, Address, Echo, Kind, in_thread, sockets, until

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

from aiojob.tls.aiohttp import TLSSite  # noqa: E402

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

BODY = os.urandom(3_000_000)
SERVERS = ["loop-rebind", "loop-shuttle", "thread-rebind", "openssl-rebind"]


def run(program: str, *arguments: str) -> bytes:
    """Run a program, return its output."""
    if shutil.which(program) is None:
        unavailable(f"needs {program}")
    done = subprocess.run([program, *arguments], capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


# -- an application of aiohttp's


async def send_body(request: web.Request) -> web.Response:
    return web.Response(body=BODY)


async def count_body(request: web.Request) -> web.Response:
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
    ssl_object = request.transport.get_extra_info("ssl_object") if request.transport else None
    return web.json_response(
        {"size": size, "scheme": request.scheme, "version": ssl_object and ssl_object.version()}
    )


async def echo_messages(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data.upper())
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


@asynccontextmanager
async def site(kind: Kind, context: ssl.SSLContext, **options: Any) -> AsyncIterator[TLSSite]:
    """Serve for the length of the block; at its end no connection may be left."""
    before = sockets()
    application = web.Application(client_max_size=100_000_000)
    application.add_routes(
        [web.get("/", send_body), web.post("/", count_body), web.get("/messages", echo_messages)]
    )
    runner = web.AppRunner(application, shutdown_timeout=PATIENCE)
    await runner.setup()
    try:
        started = TLSSite(
            runner,
            "127.0.0.1",
            0,
            ssl_context=context,
            handshake=kind.handshake or "loop",
            **options,
        )
        assert started.port == 0
        await started.start()
        yield started
    finally:
        await runner.cleanup()
    await until(lambda: sockets() <= before)


@pytest.fixture
def client_session(client_context: ssl.SSLContext) -> Any:
    def session() -> Any:
        connector = aiohttp.TCPConnector(ssl=client_context)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE))

    return session


@pytest.mark.parametrize("kind", SERVERS, indirect=True)
async def test_aiohttps_client_gets_and_posts(
    kind: Kind, server_context: ssl.SSLContext, client_session: Any
) -> None:
    async with site(kind, server_context) as started, client_session() as session:
        url = f"https://localhost:{started.port}/"
        for _ in range(2):  # the second on the same connection
            async with session.get(url) as response:
                assert await response.read() == BODY
        async with session.post(url, data=io.BytesIO(BODY)) as response:
            assert await response.json() == {
                "size": len(BODY),
                "scheme": "https",
                "version": "TLSv1.3",
            }
        answers = await asyncio.gather(*(get(session, url) for _ in range(10)))
        assert answers == [BODY] * 10


async def get(session: Any, url: str) -> bytes:
    async with session.get(url) as response:
        body: bytes = await response.read()
        return body


@pytest.mark.parametrize("kind", SERVERS, indirect=True)
async def test_aiohttps_client_has_a_web_socket(
    kind: Kind, server_context: ssl.SSLContext, client_session: Any
) -> None:
    async with (
        site(kind, server_context) as started,
        client_session() as session,
        session.ws_connect(f"wss://localhost:{started.port}/messages") as socket,
    ):
        for number in range(20):
            await socket.send_str(f"message {number}")
            assert await socket.receive_str() == f"MESSAGE {number}"
        await socket.send_bytes(BODY)
        assert await socket.receive_bytes() == BODY
        await socket.ping()
        await socket.close()
        assert socket.close_code == aiohttp.WSCloseCode.OK


async def test_a_site_tells_its_address_and_has_the_options_of_a_server(
    server_context: ssl.SSLContext,
) -> None:
    async with site(
        KINDS["loop-rebind"], server_context, ssl_handshake_timeout=0.1, reuse_port=True
    ) as started:
        assert started.name == f"https://127.0.0.1:{started.port}"
        reader, writer = await asyncio.open_connection("127.0.0.1", started.port)
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()


@pytest.mark.parametrize("kind", SERVERS, indirect=True)
async def test_http_client_gets_and_posts(
    kind: Kind, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    def talk(port: int) -> None:
        connection = http.client.HTTPSConnection(
            "localhost", port, context=client_context, timeout=PATIENCE
        )
        connection.request("GET", "/")
        assert connection.getresponse().read() == BODY
        connection.request("POST", "/", body=BODY)
        assert b'"size": 3000000' in connection.getresponse().read()
        connection.close()

    async with site(kind, server_context) as started:
        await in_thread(talk, started.port)


# -- curl


@pytest.mark.parametrize("kind", SERVERS, indirect=True)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_curl_downloads_and_uploads(
    kind: Kind,
    version: str,
    server_context: ssl.SSLContext,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    body = tmp_path / "body"
    body.write_bytes(BODY)
    arguments = ["-sS", "-4", "--cacert", str(certificates.authority_file), "--noproxy", "*"]
    arguments += [f"--tlsv{version}", "--tls-max", version]

    async with site(kind, server_context) as started:
        url = f"https://localhost:{started.port}/"
        assert await in_thread(run, "curl", *arguments, url) == BODY
        answer = await in_thread(run, "curl", *arguments, "--data-binary", f"@{body}", url)
        assert f'"version": "TLSv{version}"'.encode() in answer
        assert b'"size": 3000000' in answer
        twice = await in_thread(run, "curl", *arguments, url, url)
        assert twice == BODY * 2


# -- openssl s_client


class Dialogue:
    """A run of ``openssl s_client``, to which lines can be sent when something was printed."""

    def __init__(self, address: Address, certificates: Certificates, *arguments: str) -> None:
        if shutil.which("openssl") is None:
            unavailable("needs the command openssl")
        command = ["openssl", "s_client", "-connect", f"{address[0]}:{address[1]}"]
        command += ["-CAfile", str(certificates.authority_file), "-verify_return_error"]
        self.process = subprocess.Popen(
            [*command, "-servername", "localhost", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = b""

    def expect(self, pattern: bytes) -> None:
        """Read on until the pattern was printed."""
        stdout = self.process.stdout
        assert stdout is not None
        while not (found := re.search(pattern, self.output)):
            chunk = os.read(stdout.fileno(), 65536)
            assert chunk, self.output.decode(errors="replace")
            self.output += chunk
        self.output = self.output[found.end() :]

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.output += self.process.stdout.read()
        self.process.stdout.close()
        assert self.process.wait(PATIENCE) == 0, self.output.decode(errors="replace")


@pytest.mark.parametrize("kind", HANDOVERS, indirect=True)
async def test_s_client_updates_its_keys_and_the_servers(
    kind: Kind, server_context: ssl.SSLContext, certificates: Certificates
) -> None:
    def talk(address: Address) -> None:
        dialogue = Dialogue(address, certificates, "-tls1_3")
        dialogue.expect(b"Verify return code: 0")
        for number, command in enumerate([b"k", b"K", b"k", b"K", b"K"]):
            dialogue.say(b"before %d" % number)
            dialogue.expect(b"before %d" % number)
            dialogue.say(command)
            dialogue.expect(b"KEYUPDATE")
            dialogue.say(b"after %d" % number)
            dialogue.expect(b"after %d" % number)
        dialogue.say(b"Q")
        dialogue.end()

    async with kind.serving(Echo, server_context) as address:
        await in_thread(talk, address)


@pytest.mark.parametrize("kind", SERVERS, indirect=True)
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_s_client_resumes_its_session(
    kind: Kind,
    version: str,
    server_context: ssl.SSLContext,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    session = str(tmp_path / "session")

    def talk(address: Address, reused: bytes, *arguments: str) -> None:
        dialogue = Dialogue(address, certificates, version, *arguments)
        dialogue.expect(reused + b", TLSv1")
        dialogue.say(b"over there")
        dialogue.expect(b"over there")
        dialogue.say(b"Q")
        dialogue.end()

    async with kind.serving(Echo, server_context) as address:
        await in_thread(talk, address, b"New", "-sess_out", session)
        await in_thread(talk, address, b"Reused", "-sess_in", session)


async def test_a_site_keeps_its_name_when_it_is_stopped(server_context: ssl.SSLContext) -> None:
    async with site(Kind("loop"), server_context) as started:
        name = started.name
        assert started.port != 0
        await started.stop()
        assert started.name == name


async def test_a_site_refuses_what_is_no_runner_or_no_context(
    server_context: ssl.SSLContext,
) -> None:
    wrong: Any = None
    runner = web.AppRunner(web.Application())
    await runner.setup()
    try:
        with pytest.raises(TypeError, match=r"runner must be an AppRunner .*, got None"):
            TLSSite(wrong, ssl_context=server_context)
        with pytest.raises(TypeError, match=r"ssl_context must be an ssl.SSLContext, got None"):
            TLSSite(runner, ssl_context=wrong)
        assert not runner.sites
    finally:
        await runner.cleanup()
