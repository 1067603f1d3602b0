"""The soak, for a few seconds; run ``python -m benchmarks.soak`` for as long as you like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_soak_of_offload_finds_no_fault_and_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.soak", "--seconds", "2"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    assert "FAULT" not in done.stdout
    assert "calls ended" in done.stdout
