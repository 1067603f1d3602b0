"""Runs CPython's own asyncio tests of TLS servers: as they are, and on aiojob's servers.

    python cpython_suite.py LOOP REPORT

The report is a file in JSON: for each kind of server, how each case ended, and how many servers of
aiojob's there were.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import uvloop

from aiojob import tls

PATIENCE = 60.0
"""Seconds that their clients wait, whatever else the machine does."""
KINDS = {
    "plain": None,
    "loop-rebind": ("loop", True),
    "loop-shuttle": ("loop", False),
    "thread-rebind": ("thread", True),
}
CASES = {
    "asyncio": [
        "test.test_asyncio.test_ssl.TestSSL",
        "test.test_asyncio.test_events.SelectEventLoopTests",
        "test.test_asyncio.test_sendfile.SelectEventLoopTests",
    ],
    "uvloop": ["test.test_asyncio.test_ssl.TestSSL"],
}
NAMES = ("test_create_server_ssl", "test_sendfile_ssl")

plain_create_server: Any = asyncio.BaseEventLoop.create_server
plain_start_server = asyncio.start_server


class Substitute:
    """What stands in the place of the functions that make servers."""

    def __init__(self, handshake: str) -> None:
        self.handshake = handshake
        self.servers = 0

    async def create_server(self, loop: Any, plain: Any, *args: Any, **options: Any) -> Any:
        if options.get("ssl") is None:
            return await plain(loop, *args, **options)
        self.servers += 1
        return await tls.create_server(*args, handshake=self.handshake, **options)  # type: ignore[arg-type]

    async def start_server(self, *args: Any, **options: Any) -> Any:
        if options.get("ssl") is None:
            return await plain_start_server(*args, **options)
        self.servers += 1
        return await tls.start_server(*args, handshake=self.handshake, **options)


class Outcomes(unittest.TestResult):
    """How each case ended."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self.outcomes[test.id()] = "passed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self.outcomes[test.id()] = f"skipped: {reason}"

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        self.outcomes[test.id()] = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]

    addFailure = addError  # noqa: N815


def cases(loop: str) -> unittest.TestSuite:
    support: Any = importlib.import_module("test.support")
    support.LOOPBACK_TIMEOUT = support.SHORT_TIMEOUT = PATIENCE  # for the modules that are loaded
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*.{name}*" for name in NAMES]
    return loader.loadTestsFromNames(CASES[loop])


def run(loop: str, kind: tuple[str, bool] | None) -> dict[str, Any]:
    outcomes = Outcomes()
    substitute = Substitute("" if kind is None else kind[0])

    async def create_asyncio_server(self: Any, *args: Any, **options: Any) -> Any:
        return await substitute.create_server(self, plain_create_server, *args, **options)

    class Loop(uvloop.Loop):
        _default_executor = None  # CPython's tests look at it

        async def create_server(self, *args: Any, **options: Any) -> Any:
            if kind is None:
                return await super().create_server(*args, **options)
            return await substitute.create_server(self, uvloop.Loop.create_server, *args, **options)

    with mock.patch("asyncio.new_event_loop", Loop if loop == "uvloop" else asyncio.new_event_loop):
        if kind is None:
            cases(loop).run(outcomes)
        else:
            with (
                mock.patch("asyncio.BaseEventLoop.create_server", create_asyncio_server),
                mock.patch("asyncio.start_server", substitute.start_server),
                mock.patch("aiojob.tls._handover.can_rebind", return_value=kind[1]),
            ):
                cases(loop).run(outcomes)
    return {"outcomes": outcomes.outcomes, "servers": substitute.servers}


if __name__ == "__main__":
    loop, report = sys.argv[1:]
    Path(report).write_text(json.dumps({name: run(loop, kind) for name, kind in KINDS.items()}))
