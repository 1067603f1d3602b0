"""The soaks, for a few seconds; run ``python -m benchmarks.soak`` for as long as you like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import PATIENCE, without_slow_steps


def test_soak_of_jobs_finds_no_fault_and_leaves_nothing() -> None:
    options = ["--seconds", "2", "--jobs", "1000"]
    assert "jobs ended" in soaked("benchmarks.soak", "jobs", *options)


def test_soak_of_offload_finds_no_fault_and_leaves_nothing() -> None:
    assert "calls ended" in soaked("benchmarks.soak", "offload", "--seconds", "2")


def test_soak_of_tls_finds_no_fault_and_leaves_nothing() -> None:
    assert "served byte by byte" in soaked("benchmarks.soak.tls", "--handshakes", "200")


def soaked(module: str, *options: str) -> str:
    """Run a soak, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *options],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert without_slow_steps(done.stderr) == ""
    assert done.returncode == 0, done.stdout
    assert "FAULT" not in done.stdout
    return done.stdout
