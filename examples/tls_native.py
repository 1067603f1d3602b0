"""TLS handshakes with an engine of OpenSSL's that pauses by itself, for keys that are far away.

The engine, `remote_key.c`, waits 100 ms for each signature. On the loop's thread it blocks; with
OpenSSL's own jobs it pauses them, and the handshakes wait together.

Needs Linux, a C compiler, OpenSSL's headers, and the program openssl for the certificate.

Expected output::

    handshake=    10 handshakes
    loop          ... ms
    openssl       ... ms
    shorter with OpenSSL's own jobs: True
"""

import asyncio
import ctypes
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

from aiojob.tls import HandshakeMode, create_server, is_native_capable

CLIENTS = 10


async def main(certificate: Path) -> None:
    assert is_native_capable()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)  # its key is the engine's, which is installed by now
    trust = ssl.create_default_context(cafile=certificate)
    print(f"handshake=    {CLIENTS} handshakes")
    on_the_loop = await milliseconds("loop", context, trust)
    by_openssl = await milliseconds("openssl", context, trust)
    print("shorter with OpenSSL's own jobs:", by_openssl < on_the_loop)


async def milliseconds(
    handshake: HandshakeMode, context: ssl.SSLContext, trust: ssl.SSLContext
) -> float:
    async with await create_server(
        asyncio.Protocol, "127.0.0.1", 0, ssl=context, handshake=handshake
    ) as server:
        address = server.sockets[0].getsockname()
        begin = time.perf_counter()
        await asyncio.gather(*(be_a_client(address, trust) for _ in range(CLIENTS)))
        elapsed = (time.perf_counter() - begin) * 1000
    print(f"{handshake:13} {elapsed:.0f} ms")
    return elapsed


async def be_a_client(address: tuple[str, int], trust: ssl.SSLContext) -> None:
    _, writer = await asyncio.open_connection(*address, ssl=trust, server_hostname="localhost")
    writer.close()
    await writer.wait_closed()


def install_engine(directory: Path) -> None:
    source, library = Path(__file__).with_name("remote_key.c"), directory / "remote_key.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-lcrypto"]
    subprocess.run(command, check=True)
    assert ctypes.CDLL(str(library)).install() == 1


def new_certificate(file: Path) -> None:
    request = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    command = [*request.split(), *names, "-keyout", str(file), "-out", str(file)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        install_engine(Path(directory))
        new_certificate(Path(directory, "certificate.pem"))
        asyncio.run(main(Path(directory, "certificate.pem")))
