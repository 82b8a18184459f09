"""All settings of the guard in one flat, frozen dataclass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

from .errors import ConfigError

SELECTIONS = ("energy", "edits", "random")
PROJECTION_METRICS = ("euclidean", "gradient")
UNIT_KINDS = ("row", "column", "vector")
# Seeds of steps are made from it, and a generator takes 64 bits.
SEED_LIMIT = 1 << 32


@dataclass(frozen=True)
class GuardConfig:
    """Settings of a `Guard`; the defaults are those of the benchmark beds.

    The fields are plain numbers, words and lists, so that `transformers.HfArgumentParser` and TRL's
    `TrlParser` read them from a YAML file or the command line.

    Raises:
        ConfigError: If a value is outside its range. The message names the field, the value and the range.

    Examples:
        >>> GuardConfig(budget=0.05).budget
        0.05
        >>> GuardConfig(budget=0)
        Traceback (most recent call last):
        interference_guard.errors.ConfigError: budget=0 is not allowed: it must be a number above 0 and ...
    """

    enabled: bool = field(
        default=True, metadata={"help": "False leaves the run bit-identical to one without the guard."}
    )
    domain_column: str = field(
        default="domain", metadata={"help": "Column of the dataset that holds a row's domain."}
    )
    project: bool = field(
        default=True,
        metadata={"help": "Project every step into the trust regions. False only predicts and measures."},
    )
    budget: float = field(
        default=0.02,
        metadata={
            "help": "Measured loss toward which a protected domain's radius is steered, as a share of its reward "
            "range."
        },
    )
    budget_nats: float = field(
        default=0.01,
        metadata={
            "help": "The same target for domains without rewards, or whose rewards are all alike: "
            "log-likelihood lost, in nats per token."
        },
    )
    rank: int = field(default=16, metadata={"help": "Most directions kept for each weight matrix and domain."})
    sketch: int = field(
        default=32, metadata={"help": "Columns of the random test matrix behind the directions; >= rank."}
    )
    residual: int = field(
        default=8,
        metadata={
            "help": "Random directions that estimate what the kept ones miss; weights wider than 512 get "
            "512 / width of them."
        },
    )
    first_order: bool = field(
        default=False,
        metadata={
            "help": "Add the domains' own mean gradient to the prediction: for domains left before they have "
            "converged, as in interleaved training. Takes (rank + sketch) / width of the weights more a domain."
        },
    )
    half_life: float = field(
        default=50.0, metadata={"help": "Own steps after which a gradient has half its weight in the curvature."}
    )
    refresh_steps: int = field(
        default=20,
        metadata={"help": "Own steps before a domain's directions are recomputed (its anchor always is)."},
    )
    stochastic_rounding: bool = field(
        default=True,
        metadata={
            "help": "Round projected bf16 weights up or down at random, in proportion. Rounding to nearest loses "
            "corrections smaller than half the spacing of bf16 numbers."
        },
    )
    sweeps: int = field(
        default=3, metadata={"help": "Cyclic passes of the projection when several domains are protected."}
    )
    projection_metric: str = field(
        default="euclidean",
        metadata={
            "help": "Distance of a projection: 'euclidean' changes the weights least; 'gradient' weighs each "
            "unit by the gradient energy of the domain in training."
        },
    )
    retain: int = field(
        default=128,
        metadata={
            "help": "Completions kept per domain to measure interference on, spread over the latest prompts."
        },
    )
    probe_steps: int = field(
        default=20,
        metadata={"help": "Foreign steps between two measurements (also made after steps 1, 2 and 4)."},
    )
    renew: bool = field(
        default=True,
        metadata={
            "help": "If a domain loses outside its directions, give it new ones from its retained completions "
            "and move its trust region to where the weights are. Sharded models keep the directions."
        },
    )
    coverage: float = field(
        default=1.0,
        metadata={"help": "Share of a domain's curvature energy that its protected units must cover."},
    )
    selection: str = field(
        default="energy",
        metadata={
            "help": "How protected units are chosen when coverage < 1: 'energy', 'edits' (size of the "
            "domain's own change) or 'random' (a control)."
        },
    )
    active_share: float = field(
        default=0.05,
        metadata={"help": "Share of a mixed batch from which a domain counts as active, not protected."},
    )
    recovery: bool = field(
        default=False,
        metadata={
            "help": "Train a domain for a few steps when its interference exceeds recovery_budget. The host "
            "trains its rows instead of the planned ones."
        },
    )
    recovery_budget: float | None = field(
        default=None,
        metadata={
            "help": "Interference that starts a recovery phase, as a share of the reward range. By default 3 x "
            "budget, or budget if project is False. Below budget it repairs what a loose budget allows."
        },
    )
    recovery_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Reward still missing, as a share of the range, at which a phase ends early. By default half "
            "the budget, or half of recovery_budget if that is smaller."
        },
    )
    recovery_steps: int = field(default=2, metadata={"help": "Most steps of one recovery phase."})
    recovery_cooldown: int = field(
        default=4, metadata={"help": "Steps after a recovery phase in which none starts."}
    )
    recovery_share: float = field(
        default=0.15, metadata={"help": "Most recovery steps, as a share of all steps at any time."}
    )
    unit_overrides: list[str] | None = field(
        default=None,
        metadata={
            "help": "Unit axis by parameter name, each 'pattern=row', 'pattern=column' or 'pattern=vector', "
            "for instance '*.mix.weight=column'."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the guard's own random matrices."})

    def __post_init__(self) -> None:
        for item in fields(self):
            value = _plain(getattr(self, item.name))
            object.__setattr__(self, item.name, value)
            if isinstance(item.default, bool):
                self._check(item.name, isinstance(value, bool), "True or False")
        for name in ("budget_nats", "half_life"):
            self._check(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        self._check(
            "budget",
            _is_number(self.budget) and 0 < self.budget <= 1,
            "a number above 0 and at most 1 (two points of a pass rate are 0.02)",
        )
        for name in (
            "rank",
            "sketch",
            "residual",
            "refresh_steps",
            "sweeps",
            "retain",
            "probe_steps",
            "recovery_steps",
        ):
            self._check(name, _is_integer(getattr(self, name)) and getattr(self, name) >= 1, "an integer >= 1")
        cooldown = self.recovery_cooldown
        self._check("recovery_cooldown", _is_integer(cooldown) and cooldown >= 0, "an integer >= 0")
        self._check("sketch", self.sketch >= self.rank, f"at least rank={self.rank}")
        for name in ("coverage", "active_share", "recovery_share"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1")
        self._check("selection", self.selection in SELECTIONS, f"one of {list(SELECTIONS)}")
        self._check(
            "projection_metric",
            self.projection_metric in PROJECTION_METRICS,
            f"one of {list(PROJECTION_METRICS)}",
        )
        self._check("seed", _is_integer(self.seed) and abs(self.seed) < SEED_LIMIT, "an integer below 2**32")
        self._check(
            "domain_column", isinstance(self.domain_column, str) and self.domain_column != "", "a column name"
        )
        self._check_recovery()
        if self.unit_overrides is not None:
            self._check(
                "unit_overrides", _is_words(self.unit_overrides), "a list of strings, ['pattern=row'], or None"
            )
            # As a state file gives it back, to be compared.
            object.__setattr__(self, "unit_overrides", list(self.unit_overrides))
        self.overrides()

    def _check_recovery(self) -> None:
        for name in ("recovery_budget", "recovery_tolerance"):
            value = getattr(self, name)
            self._check(name, value is None or (_is_number(value) and value > 0), "a number above 0, or None")
        self._check(
            "recovery_tolerance",
            self.regained_within < self.recovery_threshold,
            f"under the recovery budget, here {self.recovery_threshold}: a phase must end below where it starts",
        )

    @property
    def recovery_threshold(self) -> float:
        """Interference that starts a recovery phase, in parts of the reward range."""
        if self.recovery_budget is not None:
            return self.recovery_budget
        return 3 * self.budget if self.project else self.budget

    @property
    def regained_within(self) -> float:
        """Reward still missing at which a recovery phase ends, in parts of the reward range."""
        if self.recovery_tolerance is not None:
            return self.recovery_tolerance
        return min(self.budget, self.recovery_threshold) / 2

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            kind = type(getattr(self, name))
            # One of another package may look like what is allowed.
            of = "" if kind.__module__ == "builtins" else f" (a {kind.__module__}.{kind.__name__})"
            raise ConfigError(
                f"{name}={getattr(self, name)!r}{of} is not allowed: it must be {allowed}. "
                f"Change {name} in GuardConfig; the default is {self._default(name)!r}."
            )

    @classmethod
    def _default(cls, name: str) -> object:
        return next(item.default for item in fields(cls) if item.name == name)

    def overrides(self) -> dict[str, str]:
        """`unit_overrides` as a mapping from pattern to ``"row"``, ``"column"`` or ``"vector"``."""
        table: dict[str, str] = {}
        for entry in self.unit_overrides or ():
            pattern, _, kind = entry.rpartition("=")
            if not pattern or kind not in UNIT_KINDS:
                raise ConfigError(
                    f"unit_overrides entry {entry!r} is not allowed: it must read 'pattern=kind' with a kind "
                    f"of {list(UNIT_KINDS)}, for instance '*.mix.weight=column'."
                )
            # The first one decides.
            table.setdefault(pattern, kind)
        return table


def _plain(value: object) -> object:
    """A number of NumPy's as Python's own, which JSON holds; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_words(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(entry, str) for entry in value)
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
