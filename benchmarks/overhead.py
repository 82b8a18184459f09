"""The guard's share of the training time on the bed, by part, for 0 to 3 protected domains.

    python -m benchmarks.overhead [--seeds 0 1 2]
    python -m benchmarks.overhead --model qwen3-4b      at a large model's shapes; see `shapes.py`

One guarded run of four domains a seed: phase k trains with k domains protected, so each phase is measured
against its own steps in the same run. Writes `benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from .provenance import write

DOMAINS = 4


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", help="measure at the shapes of this model instead")
    parser.add_argument("--layers", type=int, default=4, help="with --model: layers to build")
    parser.add_argument("--device", default="cpu", help="with --model: where")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(options.threads)
    if options.model is not None:
        from . import shapes

        if options.model not in shapes.MODELS or options.layers < 1:
            parser.error(f"--model must be one of {sorted(shapes.MODELS)} and --layers 1 or more.")
        shapes.measure(options.model, options.layers, torch.device(options.device))
        return
    from rich.console import Console
    from rich.table import Table

    from .bed.domains import ORDER
    from .bed.run import Run
    from .bed.training import train
    from .forgetting import RATE

    seeds: dict[int, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        run = Run("guarded", RATE, seed, ORDER[:DOMAINS])
        seeds[seed] = train(run, every=run.steps).phases
        print(f"seed {seed} done", flush=True)
    rows = []
    for protected in range(DOMAINS):
        phases = [phases[protected] for phases in seeds.values()]
        steps = Run.steps * len(phases)
        step = sum(phase["seconds"] for phase in phases) / steps
        parts = {name: sum(phase["guard"][name] for phase in phases) / steps for name in phases[0]["guard"]}
        rows.append(
            {
                "protected": protected,
                "step_seconds": step,
                "guard_seconds_by_part": parts,
                "share": sum(parts.values()) / step,
            }
        )
    path = write("overhead", {"rows": rows, "phases": seeds})
    table = Table("protected", "ms a step", *rows[0]["guard_seconds_by_part"], "share", title="Guard, ms a step")
    for row in rows:
        parts = [f"{1e3 * value:.2f}" for value in row["guard_seconds_by_part"].values()]
        table.add_row(str(row["protected"]), f"{1e3 * row['step_seconds']:.0f}", *parts, f"{row['share']:.1%}")
    Console().print(table)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
