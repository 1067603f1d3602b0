"""Parts on their own: what happens between two steps of a handshake, or after a loop."""

from __future__ import annotations

import asyncio
import inspect
import ssl
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import closing
from typing import Any, cast

import pytest

from aiojob.tls._handover import hand_over
from aiojob.tls._handshake import Handshake
from aiojob.tls._standins import ContextStandIn
from aiojob.tls._steps import LoopSteps, Steps, ThreadSteps
from tls.kit import PATIENCE


def test_a_stand_in_of_a_context_is_like_it_once_it_was_used(
    server_context: ssl.SSLContext,
) -> None:
    finished: Any = object()
    stand_in: Any = ContextStandIn(server_context, lambda incoming, outgoing: finished)
    assert isinstance(stand_in, ssl.SSLContext)
    assert stand_in == server_context
    assert stand_in == stand_in
    assert stand_in != ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert len({stand_in, server_context}) == 1
    assert repr(stand_in) == repr(server_context)
    stand_in.num_tickets = 1
    assert server_context.num_tickets == stand_in.num_tickets == 1
    bios = ssl.MemoryBIO(), ssl.MemoryBIO()
    assert stand_in.wrap_bio(*bios, server_side=True) is finished
    assert type(stand_in.wrap_bio(*bios, server_side=True)) is ssl.SSLObject


async def test_a_connection_that_is_lost_in_the_hand_over_is_not_handed_over(
    server_context: ssl.SSLContext,
) -> None:
    class Connection:
        is_lost = False

        def is_closing(self) -> bool:
            return self.is_lost

        def pause_reading(self) -> None:
            self.is_lost = True  # the loop has found that out by the time it does this

    class Loop:
        call_soon = asyncio.get_running_loop().call_soon

        async def start_tls(self, *args: Any, **options: Any) -> object:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return object()

    loop: Any = Loop()
    connection: Any = Connection()
    handshake = Handshake(server_context, LoopSteps)
    assert await hand_over(loop, connection, handshake, server_context, None) is None
    assert connection.is_lost
    assert await hand_over(loop, connection, handshake, server_context, None) is None


# -- a worker's callback that has its event loop await something

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class Waiting:
    """A worker thread that waits for `lookup`, which has been posted to the event loop."""

    def __init__(
        self, steps: ThreadSteps, lookup: Awaitable[object], *, closes: bool = False
    ) -> None:
        self.steps = steps
        self.lookup = lookup
        self._closes = closes
        self._posted = threading.Event()
        self._loop, steps._loop = steps._loop, cast("asyncio.AbstractEventLoop", self)
        self._outcome: Future[object] = Future()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._posted.wait(PATIENCE)

    def _run(self) -> None:
        try:
            self._outcome.set_result(self.steps.await_in_callback(self.lookup))
        except BaseException as error:
            self._outcome.set_exception(error)

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        if self._closes:  # after it has looked whether it is closed
            self.held = callback
            self._loop.close()
        else:
            self._loop.call_soon_threadsafe(callback)
        del callback
        self._posted.set()

    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def result(self) -> object:
        self._thread.join(PATIENCE)
        return self._outcome.result(0)


def thread_steps(loop: asyncio.AbstractEventLoop, context: ssl.SSLContext) -> ThreadSteps:
    async def steps() -> Steps:
        return Handshake(context, ThreadSteps).steps

    made = loop.run_until_complete(steps())
    assert isinstance(made, ThreadSteps)
    return made


def test_a_worker_whose_event_loop_has_closed_waits_for_nothing(
    loop_factory: LoopFactory, server_context: ssl.SSLContext
) -> None:
    with closing(loop_factory()) as loop:
        steps = thread_steps(loop, server_context)
    lookup = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        steps.await_in_callback(lookup)
    assert inspect.getcoroutinestate(lookup) == inspect.CORO_CLOSED


@pytest.mark.parametrize("closes", [True, False], ids=["meanwhile", "later"])
def test_a_worker_whose_event_loop_closes_before_it_awaits_is_let_go(
    closes: bool, loop_factory: LoopFactory, server_context: ssl.SSLContext
) -> None:
    lookup = asyncio.sleep(0)
    with closing(loop_factory()) as loop:
        waiting = Waiting(thread_steps(loop, server_context), lookup, closes=closes)
    with pytest.raises(CancelledError):
        waiting.result()
    assert inspect.getcoroutinestate(lookup) == inspect.CORO_CLOSED


def test_nothing_is_awaited_for_a_connection_that_was_given_up_before(
    loop_factory: LoopFactory, server_context: ssl.SSLContext
) -> None:
    lookup = asyncio.sleep(0)
    with closing(loop_factory()) as loop:
        waiting = Waiting(thread_steps(loop, server_context), lookup)
        waiting.steps.is_abandoned = True
        loop.run_until_complete(asyncio.sleep(0))
        with pytest.raises(CancelledError):
            waiting.result()
        assert inspect.getcoroutinestate(lookup) == inspect.CORO_CLOSED


def test_what_is_awaited_for_a_connection_that_is_given_up_is_cancelled(
    loop_factory: LoopFactory, server_context: ssl.SSLContext
) -> None:
    ends: list[str] = []

    async def lookup() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("looked up")

    with closing(loop_factory()) as loop:
        waiting = Waiting(thread_steps(loop, server_context), lookup())
        loop.run_until_complete(asyncio.sleep(0))
        waiting.steps.abandon()
        with pytest.raises(CancelledError):
            waiting.result()
        loop.run_until_complete(asyncio.sleep(0))
        assert ends == ["looked up"]
        waiting.steps.abandon()  # there is nothing to cancel any more


@pytest.mark.parametrize("cancels", [True, False])
def test_a_worker_gets_what_was_awaited(
    cancels: bool, loop_factory: LoopFactory, server_context: ssl.SSLContext
) -> None:
    async def lookup() -> str:
        await asyncio.sleep(0)
        if cancels:
            raise asyncio.CancelledError
        return "found"

    with closing(loop_factory()) as loop:
        waiting = Waiting(thread_steps(loop, server_context), lookup())
        for _ in range(3):
            loop.run_until_complete(asyncio.sleep(0))
        if cancels:
            with pytest.raises(CancelledError):
                waiting.result()
        else:
            assert waiting.result() == "found"
