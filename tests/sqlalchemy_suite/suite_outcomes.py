"""A pytest plugin for SQLAlchemy's suite: writes down the outcome of every test.

The suite's own pytest loads this module; aiojob's tests do not. The file to write is named by
the environment variable ``AIOJOB_SUITE_REPORT``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

outcomes: dict[str, str] = {}
counts: Counter[str] = Counter()


def pytest_collection_finish() -> None:
    """Count how often the suite's cancellation tests cancel something."""
    from sqlalchemy.testing import cancellation

    await_points: Any = cancellation.AwaitPoints
    visit = await_points.__call__

    def visit_and_count(points: Any, awaitable: object) -> None:
        before = len(points.cancelled_at)
        visit(points, awaitable)
        counts["await points"] += 1
        counts["cancellations"] += len(points.cancelled_at) - before

    await_points.__call__ = visit_and_count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        outcomes[report.nodeid] = report.outcome


def pytest_unconfigure() -> None:
    report = {"outcomes": outcomes, "counts": counts}
    Path(os.environ["AIOJOB_SUITE_REPORT"]).write_text(json.dumps(report))
