"""The stacks of jobs, for those who look at them. Any thread may look.

A greenlet that is switched away from shows the frame where that was; the one that is current in
its thread shows none, and its frames are those that the thread is in.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from types import FrameType
from typing import Final

from ._fibre import BOTTOM, Fibre, getcurrent, greenlet

__all__ = ["stack_of", "without_own_frames"]


class CurrentFrames:
    """Calls `sys._current_frames` while no garbage is collected, one thread at a time.

    In Python 3.11 the call may collect garbage, and so let other threads go on, while it holds a
    lock that each thread needs that begins, ends or calls this: a deadlock. Later Pythons collect
    between two instructions only.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may look in the middle of this
        self._paused_gc = False

    def __call__(self) -> dict[int, FrameType]:
        with self._lock:
            if not gc.isenabled():
                return sys._current_frames()
            self._paused_gc = True
            gc.disable()
            try:
                return sys._current_frames()
            finally:
                gc.enable()
                self._paused_gc = False

    def forget(self) -> None:
        """Be as new: in a forked process, the thread that was looking is missing."""
        if self._paused_gc:
            gc.enable()
        CurrentFrames.__init__(self)


_safe_frames: Final = CurrentFrames()
_current_frames: Final = sys._current_frames if sys.version_info >= (3, 12) else _safe_frames

if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_safe_frames.forget)


def stack_of(fibre: Fibre, caller: FrameType | None = None) -> list[FrameType]:
    """Return the frames of the job on a fibre, outermost first.

    `caller` is the innermost frame if the current greenlet is the job's own.
    """
    frames = []
    for part in _greenlets_of(fibre):
        frame = part.gr_frame
        if frame is None and fibre.port.running:
            here = part is getcurrent()
            frame = caller if here else _current_frames().get(fibre.pool.ident)
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
