"""TLS handshakes as jobs, against the loop's own TLS server in the same event loop.

The servers run in this process; their clients are another (`tls_clients`), so that CPU time, memory
and the loop's heartbeat are the server's alone.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import json
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import cache, partial
from time import perf_counter, process_time
from typing import Any, Literal, Self, cast

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

import aiojob
from aiojob import tls

from .measure import LOOPS, ROOT, Row, Run, Samples, child
from .results import Points, at_least, at_most

Strategy = Literal["loop", "thread"]
Factory = Callable[[], asyncio.Protocol]
Ports = dict[str, int]

BEAT = 0.001
"""Seconds from one heartbeat of the loop to the next."""
BURST = 64
UNDER_WAY = 32
"""Handshakes at a time while the server is saturated."""
SECONDS = 2.0
"""For which it is."""
WORKERS = 2
CONNECTIONS = 500
"""That wait while memory is measured."""
TIMEOUT = 120.0
KIB, MIB = 1 << 10, 1 << 20
STALL = "longest stall of the loop, RSA-4096 handshakes (thread)"


def rows() -> Iterator[Row]:
    for loop, stall, delay, rate in (("asyncio", 0.1, 0.2, 1.2), ("uvloop", 0.25, None, None)):
        yield Row(
            "tls-stall",
            STALL,
            in_loop(burst),
            {"native": at_most(stall)},
            BURST,
            judged="median",
            loops=(loop,),
        )
        yield Row(
            "tls-stall",
            "p99 delay of a 1 ms heartbeat, RSA-4096 handshakes (thread)",
            lambda run: saturated(run)["delay"],
            {} if delay is None else {"native": at_most(delay)},
            UNDER_WAY,
            judged="median",
            loops=(loop,),
        )
        yield Row(
            "tls-stall",
            f"RSA-4096 handshakes (thread, {WORKERS} workers)",
            lambda run: saturated(run)["rate"],
            {} if rate is None else {"native": at_least(rate)},
            UNDER_WAY,
            unit="1/s",
            judged="median",
            loops=(loop,),
        )
    for key, limit in (("RSA-2048", 1.2), ("P-256", 1.35)):
        yield Row(
            "tls-cpu",
            f"CPU of a handshake, {key} (loop)",
            in_loop(partial(cpu, Greeter, key, 400, "handshakes", at_a_time=8)),
            {"native": at_most(limit)},
        )
    for name, factory, command, number in (
        ("receive 1 MiB", Sink, "upload", 64),
        ("send 1 MiB", Source, "download", 64),
        ("echo 64 bytes", Echo, "messages", 3_000),
    ):
        yield Row(
            "tls-data",
            f"CPU to {name} after the hand-over",
            in_loop(partial(cpu, factory, "P-256", number, command)),
            {"native": at_most(1.08)},
        )
    for name, command, limit, contenders in (
        ("connection that waits for its ClientHello", "silent", 25, ("aiojob", "native")),
        ("handshake paused in its SNI callback", "hello", 65, ("aiojob",)),
    ):
        yield Row(
            "tls-memory",
            f"memory of a {name}",
            partial(memory, command, contenders),
            {"aiojob": at_most(limit * KIB)},
            CONNECTIONS,
            unit="B",
        )


def in_loop(measured: Callable[[Run], Coroutine[Any, Any, Samples]]) -> Callable[[Run], Samples]:
    def measure(run: Run) -> Samples:
        with asyncio.Runner(loop_factory=LOOPS[run.loop]) as runner:
            return runner.run(asyncio.wait_for(measured(run), TIMEOUT))

    return measure


def turns(contenders: Iterable[str], rounds: int) -> Iterator[str]:
    """Yield the names of all contenders in each round, the first one being another each time."""
    names = list(contenders)
    for _ in range(rounds):
        yield from names
        names.append(names.pop(0))


# -- the heartbeat of a loop that is busy with handshakes


class Heartbeat:
    """Beats every millisecond, and knows how late the beats were."""

    def __init__(self) -> None:
        self._beats: list[tuple[float, float]] = []
        """Of each the time when it was due, since the beginning, and its delay; in seconds."""
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        self._begin = self._last = perf_counter()
        self._timer = self._loop.call_later(BEAT, self._beat)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        now = perf_counter()
        due = self._last + BEAT
        self._beats.append((due - self._begin, max(0.0, now - due)))
        self._last = now
        self._timer = self._loop.call_later(BEAT, self._beat)

    @property
    def delays(self) -> list[float]:
        """All delays, in order of their length.

        A beat that came late stands for all that were due meanwhile, as anything else that was due
        then had to wait, too.
        """
        missed = (range(int(delay / BEAT) + 1) for _, delay in self._beats)
        beats = zip(self._beats, missed, strict=True)
        return sorted(delay - number * BEAT for (_, delay), some in beats for number in some)

    @property
    def trace(self) -> Points:
        """How long what was due at a time had to wait."""
        points = (((due, delay), (due + delay, 0.0)) for due, delay in self._beats)
        return [(round(time, 5), round(delay, 5)) for pair in points for time, delay in pair]


async def burst(run: Run) -> Samples:
    """Have all clients begin at once, and take the longest time for which the loop stood still."""
    number = run.effort.of(BURST)
    rounds: dict[str, list[tuple[float, Points]]] = {}
    async with servers(Greeter, "RSA-4096", "thread") as (clients, ports):
        for who in turns(ports, run.effort.long_rounds):
            with Heartbeat() as heartbeat:
                await clients.ask("handshakes", port=ports[who], number=number, at_a_time=number)
                await asyncio.sleep(5 * BEAT)
            rounds.setdefault(who, []).append((heartbeat.delays[-1], heartbeat.trace))
    return Samples(
        {who: [stall for stall, _ in some] for who, some in rounds.items()},
        {who: sorted(some)[len(some) // 2][1] for who, some in rounds.items()},  # the median's
    )


@cache
def saturated(run: Run) -> dict[str, Samples]:
    """Keep the server busy for some seconds; measure delays and handshakes per second at once."""
    delays: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}

    async def measured(run: Run) -> Samples:
        seconds = SECONDS * run.effort.share
        async with servers(Greeter, "RSA-4096", "thread") as (clients, ports):
            for who in turns(ports, run.effort.long_rounds):
                with Heartbeat() as heartbeat:
                    done, taken = await clients.ask(
                        "handshakes", port=ports[who], seconds=seconds, at_a_time=UNDER_WAY
                    )
                    await asyncio.sleep(5 * BEAT)
                of_round = heartbeat.delays
                delays.setdefault(who, []).append(of_round[len(of_round) * 99 // 100])
                rates.setdefault(who, []).append(done / taken)
        return Samples(delays)

    in_loop(measured)(run)
    return {"delay": Samples(delays), "rate": Samples(rates)}


# -- the server's CPU time


async def cpu(
    factory: Factory, key: str, operations: int, command: str, run: Run, **arguments: object
) -> Samples:
    """Take the CPU time of one operation."""
    number = run.effort.of(operations)
    times: dict[str, list[float]] = {}
    async with servers(factory, key, "loop") as (clients, ports):
        for port in ports.values():  # whatever is kept for good is there by now
            await clients.ask(command, port=port, number=1, **arguments)
        for who in turns(ports, 3 * run.effort.long_rounds):
            gc.collect()
            begin = process_time()
            await clients.ask(command, port=ports[who], number=number, **arguments)
            times.setdefault(who, []).append((process_time() - begin) / number)
    return Samples(times)


# -- memory, each contender's in a process of its own


def memory(command: str, contenders: Iterable[str], run: Run) -> Samples:
    number = run.effort.of(CONNECTIONS)
    used: dict[str, list[float]] = {}
    for round_ in range(run.effort.processes):
        for who in contenders:
            output = child(__name__, round_, run.loop, who, command, str(number))
            used.setdefault(who, []).append(output["memory"])
    return Samples(used)


def main() -> None:
    loop, who, command, number = sys.argv[1:]
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        used = runner.run(asyncio.wait_for(memory_of(who, command, int(number)), TIMEOUT))
    print(json.dumps({"memory": used}))


async def memory_of(who: str, command: str, number: int) -> float:
    """Return the bytes that each of so many connections takes while it waits."""
    process = psutil.Process()
    context = server_context("P-256")
    paused = 0

    async def wait(*_: object) -> None:
        nonlocal paused
        paused += 1
        await asyncio.Event().wait()

    if who == "aiojob":
        context.sni_callback = tls.sni_callback(wait)
    async with servers(Greeter, "P-256", "loop") as (clients, ports):

        async def more(connections: int) -> None:
            accepted = process.num_fds() + connections
            to_pause = paused + connections if command == "hello" else 0
            await clients.ask(command, port=ports[who], number=connections)
            while process.num_fds() < accepted or paused < to_pause:
                await asyncio.sleep(0.01)

        await more(10)  # whatever is kept for good is there by now
        gc.collect()
        before = process.memory_info().rss
        await more(number)
        gc.collect()
        return (process.memory_info().rss - before) / number


# -- servers and clients


class Served(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one of asyncio's by its methods only.
        self.transport = cast(asyncio.Transport, transport)


class Greeter(Served):
    """Tells the client that the handshake is over."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(b"!")


