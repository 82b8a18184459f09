"""What a result was measured with: versions, hardware and commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from interference_guard.files import replacing

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "verl",
    "ray",
    "reasoning-gym",
    "interference-guard",
)


def describe() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
        check=False,
    )
    return found.stdout.strip() or None


def maker(processor: str) -> str:
    """The first word of a processor's name in lower case, such as ``amd``: makers round differently."""
    found = re.match("[A-Za-z0-9]+", processor)
    return found.group().lower() if found else "unknown"


def here(name: str, folder: Path = RESULTS) -> str:
    """The name under which this machine keeps the runs of `name`.

    The same seed is another run on a processor of another maker, so runs of two of them never share a file: the
    maker's name is added where the file there is was made by another one's.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return name
    made_by = maker(json.loads(path.read_text(encoding="utf-8"))["made_with"]["processor"])
    own = maker(_processor())
    return name if made_by == own else f"{name}_{own}"


def write(name: str, payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result with its provenance into `benchmarks/results/`, or another folder; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    # A benchmark that was stopped goes on from what is there.
    with replacing(path) as new:
        new.write_text(json.dumps({"made_with": describe(), **payload}, indent=1) + "\n", encoding="utf-8")
    return path
