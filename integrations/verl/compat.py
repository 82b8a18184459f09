"""Which veRL the guard works with, and what is in the way of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys

from interference_guard.errors import HostError

# The oldest tested of each release.
TESTED = ((0, 7, 1), (0, 8, 0), (0, 9, 0))


def check_version(version: str | None = None) -> None:
    """Refuse a veRL whose seams were not tested.

    Args:
        version: The version; the installed one by default.

    Raises:
        HostError: If it is another one than 0.7.1, 0.8 or 0.9.
    """
    version = _installed("verl") if version is None else version
    if version is None:
        raise HostError(
            "This veRL is not installed as a package, so nothing says which release it is. Install it, from its "
            "source tree with `pip install -e .`."
        )
    found = tuple(int(part) for part in [*re.findall(r"\d+", version), "0", "0"][:3])
    if not any(found[:2] == oldest[:2] and found >= oldest for oldest in TESTED):
        raise HostError(
            f"This is veRL {version}; the guard was tested with 0.9, and its engine with 0.8 and 0.7.1. The "
            'seams it needs move between releases. Install a tested one: pip install "interference-guard[verl]".'
        )


def check_workers() -> None:
    """Refuse the older workers of veRL 0.7, which build no engine that could be guarded.

    Raises:
        HostError: If this process is one of theirs.
    """
    if "verl.workers.fsdp_workers" in sys.modules:
        raise HostError(
            "This is a worker of verl.workers.fsdp_workers, which builds no engine, so nothing would be guarded. "
            "Set trainer.use_legacy_worker_impl=disable."
        )


def hide_trl() -> bool:
    """Keep veRL 0.9.1 from patching a class that TRL no longer has; returns whether TRL was hidden.

    Its `apply_monkey_patch` imports `AutoModelForCausalLMWithValueHead` wherever TRL is installed, and fails
    with TRL 1.14 and later, which have no such class. Only for this process, and only if nobody uses TRL in it.
    Delete once veRL asks for the class and not for the package.
    """
    if "trl" in sys.modules or importlib.util.find_spec("trl") is None:
        return False
    # A folder of that name on the path is no package, but looks like one.
    found = _installed("trl")
    if found is not None and int(found.split(".")[0]) < 1:
        return False
    # find_spec() of a module that is None here says that there is none.
    sys.modules["trl"] = None  # type: ignore[assignment]
    return True


def _installed(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
