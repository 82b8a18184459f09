"""The guard: one object beside a model, told what each step trains, that keeps earlier domains in bounds.

Data flows one way: gradients -> curvature -> local model -> prediction -> projection, and
completions -> probe -> trust region. The guard knows no trainer: a host calls `begin`, `before_step`,
`after_step`, `retain` and `probe`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

import torch
from torch import Tensor, nn

from . import checkpoint
from .blocks import make_blocks
from .checks import trainable_parameters
from .config import GuardConfig
from .curvature import DomainCurvature, block_matrices
from .domain import DomainState, RunningMean
from .errors import MissingDomainError, ShapeError, UnknownDomainError
from .local_model import Grams, anchor_domain, displacements, predict, project
from .metering import collect
from .probe import Completions, Measurement, Policy, estimate, model_policy
from .protection import protected_rows, span_of_edits
from .trust_region import TrustRegion
from .units import UnitLayout

PARTS = ("retain", "observe", "anchor", "predict", "project", "probe", "metrics")
# The first foreign steps are the ones about which least is known.
EARLY_PROBES = (1, 2, 4)
Reduce = Callable[[Tensor, str], Tensor]


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
        self.reduce = reduce
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._shares: dict[str, float] = {}
        self._domains: dict[str, DomainState] = {}
        self._kept = RunningMean()
        self._kept_tensor: Tensor | None = None
        self._reported = (0, 0.0)
        # By id of the local models, which live as long as the entry: cleared whenever one is replaced.
        self._grams: Grams = {}
        # Jaccard indices of protected sets by sorted names; sets change at anchors alone.
        self.overlaps: dict[tuple[str, str], float] = {}
        # Off only in tests, which prove that the path for accelerators reads nothing back.
        self._early = True
        self._parameters: dict[str, nn.Parameter] = {}
        if self.enabled:
            self._parameters = trainable_parameters(model)
            self.layout = UnitLayout(
                self._parameters.items(),
                self.config.overrides(),
                module=model,
            )
            self.blocks = make_blocks(self.layout, self._parameters)
            settings = self.config
            self._omegas = block_matrices(self.blocks, settings.sketch, settings.seed, "test")
            self._residuals = block_matrices(self.blocks, settings.residual, settings.seed, "residual")
            self._place()

    def bind(self, model: nn.Module) -> None:
        """Go on with another object of the same model, for instance in the next phase's trainer.

        The guard's own policy is bound too, unless a host gave one.

        Raises:
            ShapeError: If its trainable parameters differ; nothing is changed then.
        """
        if not self.enabled:
            return
        found = trainable_parameters(model)
        mine = {name: tuple(tensor.shape) for name, tensor in self._parameters.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if mine != theirs:
            different = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            name = different[0] if different else "their order"
            raise ShapeError(
                f"The guard was built for other trainable parameters: {len(different)} differ, for instance "
                f"{name!r} with shape {mine.get(name)} before and {theirs.get(name)} now. Go on with the same "
                "model, or build a new guard."
            )
        self._parameters = found
        if self._own_policy:
            self.policy = model_policy(model)
        self._place()

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
                state.rewards.add(finite.sum().item(), len(finite))
        self._clock("retain", started)

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
        self._place()
        active = self.active
        started = perf_counter()
        # By name: ranks may have met the domains in another order, and anchoring reduces over ranks.
        for name in sorted(self._domains):
            if name not in active and self._domains[name].own_steps:
                self._anchor(self._domains[name])
        started = self._clock("anchor", started)
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        batch = [block.gather(gradients) for block in self.blocks]
        for name in active:
            state = self._domains[name]
            if state.start is None and self.config.selection == "edits" and not state.anchored:
                state.start = span_of_edits(self._weights(), self._residuals)
            state.curvature.observe(batch)
            state.own_steps += 1
            state.since_refresh += 1
            state.evaluated = False
            state.anchored = False
        self._clock("observe", started)

    @torch.no_grad()
    def after_step(self) -> None:
        """Predict the interference of the weights as they are now, and project them where it is too high."""
        if not self.enabled:
            return
        self.steps += 1
        states = [self._domains[name] for name in self.protected]
        if not states:
            return
        started = perf_counter()
        models = [state.model for state in states if state.model is not None]
        seen = displacements(self._weights(), models)
        for state, displacement in zip(states, seen, strict=True):
            state.foreign_steps += 1
            state.subspace = displacement.energy()
            # The first visible displacement: nothing else is known of the unit yet. A step at rate 0 (the
            # start of a warm-up) shows rounding alone, and a radius of that size would freeze learning.
            if state.radius is None:
                state.radius = torch.full_like(state.subspace, math.inf)
            if not state.region.radius and state.model is not None:
                seen_now = (state.subspace > 4 * state.model.rounding()) & state.radius.isinf()
                state.radius = torch.where(seen_now, state.subspace, state.radius)
        started = self._clock("predict", started)
        if not self.config.project:
            return
        radii = [state.radius for state in states if state.radius is not None]
        before = torch.stack([state.subspace for state in states if state.subspace is not None])
        changes = project(models, seen, radii, self.config.sweeps, self._early and self._on_cpu, self._grams)
        if changes is not None:
            for block, change in zip(self.blocks, changes, strict=True):
                targets = block.targets(self._parameters)
                parts = [change.squeeze(0) if targets[0].dim() == 2 else change]
                if len(targets) > 1:
                    parts = list(change.unbind(0))
                torch._foreach_sub_(targets, [part.to(targets[0].dtype) for part in parts])
            for state, displacement in zip(states, seen, strict=True):
                state.subspace = displacement.energy()
        after = torch.stack([state.subspace for state in states if state.subspace is not None])
        kept = (after.sum() / before.sum().clamp(min=1e-37)).clamp(max=1.0).sqrt()
        self._kept_tensor = kept if self._kept_tensor is None else self._kept_tensor + kept
        self._kept.count += 1
        self._clock("project", started)

    # Measurement

    def probe(self, policy: Policy | None = None) -> dict[str, Measurement]:
        """Measure the protected domains whose turn it is; call after every step.

        A domain is due after 1, 2 and 4 foreign steps and then every `probe_steps`. When nothing is due
        the call costs nothing.

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
            due = state.foreign_steps in EARLY_PROBES or state.foreign_steps % self.config.probe_steps == 0
            if due and state.foreign_steps and state.measurable:
                found[name] = self.measure(name, policy)
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
        started = perf_counter()
        # Another rank may hold all rows of a domain: this one then adds nothing to the sums.
        now = anchor = mask = torch.zeros(0, 1, device=self.device)
        rewards: Tensor | None = torch.zeros(0, device=self.device)
        if state.retained is not None and state.anchor_scores is not None:
            now, anchor = (policy or self.policy)(state.retained), state.anchor_scores
            mask, rewards = state.retained.completion_mask, state.retained.rewards
        found = estimate(domain, now, anchor, mask, rewards, state.span, self._sum)
        subspace, residual = self.interference([domain])[domain]
        if state.radius is not None and not state.region.radius and math.isfinite(first := state.radius.item()):
            state.region.radius = state.region.largest = first
        result = state.region.measured(found, subspace, residual, adapt=self.config.project)
        if state.radius is not None and state.region.radius:
            state.radius.fill_(state.region.radius)
        state.measurement = result
        self._clock("probe", started)
        return result

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
        state = self._domains[domain]
        if not state.anchored or not state.foreign_steps:
            state.anchor_reward, state.evaluated = reward, True
            return
        state.true_reward = reward
        span = state.span
        if span is None or not state.measurable:
            return
        loss = self.measure(domain).loss
        if state.evaluated:
            state.region.truth((state.anchor_reward - reward) / (span[1] - span[0]))
        else:
            # The retained rows' rewards are of other prompts than the evaluation's.
            state.anchor_reward, state.evaluated = reward + loss * (span[1] - span[0]), True

    def predicted(self, domain: str) -> float:
        """Calibrated prediction of a domain's interference under the present weights.

        In parts of the domain's reward range, or nats per token where no rewards are at hand; NaN before
        the first measurement. Reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        state = self._anchored(domain)
        return state.region.predict(self.raw(domain)) if state.foreign_steps else 0.0

    def raw(self, domain: str) -> float:
        """Uncalibrated prediction, both parts; reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        return sum(self.interference([domain])[domain])

    @torch.no_grad()
    def interference(self, domains: Iterable[str] | None = None) -> dict[str, tuple[float, float]]:
        """Uncalibrated prediction of domains under the present weights, in one pass over them.

        Args:
            domains: Their names; all anchored ones by default.

        Returns:
            By domain: the part inside its directions, which the projection bounds, and the part outside,
            estimated through random directions. Reads the device.

        Raises:
            UnknownDomainError: If a domain has no anchor.
        """
        if domains is None:
            domains = [name for name, state in self._domains.items() if state.anchored]
        models = {name: model for name in domains if (model := self._anchored(name).model) is not None}
        parts = predict(self._weights(), list(models.values()), self._residuals) if models else []
        table = torch.stack([torch.stack(pair) for pair in parts]).tolist() if parts else []
        return {name: (inside, outside) for name, (inside, outside) in zip(models, table, strict=True)}

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """All metrics as plain numbers; `metrics.METRICS` says what each means. Reads the device.

        Means are taken since the last call.
        """
        if not self.enabled:
            return {}
        started = perf_counter()
        found = collect(self)
        self._clock("metrics", started)
        return found

    def take_kept(self) -> float | None:
        """Mean of `guard/update_kept` since the last call."""
        count = self._kept.count
        value = None if self._kept_tensor is None else self._kept_tensor.item() / count
        self._kept_tensor, self._kept.count = None, 0.0
        return value

    def take_seconds(self) -> float | None:
        """Guard seconds per step since the last call."""
        steps, seconds = self._reported
        total = sum(self.seconds.values())
        self._reported = (self.steps, total)
        return (total - seconds) / (self.steps - steps) if self.steps > steps else None

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

    def save(self, directory: str | Path) -> None:
        """Write the state beside a checkpoint, atomically; see `checkpoint.save`."""
        checkpoint.save(self, Path(directory))

    def load(self, directory: str | Path) -> None:
        """Read what `save` wrote; the guard is unchanged if anything is wrong with it."""
        checkpoint.load(self, Path(directory))

    def new_state(self, name: str) -> DomainState:
        """An empty state for a domain (used when a state file is read)."""
        settings = self.config
        curvature = DomainCurvature(0.5 ** (1 / settings.half_life), self._omegas)
        return DomainState(name, curvature, TrustRegion(settings.budget, settings.budget_nats))

    def replace_domains(self, domains: Mapping[str, DomainState]) -> None:
        """Put other states in place of all present ones (used when a state file is read)."""
        self._domains = dict(domains)
        self._grams.clear()
        self.overlaps.clear()

    # Parts

    @property
    def device(self) -> torch.device:
        """Where the guard's own tensors lie."""
        return next(iter(self._parameters.values())).device

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def _place(self) -> None:
        """Follow the model to another device."""
        if self._omegas and self._omegas[0].device != self.device:
            memo: dict[int, Tensor] = {}

            def move(tensor: Tensor) -> Tensor:
                return memo.setdefault(id(tensor), tensor.to(self.device))

            self._omegas[:] = [move(item) for item in self._omegas]
            self._residuals[:] = [move(item) for item in self._residuals]

    def _weights(self) -> list[Tensor]:
        return [block.gather(self._parameters) for block in self.blocks]

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

    def _anchor(self, state: DomainState) -> None:
        """Set a domain's anchor at the present weights and score its retained completions there."""
        if not state.curvature.sums or not state.curvature.count.item():
            # Only zero or non-finite gradients so far: there is nothing to protect.
            state.own_steps = 0
            return
        state.retained = state.latest(self.config.retain)
        state.pending = [] if state.retained is None else [state.retained]
        chosen = protected_rows(state, self)
        self._grams.clear()
        self.overlaps = {pair: value for pair, value in self.overlaps.items() if state.name not in pair}
        reuse = state.model if state.since_refresh < self.config.refresh_steps else None
        state.model = anchor_domain(
            state.curvature, self._weights(), self._residuals, self.config.rank, chosen, reuse
        )
        if reuse is None:
            state.since_refresh = 0
        rows = 0.0 if state.retained is None else float(len(state.retained))
        rewarded = state.retained is not None and state.retained.rewards is not None
        every, with_rewards = self._total([rows, rows if rewarded else 0.0])
        state.measurable = every > 0
        if not state.measurable:
            warnings.warn(
                f"No completions of domain {state.name!r} were retained, so its interference cannot be "
                "measured: its radius stays what the first foreign step sets. Call guard.retain().",
                stacklevel=4,
            )
        else:
            self._sync_span(state)
            state.anchor_scores = None if state.retained is None else self.policy(state.retained).detach()
            if with_rewards and not state.evaluated:
                own = state.retained.rewards if state.retained is not None else None
                (total,) = self._total([0.0 if own is None else own.double().sum().item()])
                state.anchor_reward = total / with_rewards
        state.anchored = True
        state.own_steps = state.foreign_steps = 0
        state.true_reward = math.nan
        state.subspace = None
        state.measurement = None
        state.start = None

    def _sync_span(self, state: DomainState) -> None:
        if self.reduce is not None:
            known = not math.isnan(state.low)
            limits = torch.tensor(
                [-state.low if known else -math.inf, state.high if known else -math.inf],
                dtype=torch.float64,
                device=self.device,
            )
            low, high = self.reduce(limits, "max").tolist()
            if math.isfinite(high):
                state.see_rewards(-low, high)

    def _sum(self, table: Tensor) -> Tensor:
        return table if self.reduce is None else self.reduce(table, "sum")

    def _total(self, values: list[float]) -> list[float]:
        """Sums over ranks."""
        if self.reduce is None:
            return values
        summed = self.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return [float(value) for value in summed.tolist()]

    def _clock(self, part: str, started: float) -> float:
        now = perf_counter()
        self.seconds[part] += now - started
        return now
