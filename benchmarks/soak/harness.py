"""What the parts of the soak share: the time, the counts, the faults, the check for progress."""

from __future__ import annotations

import faulthandler
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SILENCE = 60.0
"""Seconds without progress after which all stacks are shown and the program ends."""


@dataclass(frozen=True)
class Part:
    """One part of the soak.

    run: called with the soak, the names of the loops and the source of chance.
    progress: the count that grows as long as all is well.
    """

    run: Callable[[Soak, list[str], random.Random], None]
    progress: str


class Soak:
    """One run of a part: what its threads share."""

    def __init__(self, seconds: float, jobs: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.jobs = jobs
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline or bool(self.faults)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def guarded(self, func: Callable[..., None], *args: Any) -> None:
        """Call a function; what it raises is a fault."""
        try:
            func(*args)
        except BaseException as error:
            self.fault(f"{func.__name__}: {error!r}")

    def watch(self, threads: list[threading.Thread], progress: str) -> None:
        """Wait for the threads; end the program if nothing goes on any more."""
        seen = -1
        while any(thread.is_alive() for thread in threads):
            if self.counts[progress] != seen:
                seen = self.counts[progress]
                faulthandler.dump_traceback_later(SILENCE, exit=True)
            time.sleep(0.1)
        faulthandler.cancel_dump_traceback_later()


def started(soak: Soak, part: Part, loops: list[str], chance: random.Random) -> None:
    """Run a part to its end, in a thread of its own."""
    thread = threading.Thread(target=soak.guarded, args=(part.run, soak, loops, chance))
    thread.start()
    soak.watch([thread], part.progress)
    thread.join()
