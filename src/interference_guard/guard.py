"""The guard: one object beside a model. It is told what each step trains, and protects earlier domains.

Data flows one way: gradients -> curvature -> local model -> prediction -> projection, and
completions -> probe -> trust region. The guard knows no trainer: a host calls `begin`, `before_step`,
`after_step`, `retain` and `probe`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from . import checkpoint, measuring, packing, recovering, reference, renewing, stepping
from .errors import UnknownDomainError
from .evaluating import bare
from .exact import exact_products
from .guard_state import GuardState, check_module
from .metering import collect
from .places import Places, curvature_places, projected_places
from .probe import Completions, Measurement, Policy, check_completions, model_policy
from .recut import restored, share_out
from .trust_region import Raw


class Guard(GuardState):
    """Keeps the weights inside a trust region for every earlier domain, sized by the loss of its reward.

    Args:
        model: The policy. Its trainable parameters are read here and changed only by `after_step`. Under
            DeepSpeed the engine that ``deepspeed.initialize`` returned.
        config: Settings.
        policy: Gives log-probabilities of completions under the current weights; `model_policy(model)`
            by default. Hosts that compute them in a special way pass their own.
        reduce: Reduces a 1-d tensor over data-parallel ranks, ``reduce(tensor, "sum" | "max")``. All ranks then
            call the guard, and measure and decide the same; None in a single process.

    Raises:
        UnsupportedError: If the model holds something the guard cannot protect; nothing is changed.

    Examples:
        >>> from interference_guard import GuardConfig
        >>> model = torch.nn.Linear(4, 2)
        >>> guard = Guard(model, GuardConfig(rank=2, sketch=4))
        >>> with guard.domain("math"):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     guard.before_step()
        ...     guard.after_step()
        >>> guard.domains["math"].own_steps
        1
    """

    def bind(self, model: nn.Module) -> None:
        """Continue with another object of the same model, for instance in the next phase's trainer.

        The guard's default policy follows; a host's own does not. The model may have been sharded since.

        Raises:
            ConfigError: If it is not a module.
            ShapeError: If its trainable parameters differ; nothing is changed then.
            StateError: If they are sharded in another way than when the guard's sums were taken.
        """
        if not self.enabled:
            return
        check_module(model)
        if self._domains and self.view.shared_since(model):
            share_out(self, model)
        else:
            self.view.bind(model, known=list(self._domains))
        self.model = bare(model)
        if self._own_policy:
            self.policy = model_policy(self.model)

    # Also for hosts in inference mode, whose tensors can neither be changed nor be part of a graph afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def retain(self, domain: str, completions: Completions) -> None:
        """Keep a domain's latest completions, on which its interference is measured later.

        Args:
            domain: Its name.
            completions: Copied; `retain` of the latest rows will be kept, spread over their prompts. Their
                rewards widen the domain's reward range. Rows whose reward is not finite are left out.

        Raises:
            MissingDomainError: If the name is not a non-empty string.
            ShapeError: If they are not completions, or their shapes do not fit.
        """
        if not self.enabled:
            return
        check_completions(completions, f"guard.retain({domain!r}, ...)")
        started = perf_counter()
        rows = completions.finite()
        if not len(rows):
            return
        state = self.state_of(domain)
        state.keep(rows.evenly(self.retain_here).to(self.device), self.retain_here, self.steps)
        state.lengths.add(float(rows.completion_mask.sum().item()), len(rows))
        if rows.rewards is not None:
            rewards = rows.rewards.detach().float()
            lowest, highest = rewards.min().item(), rewards.max().item()
            if state.outlies(lowest, highest):
                self._warn_range(state, lowest, highest)
            state.see_rewards(lowest, highest)
            state.note_rewards(rewards.sum().item(), len(rewards))
        self.clock.add("retain", started)

    @torch.inference_mode(False)
    def protect(self, domain: str, completions: Completions, *, passes: int = 64, batch_size: int = 8) -> None:
        """Protect a domain that is known only from given rows, starting at the current weights.

        For what the model could do before any RL: curvature from backward passes with labels drawn from the
        softened output, an anchor at the current weights, and a probe on the rows. Parameters' gradients, the
        optimizer and the global random generators are not touched. On several ranks, give all of them the same
        rows.

        Args:
            domain: A name that no other domain has.
            completions: The rows; without rewards the interference is measured in nats per token.
            passes: Number of backward passes.
            batch_size: Rows in one pass; rows are used again when they run out.

        Raises:
            ConfigError: If the domain is known already, or there is no pass or no row in one.
            MissingDomainError: If the name is not a non-empty string.
            ShapeError: If a row has no completion token, or they are no completions; nothing is changed then.
            UnsupportedError: If the model returns no logits, no gradient comes of the passes or has room, or an
                engine shares the parameters out and keeps their gradients.
        """
        if self.enabled:
            reference.protect(self, domain, completions, passes, batch_size)

    # The optimizer step

    @torch.no_grad()
    def before_step(self) -> None:
        """Observe the step's gradients; call when they are final and the weights are still unchanged.

        Domains that were trained until now, and are not in this step, get their anchor here.

        Raises:
            MissingDomainError: If `begin` or `domain` has not said what the step trains, or `end` was called
                since.
            HostError: If a domain is to be anchored and the model's parameters were replaced; see `bind`.
        """
        if self.enabled:
            stepping.open_step(self)
            if self.view.zero is None:
                with exact_products(self.device):
                    stepping.take_gradients(self)

    @torch.no_grad()
    def open_step(self) -> None:
        """All of `before_step` that needs no gradients, anchors among it; raises as that does.

        `attach` calls it, since a closure may be evaluated at other weights than those that are stepped.
        """
        if self.enabled:
            stepping.open_step(self)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Take in the gradients of a step that `open_step` began; call when they are final.

        `attach` does it: after the first evaluation of a closure, and where DeepSpeed takes a step in parts, when
        the gradients of all parts are held.
        """
        if self.enabled:
            with exact_products(self.device):
                stepping.take_gradients(self)

    @torch.no_grad()
    def after_step(self) -> None:
        """Predict the interference at the current weights, and project them if it is too high.

        With sharded parameters the step's gradients are read again: clear them only afterwards.

        Raises:
            HostError: If the optimizer changed the gradients of sharded parameters during its step.
        """
        if not self.enabled:
            return
        self.steps += 1
        states = [self._domains[name] for name in self.protected]
        if states or self.observation is not None:
            with exact_products(self.device):
                stepping.hold(self, states)

    # Measurement

    @torch.inference_mode(False)
    @torch.no_grad()
    def probe(self, policy: Policy | None = None, *, free: bool = True) -> dict[str, Measurement]:
        """Measure the protected domains that are due; call after every step.

        A domain is due after 1, 2 and 4 foreign steps and then every `probe_steps`; if its region was moved,
        also 1, 2 and 4 steps after that. When nothing is due the call costs nothing. With `recovery`, the
        measurements also move the recovery schedule: afterwards `recovery` names the domain to train next, or is
        None.

        Args:
            policy: Replaces the guard's own for this call.
            free: Whether the next step may train another domain. Give False between the steps of one batch of
                rollouts, which the host uses up first: a recovery phase neither begins nor ends there.

        Returns:
            The measurements made, by domain.
        """
        found: dict[str, Measurement] = {}
        if not self.enabled:
            return found
        # A host may ask again after a step that was skipped: what is known need not be measured twice.
        for name in self.protected if self.asked != self.steps else ():
            state = self._domains[name]
            if name != self.recovery and measuring.due(self, state):
                found[name] = measuring.measure(self, state, policy)
        # Only now: where a policy raised, the domains still have their turn.
        self.asked = self.steps
        if self.config.recovery:
            self.unfollowed |= found
            if free and self.steps > self.followed:
                took, self.followed = self.steps - self.followed, self.steps
                unfollowed, self.unfollowed = self.unfollowed, {}
                recovering.follow(self, unfollowed, policy, took)
        # Afterwards: a domain that is given steps of its own comes back to where its region stands.
        for name in found:
            renewing.renew_if_due(self, self._domains[name])
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(self, domain: str, policy: Policy | None = None) -> Measurement:
        """Measure one protected domain now, calibrate its prediction and adapt its radius, or move its region.

        Raises:
            UnknownDomainError: If the domain has no anchor, no completions were retained before it, or the guard
                is off.
        """
        state = self.anchored(domain)
        if not state.measurable:
            raise UnknownDomainError(
                f"Domain {domain!r} has an anchor but no retained completions, so nothing can be measured. "
                f"Call guard.retain({domain!r}, completions) during its own steps."
            )
        found = measuring.measure(self, state, policy)
        renewing.renew_if_due(self, state)
        return found

    def calibrate(self, domain: str, reward: float) -> None:
        """Report the true mean reward of a domain under the current weights, from an evaluation.

        Between the domain's last own step and the first foreign one it is the reward at the anchor. After that it
        corrects the scale of the domain's measurements; if there is none at the anchor, the first one is the
        reference for later ones. NaN is ignored. All ranks call it, and the mean of what they give counts.

        Raises:
            ConfigError: If it is not a number.
            UnknownDomainError: If the guard has never seen the domain.
        """
        if not self.enabled:
            return
        if domain not in self._domains:
            raise self._unknown(domain)
        measuring.calibrate(self, self._domains[domain], reward)

    def abandon_recovery(self) -> None:
        """Abandon the current recovery phase, for instance because the host has no rows of its domain.

        It counts as failed, and the domain keeps its old anchor. Without a phase nothing happens.
        """
        recovering.abandon(self)

    def predicted(self, domain: str) -> float:
        """Calibrated prediction of a domain's interference under the current weights.

        A share of the domain's reward range, or nats per token without rewards. 0 before the first foreign step,
        NaN from there to the first measurement, and where the guard is off. Reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        if not self.enabled:
            return math.nan
        state = self.anchored(domain)
        return state.region.predict(self.raw_parts([domain])[domain]) if state.foreign_steps else 0.0

    def raw(self, domain: str) -> float:
        """Uncalibrated quadratic prediction, inside and outside the directions; NaN where the guard is off.

        Reads the device.

        Raises:
            UnknownDomainError: If the domain has no anchor.
        """
        if not self.enabled:
            return math.nan
        return self.raw_parts([domain])[domain].quadratic

    @torch.no_grad()
    def raw_parts(self, domains: Iterable[str] | None = None) -> dict[str, Raw]:
        """Uncalibrated prediction for domains under the current weights, in one pass over the weights.

        Args:
            domains: Their names; all anchored ones by default.

        Returns:
            By domain the parts of its prediction; reads the device.

        Raises:
            UnknownDomainError: If a domain has no anchor.
        """
        if not self.enabled:
            return {}
        if domains is None:
            # By name: ranks may have met the domains in another order, and sum what each of them sees.
            domains = sorted(name for name, state in self._domains.items() if state.anchored)
        return measuring.predictions(self, [self.anchored(name) for name in domains])

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """All metrics as plain numbers; `metrics.METRICS` says what each means. Reads the device.

        Means are since the last call, over all ranks' rows: with several ranks, all of them must call it.
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
        """Everything needed to go on exactly: see `packing.pack`. Not copied; empty where nothing is enabled."""
        return {**packing.pack(self), **packing.REFUSAL} if self.enabled else {}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over a `state_dict`; checked as a whole before anything is changed.

        Raises:
            StateError: If it is of another model or of other settings.
            StateVersionError: If its format is unknown.
        """
        if self.enabled:
            restored(self, state)()

    def save(self, directory: str | Path, *, folders: int = 1, place: tuple[int, int] | None = None) -> None:
        """Write the state beside a checkpoint, atomically; see `checkpoint.save`.

        Raises:
            StateError: If the files cannot be written, or ranks would overwrite each other's.
        """
        if self.enabled:
            checkpoint.save(self, Path(directory), folders, place)

    @torch.inference_mode(False)
    def load(
        self,
        directory: str | Path,
        *,
        ranks: Sequence[str | Path] | None = None,
        place: tuple[int, int] | None = None,
    ) -> None:
        """Read what `save` wrote; the guard is unchanged if anything is wrong with it.

        The model may lie on another number of ranks than before; all ranks call it: see `checkpoint.load`.

        Args:
            directory: Holds this rank's files.
            ranks: The folders of all ranks that saved, in their order, where each had one of its own and there
                were more or fewer than now.
            place: This rank and their number, among those that keep completions; as `save` was given it.

        Raises:
            StateError: If a file is missing, damaged, or of another model, other settings, rank or moment.
            StateVersionError: If its format is unknown.
        """
        if not self.enabled:
            return
        folders = None if ranks is None else [Path(folder) for folder in ranks]
        checkpoint.load(self, Path(directory), folders, place)
