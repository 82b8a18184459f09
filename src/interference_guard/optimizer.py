"""Runs a guard inside any torch optimizer: step hooks on the innermost one, or a wrapper built on them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from .closures import closure_of, observed, with_closure
from .eager import eager
from .errors import ConfigError, HostError, UnsupportedError
from .guard import Guard
from .innermost import innermost
from .nested import outermost
from .unusual import scale_of, trains_nothing
from .zero import Zero, partitioned

HOOK_TABLES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# The optimizers that `attach` has given hooks, as long as they live.
_HOOKED: WeakSet[Optimizer] = WeakSet()


class StepHooks:
    """The hooks that `attach` set; `detach` removes them and leaves nothing behind.

    Works as a context manager that detaches on exit.
    """

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    @property
    def attached(self) -> bool:
        """Whether the hooks are still in place."""
        return bool(self._handles)

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> StepHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(optimizer: Any, guard: Guard, begin: Callable[[], None] | None = None) -> StepHooks:
    """Call `guard.before_step` and `guard.after_step` around every step of an optimizer.

    Nothing but two step hooks is added: neither state, gradients nor hyper-parameters are touched. With a
    closure the guard sets its anchors before the first evaluation, which may be at other weights than those that
    are stepped, and takes the gradients after it. DeepSpeed's ZeRO steps its optimizer once for each of its flat
    buffers, which makes one step of the guard. A step that `GradScaler` skips is none, nor is the one by which
    `torch.distributed.checkpoint` sets up a new optimizer.

    Args:
        optimizer: A torch optimizer, or a wrapper around one (accelerate's `AcceleratedOptimizer`, the
            ``engine.optimizer`` of DeepSpeed).
        guard: The guard; under ZeRO one that was built on the engine.
        begin: Called before `guard.before_step`, and before a closure, by hosts that know the step's domains only
            then.

    Returns:
        The hooks; `detach()` removes them.

    Raises:
        ConfigError: If the guard is none.
        UnsupportedError: If the optimizer cannot be hooked; nothing is attached then.
        HostError: If the guard watches this optimizer already, or another one that steps other parameters, if the
            optimizer steps none of the guard's parameters or the model has others now, or if it is a ZeRO
            optimizer and the guard was not built on its engine.
    """
    if not isinstance(guard, Guard):
        raise ConfigError(
            f"attach() was given a guard of type {type(guard).__name__}. Give it the Guard of the model."
        )
    inner = innermost(optimizer)
    if _watches(guard, inner):
        raise HostError(
            f"This guard watches this {type(inner).__name__} already, and would count each step twice. Keep the "
            "hooks there are, or call their detach() first."
        )

    def announce() -> None:
        if begin is not None:
            begin()
        guard.rate = _rate(inner)
        guard.grad_scale = scale_of(inner)

    def open_step() -> None:
        announce()
        guard.before_step()

    def open_closure() -> None:
        announce()
        guard.open_step()

    if (sharded := partitioned(optimizer)) is not None and guard.enabled:
        return _hooks(inner, guard, *_in_parts(sharded, guard, open_step))
    _check_parameters(inner, guard)
    before_step, after_step = eager(open_step), eager(guard.after_step)
    before_closure, after_closure = eager(open_closure), eager(guard.take_gradients)
    idle = False

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal idle
        if idle := not guard.enabled or trains_nothing(optimizer, begin is not None or bool(guard.active)):
            return None
        closure, place = closure_of(args, kwargs)
        if closure is None:
            before_step()
            return None
        before_closure()
        return with_closure(args, kwargs, observed(closure, after_closure), place)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not idle:
            after_step()

    return _hooks(inner, guard, before, after)


def _rate(optimizer: Optimizer) -> float:
    """The largest learning rate of the groups; NaN where there is none, or reading it would stall a device."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates):
        return math.nan
    # Some optimizers find their rate themselves, and say None.
    return max((float(rate) for rate in rates if rate is not None), default=math.nan)


def _watches(guard: Guard, optimizer: Optimizer) -> bool:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    return any(isinstance(hook, _Before) and hook.guard is guard for hook in hooks)


