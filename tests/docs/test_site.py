"""The pages name settings and metrics that exist, and the site builds without a warning."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interference_guard import GuardConfig

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS = sorted(page for page in (ROOT / "docs/concepts").glob("*.md") if page.stem != "index")
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


def test_site_builds(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "index.html").exists()
