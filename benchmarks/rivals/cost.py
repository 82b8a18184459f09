"""What each method costs: its time against plain runs just before and after it, and the bytes it keeps.

    python -m benchmarks.rivals.cost [--bed digits]

Run it on a quiet machine. Rates and strengths are the tuned ones of `benchmarks/results/rivals_<bed>.json`;
phases have half their length. Writes `benchmarks/results/rivals_<bed>_cost.json`.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median

from ..provenance import RESULTS, write
from .registry import RIVALS


def main() -> None:
    """Run all, one after the other in one process."""
    from ..bed.beds import BEDS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    from ..bed.method import tensor_bytes
    from ..bed.run import Run
    from ..bed.training import prepare, train

    bed = BEDS[options.bed]
    rows = json.loads((RESULTS / f"rivals_{bed.name}.json").read_text(encoding="utf-8"))["summary"]["rows"]
    chosen = {row["method"]: (row["rate"], row["strength"]) for row in rows if row["tuned"]}
    student, _ = prepare(bed.orders[0], options.seed, bed=bed)
    weights = tensor_bytes(list(student.parameters()))

    def seconds(name: str) -> tuple[float, int]:
        rate, strength = chosen[name]
        settings = dict(RIVALS[name].settings(strength))
        steps = bed.steps // 2
        run = Run(name, rate, options.seed, bed.orders[0], steps, settings, bed=bed.name, strength=strength)
        found = train(run, every=steps, method=RIVALS[name].method()(run))
        return found.seconds, found.method_bytes

    ratios: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    before, _ = seconds("plain")
    for _ in range(options.repeats):
        for name in [name for name in RIVALS if name in chosen and name != "plain"]:
            own, kept[name] = seconds(name)
            after, _ = seconds("plain")
            ratios.setdefault(name, []).append(own / (0.5 * (before + after)))
            before = after
            print(f"{name:24} {ratios[name][-1]:.3f} x the time", flush=True)
    methods = {
        name: {"ratio": median(values), "ratios": values, "bytes": kept[name] / weights}
        for name, values in ratios.items()
    }
    path = write(f"rivals_{bed.name}_cost", {"weights_bytes": weights, "methods": methods})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
