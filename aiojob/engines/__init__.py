"""Engines: they start an operation, pause the job, and have it woken on completion.

Outside a job, and where pausing is blocked, each of them blocks the thread instead.

======================  ==================================================================
``_kernel``             fds that turn readable: signals, timers, room to write
``_pauses``             how a paused job is woken, by whom, and by when
``_completion``         `Completion`: what engines are made of
``_fds``                `wait_readable`, `wait_writable`
``_timers``             `sleep`
``_futures``            `wait_future`
``_workers``            worker threads
``_offload``            `offload`, `offload_async`, `set_offload_threads`
======================  ==================================================================
"""

from ._completion import Completion
from ._fds import HasFileno, wait_readable, wait_writable
from ._futures import wait_future
from ._offload import offload, offload_async, set_offload_threads
from ._timers import sleep

__all__ = [
    "Completion",
    "HasFileno",
    "offload",
    "offload_async",
    "set_offload_threads",
    "sleep",
    "wait_future",
    "wait_readable",
    "wait_writable",
]
