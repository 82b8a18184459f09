"""The core knows no trainer: it imports where only torch and safetensors are installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "src/interference_guard"
# The report and the command line have an extra of their own; all else is the core.
EXTRA = ("report", "commands")
MODULES = sorted(path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] not in EXTRA)
OPTIONAL = sorted(path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] in EXTRA)
ALLOWED = {"torch", "safetensors", "interference_guard", *sys.stdlib_module_names}
IMPORT_ALL = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"the core asked for {name}", name=name)

REFUSED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
# Runs saved models, and asks for this when it does; the test at the end imports it without.
RUNS_MODELS = {"interference_guard.analysis.measured": {"transformers"}}
PAGES = {"jinja2", "matplotlib", "packaging", "rich", "typer"}
HOSTS = ("trl", "transformers", "accelerate", "peft", "datasets", "verl", "ray", "deepspeed")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, at its top or inside a function."""
    names: set[str] = set()
    parts = module_name(path).split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_imports_only_torch_and_safetensors(path):
    allowed = ALLOWED | RUNS_MODELS.get(module_name(path), set())
    assert {name.partition(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", OPTIONAL, ids=module_name)
def test_report_and_commands_import_their_extra_and_no_host(path):
    assert {name.partition(".")[0] for name in imported(path)} <= ALLOWED | PAGES


@pytest.mark.parametrize("path", [*MODULES, *OPTIONAL], ids=module_name)
def test_module_does_not_reach_into_integrations(path):
    assert not [name for name in imported(path) if name.startswith("interference_guard.integrations")]


def test_core_imports_without_any_host():
    names = [module_name(path) for path in MODULES if path.name != "__main__.py"]
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join([*HOSTS, *PAGES]), *names],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
