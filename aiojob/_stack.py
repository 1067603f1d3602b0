"""The stacks of jobs, for those who look at them. Any thread may look.

A greenlet that is switched away from shows the frame where that was; the one that is current in
its thread shows none, and its frames are those that the thread is in.
"""

from __future__ import annotations

import sys
from types import FrameType

from ._fibre import BOTTOM, Fibre, getcurrent, greenlet

__all__ = ["stack_of", "without_own_frames"]


def stack_of(fibre: Fibre, caller: FrameType | None = None) -> list[FrameType]:
    """Return the frames of the job on a fibre, outermost first.

    `caller` is the innermost frame if the current greenlet is the job's own.
    """
    frames = []
    for part in _greenlets_of(fibre):
        frame = part.gr_frame
        if frame is None and fibre.port.running:
            here = part is getcurrent()
            frame = caller if here else sys._current_frames().get(fibre.pool.ident)
        frames += _frames_of(frame, needs_bottom=part is fibre)
    return frames


def _greenlets_of(fibre: Fibre) -> list[greenlet]:
    """Return the fibre, and the greenlets below it down to the innermost one of the job."""
    greenlets = []
    part = getcurrent() if fibre.port.running else fibre.paused_in
    while part is not None and part is not fibre:
        greenlets.append(part)
        part = part.parent
    return [fibre] if part is None else [fibre, *reversed(greenlets)]


def _frames_of(frame: FrameType | None, *, needs_bottom: bool) -> list[FrameType]:
    """Return the frames below the fibre's own, which is what needs to be found at the bottom.

    In another thread the job may go on meanwhile, and its frames may lead nowhere.
    """
    frames: list[FrameType] = []
    while frame is not None:
        if frame.f_code is BOTTOM:
            return frames[::-1]
        frames.append(frame)
        frame = frame.f_back
    return [] if needs_bottom else frames[::-1]


def without_own_frames(stack: list[FrameType]) -> list[FrameType]:
    """Return what lies between the outermost and the innermost frame that is not aiojob's.

    If all are, the outermost one.
    """
    others = [place for place, frame in enumerate(stack) if not _is_own(frame)]
    return stack[others[0] : others[-1] + 1] if others else stack[:1]


def _is_own(frame: FrameType) -> bool:
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "aiojob"
