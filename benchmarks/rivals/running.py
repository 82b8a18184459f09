"""One run of a method, in a process of its own."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bed.method import Method
from ..bed.run import Run
from .registry import RIVALS


def work(run: Run, starts: str) -> dict[str, Any]:
    """Run it on one thread.

    Args:
        run: What to run; its method is the name of a rival.
        starts: A folder in which runs share their warm starts.

    Returns:
        The result as a mapping, with its means, and without what a table needs nothing of.
    """
    return result_of(run, RIVALS[run.method].method()(run), starts)


def result_of(run: Run, method: Method, starts: str, pairs: bool = False) -> dict[str, Any]:
    """The same with a method that no name is known for; the pairs of a prediction are kept on demand."""
    import torch

    torch.set_num_threads(1)
    from ..bed.beds import named
    from ..bed.training import share_start, train

    bed = named(run.bed)
    path = Path(starts) / f"{run.bed}-{run.seed}.pt"
    if not path.is_file():
        own = path.with_suffix(f".{os.getpid()}")
        share_start(run.order, run.seed, own, save=True, bed=bed)
        own.replace(path)
    share_start(run.order, run.seed, path, save=False, bed=bed)
    result = train(run, every=run.steps, method=method)
    kept = asdict(result)
    for name in ("metrics", "phases", "guard_seconds", *(() if pairs else ("pairs",))):
        del kept[name]
    last = result.own[run.order[-1]]
    return {**kept, "average": result.average, "forgetting": result.forgetting, "last": last}
