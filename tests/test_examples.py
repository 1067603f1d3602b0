"""Each example runs as its own program, and prints what its docstring says."""

from __future__ import annotations

import ast
import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATIENCE, unavailable, without_slow_steps

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LOOP_NEUTRAL = [path for path in EXAMPLES if "asyncio.run(" in path.read_text()]

ON_UVLOOP = """
import asyncio, os, runpy, sys, uvloop

def new_event_loop():
    loops.append(uvloop.new_event_loop())
    return loops[-1]

loops = []
asyncio.events.new_event_loop = new_event_loop  # where asyncio.run() looks for it
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
assert loops, "the example did not run on uvloop"
"""


def expected_output(example: Path) -> str:
    """Return the block that ends the docstring, after the line "Expected output::"."""
    docstring = ast.get_docstring(ast.parse(example.read_text())) or ""
    _, _, block = docstring.partition("\nExpected output::\n\n")
    assert block, f"{example.name} does not say what it prints: end its docstring with the output"
    lines = block.splitlines()
    assert all(line.startswith("    ") or not line for line in lines), "the block ends it"
    return "".join(f"{line[4:]}\n" for line in lines)


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables that the example of the test needs."""
    variables = dict(os.environ)
    program = request.node.callspec.params["example"].read_text()
    if '"cc"' in program and shutil.which("cc") is None:
        unavailable("needs a C compiler: cc was not found")
    if "AIOJOB_POSTGRES" in program:
        pytest.importorskip("psycopg2")
        variables["AIOJOB_POSTGRES"] = request.getfixturevalue("postgres")
    return variables


def check(example: Path, environment: dict[str, str], *program: str) -> None:
    # Dask warns and logs on its own account, the more so in development mode and when it is slow.
    on_dask = "distributed" in example.read_text()
    if on_dask:
        environment.pop("PYTHONDEVMODE", None)
    run = subprocess.run(
        [sys.executable, *(() if on_dask else ("-W", "error", "-X", "dev")), *program],
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert on_dask or without_slow_steps(run.stderr) == ""
    # "..." stands for what depends on the machine.
    expected = expected_output(example)
    as_expected = doctest.OutputChecker().check_output(expected, run.stdout, doctest.ELLIPSIS)
    assert as_expected, run.stdout
    assert run.returncode == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_its_docstring_says(example: Path, environment: dict[str, str]) -> None:
    check(example, environment, str(example))


@pytest.mark.parametrize("example", LOOP_NEUTRAL, ids=lambda path: path.stem)
def test_example_prints_the_same_on_uvloop(example: Path, environment: dict[str, str]) -> None:
    check(example, environment, "-c", ON_UVLOOP, str(example))


def test_examples_of_both_kinds_are_found() -> None:
    assert EXAMPLES
    assert LOOP_NEUTRAL
