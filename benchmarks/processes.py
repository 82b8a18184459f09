"""Runs in processes of their own, on one thread each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def pool(workers: int, runs_each: int | None = None) -> ProcessPoolExecutor:
    """Processes that load nothing from a hub; each ends after `runs_each` runs, None: it goes on."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    # Python 3.10 does not know that limit: processes go on there, and keep what a run left in memory.
    ends = {} if runs_each is None or sys.version_info < (3, 11) else {"max_tasks_per_child": runs_each}
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), **ends)


def finished(
    call: Callable[..., dict[str, Any]],
    jobs: Iterable[tuple[Any, ...]],
    workers: int,
    runs_each: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Results of ``call(*job)`` as they come."""
    with pool(workers, runs_each) as running:
        for done in as_completed([running.submit(call, *job) for job in jobs]):
            yield done.result()
