"""What each method costs: its steps against those of a plain run, taken in turns, and the bytes it keeps.

    python -m benchmarks.rivals.cost [--bed digits] [--seeds 0 1]

The two runs of a pair take a step each in turn, so that a machine which is slow for a while is slow for both. A
core for each pair; leave the machine alone meanwhile. Plain training against itself is among the methods: how far
its ratio is from 1 says how far to trust the others. Strengths are the tuned ones of
`benchmarks/results/rivals_<bed>.json`. Phases have half their length, so what a method does once a phase weighs
twice. Writes `benchmarks/results/rivals_<bed>_cost.json` after every pair; all of them take about 25 minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..processes import finished
from ..provenance import RESULTS, write
from ..tables import show
from .registry import RIVALS
from .tuning import SEEDS
from .turns import Turns

# Weights hardly move, so all methods sample answers of the same length: one that teaches a policy to stop early
# would seem cheap.
RATE = 1e-6
# Nobody asks what these runs learn.
TESTS = 16
# A pair that takes longer has lost its turn.
MOST_SECONDS = 1200.0


def start(bed: str, seed: int, folder: str) -> dict[str, Any]:
    """Make a seed's warm start, which takes as long as a run, once for all."""
    from ..bed.beds import BEDS
    from ..bed.training import share_start

    share_start(BEDS[bed].orders[0], seed, Path(folder) / f"{seed}.pt", save=True, bed=BEDS[bed])
    return {}


def one(folder: str, bed: str, seed: int, name: str, strength: Any, turns: Turns) -> dict[str, float]:
    """One run of a pair.

    Args:
        folder: Holds the warm start.
        bed: Name of the bed.
        seed: Of weights, data and sampling.
        name: Of the method.
        strength: Its strength.
        turns: When it may go on.

    Returns:
        The seconds of its steps, the bytes the method keeps at the end, and the bytes of the weights.
    """
    import torch

    torch.set_num_threads(1)
    from ..bed.beds import BEDS
    from ..bed.method import tensor_bytes
    from ..bed.run import Run
    from ..bed.training import prepare, share_start, train

    where = BEDS[bed]
    steps = where.steps // 2
    settings = dict(RIVALS[name].settings(strength))
    run = Run(name, RATE, seed, where.orders[0], steps, settings, bed=bed, strength=strength, tests=TESTS)
    share_start(run.order, seed, Path(folder) / f"{seed}.pt", save=False, bed=where)
    student, _ = prepare(run.order, seed, bed=where)
    weights = tensor_bytes(list(student.parameters()))
    method = RIVALS[name].method()(run)
    turns.join(method)
    try:
        found = train(run, every=steps, method=method)
    finally:
        turns.leave()
    return {"seconds": turns.seconds, "bytes": found.method_bytes, "weights_bytes": weights}


def _beside(connection: Any, folder: str, bed: str, seed: int, turns: Turns) -> None:
    """The plain run of a pair, in a process of its own."""
    connection.send(one(folder, bed, seed, "plain", None, turns))


def pair(folder: str, bed: str, seed: int, name: str, strength: Any) -> dict[str, Any]:
    """A method and plain training in turns on one core; called in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[seed % len(cores)]})
    context = multiprocessing.get_context("spawn")
    mine, theirs = Turns.pair(context, MOST_SECONDS)
    here, there = context.Pipe(duplex=False)
    other = context.Process(target=_beside, args=(there, folder, bed, seed, theirs))
    other.start()
    found = one(folder, bed, seed, name, strength, mine)
    plain = here.recv()
    other.join()
    times = {"seconds": found["seconds"], "plain_seconds": plain["seconds"]}
    parts = {"ratio": found["seconds"] / plain["seconds"], "bytes": found["bytes"] / found["weights_bytes"]}
    return {"seed": seed, "method": name, **times, **parts}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method the mean of its ratios, the ratios by seed, and the bytes it keeps over the weights'."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["method"] for run in runs):
        group = [run for run in runs if run["method"] == name]
        ratios = [run["ratio"] for run in group]
        rows[name] = {"ratio": fmean(ratios), "ratios": ratios, "bytes": max(run["bytes"] for run in group)}
    return rows


HEAD = ("method", "time over plain", "by seed", "memory, in sizes of the weights")


def cells(methods: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the documentation's table, under `HEAD`; the cheapest first, after the control."""
    order = sorted(methods, key=lambda name: (name != "plain", methods[name]["ratio"]))
    return [
        (
            "plain, the control" if name == "plain" else name,
            f"{methods[name]['ratio']:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in methods[name]["ratios"]),
            f"{methods[name]['bytes']:.1f}",
        )
        for name in order
    ]


def main() -> None:
    """All pairs, one for each seed at a time."""
    from ..bed.beds import BEDS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS[:2]))
    options = parser.parse_args()
    path = RESULTS / f"rivals_{options.bed}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["summary"]["rows"]
    chosen = {row["method"]: row["strength"] for row in rows if row["tuned"]}
    names = [name for name in RIVALS if name in chosen]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds
        list(finished(start, [(options.bed, seed, folder) for seed in seeds], len(seeds), 1))
        jobs = [(folder, options.bed, seed, name, chosen[name]) for name in names for seed in seeds]
        for found in finished(pair, jobs, len(seeds), 1):
            runs.append(found)
            runs.sort(key=lambda run: (names.index(run["method"]), run["seed"]))
            write(f"rivals_{options.bed}_cost", {"methods": summarise(runs), "runs": runs})
    show(f"{options.bed}: time and memory", HEAD, cells(summarise(runs)))


if __name__ == "__main__":
    main()
