"""`doctor`: what is installed, what is supported, what is wrong, and the command that mends it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from . import output

DISTRIBUTION = "interference-guard"
# The packages of each way to use the guard; the versions allowed are the distribution's own.
HOSTS = {"core": ("torch", "safetensors", "numpy"), "trl": ("trl", "transformers", "accelerate"),
         "verl": ("verl",), "report": ("jinja2", "matplotlib", "rich", "typer")}  # fmt: skip


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the environment; exit with 1 if something that is installed cannot work.

    Example: interference-guard doctor
    """
    allowed = _allowed()
    rows = [_row(host, name, allowed.get(name)) for host, names in HOSTS.items() for name in names]
    wrong = [row for row in rows if row["state"] == "wrong"]
    device = _device()
    if json:
        output.as_json(
            {"python": platform.python_version(), "platform": platform.platform(), "device": device,
             "packages": rows, "ok": not wrong}
        )  # fmt: skip
        raise typer.Exit(1 if wrong else 0)
    output.line(f"Python {platform.python_version()} on {platform.platform()}; device: {device}")
    cells = [[row["package"], row["host"], row["found"] or "-", row["allowed"], row["state"]] for row in rows]
    output.table("Packages", ["package", "for", "found", "supported", "state"], cells)
    for row in rows:
        if row["mend"]:
            output.line(f"{row['package']} ({row['host']}): {row['mend']}")
    raise typer.Exit(1 if wrong else 0)


def _allowed() -> dict[str, Requirement]:
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    # A later extra repeats a package with a wider range; the first names what the host needs.
    found: dict[str, Requirement] = {}
    for line in lines:
        requirement = Requirement(line)
        found.setdefault(requirement.name, requirement)
    return found


def _row(host: str, name: str, allowed: Requirement | None) -> dict[str, Any]:
    row: dict[str, Any] = {"package": name, "host": host, "allowed": str(allowed.specifier) if allowed else "any"}
    # What is asked for itself: the project is installed from a clone, wherever that lies.
    mend = f"pip install --upgrade '{name}{allowed.specifier if allowed else ''}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        state = "wrong" if host == "core" else "not installed"
        return {**row, "found": None, "state": state, "mend": mend if host == "core" else ""}
    # A local build tag, as +cpu, is no other version.
    fits = allowed is None or allowed.specifier.contains(found.partition("+")[0], prereleases=True)
    return {**row, "found": found, "state": "ok" if fits else "wrong", "mend": "" if fits else mend}


def _device() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.get_num_threads()} threads"
