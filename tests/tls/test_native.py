"""The strategy of OpenSSL's own jobs, driven without sockets, with an engine that pauses."""

from __future__ import annotations

import _ssl
import asyncio
import ctypes
import gc
import ssl
import subprocess
import sys
import threading
from asyncio import AbstractEventLoop, CancelledError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import without_slow_steps

from aiojob import CannotPauseError, LibsslUnavailableError, WaitFdError, cleanup_thread, run_job
from aiojob.tls import _native
from aiojob.tls._libssl import SSL_ASYNC_NO_JOBS, Connection
from aiojob.tls._native import (
    NativeSteps,
    abandoned,
    check_native,
    is_native_capable,
    resume_abandoned,
)
from tls.conftest import Certificates
from tls.kit import PATIENCE, until
from tls.native_engine import NativeEngine


class Pair:
    """A server's and a client's SSL object, and the steps of the server's handshake."""

    def __init__(self, server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server_context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.steps = NativeSteps(self.server, self.incoming, self.outgoing)
        self._from_server, self._to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context.wrap_bio(
            self._from_server, self._to_server, server_hostname="localhost"
        )

    def step_of_client(self) -> None:
        """Have the client take what the server has sent, and send what it has to say to it."""
        self._from_server.write(self.outgoing.read())
        with suppress(ssl.SSLWantReadError):
            self.client.do_handshake()
        self.incoming.write(self._to_server.read())

    def shake_hands(self) -> None:
        """Do the whole handshake; in a job."""
        while True:
            self.step_of_client()
            with suppress(ssl.SSLWantReadError):
                self.steps.step()
                break
        self.steps.finish()
        self.step_of_client()

    def exchange(self) -> None:
        """Check that both have a connection."""
        self.server.write(b"from the server")
        self._from_server.write(self.outgoing.read())
        assert self.client.read() == b"from the server"
        self.client.write(b"from the client")
        self.incoming.write(self._to_server.read())
        assert self.server.read() == b"from the client"


@pytest.fixture
def new_pair(engine_context: ssl.SSLContext, client_context: ssl.SSLContext) -> Callable[[], Pair]:
    return lambda: Pair(engine_context, client_context)


async def pause_in_engine(engine: NativeEngine, pair: Pair) -> asyncio.Task[None]:
    """Return the task of a handshake that is paused in the engine, which is held."""
    engine.hold()
    before = engine.counts.in_flight
    task = asyncio.create_task(run_job(pair.shake_hands))
    await engine.reached(before + 1)
    return task


async def give_up(task: asyncio.Task[None], pair: Pair) -> None:
    """Cancel a handshake in mid-job, and abandon it."""
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    assert pair.steps.in_flight
    pair.steps.abandon()


# -- handshakes


@pytest.mark.parametrize("uses_fds", [True, False], ids=["fds", "polled"])
async def test_handshake_pauses_in_the_engine_and_completes(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    client_context: ssl.SSLContext,
    version: str,
    uses_fds: bool,
) -> None:
    engine.use_fds(uses_fds)
    pair = new_pair()
    task = await pause_in_engine(engine, pair)
    assert pair.steps.in_flight
    engine.release()
    await task
    assert not pair.steps.in_flight
    assert pair.client.version() == version
    pair.exchange()
    assert engine.counts.finished == 1
    assert engine.counts.pauses > 0
    assert engine.counts.in_place == 0


@pytest.mark.parametrize("cipher", ["ECDHE-RSA-AES128-GCM-SHA256", "AES128-GCM-SHA256"])
async def test_signatures_and_decryptions_pause(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    engine_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    cipher: str,
) -> None:
    client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (engine_context, client_context):
        context.set_ciphers(cipher)
    pair = new_pair()
    await run_job(pair.shake_hands)
    pair.exchange()
    assert engine.counts.finished == 1
    assert engine.counts.in_place == 0


async def test_native_job_may_pause_again_with_another_fd_of_the_same_number(
    engine: NativeEngine, new_pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    async_fds, seen = Connection.async_fds, []

    def seeing(connection: Connection) -> list[int]:
        seen.append(async_fds(connection))
        return seen[-1]

    monkeypatch.setattr(Connection, "async_fds", seeing)
    engine.repeat(3)
    pair = new_pair()
    task = await pause_in_engine(engine, pair)
    engine.release()
    await task
    pair.exchange()
    assert engine.counts.finished == 3
    assert len(seen) == 3
    assert seen == [seen[0]] * 3, "a number was expected to come again"


async def test_keys_are_logged_from_a_native_job(
    new_pair: Callable[[], Pair], engine_context: ssl.SSLContext, tmp_path: Path
) -> None:
    engine_context.keylog_filename = str(tmp_path / "keys")  # written on the native job's stack
    pair = new_pair()
    await run_job(pair.shake_hands)
    pair.exchange()
    engine_context.keylog_filename = None  # type: ignore[assignment]
    assert "SERVER_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()


async def test_native_jobs_overlap(engine: NativeEngine, new_pair: Callable[[], Pair]) -> None:
    pairs = [new_pair() for _ in range(20)]
    tasks = [await pause_in_engine(engine, pair) for pair in pairs]
    engine.release()
    await asyncio.gather(*tasks)
    assert engine.counts.most_in_flight == len(pairs)
    assert engine.counts.finished == len(pairs)
    for pair in pairs:
        pair.exchange()


async def test_loop_goes_on_while_the_engine_works(
    engine: NativeEngine, new_pair: Callable[[], Pair]
) -> None:
    task = await pause_in_engine(engine, new_pair())
    pauses = engine.counts.pauses
    for _ in range(100):
        await asyncio.sleep(0)
    assert engine.counts.pauses == pauses, "the job was resumed though no fd was readable"
    engine.release()
    await task


async def test_handshake_without_an_engine_does_not_pause(
    certificates: Certificates, client_context: ssl.SSLContext
) -> None:
    pair = Pair(certificates.rsa_context(), client_context)
    await run_job(pair.shake_hands)
    pair.exchange()


async def test_step_with_garbage_fails_as_do_handshake_does(new_pair: Callable[[], Pair]) -> None:
    pair = new_pair()
    pair.incoming.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError, match="HTTP_REQUEST"):
        await run_job(pair.steps.step)
    assert not pair.steps.in_flight
    pair.steps.abandon()
    assert not abandoned


def mode_of(connection: Any) -> int:
    return int(connection._libssl.native.ctrl(connection._ssl, 33, 0, None))


async def test_finish_leaves_the_mode_as_it_was(new_pair: Callable[[], Pair]) -> None:
    pair = new_pair()
    mode = mode_of(pair.steps._connection)
    assert mode & 0x100
    pair.steps.finish()
    assert mode_of(pair.steps._connection) == mode & ~0x100


async def test_interrupt_in_do_handshake_knows_of_the_native_job(
    engine: NativeEngine, new_pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def do_handshake(self) -> None:
            with suppress(ssl.SSLError):
                pair.server.do_handshake()
            raise KeyboardInterrupt

    pair = new_pair()
    pair.step_of_client()
    engine.hold()
    monkeypatch.setattr(pair.steps, "_ssl_object", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        pair.steps._go_on()
    assert pair.steps.in_flight
    monkeypatch.undo()
    engine.release()
    pair.steps.abandon()
    await until(lambda: not abandoned)


async def test_callback_cannot_wait_on_the_stack_of_a_native_job(
    new_pair: Callable[[], Pair],
) -> None:
    with pytest.raises(CannotPauseError, match="cannot wait"):
        new_pair().steps.await_in_callback(asyncio.sleep(0))
    with pytest.raises(CannotPauseError, match="cannot wait"):
        new_pair().steps.await_in_callback(asyncio.get_running_loop().create_future())


def in_thread(func: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            func()
        except BaseException as error:
            errors.append(error)
        finally:
            cleanup_thread()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_exhausted_pool_of_native_jobs_is_polled(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
) -> None:
    libcrypto = ctypes.PyDLL(_ssl.__file__)

    async def main() -> None:
        first, second = new_pair(), new_pair()
        first_task = await pause_in_engine(engine, first)
        second_task = asyncio.create_task(run_job(second.shake_hands))
        await until(lambda: second.steps._connection.want() == SSL_ASYNC_NO_JOBS)
        assert not second.steps.in_flight
        engine.release()
        await asyncio.gather(first_task, second_task)
        first.exchange()
        second.exchange()

    def limited() -> None:
        assert libcrypto.ASYNC_init_thread(ctypes.c_size_t(1), ctypes.c_size_t(1)) == 1
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())
        libcrypto.ASYNC_cleanup_thread()

    in_thread(limited)
    assert engine.counts.most_in_flight == 1


# -- connections that are given up


@pytest.mark.parametrize("uses_fds", [True, False], ids=["fds", "polled"])
async def test_abandoned_native_job_is_resumed_to_its_end(
    engine: NativeEngine, new_pair: Callable[[], Pair], uses_fds: bool
) -> None:
    engine.use_fds(uses_fds)
    pair = new_pair()
    await give_up(await pause_in_engine(engine, pair), pair)
    steps = pair.steps
    del pair
    await asyncio.sleep(0.01)
    assert abandoned == {steps}
    engine.release()
    await until(lambda: not abandoned)
    assert not steps.in_flight
    assert engine.counts.finished == 1
    assert engine.counts.orphans == 0


async def test_many_abandoned_among_others_are_each_resumed(
    engine: NativeEngine, new_pair: Callable[[], Pair]
) -> None:
    pairs = [new_pair() for _ in range(20)]
    tasks = [await pause_in_engine(engine, pair) for pair in pairs]
    for pair, task in zip(pairs[::2], tasks[::2], strict=True):
        await give_up(task, pair)
    assert len(abandoned) == 10
    engine.release()
    await asyncio.gather(*tasks[1::2])
    for pair in pairs[1::2]:
        pair.exchange()
    await until(lambda: not abandoned)
    assert engine.counts.finished == len(pairs)
    assert engine.counts.orphans == 0


async def test_abandon_within_the_job(engine: NativeEngine, new_pair: Callable[[], Pair]) -> None:
    pair = new_pair()

    def shake_hands() -> None:
        try:
            pair.shake_hands()
        finally:
            pair.steps.abandon()

    engine.hold()
    task = asyncio.create_task(run_job(shake_hands))
    await engine.reached(1)
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    assert abandoned
    engine.release()
    await until(lambda: not abandoned)


def abandon_under_a_loop(
    engine: NativeEngine, pair: Pair, loop: AbstractEventLoop, steps_of_the_loop: int
) -> None:
    async def main() -> None:
        await give_up(await pause_in_engine(engine, pair), pair)
        for _ in range(steps_of_the_loop):
            await asyncio.sleep(0)

    loop.run_until_complete(main())


def finish_abandoned(engine: NativeEngine) -> None:
    """Check that later native handshakes of this thread resume what was left behind."""
    assert abandoned
    resume_abandoned()
    assert abandoned, "the engine has not finished"
    engine.finish()
    resume_abandoned()
    assert not abandoned
    assert engine.counts.orphans == 0


@pytest.mark.parametrize("steps_of_the_loop", [0, 3])
def test_native_job_left_behind_by_a_runner_is_resumed_later(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
    steps_of_the_loop: int,
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        abandon_under_a_loop(engine, new_pair(), runner.get_loop(), steps_of_the_loop)
    finish_abandoned(engine)


def test_native_job_left_behind_by_a_closed_loop_is_resumed_later(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
) -> None:
    loop = loop_factory()
    loop.set_exception_handler(lambda *_: None)  # it complains of the task that is destroyed
    pair = new_pair()
    abandon_under_a_loop(engine, pair, loop, 3)
    (drain,) = asyncio.all_tasks(loop)
    loop.close()
    assert not drain.done()
    finish_abandoned(engine)
    coroutine: Any = drain.get_coro()
    coroutine.close()  # lest its job stays paused for ever
    assert not abandoned


def test_abandon_where_no_loop_runs_is_resumed_later(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
) -> None:
    pair = new_pair()

    async def main() -> None:
        task = await pause_in_engine(engine, pair)
        task.cancel()
        with pytest.raises(CancelledError):
            await task

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    pair.steps.abandon()
    finish_abandoned(engine)


def test_next_native_handshake_resumes_what_was_left_behind(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        abandon_under_a_loop(engine, new_pair(), runner.get_loop(), 1)
    engine.finish()
    new_pair()
    assert not abandoned


def test_native_job_of_another_thread_is_left_alone(
    engine: NativeEngine,
    new_pair: Callable[[], Pair],
    loop_factory: Callable[[], AbstractEventLoop],
) -> None:
    def begin() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            abandon_under_a_loop(engine, new_pair(), runner.get_loop(), 1)

    in_thread(begin)
    resume_abandoned()
    (steps,) = abandoned
    assert steps.in_flight
    # Its thread is gone, so it can never be resumed; the engine is told that nobody waits.
    abandoned.clear()
    del steps
    gc.collect()  # the cancelled task's frames
    assert engine.counts.orphans == 1
    engine.finish()


EXIT = """
import asyncio, ssl, sys
from pathlib import Path

import uvloop

tests, library, certificate, authority, loop, state = sys.argv[1:]
sys.path.insert(0, tests)
from tls.native_engine import NativeEngine, load
from tls.test_native import Pair, give_up, pause_in_engine

async def main():
    pair = Pair(server_context, client_context)
    task = await pause_in_engine(engine, pair)
    if state == "abandoned":
        await give_up(task, pair)

engine = NativeEngine(load(Path(library)))
engine.install()
server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_context.load_cert_chain(certificate)
client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
client_context.load_verify_locations(authority)
factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop]
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main())
print(engine.counts.in_flight)
"""


@pytest.mark.parametrize("state", ["paused", "abandoned"])
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
def test_exit_with_a_native_job_under_way_is_silent(
    engine_path: Path, certificates: Certificates, tmp_path: Path, loop_name: str, state: str
) -> None:
    tests = Path(__file__).parents[1]
    certificate = tmp_path / "certificate.pem"
    certificates.rsa.private_key_and_cert_chain_pem.write_to_path(certificate)
    files = [tests, engine_path, certificate, certificates.authority_file]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", EXIT, *files, loop_name, state],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert without_slow_steps(done.stderr) == ""
    assert done.stdout == "1\n"
    assert done.returncode == 0


async def test_fd_that_cannot_be_watched_raises_and_leaves_the_native_job(
    engine: NativeEngine, new_pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = new_pair()
    with open(__file__) as file, monkeypatch.context() as patch:
        patch.setattr(Connection, "async_fds", lambda _: [file.fileno()])
        engine.hold()
        with pytest.raises(WaitFdError):
            await run_job(pair.shake_hands)
        assert pair.steps.in_flight
        pair.steps.abandon()
        await until(pair.steps._is_left_behind)
    finish_abandoned(engine)


# -- where it is not possible


def test_native_jobs_are_possible_here() -> None:
    assert is_native_capable()
    check_native(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_unreachable_libssl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "check_rebind", lambda: LibsslUnavailableError("no such luck"))
    assert not is_native_capable()
    with pytest.raises(LibsslUnavailableError, match="not possible here: no such luck"):
        check_native(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_libcrypto_without_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "is_async_capable", lambda: False)
    assert not is_native_capable()
    with pytest.raises(LibsslUnavailableError, match="ASYNC_is_capable"):
        check_native(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def set_sni_callback(context: Any, callback: Any) -> None:
    context.sni_callback = callback


def set_msg_callback(context: Any, callback: Any) -> None:
    context._msg_callback = callback


def set_psk_server_callback(context: Any, callback: Any) -> None:
    context.set_psk_server_callback(callback)


@pytest.mark.parametrize(
    ("name", "set_callback"),
    [
        ("sni_callback", set_sni_callback),
        ("_msg_callback", set_msg_callback),
        pytest.param(
            "a PSK callback",
            set_psk_server_callback,
            marks=pytest.mark.skipif(
                not getattr(ssl, "HAS_PSK", False), reason="this ssl module has no PSK callbacks"
            ),
        ),
    ],
)
def test_context_with_a_callback_in_python_is_refused(
    name: str, set_callback: Callable[[Any, Any], None]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    set_callback(context, lambda *_: None)
    with pytest.raises(LibsslUnavailableError, match=f"^{name} is set"):
        check_native(context)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ssl_object = context.wrap_bio(incoming, outgoing, server_side=True)
    with pytest.raises(LibsslUnavailableError, match=f"^{name} is set"):
        NativeSteps(ssl_object, incoming, outgoing)
    set_callback(context, None)
    check_native(context)
    NativeSteps(ssl_object, incoming, outgoing)