class Echo(Served):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Sink(Served):
    """Confirms each MiB with a byte."""

    def __init__(self) -> None:
        self._received = 0

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        confirmed, self._received = divmod(self._received, MIB)
        if confirmed:
            self.transport.write(bytes(confirmed))


class Source(Served):
    """Sends a MiB for each byte that comes."""

    _chunk = bytes(MIB // 4)

    def __init__(self) -> None:
        self._owed = 0
        self._may_write = True

    def data_received(self, data: bytes) -> None:
        self._owed += 4 * len(data)
        self._write()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._write()

    def _write(self) -> None:
        while self._owed and self._may_write:
            self._owed -= 1
            self.transport.write(self._chunk)


class Clients:
    """The process that plays the clients, and does one thing after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, command: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        answer = await self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the clients' process died of {command} {arguments}")
        return json.loads(answer)


@asynccontextmanager
async def clients() -> AsyncIterator[Clients]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.tls_clients",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Clients(process)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def servers(
    factory: Factory, key: str, handshake: Strategy
) -> AsyncIterator[tuple[Clients, Ports]]:
    """Start aiojob's server and the loop's own, and clients for them."""
    loop = asyncio.get_running_loop()
    aiojob.set_offload_threads(WORKERS)
    address: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "backlog": 2 * CONNECTIONS}
    context = server_context(key)
    ours = await tls.create_server(factory, **address, ssl=context, handshake=handshake)
    native = await loop.create_server(factory, **address, ssl=context)
    ports = {
        who: server.sockets[0].getsockname()[1]
        for who, server in (("aiojob", ours), ("native", native))
    }
    async with clients() as started:
        try:
            yield started, ports
        finally:
            ours.close()  # which ends the handshakes that wait
            native.close()
    await ours.wait_closed()
    await native.wait_closed()


@cache
def server_context(key: str) -> ssl.SSLContext:
    """Make a context with a new key of its kind and a certificate that it signed itself."""
    keys: dict[str, Callable[[], rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey]] = {
        "RSA-2048": partial(rsa.generate_private_key, 65537, 2048),
        "RSA-4096": partial(rsa.generate_private_key, 65537, 4096),
        "P-256": partial(ec.generate_private_key, ec.SECP256R1()),
    }
    private = keys[key]()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(private, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.flush()
        context.load_cert_chain(file.name)
    return context


if __name__ == "__main__":
    main()
