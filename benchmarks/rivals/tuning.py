"""Which runs a method still needs: its rate and strength on one seed, then the runs that are compared.

A pure function of the runs there are, so that a benchmark can stop and go on anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..bed.beds import Bed
from ..bed.run import Run
from .registry import Rival

# Each strength climbs from the third rate to where both neighbours are worse.
RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
FIRST = 3
# Plain training is compared at these, whatever its best one is.
SHOWN = (1e-4, 2e-4, 3e-4, 5e-4)
TUNING_SEED = 3
SEEDS = (0, 1, 2)
TESTS = 512


def key(run: dict[str, Any]) -> str:
    """What tells one run from another; `run` is a `Run` as a mapping."""
    return json.dumps(run, sort_keys=True)


def tuning_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that methods are tuned on and no table compares."""
    return [run for run in runs if run["run"]["seed"] == TUNING_SEED]


class Tuning:
    """One method on one bed.

    Args:
        name: Of the method.
        rival: The method.
        bed: The bed.
        found: Average final pass rate by `key` of the runs there are.
        seeds: Seeds of the runs that are compared.
    """

    def __init__(
        self, name: str, rival: Rival, bed: Bed, found: dict[str, float], seeds: Sequence[int] = SEEDS
    ) -> None:
        self.name, self.rival, self.bed, self.found, self.seeds = name, rival, bed, found, seeds

    def run(self, rate: float, strength: Any, seed: int = TUNING_SEED, order: int = 0) -> Run:
        """One run of the method."""
        return Run(
            self.name,
            rate,
            seed,
            self.bed.orders[order],
            self.bed.steps,
            dict(self.rival.settings(strength)),
            bed=self.bed.name,
            strength=strength,
            tests=TESTS,
        )

    def score(self, run: Run) -> float | None:
        """Its average, or None where it is still to be run."""
        return self.found.get(key(asdict(run)))

    def needed(self) -> tuple[list[Run], tuple[float, Any] | None]:
        """Runs that can be made now, and the tuned rate and strength once they are known."""
        chosen = self._tuned()
        if isinstance(chosen, list):
            return chosen, None
        return [run for run in self.compared(*chosen) if self.score(run) is None], chosen

    def compared(self, rate: float, strength: Any) -> list[Run]:
        """The runs that a table shows; plain training at several rates."""
        rates = sorted({*SHOWN, rate}) if self.name == "plain" else [rate]
        return [
            self.run(rate, strength, seed, order)
            for rate in rates
            for seed in self.seeds
            for order in range(len(self.bed.orders))
        ]

    def at_edge(self, rate: float, strength: Any) -> bool:
        """Whether a better setting may lie outside what was tried."""
        order = self.rival.ordered
        return rate in (RATES[0], RATES[-1]) or (order and strength in (min(order), max(order)))

    def _tuned(self) -> list[Run] | tuple[float, Any]:
        best: dict[Any, Run] = {}
        missing: list[Run] = []
        # A rate that suits one strength says little of another: each is tuned by itself.
        for strength in self.rival.strengths:
            found = self._climb(strength)
            if isinstance(found, list):
                missing += found
            else:
                best[strength] = found
        if missing:
            return missing
        strength = max(best, key=lambda value: self.score(best[value]) or 0.0)
        return best[strength].rate, strength

    def _climb(self, strength: Any) -> list[Run] | Run:
        place = FIRST
        while True:
            near = range(max(place - 1, 0), min(place + 2, len(RATES)))
            runs = {index: self.run(RATES[index], strength) for index in near}
            scores = {index: self.score(run) for index, run in runs.items()}
            missing = [runs[index] for index in near if scores[index] is None]
            if missing:
                return missing
            best = max(scores, key=lambda index: (scores[index] or 0.0, index == place))
            if best == place:
                return runs[place]
            place = best
