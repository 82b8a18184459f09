"""Every public name is listed once, can be imported, and says what it is."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import interference_guard
from interference_guard import Guard, errors

DOCS = Path(__file__).resolve().parents[2] / "docs"

PACKAGES = ("interference_guard", "interference_guard.integrations.trl")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_unique(package):
    names = importlib.import_module(package).__all__
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_name_imports_and_is_documented(package, name):
    thing = getattr(importlib.import_module(package), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing), f"{package}.{name} has no docstring"
        assert (thing.__module__ or "").startswith("interference_guard")


def test_every_error_that_a_docstring_names_is_public():
    found = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
    assert {"CheckpointError", "ReportError"} < found
    assert found <= set(interference_guard.__all__)


def test_the_page_on_the_api_shows_what_the_pages_use():
    api = DOCS / "api.md"
    hidden = {name for names in re.findall(r"!\^\((.*)\)\$", api.read_text()) for name in names.split("|")}
    pages = " ".join(page.read_text() for page in DOCS.rglob("*.md") if page != api)
    shown = {name for name in dir(Guard) if not name.startswith("_")} - hidden
    # Parts of the convention that torch's own state dicts follow.
    unused = {name for name in shown if not re.search(rf"\b{name}\b", pages)} - {"state_dict", "load_state_dict"}
    assert not unused, "helpers of the guard's own parts"


def test_the_version_is_the_package_s():
    if hasattr(interference_guard, "__version__"):
        from importlib.metadata import version

        assert interference_guard.__version__ == version("interference-guard")
