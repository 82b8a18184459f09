"""How far projected weights lie outside the trust region in bf16, by learning rate and rounding.

    python -m benchmarks.precision

Two matrices of width 1,024 in a residual stream, one domain whose gradients fill 16 directions, then 100 guarded
steps of AdamW on another one whose gradients have a constant part, at the sizes of weights and rates of a real
run. The radius is what the first 5 or 20 of these steps reach in fp32; no measurement moves it. Writes
`benchmarks/results/precision.json`; takes five minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import warnings
from statistics import fmean
from typing import Any

import torch
from torch import nn

from interference_guard import Guard, GuardConfig, GuardedOptimizer

from .provenance import write

WIDTH, UNITS, DIRECTIONS = 1024, 512, 16
OWN, STEPS, LAST = 12, 100, 20
# Steps whose displacement the radius allows.
REACHES = (5, 20)
SCALE, DRIFT = 0.02, 0.3
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
KINDS: dict[str, tuple[torch.dtype, bool]] = {
    "fp32": (torch.float32, True),
    "bf16, to the nearest": (torch.bfloat16, False),
    "bf16, at random": (torch.bfloat16, True),
}


class Pair(nn.Module):
    """One matrix that reads from the stream and one that writes to it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Linear(WIDTH, UNITS, bias=False)
        self.down_proj = nn.Linear(UNITS, WIDTH, bias=False)
        for module in (self.up_proj, self.down_proj):
            with torch.no_grad():
                module.weight.copy_(SCALE * torch.randn(module.weight.shape, generator=generator))


def terms(
    dtype: torch.dtype, rate: float, seed: int, radius: float | None, stochastic: bool = True
) -> list[float]:
    """The subspace term after every step of the other domain; without a radius nothing is projected."""
    model = Pair().to(dtype)
    config = GuardConfig(project=radius is not None, seed=seed, stochastic_rounding=stochastic)
    guard = Guard(model, config)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), guard)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    basis = torch.linalg.qr(torch.randn(WIDTH, DIRECTIONS, generator=generator)).Q
    drift = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = []
    for step in range(OWN + STEPS):
        own = step < OWN
        for name, parameter in model.named_parameters():
            if own:
                rows = torch.randn(UNITS, DIRECTIONS, generator=generator) @ basis.T
                gradient = rows if name.startswith("up") else rows.T
            else:
                gradient = torch.randn(shapes[name], generator=generator) + DRIFT * drift[name]
            parameter.grad = gradient.to(dtype)
        # The domain's own steps only fill its curvature: both kinds must start from the same weights.
        optimizer.param_groups[0]["lr"] = 0.0 if own else rate
        with guard.domain("own" if own else "other"):
            optimizer.step()
        if not own:
            found.append(guard.raw_parts(["own"])["own"].inside)
            if radius is not None:
                # As measurements would have set it by now.
                guard.domains["own"].region.radius = radius
                guard.domains["own"].follow_region()
    return found


def excess(kind: str, rate: float, seed: int, reach: int) -> float:
    """Mean excess over the radius in the last steps: the subspace term over the radius, minus 1."""
    radius = terms(torch.float32, rate, seed, None)[reach - 1]
    dtype, stochastic = KINDS[kind]
    return fmean(term / radius - 1 for term in terms(dtype, rate, seed, radius, stochastic)[-LAST:])


def main() -> None:
    """Run all and print the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    # There is no policy here whose completions could be retained.
    warnings.filterwarnings("ignore", message="No completions of domain")
    rows: list[dict[str, Any]] = []
    table = Table("radius, steps", "learning rate", *KINDS, title="Excess over the radius")
    for reach, rate in itertools.product(REACHES, RATES):
        row: dict[str, Any] = {"reach": reach, "rate": rate}
        for kind in KINDS:
            seeds = [excess(kind, rate, seed, reach) for seed in options.seeds]
            row[kind] = {"mean": fmean(seeds), "seeds": seeds}
        rows.append(row)
        table.add_row(str(reach), f"{rate:g}", *(f"{row[kind]['mean']:.3f}" for kind in KINDS))
        path = write("precision", {"rows": rows})
    Console().print(table)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
