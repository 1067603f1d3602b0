"""A burst of TLS handshakes with an RSA-4096 key: on the event loop's thread, and in workers.

A heartbeat beats meanwhile. Its longest pause is how long the event loop served nobody else; of
a few bursts, the best one counts, as the machine has other things to do as well.

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

CLIENTS = 32
BURSTS = 3


async def main(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    print("handshake=    longest pause of the heartbeat")
    in_loop = await longest_pause(context, "loop")
    in_threads = await longest_pause(context, "thread")
    print("shorter in threads:", in_threads < in_loop)


async def longest_pause(context: ssl.SSLContext, handshake: HandshakeMode) -> float:
    """Return the longest pause of the best burst."""
    hello = client_hello()
    pauses = [await pause_in_a_burst(context, handshake, hello) for _ in range(BURSTS)]
    print(f"{handshake:13} {min(pauses) * 1000:.0f} ms")
    return min(pauses)


async def pause_in_a_burst(
    context: ssl.SSLContext, handshake: HandshakeMode, hello: bytes
) -> float:
    async with await create_server(
        asyncio.Protocol, "127.0.0.1", 0, ssl=context, handshake=handshake, backlog=CLIENTS
    ) as server:
        address = server.sockets[0].getsockname()
        clients = [await offload_async(socket.create_connection, address) for _ in range(CLIENTS)]
        while server.handshakes < CLIENTS:
            await asyncio.sleep(0.001)
        for client in clients:  # all of them, before the event loop serves the first one
            client.sendall(hello)
        burst = offload_async(wait_for_answers, clients)
        longest, before = 0.0, time.perf_counter()
        while not burst.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        await burst
    return longest


def client_hello() -> bytes:
    """Return a TLS client's first message."""
    outgoing = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="localhost"
    )
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def wait_for_answers(clients: list[socket.socket]) -> None:
    """Wait until each client has its signed answer."""
    for client in clients:
        assert client.recv(1)
        client.close()


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        request = "openssl req -x509 -newkey rsa:4096 -nodes -subj /CN=localhost -keyout"
        command = [*request.split(), file.name, "-out", file.name]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        asyncio.run(main(file.name))
