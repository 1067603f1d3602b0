"""All rows, by module; each module's are measured in a process of their own.

``python -m benchmarks.suites SUITE LOOP EFFORT GROUP...`` is that process. It prints a line of JSON
before each row, with its title, and one after it, with its result or its error.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

from . import jobs, offload, scale, tls
from .measure import FULL, QUICK, SMOKE, Row, Run

SUITES: dict[str, Callable[[], Iterator[Row]]] = {
    "jobs": jobs.rows,
    "offload": offload.rows,
    "scale": scale.rows,
    "tls": tls.rows,
}
EFFORTS = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def rows_of(suite: str, loop: str, groups: Iterable[str]) -> list[Row]:
    return [row for row in SUITES[suite]() if loop in row.loops and row.group in groups]


def main(suite: str, loop: str, effort: str, *groups: str) -> None:
    run = Run(loop, EFFORTS[effort])
    for row in rows_of(suite, loop, groups):
        print(json.dumps({"begun": row.name, "at_a_time": row.at_a_time}), flush=True)
        try:
            ended: dict[str, object] = {"result": row.result(run).as_json()}
        except Exception:
            ended = {"error": traceback.format_exc()}
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
