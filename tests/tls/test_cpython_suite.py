"""CPython's own asyncio tests of TLS servers, on aiojob's servers: each ends as on the loop's own.

They run in subprocesses, one for each loop; `cpython_suite` is what these run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import unavailable

import aiojob
from tls import cpython_suite

LOOPS = ["asyncio", "uvloop"]
SECONDS = 240
"""For all that runs in one subprocess; it takes some ten."""
pytestmark = pytest.mark.timeout(2 * SECONDS)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the cases ended, by loop and kind of server."""
    if importlib.util.find_spec("test.test_asyncio") is None:
        unavailable("Python was installed without its tests")
    tmp = tmp_path_factory.mktemp("cpython-suite")
    env = os.environ | {
        "PYTHONPATH": str(Path(aiojob.__file__).parents[1]),
        "PYTHONDEVMODE": "",  # asyncio's debug mode only makes them slow
    }
    processes = {
        loop: subprocess.Popen(
            [sys.executable, "-W", "ignore", cpython_suite.__file__, loop, f"{tmp / loop}.json"],
            env=env,
            cwd=tmp,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for loop in LOOPS
    }
    reports = {}
    try:
        for loop, process in processes.items():
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output
            reports[loop] = json.loads((tmp / f"{loop}.json").read_text())
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return reports


@pytest.mark.parametrize("kind", [kind for kind in cpython_suite.KINDS if kind != "plain"])
@pytest.mark.parametrize("loop", LOOPS)
def test_cpythons_own_tests_of_tls_servers_end_on_aiojob_as_without(
    loop: str, kind: str, reports: dict[str, Any]
) -> None:
    plain, ours = reports[loop]["plain"], reports[loop][kind]
    assert ours["outcomes"] == plain["outcomes"]
    assert list(ours["outcomes"].values()).count("passed") >= len(cpython_suite.CASES[loop])
    assert plain["servers"] == 0
    assert ours["servers"] == list(ours["outcomes"].values()).count("passed")
