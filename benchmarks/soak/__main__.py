"""Jobs and offloads under fire: ``python -m benchmarks.soak [jobs] [offload] --seconds 60``.

Each job and each offloaded call has to end exactly once, and nothing may be left behind: no job,
fd, thread or fibre, and no memory. The exit status is 1 if that is not so.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import sys

import psutil

import aiojob
from aiojob.testing import nothing_left

from ..measure import LOOPS
from . import jobs, offload
from .harness import Part, Soak, started

PARTS = {"jobs": jobs.PART, "offload": offload.PART}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each part")
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs at a time")
    parser.add_argument("--loop", action="append", choices=LOOPS, help="default: both")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(unknown)}")
    faulty = [name for name in options.parts or PARTS if soaked(PARTS[name], name, options)]
    return bool(faulty)


def soaked(part: Part, name: str, options: argparse.Namespace) -> bool:
    """Run a part, print what it did, and say whether there was a fault."""
    loops = options.loop or list(LOOPS)
    started(Soak(1, options.jobs), part, loops, random.Random(options.seed))
    before, stats = resident(), aiojob.stats()  # whatever is kept for good is there by now
    soak = Soak(options.seconds, options.jobs)
    try:
        with nothing_left():
            started(soak, part, loops, random.Random(options.seed))
    except AssertionError as error:
        soak.fault(f"left behind: {error}")
    grown = (resident() - before) / 2**20
    check_stats(soak, stats)
    print(f"{name}, {' and '.join(loops)}, {options.seconds:g} s, seed {options.seed}")
    for what, count in sorted(soak.counts.items()):
        print(f"  {what:32} {count:>12,}")
    print(f"  {'memory grew by':32} {grown:>8.1f} MiB")
    for fault in soak.faults:
        print(f"  FAULT {fault}")
    if not soak.faults:
        print(f"  {'jobs, fibres, fds, threads left':32} {'none':>12}")
    return bool(soak.faults)


def check_stats(soak: Soak, before: aiojob.Stats) -> None:
    after = aiojob.stats()
    if after.running or after.paused or after.waiters:
        soak.fault(f"jobs are left: {after}")
    if after.pooled > before.pooled:
        soak.fault(f"fibres are left: {after.pooled - before.pooled}")


def resident() -> int:
    """Return the bytes of memory that the process needs, without what malloc only keeps."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    sys.exit(main())