def _check_parameters(optimizer: Optimizer, guard: Guard) -> None:
    if not guard.enabled:
        return
    watched = {id(item) for item in guard.view.parameters.values()}
    steps = _stepped(optimizer)
    if not watched & steps:
        raise HostError(
            f"{type(optimizer).__name__} steps {len(steps)} parameters, and none of them is among the "
            f"{len(watched)} the guard watches. Build the guard on the model whose parameters the optimizer was "
            "given, or call guard.bind(model)."
        )
    guard.view.check_in_place()
    if _beside(guard, watched, steps) is not None:
        # One that nobody holds any more is in a cycle with its hooks, and does not count.
        gc.collect()
    if (other := _beside(guard, watched, steps)) is not None:
        raise HostError(
            f"This guard watches a {type(other).__name__} already, which steps other parameters than this "
            f"{type(optimizer).__name__}: each step of training would count as two. Detach it if it is no longer "
            "used. Where both step together attach the guard to neither, and call guard.before_step() before the "
            "first of them steps and guard.after_step() after the last."
        )


def _beside(guard: Guard, watched: set[int], steps: set[int]) -> Optimizer | None:
    """An optimizer that this guard watches and that steps other parameters of it.

    One that steps the same parameters takes turns with it, as one for each domain does.
    """
    for other in list(_HOOKED):
        mine = watched & _stepped(other)
        if mine and not mine & steps and _watches(guard, other):
            return other
    return None


def _stepped(optimizer: Optimizer) -> set[int]:
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}


def _hooks(
    optimizer: Optimizer, guard: Guard, before: Callable[..., Any], after: Callable[..., Any]
) -> StepHooks:
    handles: list[Any] = [optimizer.register_step_pre_hook(_Before(guard, outermost(optimizer, before)))]
    try:
        handles.append(optimizer.register_step_post_hook(outermost(optimizer, after)))
    except BaseException:
        handles[0].remove()
        raise
    _HOOKED.add(optimizer)
    return StepHooks(handles)


@dataclass(frozen=True, eq=False)
class _Before:
    """A pre-hook by which `attach` knows again whose it is."""

    guard: Guard
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _in_parts(
    sharded: Any, guard: Guard, open_step: Callable[[], None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks for an optimizer that ZeRO steps once for each of its buffers."""

    def zero() -> Zero:
        found = guard.view.zero
        if found is None or found.optimizer is not sharded:
            raise HostError(
                f"The optimizer is DeepSpeed's {type(sharded).__name__}, and the guard does not know its engine. "
                "Build it on what deepspeed.initialize returned, Guard(engine), or call guard.bind(engine)."
            )
        return found

    zero()

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        buffers = zero()
        if buffers.hold(optimizer):
            open_step()
            buffers.put_away()
        if buffers.complete:
            guard.take_gradients()

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        buffers = zero()
        buffers.check_untouched(optimizer)
        if buffers.complete:
            guard.after_step()
            buffers.release()

    return before, after


class GuardedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that wraps any other; a guard observes each step and corrects the weights.

    It shares the inner optimizer's ``param_groups``, ``state``, ``defaults`` and hooks, so learning-rate
    schedulers, `GradScaler`, ``accelerator.prepare`` and ``state_dict`` work as with the inner one, and a
    state dict saved from either loads into the other. Further methods of the inner optimizer (`train` and
    `eval` of the schedule-free ones) can be called on it too.

    Args:
        optimizer: The optimizer that makes the steps.
        guard: The guard. Parameters added later by `add_param_group` are protected only if they were
            trainable when the guard was built.

    Raises:
        UnsupportedError: If the optimizer cannot be hooked.
    """

    def __init__(self, optimizer: Optimizer, guard: Guard) -> None:
        # Optimizer.__init__ would make its own groups and state; these must be the inner one's.
        self.hooks = attach(optimizer, guard)
        self.guard = guard
        self.optimizer = optimizer
        for table in HOOK_TABLES:
            setattr(self, table, getattr(innermost(optimizer), table))
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer, observed before and projected after it."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    # Marks the step as hooked: the inner optimizer runs the (shared) hooks, once.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; the guard's own state is `Guard.state_dict`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the inner optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def detach(self) -> Optimizer:
        """Remove the guard's hooks; returns the inner optimizer, which goes on unguarded."""
        self.hooks.detach()
        return self.optimizer

    def __getattr__(self, name: str) -> Any:
        # Private names stay the wrapper's own: GradScaler asks for some to let a fused step unscale.
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        raise UnsupportedError(
            "A GuardedOptimizer cannot be copied or pickled: its hooks and its guard belong to one model. "
            "Save state_dict() of the optimizer and of the guard, and build both anew."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
