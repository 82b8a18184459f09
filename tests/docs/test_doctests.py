"""Examples in the docstrings of the integrations; pytest collects those of `src` by itself."""

import doctest
import importlib
import importlib.util
from pathlib import Path

import pytest

# Each host has its environment; tests/verl looks at veRL's own part. What they share needs none of them.
HOSTS = {"trl": "trl", "verl": "verl"}
FOLDER = Path(__file__).resolve().parents[2] / "integrations"
MODULES = sorted(
    "interference_guard.integrations." + ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.name not in {"__init__.py", "__main__.py"}
    and importlib.util.find_spec(HOSTS.get(path.relative_to(FOLDER).parts[0], "torch"))
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
