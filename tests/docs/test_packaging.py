"""The archive and the wheel hold the whole package, core and integrations, and the wheel imports alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "interference_guard": ROOT / "src/interference_guard",
    "interference_guard.integrations": ROOT / "integrations",
}
IMPORTS = """
import importlib, sys
target, modules = sys.argv[1], sys.argv[2:]
sys.path.insert(0, target)
for name in modules:
    found = importlib.import_module(name).__file__
    assert found.startswith(target), f"{name} came from {found}"
"""


def source_files() -> dict[str, Path]:
    """Every Python file of the package by the path it has once installed."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            files[f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel built from that archive."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert {str(Path(name).parent).replace(os.sep, ".") for name in source_files()} == listed


def test_wheel_holds_the_sources_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    data = {
        "interference_guard/py.typed",
        "interference_guard/integrations/verl/conf/guard/interference_guard.yaml",
        "interference_guard/report/page.html",
    }
    assert names == {*source_files(), *data}


def test_wheel_carries_the_licence(built):
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(built[1]).namelist())


def test_archive_can_be_built_again(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "integrations/__init__.py"} <= names


def test_wheel_installs_and_imports(built, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path, built[1]],
        check=True,
        capture_output=True,
        timeout=300,
    )
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in source_files()]
    # veRL has an environment of its own, in which tests/verl imports its part.
    modules = sorted(name for name in names if not name.endswith("__main__") and ".verl" not in name)
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(tmp_path), *modules],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
