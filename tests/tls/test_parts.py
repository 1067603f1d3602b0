"""Parts on their own: what happens between two steps of a handshake, or after a loop."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from aiojob.tls._handover import hand_over
from aiojob.tls._handshake import Handshake
from aiojob.tls._standins import ContextStandIn
from aiojob.tls._steps import LoopSteps, Steps, ThreadSteps


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


def test_a_worker_whose_event_loop_has_closed_waits_for_nothing(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], server_context: ssl.SSLContext
) -> None:
    async def steps() -> Steps:
        return Handshake(server_context, ThreadSteps).steps

    with closing(loop_factory()) as loop:
        in_thread = loop.run_until_complete(steps())
    lookup = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        in_thread.await_in_callback(lookup)
    assert inspect.getcoroutinestate(lookup) == inspect.CORO_CLOSED
