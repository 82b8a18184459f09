"""The guard: one object beside a model, told what each step trains, that keeps earlier domains in bounds.

Data flows one way: gradients -> curvature -> local model -> prediction -> projection, and
completions -> probe -> trust region. The guard knows no trainer: a host calls `begin`, `before_step`,
`after_step`, `retain` and `probe`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

import torch
from torch import nn

from . import checkpoint, measuring, recovering, reference, stepping
from .config import GuardConfig
from .curvature import DomainCurvature
from .domain import DomainState
from .errors import MissingDomainError, UnknownDomainError
from .first_order import first_order
from .local_model import Grams, predict
from .metering import Clock, TensorMean, collect
from .model_view import ModelView
from .observation import Observation
from .places import Places, curvature_places, projected_places
from .probe import Completions, Measurement, Policy, model_policy
from .ranks import Ranks, Reduce
from .recovery import RecoverySchedule
from .trust_region import Raw, TrustRegion

# The first foreign steps are the ones about which least is known.
EARLY_PROBES = (1, 2, 4)


class Guard:
    """Keeps every earlier domain inside a trust region measured in its own reward.

    Args:
        model: The policy. Its trainable parameters are read here and changed only by `after_step`.
        config: Settings.
        policy: Gives log-probabilities of completions under the present weights; `model_policy(model)`
            by default. Hosts that compute them in a special way pass their own.
        reduce: Reduces a 1-d tensor over data-parallel ranks, ``reduce(tensor, "sum" | "max")``, so that
            all ranks measure and decide the same; None in a single process.

    Raises:
        UnsupportedError: If the model holds something the guard cannot protect; nothing is changed.

    >>> model = torch.nn.Linear(4, 2)
    >>> guard = Guard(model, GuardConfig(rank=2, sketch=4))
    >>> with guard.domain("math"):
    ...     model(torch.ones(1, 4)).sum().backward()
    ...     guard.before_step()
    ...     guard.after_step()
    >>> guard.domains["math"].own_steps
    1
    """

    def __init__(
        self,
        model: nn.Module,
        config: GuardConfig | None = None,
        *,
        policy: Policy | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self.config = config if config is not None else GuardConfig()
        self.enabled = self.config.enabled
        self.policy: Policy = policy if policy is not None else model_policy(model)
        self._own_policy = policy is None
        self.model = model
        self.ranks = Ranks(reduce)
        self.clock = Clock()
        self.steps = 0
        self.kept = TensorMean()
        # By id of the local models, which live as long as the entry: cleared whenever one is replaced.
        self.grams: Grams = {}
        # Jaccard indices of protected sets by sorted names; sets change at anchors alone.
        self.overlaps: dict[tuple[str, str], float] = {}
        # None: wherever reading the device costs nothing. Tests set it to prove that the path for
        # accelerators reads nothing back.
        self.force_read: bool | None = None
        # The step's gradients, where they wait for a sum over ranks.
        self.observation: Observation | None = None
        self.schedule = RecoverySchedule()
        self.trained: tuple[str, ...] = ()
        # Domains a host can give own steps to; None: all of them.
        self.recoverable: frozenset[str] | None = None
        self._mixed: set[tuple[str, ...]] = set()
        self._followed = 0
        self._shares: dict[str, float] = {}
        self._domains: dict[str, DomainState] = {}
        if self.enabled:
            self.view = ModelView(model, self.config)

    def bind(self, model: nn.Module) -> None:
        """Go on with another object of the same model, for instance in the next phase's trainer.

        The guard's own policy is bound too, unless a host gave one. Before the guard has seen a domain, the
        model may also have been sharded since.

        Raises:
            ShapeError: If its trainable parameters differ; nothing is changed then.
            StateError: If they lie on the ranks in other pieces than those the guard's sums are of.
        """
        if not self.enabled:
            return
        self.view.bind(model, known=list(self._domains))
        self.model = model
        if self._own_policy:
            self.policy = model_policy(model)

    # What a host tells

    @contextmanager
    def domain(self, name: str | Mapping[str, float]) -> Iterator[Guard]:
        """Say what the steps inside the block train: one domain, or the share of rows of each."""
        self.begin({name: 1.0} if isinstance(name, str) else name)
        try:
            yield self
        finally:
            self._shares = {}

    def begin(self, shares: Mapping[str, float]) -> None:
        """Say what the coming step trains.

        Args:
            shares: Domain name to its part of the step's rows. Domains under `active_share` stay
                protected. Replaces what was said before.

        Raises:
            MissingDomainError: If no domain has a positive share, or a name is not a non-empty string.
        """
        for name, share in shares.items():
            if not isinstance(name, str) or not name:
                raise MissingDomainError(
                    f"A domain is named {name!r}; it must be a non-empty string. "
                    "Give every row of the data a domain."
                )
            if not (math.isfinite(share) and share >= 0):
                raise MissingDomainError(f"Domain {name!r} has share {share!r}; shares are numbers from 0 to 1.")
        total = sum(shares.values())
        if total <= 0:
            raise MissingDomainError(
                "The step has no domain: no row names one. Give guard.begin() or guard.domain() at least "
                "one name with a share above 0."
            )
        self._shares = {name: share / total for name, share in shares.items() if share > 0}
        if self.enabled:
            for name in self.active:
                self._state(name)

    @property
    def active(self) -> tuple[str, ...]:
        """Domains the present step trains."""
        least = self.config.active_share
        chosen = tuple(name for name, share in self._shares.items() if share >= least)
        if self._shares and not chosen:
            # Many tiny shares: the step still belongs to someone.
            chosen = tuple(self._shares)
        return chosen

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

    def retain(self, domain: str, completions: Completions) -> None:
        """Keep a domain's latest completions, to measure its interference on later.

        Args:
            domain: Its name.
            completions: Copied; the latest `retain` rows are kept. Their rewards widen the domain's
                reward range.
        """
        if not self.enabled or not len(completions):
            return
        started = perf_counter()
        state = self._state(domain)
        # Rows that `retain` would drop at once need not be copied.
        rows = completions.rows(slice(max(len(completions) - self.config.retain, 0), None))
        state.keep(rows.detached(), self.config.retain)
        lengths = completions.completion_mask.sum().item()
        state.lengths.add(float(lengths), len(completions))
        if completions.rewards is not None:
            rewards = completions.rewards.detach().float()
            finite = rewards[rewards.isfinite()]
            if len(finite):
                state.see_rewards(finite.min().item(), finite.max().item())
                state.note_rewards(finite.sum().item(), len(finite))
        self.clock.add("retain", started)

    def protect(self, domain: str, completions: Completions, *, passes: int = 64, batch_size: int = 8) -> None:
        """Protect a domain that is only known from given rows, from the present weights on.

        For what the model could do before any RL: curvature from backward passes with labels drawn from the
        softened output, an anchor at the present weights, and a probe on the rows. Parameters' gradients, the
        optimizer and the global random generators are not touched. On several ranks, give all of them the same
        rows.

        Args:
            domain: A name of its own.
            completions: The rows; without rewards the interference is measured in nats per token.
            passes: Backward passes.
            batch_size: Rows of one pass; rows are used again when they run out.

        Raises:
            ConfigError: If the domain is known already.
            ShapeError: If a row has no completion token; nothing is changed then.
            UnsupportedError: If the model returns no logits.
        """
        if self.enabled:
            reference.protect(self, domain, completions, passes, batch_size)

    # The optimizer step

    @torch.no_grad()
    def before_step(self) -> None:
        """Take in the step's gradients; call when they are final and the weights still unchanged.

        Domains that stop being trained with this step get their anchor here.

        Raises:
            MissingDomainError: If `begin` or `domain` has not said what the step trains.
        """
        if not self.enabled:
            return
        if not self._shares:
            raise MissingDomainError(
                "An optimizer step began and no domain is set. Put the step inside "
                "`with guard.domain(name):`, or call guard.begin({name: share}) before it."
            )
        self.view.place()
        stepping.take_gradients(self)

    @torch.no_grad()
    def after_step(self) -> None:
        """Predict the interference of the weights as they are now, and project them where it is too high.

        On sharded parameters the step's gradients must still be there: clear them afterwards.
        """
        if not self.enabled:
            return
        self.steps += 1
        states = [self._domains[name] for name in self.protected]
        if states or self.observation is not None:
            stepping.hold(self, states)

    # Measurement

    def probe(self, policy: Policy | None = None) -> dict[str, Measurement]:
        """Measure the protected domains whose turn it is; call after every step.

        A domain is due after 1, 2 and 4 foreign steps and then every `probe_steps`. When nothing is due
        the call costs nothing. With `recovery`, the measurements also move the recovery schedule: afterwards
        `recovery` names the domain to train next, or is None.

        Args:
            policy: Replaces the guard's own for this call.

        Returns:
            The measurements made, by domain.
        """
        found: dict[str, Measurement] = {}
        if not self.enabled:
            return found
        for name in self.protected:
            state = self._domains[name]
            if name == self.recovery:
                continue
            early = state.foreign_steps in EARLY_PROBES and state.fresh
            due = early or state.foreign_steps % self.config.probe_steps == 0
            if due and state.foreign_steps and state.measurable:
                found[name] = self.measure(name, policy)
        if self.config.recovery and self.steps > self._followed:
            self._followed = self.steps
            recovering.follow(self, found, policy)
        return found

    @torch.no_grad()
    def measure(self, domain: str, policy: Policy | None = None) -> Measurement:
        """Measure one protected domain now, calibrate its prediction and adapt its radius.

        Raises:
            UnknownDomainError: If the domain has no anchor, or no completions were retained before it.
        """
        state = self._anchored(domain)
        if not state.measurable:
            raise UnknownDomainError(
                f"Domain {domain!r} has an anchor but no retained completions, so nothing can be measured. "
                f"Call guard.retain({domain!r}, completions) during its own steps."
            )
        return measuring.measure(self, state, policy)

    def calibrate(self, domain: str, reward: float) -> None:
        """Tell the true mean reward of a domain under the present weights, from an evaluation.

        Between the domain's last own step and the first foreign one it is the reward at the anchor. After
        that it corrects the scale of the domain's measurements; without one at the anchor, the first counts
        as right and later ones are compared with it.

        Raises:
            UnknownDomainError: If the guard has never seen the domain.
        """
        if not self.enabled:
            return
        if domain not in self._domains:
            raise self._unknown(domain)
        measuring.calibrate(self, self._domains[domain], reward)

    def abandon_recovery(self) -> None:
        """Give up the present recovery phase, for instance because the host has no rows of its domain.

        It counts as one that did not bring its domain back, which keeps its old anchor. Without a phase nothing
        happens.
        """
        recovering.abandon(self)

    def predicted(self, domain: str) -> float:
        """Calibrated prediction of a domain's interference under the present weights.

        In parts of the domain's reward range, or nats per token where no rewards are at hand; NaN before
        the first measurement. Reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        state = self._anchored(domain)
        return state.region.predict(self.interference([domain])[domain]) if state.foreign_steps else 0.0

    def raw(self, domain: str) -> float:
        """Uncalibrated quadratic prediction, inside and outside the directions; reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        return self.interference([domain])[domain].quadratic

    @torch.no_grad()
    def interference(self, domains: Iterable[str] | None = None) -> dict[str, Raw]:
        """Uncalibrated prediction of domains under the present weights, in one pass over them.

        Args:
            domains: Their names; all anchored ones by default.

        Returns:
            By domain the parts of its prediction; reads the device.

        Raises:
            UnknownDomainError: If a domain has no anchor.
        """
        if domains is None:
            domains = [name for name, state in self._domains.items() if state.anchored]
        models = {name: model for name in domains if (model := self._anchored(name).model) is not None}
        parts = predict(self.view.weights(), list(models.values()), self.view.residuals) if models else []
        rows = []
        for name, (seen, inside, outside) in zip(models, parts, strict=True):
            slopes = self._domains[name].slopes
            linear = inside.new_zeros(()) if slopes is None else first_order(slopes, seen.views)
            rows.append(torch.stack([inside, outside, linear]))
        table = torch.stack(rows).tolist() if rows else []
        return {name: Raw(*numbers) for name, numbers in zip(models, table, strict=True)}

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """All metrics as plain numbers; `metrics.METRICS` says what each means. Reads the device.

        Means are taken since the last call.
        """
        if not self.enabled:
            return {}
        started = perf_counter()
        found = collect(self)
        self.clock.add("metrics", started)
        return found

    def places(self) -> dict[str, dict[str, Places]]:
        """Where each domain's curvature and its projections sit so far, summed by layer and module.

        Over several ranks all of them call it. Reads the device; meant for the end of a run.

        Returns:
            ``"curvature"``: gradient energy by domain; ``"projected"``: squared length of what projections took
            from the weights for the domain's sake.
        """
        if not self.enabled:
            return {"curvature": {}, "projected": {}}
        return {"curvature": curvature_places(self), "projected": projected_places(self)}

    # State

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on exactly: see `checkpoint.pack`. Tensors are not copied."""
        return checkpoint.pack(self)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over a `state_dict`; checked as a whole before anything is changed.

        Raises:
            StateError: If it is of another model or of other settings.
            StateVersionError: If its format is unknown.
        """
        checkpoint.unpack(self, state)

    def save(self, directory: str | Path, *, folders: int = 1) -> None:
        """Write the state beside a checkpoint, atomically; see `checkpoint.save`."""
        checkpoint.save(self, Path(directory), folders)

    def load(
        self,
        directory: str | Path,
        ranks: Sequence[str | Path] | None = None,
        place: tuple[int, int] | None = None,
    ) -> None:
        """Read what `save` wrote; the guard is unchanged if anything is wrong with it.

        The model may lie on another number of ranks than when it was saved: see `checkpoint.load`.

        Args:
            directory: Holds this rank's files.
            ranks: The folders of all ranks that saved, in their order, where each had one of its own and there
                were more or fewer than now.
            place: This rank and their number, among those that keep completions.
        """
        folders = None if ranks is None else [Path(folder) for folder in ranks]
        checkpoint.load(self, Path(directory), folders, place)

    def new_state(self, name: str) -> DomainState:
        """An empty state for a domain (used when a state file is read)."""
        settings = self.config
        curvature = DomainCurvature(0.5 ** (1 / settings.half_life), self.view.omegas, spread=self.view.spread)
        return DomainState(name, curvature, TrustRegion(settings.budget, settings.budget_nats))

    def adopt(self, state: DomainState) -> None:
        """Take in a domain's state made elsewhere (used for reference domains)."""
        self._domains[state.name] = state

    def replace_domains(self, domains: Mapping[str, DomainState], steps: int, schedule: RecoverySchedule) -> None:
        """Put other states in place of all present ones (used when a state file is read)."""
        self._domains = dict(domains)
        self.steps = self._followed = steps
        self.schedule = schedule
        self.grams.clear()
        self.overlaps.clear()

    # Parts

    @property
    def device(self) -> torch.device:
        """Where the guard's own tensors lie."""
        return self.view.device

    @property
    def reads_back(self) -> bool:
        """Whether decisions may read the device within a step: on an accelerator that would stall it."""
        return self.device.type == "cpu" if self.force_read is None else self.force_read

    def warn_mixed(self, names: tuple[str, ...]) -> None:
        """Say once for each combination that a step of several domains adds to no domain's curvature."""
        if names not in self._mixed:
            self._mixed.add(names)
            warnings.warn(
                f"A step trained the domains {sorted(names)} together. Its gradient cannot be told apart by "
                "domain, so it is added to no domain's curvature: a domain that is only trained so gets no "
                "protection later. Train one domain a step, for instance with "
                "interference_guard.integrations.trl.order_by_domain(dataset, prompts, 'round_robin').",
                stacklevel=6,
            )

    def forget_sets(self, name: str) -> None:
        """Drop what was computed from a domain's former local model and sets."""
        self.grams.clear()
        self.overlaps = {pair: value for pair, value in self.overlaps.items() if name not in pair}

    def _state(self, name: str) -> DomainState:
        if name not in self._domains:
            self._domains[name] = self.new_state(name)
        return self._domains[name]

    def _anchored(self, domain: str) -> DomainState:
        state = self._domains.get(domain)
        if state is None or not state.anchored:
            raise self._unknown(domain)
        return state

    def _unknown(self, domain: str) -> UnknownDomainError:
        anchored = sorted(name for name, state in self._domains.items() if state.anchored)
        return UnknownDomainError(
            f"Domain {domain!r} has no anchor. Known domains: {sorted(self._domains)}; anchored: {anchored}. "
            f"Train on {domain!r} first: its anchor is set when another domain's first step begins."
        )
