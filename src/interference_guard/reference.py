"""Reference domains: what the model could do before any RL, protected from given prompts and completions.

There are no training gradients of such a domain, so its curvature comes from backward passes of its own: a
Gauss-Newton matrix whose labels are drawn from the model's softened output. The softening matters. Where a model
has mastered its data its output is near certain, drawn labels agree with it, and plain Fisher gradients vanish.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .anchoring import set_anchor
from .batching import extent
from .curvature import DomainCurvature
from .errors import ConfigError, ShapeError, UnsupportedError
from .evaluating import evaluating
from .exact import exact_products
from .forward import logits_of
from .generators import generators_kept
from .guard_state import check_name
from .probe import POSITIONS, Completions, check_completions, scored

if TYPE_CHECKING:
    from .guard import Guard

TEMPERATURE = 2.0
# As a gradient scaler's: where the host casts the forward pass to fp16, gradients would vanish. A power of two:
# nothing else is rounded otherwise.
LOSS_SCALE = 1024.0


def protect(guard: Guard, domain: str, rows: Completions, passes: int, batch_size: int) -> None:
    """Anchor a domain at the present weights from given rows; see `Guard.protect`."""
    check_name(domain)
    check_completions(rows, f"guard.protect({domain!r}, ...)")
    for name, value in (("passes", passes), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"guard.protect({domain!r}, ...) was given {name}={value!r}. It is a whole number of at least 1."
            )
    if domain in guard.domains:
        raise ConfigError(
            f"Domain {domain!r} is known already: {sorted(guard.domains)}. A reference domain is protected once, "
            "before training, under a name of its own."
        )
    if guard.view.shards.managed:
        raise UnsupportedError(
            f"The model's parameters are sharded over {guard.view.shards.world} ranks, and their engine takes "
            "the gradients of a reference domain's backward passes. Protect it before the model is sharded and "
            "load the guard's state, or train data parallel (DDP)."
        )
    bare = (rows.completion_mask[:, 1:] != 0).sum(-1) == 0
    if not len(rows) or bool(bare.any()):
        row = int(bare.nonzero()[0]) if len(rows) else 0
        raise ShapeError(
            f"Row {row} of reference domain {domain!r} has no completion token to score; every row needs at "
            "least one after its prompt. Fill its completion or leave the row out."
        )
    started = perf_counter()
    rows = rows.detached().to(guard.device)
    guard.view.place()
    state = guard.new_state(domain)
    observe_softened(guard, state.curvature, rows, passes, batch_size)
    if not state.curvature.sums or not state.curvature.count.item():
        raise UnsupportedError(
            f"The {passes} backward passes on reference domain {domain!r} gave no finite gradient that is not "
            "zero, so nothing says what to protect. Check that the trainable parameters reach the model's logits."
        )
    state.keep(rows, guard.config.retain, guard.steps)
    state.own_steps = state.since_refresh = passes
    state.reference = True
    with torch.no_grad():
        set_anchor(guard, state)
    guard.adopt(state)
    guard.clock.add("anchor", started)


def observe_softened(
    guard: Guard, curvature: DomainCurvature, rows: Completions, passes: int, batch_size: int
) -> None:
    """Add backward passes on given rows to a curvature, in place; all ranks call it with the same rows.

    Args:
        guard: Its model and seed are used; no gradient of a parameter and no global generator is touched.
        curvature: Takes the sums.
        rows: On the guard's device.
        passes: Backward passes.
        batch_size: Rows of one pass; rows are used again when they run out. Where so many do not fit into the
            memory of every rank, one at a time makes as many more passes.

    Raises:
        UnsupportedError: If a single row does not fit, or the model cannot be differentiated.
    """
    failure = add_what_fits(guard, curvature, rows, passes * batch_size, (batch_size, 1))
    if failure is not None:
        raise UnsupportedError(
            f"No curvature of a reference domain can be had: {failure} Where memory is short, give shorter rows "
            "or turn on gradient checkpointing."
        )
    merge_ranks(guard, curvature)


def add_what_fits(
    guard: Guard, curvature: DomainCurvature, rows: Completions | None, total: int, sizes: Iterable[int]
) -> str | None:
    """Add backward passes over as many rows at a time as all ranks can make; all of them call it.

    Args:
        guard: The guard.
        curvature: Takes the sums, of this rank alone; empty before, and again where no size will do.
        rows: On the guard's device; None where this rank has none.
        total: Rows that all passes are made of; rows are used again when they run out.
        sizes: Rows of a pass, the most first.

    Returns:
        Why not even the last size will do, or None.
    """
    failure = None
    for size in sizes:
        failure = None if rows is None else _attempt(guard, curvature, rows, -(-total // size), size)
        # Ranks must go the same way: a step of one weighs as much as that of another.
        if not guard.ranks.any(failure is not None, guard.device):
            return None
        curvature.clear()
    return failure or "another rank has no room for them."


def _attempt(
    guard: Guard, curvature: DomainCurvature, rows: Completions, passes: int, batch_size: int
) -> str | None:
    """What `add_softened` does, or why it cannot: a rank that raised would leave the others waiting."""
    try:
        add_softened(guard, curvature, rows, passes, batch_size)
    except torch.OutOfMemoryError:
        return f"a backward pass over {batch_size} of its completions does not fit into the memory."
    except UnsupportedError as error:
        return str(error)
    except RuntimeError as error:
        return f"a backward pass over its completions ended with {type(error).__name__}: {error}."
    return None


def add_softened(
    guard: Guard, curvature: DomainCurvature, rows: Completions, passes: int, batch_size: int
) -> None:
    """Add backward passes over rows of this rank alone to a curvature, in place; nothing is summed over ranks."""
    generator = torch.Generator(device=guard.device).manual_seed(guard.config.seed)
    scale = torch.tensor(LOSS_SCALE, device=guard.device)
    with evaluating(guard.model), generators_kept(guard.device):
        for module in guard.model.modules():
            # transformers' layers save memory in training alone; what is random lies in modules below them.
            if _checkpoints(module):
                module.training = True
        for number in range(passes):
            chosen = torch.arange(number * batch_size, (number + 1) * batch_size, device=guard.device)
            batch = rows.rows(chosen[: len(rows)] % len(rows))
            batch = batch.columns(extent(batch.attention_mask))
            found = _gradients(guard.model, batch, generator)
            with exact_products(guard.device):
                curvature.observe(guard.view.arrange(found, scale))
            # Gradients are as large as the weights: the next pass must not make its own beside them.
            del found


def merge_ranks(guard: Guard, curvature: DomainCurvature) -> None:
    """Add up the sums of all ranks: their backward passes need not agree to the last bit, their sums must."""
    if guard.ranks.reduce is None or not curvature.sums:
        return
    tensors = [curvature.count]
    for sums in curvature.sums:
        tensors += [tensor for tensor in (sums.sketch, sums.energy) if tensor is not None]
    # One after the other: a host may gather what it sums, and all of them at once would be many times their size.
    for tensor in tensors:
        tensor.copy_(guard.ranks.sum(tensor.flatten()).view_as(tensor))


def _checkpoints(module: nn.Module) -> bool:
    """Whether a module recomputes its activations in a way that `torch.autograd.grad` can follow."""
    how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False)) and how.get("use_reentrant") is False


def _gradients(model: nn.Module, rows: Completions, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Gradients of the scaled loss on labels drawn from the softened output; no ``grad`` is touched."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = scored(rows)
    first = int(places[:, 1].min()) if len(places) else 0
    with torch.enable_grad():
        logits = logits_of(model, rows, first)
        slopes = _slopes(logits.detach(), places - places.new_tensor([0, first]), generator)
        found = torch.autograd.grad(logits, list(parameters.values()), slopes, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _slopes(logits: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the scaled loss, a mean of cross entropies, with respect to the logits, in their dtype.

    Few of them at a time are turned into fp32: with a large vocabulary a loss of all would need several times the
    memory of the logits.

    Args:
        logits: ``(rows, length, vocabulary)``.
        places: Row and column of those that score a token, ``(tokens, 2)`` int64; the others get 0.
        generator: Draws the labels.
    """
    slopes = torch.zeros_like(logits)
    for some in torch.split(places, POSITIONS) if len(places) else ():
        rows, columns = some.unbind(1)
        chances = (logits[rows, columns].float() / TEMPERATURE).softmax(-1)
        labels = torch.multinomial(chances, 1, generator=generator)
        chances.scatter_add_(-1, labels, chances.new_full(labels.shape, -1.0))
        slopes[rows, columns] = chances.mul_(LOSS_SCALE / (TEMPERATURE * len(places))).to(slopes.dtype)
    return slopes
