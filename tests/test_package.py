"""The package as a whole: its layers, its public names, its documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import threading
from importlib.util import resolve_name
from pathlib import Path

import pytest

import aiojob

PACKAGE = Path(aiojob.__file__).parent
LAYERS = [
    "aiojob._errors",
    "aiojob._waitctx",
    "aiojob._fibre",
    "aiojob._stack",
    "aiojob._job",
    "aiojob._wakeups",
    "aiojob._locks",
    "aiojob._observe",
    "aiojob._run",
    "aiojob.engines._kernel",
    "aiojob.engines._pauses",
    "aiojob.engines._completion",
    "aiojob.engines._fds",
    "aiojob.engines._timers",
    "aiojob.engines._futures",
    "aiojob.engines._workers",
    "aiojob.engines._offload",
    "aiojob.engines",
    "aiojob._inspect",
    "aiojob.tls._libssl",
    "aiojob.tls._steps",
    "aiojob.tls._native",
    "aiojob.tls._callbacks",
    "aiojob.tls._handshake",
    "aiojob.tls._standins",
    "aiojob.tls._handover",
    "aiojob.tls._acceptor",
    "aiojob.tls._server",
    "aiojob.tls",
    "aiojob.tls.aiohttp",
    "aiojob.testing",
    "aiojob",
]


def source_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(module: str) -> set[str]:
    """Return the modules that a module imports, by their full names."""
    path = source_of(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(resolve_name("." * node.level + (node.module or ""), package))
    return names


def test_layers_name_every_module() -> None:
    assert sorted(module_of(path) for path in PACKAGE.glob("**/*.py")) == sorted(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_module_imports_only_lower_layers(module: str) -> None:
    lower = set(LAYERS[: LAYERS.index(module)])
    own = {name for name in imports_of(module) if name.partition(".")[0] == "aiojob"}
    # What only type checkers import may point upwards.
    assert own - {"aiojob._job"} <= lower if module == "aiojob._fibre" else own <= lower


def test_only_the_fibre_module_imports_greenlet() -> None:
    assert [module for module in LAYERS if "greenlet" in imports_of(module)] == ["aiojob._fibre"]


def test_only_the_adapter_imports_asyncio() -> None:
    importers = [module for module in LAYERS if "asyncio" in imports_of(module)]
    assert importers
    assert min(LAYERS.index(module) for module in importers) == LAYERS.index("aiojob._wakeups")


def test_no_module_imports_uvloop() -> None:
    assert not [module for module in LAYERS if "uvloop" in imports_of(module)]


@pytest.mark.parametrize("name", aiojob.__all__)
def test_public_name_is_documented(name: str) -> None:
    documented = getattr(aiojob, name)
    if name not in {"Callback", "Cleanup"}:  # aliases, documented in the source
        assert inspect.getdoc(documented)


@pytest.mark.parametrize("module", LAYERS)
def test_examples_in_docstrings_are_right(module: str) -> None:
    imported = importlib.import_module(module)
    names = {name: getattr(aiojob, name) for name in aiojob.__all__}
    threads = set(threading.enumerate())
    failed, _ = doctest.testmod(imported, extraglobs=names)
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon:
            thread.join()  # it has done its work, and is about to end
    assert failed == 0


def test_greenlet_is_the_only_requirement() -> None:
    required = [line for line in importlib.metadata.requires("aiojob") or () if "extra" not in line]
    assert [line.partition(">")[0] for line in required] == ["greenlet"]


def test_first_program_of_the_readme_prints_what_it_says() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    program, output = re.findall(r"```(?:python|text)\n(.*?)```", readme.read_text(), re.DOTALL)[:2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == output
