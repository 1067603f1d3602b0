"""What tests call that need more than Python."""

from __future__ import annotations

import os
import re
from typing import Final, NoReturn

import pytest

PATIENCE: Final = 240
"""Seconds that a program may take which a test runs; much more than on a busy machine."""

SLOW_STEP = re.compile(r"^Executing <.*> took [\d.]+ seconds\n", re.MULTILINE)


def unavailable(reason: str) -> NoReturn:
    """Skip what cannot be tested here; in CI, where everything is to be there, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def without_slow_steps(stderr: str) -> str:
    """Leave out asyncio's reports, in debug mode, on steps that took long on this machine."""
    return SLOW_STEP.sub("", stderr)
