"""What each method costs: its time against plain runs just before and after it, and the bytes it keeps.

    python -m benchmarks.rivals.cost [--bed digits] [--seeds 0 1] [--workers 2]

Leave the machine alone meanwhile. Strengths are the tuned ones of `benchmarks/results/rivals_<bed>.json`. Phases
have half their length, so what a method does once a phase weighs twice. Writes
`benchmarks/results/rivals_<bed>_cost.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..processes import finished
from ..provenance import RESULTS, write
from .registry import RIVALS
from .tuning import SEEDS

# Weights hardly move, so all methods sample answers of the same length: one that teaches a policy to stop early
# would seem cheap.
RATE = 1e-6
# Nobody asks what these runs learn.
TESTS = 16


def one(bed: str, seed: int, strengths: dict[str, Any]) -> dict[str, Any]:
    """All methods of one seed, one after the other, and a plain run between any two.

    Args:
        bed: Name of the bed.
        seed: Of weights, data and sampling.
        strengths: The strength of each method; a plain run is none of them.

    Returns:
        Its seed, the bytes of the weights, and for each method its time over that of plain training and the bytes
        that it keeps at the end of a run.
    """
    import torch

    torch.set_num_threads(1)
    from ..bed.beds import BEDS
    from ..bed.method import tensor_bytes
    from ..bed.run import Run
    from ..bed.training import prepare, train

    where = BEDS[bed]
    steps = where.steps // 2

    def timed(name: str, strength: Any = None) -> tuple[float, int]:
        settings = dict(RIVALS[name].settings(strength))
        how = {"bed": bed, "strength": strength, "tests": TESTS}
        run = Run(name, RATE, seed, where.orders[0], steps, settings, **how)
        found = train(run, every=steps, method=RIVALS[name].method()(run))
        return found.seconds, found.method_bytes

    student, _ = prepare(where.orders[0], seed, bed=where)
    weights = tensor_bytes(list(student.parameters()))
    methods = {}
    # The first run of a process loads what all others find loaded.
    timed("plain")
    before, _ = timed("plain")
    for name, strength in strengths.items():
        own, kept = timed(name, strength)
        after, _ = timed("plain")
        methods[name] = {"ratio": own / (0.5 * (before + after)), "bytes": kept}
        before = after
    return {"seed": seed, "weights_bytes": weights, "methods": methods}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method the mean of its ratios, the ratios by seed, and the bytes it keeps over the weights'."""
    rows = {}
    for name in runs[0]["methods"]:
        ratios = [run["methods"][name]["ratio"] for run in runs]
        kept = max(run["methods"][name]["bytes"] / run["weights_bytes"] for run in runs)
        rows[name] = {"ratio": fmean(ratios), "ratios": ratios, "bytes": kept}
    return rows


def main() -> None:
    """A process for each seed."""
    from ..bed.beds import BEDS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS[:2]))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    path = RESULTS / f"rivals_{options.bed}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["summary"]["rows"]
    chosen = {row["method"]: row["strength"] for row in rows if row["tuned"]}
    strengths = {name: chosen[name] for name in RIVALS if name in chosen and name != "plain"}
    jobs = [(options.bed, seed, strengths) for seed in options.seeds]
    runs = sorted(finished(one, jobs, options.workers, 1), key=lambda run: run["seed"])
    path = write(f"rivals_{options.bed}_cost", {"methods": summarise(runs), "runs": runs})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
