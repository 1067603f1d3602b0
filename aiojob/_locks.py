"""Locks that a job holds while it pauses: the deadlock that OpenSSL's manual page warns of.

Python does not know who took a `threading.Lock`. But code that stands in the body of ``with lock:``
holds it, and all frames of a paused job can be looked at. So for each frame this finds the
``with`` statements around the place where it is, and what the names there mean now. It reads
plain names and attributes alone, and runs no code of the program.

What is reported is held, unless the body released the lock by hand, or gave its name to another
lock, and somebody else holds that one. What is not seen: `acquire` without ``with``, an
`ExitStack`, locks in a container or behind a property, and code without its source.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import logging
import threading
import traceback
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType, MemberDescriptorType
from typing import Any, Final

from ._fibre import Fibre
from ._stack import stack_of, without_own_frames

__all__ = ["warn_of_held_locks"]

logger = logging.getLogger("aiojob")

LOCK: Final = type(threading.Lock())
RLOCK: Final = type(threading.RLock())

ENTERS: Final = {dis.opmap[name] for name in ("BEFORE_WITH", "LOAD_SPECIAL") if name in dis.opmap}
"""The instructions, by version of Python, that functions with a ``with`` statement have."""

Place = tuple[int, int]
"""A line and a column."""


def warn_of_held_locks(fibre: Fibre) -> None:
    """Log a warning for each lock that the job on a fibre of this thread, now paused, holds."""
    stack = without_own_frames(stack_of(fibre))
    for depth, frame in enumerate(stack):
        for expression in _entered(frame):
            lock = _meaning(expression, frame)
            if _is_held(lock):
                logger.warning(
                    "a job pauses while it holds %s, %s: whoever wants it meanwhile blocks the "
                    "thread, and the job with it. Hold it in `with pause_blocked():`, or use an "
                    "asyncio.Lock.\nThe lock was taken here:\n%sThe job pauses here:\n%s",
                    ast.unparse(expression),
                    repr(lock),  # as it is now
                    _text([*stack[:depth], frame], expression.lineno),
                    _text(stack, stack[-1].f_lineno),
                )


def _text(stack: list[FrameType], last_line: int) -> str:
    places = [(frame, frame.f_lineno) for frame in stack[:-1]] + [(stack[-1], last_line)]
    return "".join(traceback.StackSummary.extract(iter(places)).format())


def _entered(frame: FrameType) -> list[ast.expr]:
    """Return the names and attributes in ``with`` statements that a frame is in by now."""
    code = frame.f_code
    statements = _with_statements(code, code.co_filename)
    if not statements:
        return []
    line, _, column, _ = next(islice(code.co_positions(), frame.f_lasti // 2, None))
    if line is None or column is None:  # python -X no_debug_ranges
        return []  # not traced
    here = line, column
    return [
        item.context_expr
        for statement in statements
        if (statement.lineno, statement.col_offset) <= here < _end(statement)
        for item in statement.items
        if _end(item.context_expr) <= here
    ]


def _end(node: ast.stmt | ast.expr) -> Place:
    return node.end_lineno or 0, node.end_col_offset or 0


@lru_cache(maxsize=1024)
def _with_statements(code: CodeType, filename: str) -> list[ast.With]:
    """Return the ``with`` statements of a function, from its source.

    (Codes of different files may be equal, and so the name is an argument: for the cache.)
    """
    if ENTERS.isdisjoint(code.co_code[::2]):
        return []
    lines = linecache.getlines(filename)[code.co_firstlineno - 1 :]
    try:
        block = lines if code.co_name == "<module>" else inspect.getblock(lines)
        # Below an `if`, an indented function keeps its columns.
        tree = ast.parse(
            "if True:\n" + "".join(block) if block[0][:1].isspace() else "\n" + "".join(block)
        )
    except Exception:
        return []  # no source, or another one: a file that was changed may hold anything
    ast.increment_lineno(tree, code.co_firstlineno - 2)
    return [node for node in ast.walk(tree) if isinstance(node, ast.With)]


def _meaning(expression: ast.expr, frame: FrameType) -> Any:
    """Return what a name or an attribute means in a frame; None if that is not easily seen."""
    if isinstance(expression, ast.Name):
        return frame.f_locals.get(expression.id, frame.f_globals.get(expression.id))
    if isinstance(expression, ast.Attribute):
        return _attribute(_meaning(expression.value, frame), _mangled(expression.attr, frame))
    return None


def _attribute(owner: Any, name: str) -> Any:
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, MemberDescriptorType):  # a slot
        try:
            return found.__get__(owner)
        except AttributeError:
            return None
    return found


def _mangled(name: str, frame: FrameType) -> str:
    """Return what a private name of a class is called outside the class."""
    if not name.startswith("__"):
        return name
    names = frame.f_code.co_names
    return next((one for one in names if one[:1] == "_" and one.endswith(name)), name)


def _is_held(lock: Any) -> bool:
    if isinstance(lock, LOCK):
        return lock.locked()
    return isinstance(lock, RLOCK) and lock._is_owned()  # type: ignore[attr-defined]
