"""SQLAlchemy's own asyncio tests, with aiojob in the place of SQLAlchemy's greenlets.

The suite is in SQLAlchemy's source distribution only, which pip fetches. It runs in
subprocesses, as it is and on aiojob; each test must end the same way. `sqlalchemy_suite` has
the plugins for that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support import unavailable

import aiojob

pytestmark = pytest.mark.timeout(600)

PLUGINS = Path(__file__).with_name("sqlalchemy_suite")
RUNS = {
    "plain": ("asyncio", ["suite_outcomes"]),
    "asyncio": ("asyncio", ["suite_outcomes", "suite_on_aiojob"]),
    "uvloop": ("uvloop", ["suite_outcomes", "suite_on_aiojob"]),
}


class Report:
    """How a run of the suite ended."""

    def __init__(self, process: subprocess.Popen[bytes], files: Path) -> None:
        self.exit_status = process.wait()
        self.output = files.with_suffix(".txt").read_text()
        report = files.with_suffix(".json")
        assert report.exists(), self.output
        content: dict[str, Any] = json.loads(report.read_text())
        self.outcomes: dict[str, str] = content["outcomes"]
        self.counts: Counter[str] = Counter(content["counts"])
        self.totals = Counter(self.outcomes.values())


def sdist(cache: Path) -> Path:
    """Return SQLAlchemy's source distribution, of the version that is installed."""
    name = f"sqlalchemy-{version('sqlalchemy')}"
    kept = cache / f"{name}.tar.gz"
    if not kept.exists():
        # Not straight to its place: another session may be filling the cache as well.
        with TemporaryDirectory(dir=cache) as fresh:
            download(name.replace("-", "=="), fresh).replace(kept)
    return kept


def download(requirement: str, directory: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", directory]
    command += ["--no-binary", "sqlalchemy", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        unavailable("pip took too long to fetch SQLAlchemy's source distribution")
    if done.returncode:
        unavailable(f"pip cannot fetch SQLAlchemy's source distribution:\n{done.stderr}")
    return next(Path(directory).glob("*.tar.gz"))


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked suite."""
    tmp = tmp_path_factory.mktemp("sqlalchemy-suite")
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    archive = sdist(tmp if cache is None else cache.mkdir("sqlalchemy-sdist"))
    with tarfile.open(archive) as tar:
        wanted = [
            member
            for member in tar
            if member.name.partition("/")[2].startswith(("test/", "lib/", "setup.cfg", "pyproject"))
        ]
        tar.extractall(tmp / "unpacked", wanted, filter="data")
    return next((tmp / "unpacked").iterdir())


@pytest.fixture(scope="module")
def reports(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """The suite's outcomes; its runs are processes side by side, as they sleep now and then."""
    tmp = tmp_path_factory.mktemp("reports")
    processes = {run: start(suite, tmp, run) for run in RUNS}
    try:
        return {run: Report(process, tmp / run) for run, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def start(suite: Path, tmp: Path, run: str) -> subprocess.Popen[bytes]:
    loop, plugins = RUNS[run]
    # Not in development mode: what it finds in SQLAlchemy, or in the suite, is not for these tests.
    left_out = ("PYTEST_", "PYTHONDEVMODE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    env |= {
        "AIOJOB_SUITE_LOOP": loop,
        "AIOJOB_SUITE_REPORT": str(tmp / f"{run}.json"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(aiojob.__file__).parents[1]), str(PLUGINS)]),
    }
    # -s makes the suite test the SQLAlchemy that is installed, not the one that it comes with.
    command = [sys.executable, "-s", "-m", "pytest", "test/ext/asyncio", "--db", "aiosqlite"]
    command += ["-p", "no:cacheprovider", *(f"-p{plugin}" for plugin in plugins)]
    with (tmp / f"{run}.txt").open("wb") as output:
        return subprocess.Popen(
            command, cwd=suite, env=env, stdout=output, stderr=subprocess.STDOUT
        )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sqlalchemys_own_asyncio_tests_end_on_aiojob_as_without(
    loop: str, reports: dict[str, Report]
) -> None:
    plain, on_aiojob = reports["plain"], reports[loop]
    assert plain.totals["passed"] > 0, plain.output
    assert on_aiojob.totals == plain.totals, on_aiojob.output
    assert on_aiojob.outcomes == plain.outcomes, on_aiojob.output
    assert on_aiojob.exit_status == plain.exit_status, on_aiojob.output
    assert on_aiojob.counts["jobs"] > 0
    assert on_aiojob.counts["awaits"] > 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sqlalchemys_cancellation_tests_cancel_as_much_on_aiojob_as_without(
    loop: str, reports: dict[str, Report]
) -> None:
    plain, on_aiojob = reports["plain"].counts, reports[loop].counts
    assert plain["cancellations"] > 0
    for what in ("await points", "cancellations"):
        assert on_aiojob[what] == plain[what]
