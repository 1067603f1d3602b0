"""The package as a whole: its layers, its public names, its documentation."""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiojob

PACKAGE = Path(aiojob.__file__).parent
LAYERS = ["_errors", "_waitctx", "_fibre", "_job", "_wakeups", "_run", "__init__"]


def imports_of(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_layers_name_every_module() -> None:
    assert {path.stem for path in PACKAGE.glob("**/*.py")} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_module_imports_only_lower_layers(module: str) -> None:
    lower = {f".{name}" for name in LAYERS[: LAYERS.index(module)]}
    own = {name for name in imports_of(module) if name.startswith(".")}
    # What only type checkers import may point upwards.
    assert own - {"._job"} <= lower if module == "_fibre" else own <= lower


def test_only_the_fibre_module_imports_greenlet() -> None:
    assert [module for module in LAYERS if "greenlet" in imports_of(module)] == ["_fibre"]


def test_only_the_adapter_imports_asyncio() -> None:
    importers = [module for module in LAYERS if "asyncio" in imports_of(module)]
    assert importers == ["_wakeups", "_run"]


def test_no_module_imports_uvloop() -> None:
    assert not [module for module in LAYERS if "uvloop" in imports_of(module)]


@pytest.mark.parametrize("name", aiojob.__all__)
def test_public_name_is_documented(name: str) -> None:
    documented = getattr(aiojob, name)
    if name not in {"Callback", "Cleanup"}:  # aliases, documented in the source
        assert inspect.getdoc(documented)


@pytest.mark.parametrize("module", LAYERS)
def test_examples_in_docstrings_are_right(module: str) -> None:
    imported = importlib.import_module(f"aiojob.{module}") if module != "__init__" else aiojob
    names = {name: getattr(aiojob, name) for name in aiojob.__all__}
    failed, _ = doctest.testmod(imported, extraglobs=names)
    assert failed == 0


def test_greenlet_is_the_only_requirement() -> None:
    required = [line for line in importlib.metadata.requires("aiojob") or () if "extra" not in line]
    assert [line.partition(">")[0] for line in required] == ["greenlet"]


def test_first_program_of_the_readme_prints_what_it_says() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    program, output = re.findall(r"```(?:python|text)\n(.*?)```", readme.read_text(), re.DOTALL)[:2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == output
