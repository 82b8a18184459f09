"""Which runs a method still needs: its rate and strength on one seed, then the runs that are compared.

A pure function of the runs there are, so that a benchmark can stop and go on anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..bed.beds import Bed
from ..bed.run import Run
from .registry import Rival

# A rate outside the middle ones is tried only where its neighbour won.
RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)
MIDDLE = RATES[1:5]
TUNING_SEED = 3
SEEDS = (0, 1, 2)


def key(run: dict[str, Any]) -> str:
    """What tells one run from another; `run` is a `Run` as a mapping."""
    kept = {name: run[name] for name in ("method", "rate", "seed", "order", "guard", "strength")}
    return json.dumps(kept, sort_keys=True)


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
        )

    def score(self, run: Run) -> float | None:
        """Its average, or None where it is still to be run."""
        from dataclasses import asdict

        return self.found.get(key(asdict(run)))

    def needed(self) -> tuple[list[Run], tuple[float, Any] | None]:
        """Runs that can be made now, and the tuned rate and strength once they are known."""
        chosen = self._tuned()
        if isinstance(chosen, list):
            return chosen, None
        return [run for run in self.compared(*chosen) if self.score(run) is None], chosen

    def compared(self, rate: float, strength: Any) -> list[Run]:
        """The runs that a table shows; plain training at each rate."""
        rates = sorted({*MIDDLE, rate}) if self.name == "plain" else [rate]
        return [
            self.run(rate, strength, seed, order)
            for rate in rates
            for seed in self.seeds
            for order in range(len(self.bed.orders))
        ]

    def _tuned(self) -> list[Run] | tuple[float, Any]:
        first = self.rival.strengths[0]
        rate = self._best_rate(first, MIDDLE)
        if isinstance(rate, list):
            return rate
        runs = {strength: self.run(rate, strength) for strength in self.rival.strengths}
        strength = self._best(runs)
        if isinstance(strength, list) or strength == first:
            return strength if isinstance(strength, list) else (rate, first)
        # Another strength may want another rate.
        place = RATES.index(rate)
        again = self._best_rate(strength, RATES[max(place - 1, 0) : place + 2])
        return again if isinstance(again, list) else (again, strength)

    def _best_rate(self, strength: Any, rates: Sequence[float]) -> list[Run] | float:
        best = self._best({rate: self.run(rate, strength) for rate in rates})
        if isinstance(best, list):
            return best
        place = RATES.index(best)
        beyond = [rate for rate in RATES[max(place - 1, 0) : place + 2] if rate not in rates]
        return self._best_rate(strength, [*rates, *beyond]) if beyond else float(best)

    def _best(self, runs: dict[Any, Run]) -> Any:
        """The value whose run scored best, or the runs that are missing."""
        scores = {value: self.score(run) for value, run in runs.items()}
        missing = [runs[value] for value, score in scores.items() if score is None]
        return missing or max(scores, key=lambda value: scores[value] or 0.0)
