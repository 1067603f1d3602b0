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
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress

from aiojob import offload_async
from aiojob.tls import HandshakeMode, create_server

CLIENTS = 64


async def main(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ProcessPoolExecutor(1) as clients:
        print("handshake=    longest pause of the heartbeat")
        in_loop = await longest_pause("loop", context, clients)
        in_threads = await longest_pause("thread", context, clients)
    print("shorter in threads:", in_threads < in_loop)


async def longest_pause(
    handshake: HandshakeMode, context: ssl.SSLContext, clients: Executor
) -> float:
    async with await create_server(
        asyncio.Protocol, "127.0.0.1", 0, ssl=context, handshake=handshake, backlog=CLIENTS
    ) as server:
        address = server.sockets[0].getsockname()
        burst = offload_async(say_hello_at_once, address, executor=clients)
        longest, before = 0.0, time.perf_counter()
        while not burst.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        await burst
    print(f"{handshake:13} {longest * 1000:.0f} ms")
    return longest


def say_hello_at_once(address: tuple[str, int]) -> None:
    """Be many clients, which want no more than the server's signed answer; in another process."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    connections = [socket.create_connection(address) for _ in range(CLIENTS)]
    for connection in connections:
        connection.sendall(hello)
    for connection in connections:
        assert connection.recv(1)
        connection.close()


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        request = "openssl req -x509 -newkey rsa:4096 -nodes -subj /CN=localhost -keyout"
        command = [*request.split(), file.name, "-out", file.name]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        asyncio.run(main(file.name))
