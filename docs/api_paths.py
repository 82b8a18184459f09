"""Lays the two source folders out as the one package they are installed as, for the page on the Python API."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"interference_guard": "src/interference_guard", "interference_guard/integrations": "integrations"}
# As long as mkdocs runs.
_tree = TemporaryDirectory()


@event_priority(100)
def on_config(config: Any) -> Any:
    """Let mkdocstrings read the package from there; links would not be followed."""
    for target, source in FOLDERS.items():
        shutil.copytree(
            ROOT / source,
            Path(_tree.name) / target,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    return config
