"""A burst of TLS handshakes with an RSA-4096 key: on the event loop's thread, and in workers.

A heartbeat beats meanwhile. Its longest pause is how long the event loop served nobody else.

Needs the program openssl, for the certificate.

Expected output::

    handshake=    longest pause of the heartbeat
    loop          ... ms
    thread        ... ms
    shorter in threads: True
"""

import asyncio
import socket
import ssl
import subprocess
import tempfile
import time
from contextlib import suppress

from aiojob import offload_async
from aiojob.tls import HandshakeMode, create_server

CLIENTS = 64


async def main(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    print("handshake=    longest pause of the heartbeat")
    in_loop = await longest_pause(context, "loop")
    in_threads = await longest_pause(context, "thread")
    print("shorter in threads:", in_threads < in_loop)


async def longest_pause(context: ssl.SSLContext, handshake: HandshakeMode) -> float:
    async with await create_server(
        asyncio.Protocol, "127.0.0.1", 0, ssl=context, handshake=handshake, backlog=CLIENTS
    ) as server:
        address = server.sockets[0].getsockname()
        clients = [await offload_async(socket.create_connection, address) for _ in range(CLIENTS)]
        while server.handshakes < CLIENTS:
            await asyncio.sleep(0.001)
        burst = offload_async(say_hello, clients)
        longest, before = 0.0, time.perf_counter()
        while not burst.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        await burst
    print(f"{handshake:13} {longest * 1000:.0f} ms")
    return longest


def say_hello(clients: list[socket.socket]) -> None:
    """Send a TLS client's first message many times over, and wait for the signed answers."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    for connection in clients:
        connection.sendall(hello)
    for connection in clients:
        assert connection.recv(1)
        connection.close()


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        request = "openssl req -x509 -newkey rsa:4096 -nodes -subj /CN=localhost -keyout"
        command = [*request.split(), file.name, "-out", file.name]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        asyncio.run(main(file.name))
