"""Runs in processes of their own, on one thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def pool(workers: int, runs_each: int | None = None) -> ProcessPoolExecutor:
    """Processes that load nothing from a hub; each ends after `runs_each` runs, None: it goes on."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=runs_each
    )


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
