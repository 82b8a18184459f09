"""What each method costs: its time against a plain run that goes on beside it, and the bytes it keeps.

    python -m benchmarks.rivals.cost [--bed digits] [--seeds 0 1 2]

Both runs of a pair are made at once, each on a core of its own, so that a machine which is slow for a while is
slow for both. Leave it alone meanwhile. Plain training against itself is among the methods: how far its ratio is
from 1 says how far to trust the others. Strengths are the tuned ones of `benchmarks/results/rivals_<bed>.json`.
Phases have half their length, so what a method does once a phase weighs twice. Writes
`benchmarks/results/rivals_<bed>_cost.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from statistics import fmean
from typing import Any

from ..processes import pool
from ..provenance import RESULTS, write
from ..tables import show
from .registry import RIVALS
from .tuning import SEEDS

# Weights hardly move, so all methods sample answers of the same length: one that teaches a policy to stop early
# would seem cheap.
RATE = 1e-6
# Nobody asks what these runs learn.
TESTS = 16
# Steps of a domain, as a part of the bed's: what is measured, and what keeps a core busy until the other is done.
MEASURED, FILLER = 2, 20


def one(bed: str, seed: int, name: str, strength: Any, part: int = MEASURED) -> dict[str, Any]:
    """One run.

    Args:
        bed: Name of the bed.
        seed: Of weights, data and sampling.
        name: Of the method.
        strength: Its strength.
        part: The bed's steps for a domain are divided by it.

    Returns:
        Its seconds, the bytes the method keeps at the end, and the bytes of the weights.
    """
    import torch

    torch.set_num_threads(1)
    from ..bed.beds import BEDS
    from ..bed.method import tensor_bytes
    from ..bed.run import Run
    from ..bed.training import prepare, train

    where = BEDS[bed]
    steps = where.steps // part
    settings = dict(RIVALS[name].settings(strength))
    run = Run(name, RATE, seed, where.orders[0], steps, settings, bed=bed, strength=strength, tests=TESTS)
    student, _ = prepare(run.order, seed, bed=where)
    weights = tensor_bytes(list(student.parameters()))
    found = train(run, every=steps, method=RIVALS[name].method()(run))
    return {"seconds": found.seconds, "bytes": found.method_bytes, "weights_bytes": weights}


def pair(running: ProcessPoolExecutor, bed: str, seed: int, name: str, strength: Any) -> dict[str, Any]:
    """A method and plain training at the same time; neither core is idle before both have ended."""
    own = running.submit(one, bed, seed, name, strength)
    plain = running.submit(one, bed, seed, "plain", None)
    while not (own.done() and plain.done()):
        wait((own, plain), return_when=FIRST_COMPLETED)
        if not (own.done() and plain.done()):
            running.submit(one, bed, seed, "plain", None, FILLER).result()
    found = own.result()
    times = {"seconds": found["seconds"], "plain_seconds": plain.result()["seconds"]}
    parts = {"ratio": times["seconds"] / times["plain_seconds"], "bytes": found["bytes"] / found["weights_bytes"]}
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
    """One pair after the other."""
    from ..bed.beds import BEDS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    path = RESULTS / f"rivals_{options.bed}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["summary"]["rows"]
    chosen = {row["method"]: row["strength"] for row in rows if row["tuned"]}
    runs: list[dict[str, Any]] = []
    with pool(2) as running:
        # The first run of a process loads what all others find loaded.
        wait([running.submit(one, options.bed, options.seeds[0], "plain", None, FILLER) for _ in range(2)])
        for seed in options.seeds:
            for name in RIVALS:
                if name in chosen:
                    runs.append(pair(running, options.bed, seed, name, chosen[name]))
                    write(f"rivals_{options.bed}_cost", {"methods": summarise(runs), "runs": runs})
                    print(f"seed {seed}, {name}: {runs[-1]['ratio']:.3f}", flush=True)
    show(f"{options.bed}: time and memory", HEAD, cells(summarise(runs)))


if __name__ == "__main__":
    main()
