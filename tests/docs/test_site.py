"""The pages name settings and metrics that exist, and the site builds without a warning."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from interference_guard import Guard, GuardConfig
from interference_guard.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS = sorted(page for page in (ROOT / "docs/concepts").glob("*.md") if page.stem != "index")
API = (
    "interference_guard",
    "interference_guard.integrations.trl",
    "interference_guard.analysis",
    "interference_guard.history",
)
SETTINGS = {field.name for field in dataclasses.fields(GuardConfig)}


def settings_of(page: Path) -> set[str]:
    """First column of the table under the heading Settings."""
    section = re.search(r"^## Settings\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    return set(re.findall(r"^\| `(\w+)`", section[1], re.M)) if section else set()


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_page_is_named_like_a_module(page):
    assert (ROOT / f"src/interference_guard/{page.stem}.py").exists()


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_settings_of_a_page_exist(page):
    assert settings_of(page) <= SETTINGS


def test_every_setting_is_described_once():
    described = [name for page in [*CONCEPTS, ROOT / "docs/trl.md"] for name in settings_of(page)]
    assert sorted(described) == sorted(SETTINGS)


@pytest.mark.parametrize("page", [*CONCEPTS, ROOT / "docs/trl.md"], ids=lambda page: page.stem)
def test_defaults_of_a_page_are_those_of_the_code(page):
    defaults = {field.name: field.default for field in dataclasses.fields(GuardConfig)}
    for name, cell in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page.read_text(), re.M):
        if name not in settings_of(page):
            continue
        if (literal := re.fullmatch(r"`([^`]+)`", cell)) is None:
            # Where it follows from another setting, the page says how.
            assert defaults[name] is None
        else:
            assert ast.literal_eval(literal[1]) == defaults[name]


def test_every_metric_is_described_once_and_in_order():
    page = (ROOT / "docs/metrics.md").read_text()
    assert re.findall(r"^\| `(guard/\S+)` \|", page, re.M) == list(METRICS)
    each = sum("<domain>" in name for name in METRICS)
    pairs = sum("<a>" in name for name in METRICS)
    assert (each, pairs, len(METRICS) - each - pairs) == (14, 1, 7)
    assert "fourteen for each, one for each pair, and seven" in page


def test_every_field_of_the_file_is_described():
    from interference_guard.integrations.trl.grpo import DomainArguments, DomainSettings

    page = (ROOT / "docs/trl.md").read_text()
    section = re.search(r"^## From a YAML file\n(.*?)^## ", page, re.M | re.S)[1]
    run, domain = section.split("| field of a domain |")
    for table, settings in ((run, DomainArguments), (domain, DomainSettings)):
        rows = dict(re.findall(r"^\| `(\w+)`(?: [^|]*)? \| ([^|]*) ?\|", table, re.M))
        rows.pop("guard_", None)
        assert list(rows) == [field.name for field in dataclasses.fields(settings)]
        for field in dataclasses.fields(settings):
            cell = rows[field.name].strip()
            if literal := re.fullmatch(r"`([^`]+)`", cell):
                assert yaml.safe_load(literal[1]) == field.default
            else:
                no_default = field.default is dataclasses.MISSING
                assert (cell in ("needed", "")) == no_default
                assert no_default or field.default is None


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_site_builds(site):
    assert (site / "index.html").exists()
    assert not list(site.rglob("*.py"))


def test_the_api_holds_public_names_and_no_internals(site):
    found = set(re.findall(r'<h\d id="(interference_guard[^"]*)"', (site / "api.html").read_text()))
    for package in API:
        names = importlib.import_module(package).__all__
        constants = {"HISTORY"}
        assert {f"{package}.{name}" for name in names if name not in constants} <= found
    assert {"interference_guard.Guard.probe", "interference_guard.history.History.report"} <= found
    for name in ("adopt", "replace_domains", "forget_sets", "new_state", "warn_mixed"):
        assert hasattr(Guard, name)
        assert f"interference_guard.Guard.{name}" not in found
