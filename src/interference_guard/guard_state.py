"""What a guard knows: its domains, what the present step trains, and where the schedule stands."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import SupportsFloat, TypeVar

import torch
from torch import Tensor, nn

from .config import GuardConfig
from .correcting import Grams
from .curvature import DomainCurvature
from .domain import DomainState
from .errors import ConfigError, MissingDomainError, UnknownDomainError
from .evaluating import bare
from .means import RunningMean
from .metering import Clock
from .model_view import ModelView
from .names import named
from .observation import Observation
from .probe import Measurement, Policy, model_policy
from .ranks import Ranks, Reduce
from .recovery import RecoverySchedule
from .telling import warn
from .trust_region import TrustRegion

# Own steps without a gradient of use after which a domain is warned about.
FRUITLESS = 5

Own = TypeVar("Own", bound="GuardState")


def check_name(name: object) -> None:
    """Raise `MissingDomainError` for a domain's name that is not a non-empty string."""
    if not named(name):
        raise MissingDomainError(
            f"A domain is named {name!r}; it must be a non-empty string. Give every row of the data a domain."
        )


def check_module(model: object) -> None:
    """Raise `ConfigError` for a model that is no module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"The model is of type {type(model).__name__}. Give Guard() the torch.nn.Module that is trained, "
            "or under DeepSpeed the engine around it."
        )


class GuardState:
    """State of a `Guard`, and what its parts ask of it; see there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        config: GuardConfig | None = None,
        *,
        policy: Policy | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        check_module(model)
        if not isinstance(config, GuardConfig | None):
            raise ConfigError(
                f"The settings are of type {type(config).__name__}. Give a GuardConfig, for instance "
                "GuardConfig(budget=0.02)."
            )
        self.config = config if config is not None else GuardConfig()
        self.enabled = self.config.enabled
        self.model = bare(model)
        self.policy: Policy = policy if policy is not None else model_policy(self.model)
        self._own_policy = policy is None
        self.ranks = Ranks(reduce)
        self.clock = Clock()
        self.steps = 0
        """Optimizer steps so far."""
        self.kept = RunningMean()
        # Keeps its local models alive: cleared whenever one is replaced.
        self.grams: Grams = {}
        # Jaccard indices of protected sets by sorted names; sets change at anchors alone.
        self.overlaps: dict[tuple[str, str], float] = {}
        # The step's gradients, where they wait for a sum over ranks.
        self.observation: Observation | None = None
        self.schedule = RecoverySchedule()
        self.rate = math.nan
        """The coming step's learning rate, the largest of the optimizer's groups; `attach` sets it."""
        self.trained: tuple[str, ...] = ()
        """Domains of the latest step."""
        # Domains a host can give own steps to; None: all of them.
        self.recoverable: frozenset[str] | None = None
        self.keepers = 1
        """Processes that keep a domain's completions together, each its part; a host of several sets it."""
        # Whether the policy needs all ranks at once although nothing is sharded, as some engines do.
        self.scores_together = False
        # What `GradScaler` leaves a fused optimizer to divide gradients by; `attach` sets it for a step.
        self.grad_scale: Tensor | None = None
        # Whether backward passes of the guard's own work here; False once one has failed.
        self.differentiates = True
        # Domains that a step trained together with others, and those whose gradients proved to be of no use: what
        # was warned about.
        self.mixed: set[str] = set()
        self.useless: set[str] = set()
        # Steps of a domain that ended without an anchor, since none of its gradients had been of use so far.
        self.fruitless: Counter[str] = Counter()
        # Steps that the recovery schedule has seen, and what was measured since.
        self.followed = 0
        self.unfollowed: dict[str, Measurement] = {}
        # Steps at the last probe.
        self.asked = -1
        # Domains that steps were announced of, in rows enough or not; the same on all ranks.
        self.announced: set[str] = set()
        self._shares: dict[str, float] = {}
        self._active: tuple[str, ...] = ()
        # Whether the step they are of is over, where a host announces every step.
        self._over = False
        self._domains: dict[str, DomainState] = {}
        if self.enabled:
            self.view = ModelView(model, self.config)

    @property
    def retain_here(self) -> int:
        """Completions of a domain that this process keeps."""
        return max(self.config.retain // self.keepers, 1)

    @contextmanager
    def domain(self: Own, name: str | Mapping[str, float]) -> Iterator[Own]:
        """Say what the steps inside the block train: one domain, or the share of rows of each."""
        self.begin(name if isinstance(name, Mapping) else {name: 1.0})
        try:
            yield self
        finally:
            self._shares, self._active = {}, ()

    def begin(self, shares: str | Mapping[str, float]) -> None:
        """Say what the coming step trains; replaces what was said before.

        Args:
            shares: One domain's name, or the part or number of the step's rows by domain. Domains under
                `active_share` stay protected.

        Raises:
            MissingDomainError: If no domain has a positive share, or a name is not a non-empty string.
            ConfigError: If a share is negative or not a finite number.
        """
        if isinstance(shares, str):
            shares = {shares: 1.0}
        if not isinstance(shares, Mapping):
            raise MissingDomainError(
                f"guard.begin() was given {shares!r}. Give it a domain's name, or the share of the step's rows "
                "by domain, for instance {'math': 1.0}."
            )
        for name, share in shares.items():
            check_name(name)
            if not isinstance(share, SupportsFloat) or not (math.isfinite(share) and share >= 0):
                raise ConfigError(
                    f"Domain {name!r} has share {share!r}. Give a finite number of at least 0, for instance "
                    "how many of the step's rows are the domain's: shares are divided by their sum."
                )
        total = sum(shares.values())
        if total <= 0:
            raise MissingDomainError(
                "The step has no domain: no row names one. Give guard.begin() or guard.domain() at least "
                "one name with a share above 0."
            )
        self._shares = {name: share / total for name, share in shares.items() if share > 0}
        self._over = False
        self._announce()

    def _announce(self) -> None:
        """Know the domains of the coming step, and say which of them it trains."""
        if self.enabled:
            # Also those with few rows: ranks that have none must know the same domains as those that do.
            self.announced.update(self._shares)
            for name in self._shares:
                self.state_of(name)
        # Once: the step itself changes which domains have an anchor.
        self._active = self._trained()

    def _trained(self) -> tuple[str, ...]:
        # Shares are sums of parts of batches.
        least = self.config.active_share * (1 - 1e-9)
        chosen = tuple(name for name, share in self._shares.items() if share >= least)
        if not chosen:
            # The step still belongs to someone: to those that nothing holds yet, where there are any.
            anchored = {name for name, state in self._domains.items() if state.anchored}
            chosen = tuple(name for name in self._shares if name not in anchored) or tuple(self._shares)
        return chosen

    def end(self) -> None:
        """The step that `begin` announced is over, and the next one must be announced too.

        For hosts that announce every step: one that nobody announced is an error then, and not one more step of
        the domain before it.
        """
        self._over = True

    def check_announced(self) -> None:
        """Know the domains of the step that begins; `MissingDomainError` where nobody has said what it trains."""
        if not self._shares:
            raise MissingDomainError(
                "An optimizer step began and no domain is set. Put the step inside "
                "`with guard.domain(name):`, or call guard.begin({name: share}) before it."
            )
        if self._over:
            raise MissingDomainError(
                f"An optimizer step began that nobody announced; the step before it trained {list(self.active)}. "
                "In TRL the callback announces them: keep it among the trainer's callbacks, or call its detach() "
                "to go on unguarded. Elsewhere call guard.begin() before each step."
            )
        if any(name not in self._domains for name in self._shares):
            # A state that does not hold them was read since.
            self._announce()

    @property
    def active(self) -> tuple[str, ...]:
        """Domains the present step trains."""
        return self._active

    @property
    def protected(self) -> tuple[str, ...]:
        """Anchored domains that the present step does not train."""
        active = self.active
        return tuple(
            name for name in sorted(self._domains) if self._domains[name].anchored and name not in active
        )

    @property
    def recovery(self) -> str | None:
        """The domain to train next because it must recover, or None to go on as planned."""
        return self.schedule.domain if self.config.recovery else None

    @property
    def domains(self) -> Mapping[str, DomainState]:
        """Every domain seen so far, in order of appearance (read only)."""
        return MappingProxyType(self._domains)

    # Parts

    # In inference mode its sums could not be added to afterwards.
    @torch.inference_mode(False)
    def new_state(self, name: str) -> DomainState:
        """An empty state for a domain (used when a state file is read)."""
        settings = self.config
        curvature = DomainCurvature(0.5 ** (1 / settings.half_life), self.view.omegas, spread=self.view.spread)
        return DomainState(name, curvature, TrustRegion(settings.budget, settings.budget_nats))

    def adopt(self, state: DomainState) -> None:
        """Take in a domain's state made elsewhere (used for reference domains)."""
        self._domains[state.name] = state

    def replace_domains(
        self,
        domains: Mapping[str, DomainState],
        steps: int,
        schedule: RecoverySchedule,
        announced: Iterable[str],
    ) -> None:
        """Put other states in place of all present ones (used when a state file is read)."""
        self._domains = dict(domains)
        self.steps = self.followed = steps
        self.unfollowed, self.asked = {}, -1
        self.announced = {*announced}
        self.schedule = schedule
        self.grams.clear()
        self.overlaps.clear()

    @property
    def device(self) -> torch.device:
        """Where the guard's own tensors lie; where it is off, its model."""
        if self.enabled:
            return self.view.device
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def warn_mixed(self, names: tuple[str, ...]) -> None:
        """Say once that a step of several domains adds to no domain's curvature; shuffled rows mix all ways."""
        first = not self.mixed
        self.mixed.update(names)
        if first:
            warn(
                f"A step trained the domains {sorted(names)} together: each has at least "
                f"active_share={self.config.active_share} of its rows. Its gradient cannot be told apart by "
                "domain, so it is added to no domain's curvature, and none of them is protected meanwhile: a "
                "domain that is only trained so gets no protection later. Train one domain a step "
                "(order_by_domain in TRL, DomainDataset in veRL). Where rows of earlier domains are only "
                "rehearsed, set active_share above their share. Other mixtures are not reported."
            )

    def warn_without_gradients(self, name: str, steps: int) -> None:
        """Say once that a domain cannot be protected because none of its gradients was of use so far.

        Args:
            name: The domain, which stops being trained.
            steps: How many steps it was trained. Few of them say nothing, where domains take turns or a recovery
                of another interrupts.
        """
        self.fruitless[name] += steps
        # Of a domain that was only trained in mixed steps nothing was observed, which was said already.
        if self.fruitless[name] >= FRUITLESS and name not in self.mixed | self.useless:
            self.useless.add(name)
            warn(
                f"All gradients of domain {name!r} were zero or not finite so far, as they are where the rewards "
                "of each group are alike, or gone when the guard looked, as where an optimizer steps inside of "
                "hooks of the backward pass. Until it has others it is not protected. If the model has mastered "
                "it already, give rows of it as a reference, see Guard.protect(); if its weights do change, let "
                "the optimizer step after the whole backward pass, and clear gradients after that."
            )

    def _warn_range(self, state: DomainState, lowest: float, highest: float) -> None:
        """Say that few rewards stretch a domain's range, of which losses are parts."""
        warn(
            f"The {state.rewarded} rewards of domain {state.name!r} lay in {state.low:g} to {state.high:g}, and "
            f"now there are some from {lowest:g} to {highest:g}. Losses are parts of the whole range: one that "
            "counted before may now be under the budget, and measurements may be noisy. If the domain is not "
            "meant to give such rewards, clip them in the reward function and begin anew."
        )

    def forget_sets(self, name: str) -> None:
        """Drop what was computed from a domain's former local model and sets."""
        self.grams.clear()
        self.overlaps = {pair: value for pair, value in self.overlaps.items() if name not in pair}

    def state_of(self, name: str) -> DomainState:
        """A domain's state, made at its first mention; raises `UnknownDomainError` where the guard is off."""
        check_name(name)
        if not self.enabled:
            raise self._unknown(name)
        if name not in self._domains:
            self._domains[name] = self.new_state(name)
        return self._domains[name]

    def anchored(self, domain: str) -> DomainState:
        """The state of a domain that has an anchor; raises `UnknownDomainError` where it has none."""
        state = self._domains.get(domain)
        if state is None or not state.anchored:
            raise self._unknown(domain)
        return state

    def _unknown(self, domain: str) -> UnknownDomainError:
        """What to raise for a domain without an anchor, or where the guard is off."""
        if not self.enabled:
            return UnknownDomainError(
                f"The guard is off (enabled=False in GuardConfig), so it knows nothing of domain {domain!r}. Ask "
                "only where guard.enabled is True."
            )
        anchored = sorted(name for name, state in self._domains.items() if state.anchored)
        return UnknownDomainError(
            f"Domain {domain!r} has no anchor. Known domains: {sorted(self._domains)}; anchored: {anchored}. "
            f"Train on {domain!r} first: its anchor is set when another domain's first step begins."
        )
