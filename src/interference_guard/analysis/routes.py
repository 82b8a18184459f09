"""Which neurons a domain's prompts run through, and how two domains' updates meet on the shared ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interference_guard.errors import CheckpointError, UnsupportedError
from interference_guard.evaluating import evaluating
from interference_guard.protected import jaccard
from interference_guard.units import CHANNELS_IN, UnitLayout, canonical_name

from .checkpoints import Weights, check_same, unit_layout
from .edits import neuron_sums, top_neurons
from .part import displacement
from .pieces import matrix_shape, unit_pieces
from .running import ADAPTER, saved_name


@torch.no_grad()
def active_neurons(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], share: float = 0.1
) -> dict[str, Tensor]:
    """The most active neurons of some prompts: by the mean size of their activation over all tokens.

    Args:
        model: The policy; run in evaluation mode, and left in the mode it was in.
        batches: Keyword arguments of its forward pass; tokens with `attention_mask` 0 are left out.
        share: Part of the neurons of each MLP that counts as active.

    Returns:
        Bool mask by MLP, ``(channels,)``; of an adapted model by the names of its base. Stacks of experts, which
        are no modules, are left out.

    Raises:
        UnsupportedError: If the model has no MLP whose channels are known, or one of them sees a part of the
            tokens and they are masked.
    """
    readers = _readers(model)
    if not readers:
        raise UnsupportedError(
            f"{type(model).__name__} has no MLP with a known gate, up and down projection, so there are no "
            f"neurons to watch. Known names of the last are {sorted(CHANNELS_IN)}."
        )
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(mlp: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Some MLPs, beside experts for instance, see all tokens in one row.
            size = inputs[0].detach().abs().double().flatten(0, -2)
            if mask is not None:
                if len(size) != mask.numel():
                    raise UnsupportedError(
                        f"{mlp} saw {len(size)} tokens of a batch of {mask.numel()}, so which are padding "
                        "cannot be told. Give batches without padding, and without an attention_mask."
                    )
                size = size * mask.to(size.device).flatten().unsqueeze(-1)
            total = size.sum(0).cpu()
            sums[mlp] = sums[mlp] + total if mlp in sums else total

        return hook

    handles = [module.register_forward_pre_hook(watch(mlp)) for mlp, module in readers.items()]  # type: ignore[arg-type]
    try:
        with evaluating(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {mlp: top_neurons({mlp: total}, share)[mlp] for mlp, total in sums.items()}


def _readers(model: nn.Module) -> dict[str, nn.Module]:
    """The layer of each MLP that reads its channels, by the MLP's name."""
    views = UnitLayout(model.named_parameters(), module=model).views
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for name, view in views.items():
        # An adapted layer hands its input on to the base layer.
        owner = name.removesuffix(".weight").removesuffix(".base_layer")
        last = owner.rpartition(".")[2]
        if view.neuron is not None and last in CHANNELS_IN and owner in modules and not view.stacked:
            found[view.neuron.removeprefix(ADAPTER)] = modules[owner]
    return found


@dataclass
class Routes:
    """How two domains meet.

    Args:
        overlap: Jaccard index of their active neurons.
        chance: What it would be between random sets of these sizes.
        shared_cosine: Cosine of their updates on the neurons both use.
        other_cosine: The same on all other neurons.
        synergy: Part of the shared neurons whose updates agree in sign.
        shared: Number of neurons both use.
    """

    overlap: float
    chance: float
    shared_cosine: float
    other_cosine: float
    synergy: float
    shared: int


def compare_routes(
    first: tuple[Mapping[str, Tensor], Weights, Weights], second: tuple[Mapping[str, Tensor], Weights, Weights]
) -> Routes:
    """Compare two domains' active neurons and, on the shared ones, the directions of their updates.

    Args:
        first: Active neurons, weights before the domain's training, and after.
        second: The other domain's.

    Raises:
        CheckpointError: If the checkpoints are of different architectures, or have no MLP of a mask's name and
            size.
    """
    products = _products(first[1:], second[1:])
    masks, other = (_of_checkpoint(item[0], products["product"], first[1]) for item in (first, second))
    if masks.keys() != other.keys():
        raise CheckpointError(
            f"The active neurons are of different models: {min(masks.keys() ^ other.keys())!r} is in one alone. "
            "Watch one model, or two of one architecture."
        )
    both = {mlp: mask & other[mlp] for mlp, mask in masks.items()}
    shared = torch.cat(list(both.values()))
    table = {key: torch.cat([values[mlp] for mlp in both]) for key, values in products.items()}
    sizes = [sum(int(mask.sum()) for mask in item.values()) for item in (masks, other)]
    common = sizes[0] * sizes[1] / len(shared)
    count = int(shared.sum())
    return Routes(
        overlap=jaccard(masks, other),
        chance=common / max(sum(sizes) - common, 1),
        shared_cosine=_cosine(table, shared),
        other_cosine=_cosine(table, ~shared),
        synergy=int((table["product"][shared] > 0).sum()) / max(count, 1),
        shared=count,
    )


def _of_checkpoint(
    masks: Mapping[str, Tensor], neurons: Mapping[str, Tensor], weights: Weights
) -> dict[str, Tensor]:
    """Active neurons by the checkpoint's names of the MLPs."""
    found: dict[str, Tensor] = {}
    for mlp, mask in masks.items():
        there = saved_name(mlp, neurons)
        size = None if there is None else len(neurons[there])
        if there is None or size != len(mask):
            raise CheckpointError(
                f"{weights.label} and the watched model do not meet: {mlp!r} has {len(mask)} neurons in the "
                f"model and {size} in the checkpoint, whose MLPs are called like {next(iter(neurons), None)!r}. "
                "Watch the model as it was saved, for instance a causal language model and not its body alone."
            )
        found[there] = mask
    return found


def _products(first: tuple[Weights, Weights], second: tuple[Weights, Weights]) -> dict[str, dict[str, Tensor]]:
    """Inner product and squared lengths of two updates by neuron."""
    for weights in (first[1], *second):
        check_same(first[0], weights)
    views = unit_layout(first[0]).views
    units: dict[str, dict[str, Tensor]] = {"product": {}, "first": {}, "second": {}}
    for name, view in views.items():
        if view.neuron is None:
            continue
        shape = matrix_shape(view)
        sums = {key: torch.zeros(shape, dtype=torch.float64, device="cpu") for key in units}
        for piece in unit_pieces(view):
            a, b = (
                piece.view(displacement(name, after, before=before)(piece.first, piece.last)).double()
                for before, after in (first, second)
            )
            piece.part(sums["product"]).add_((a * b).sum(-1))
            piece.part(sums["first"]).add_(a.square().sum(-1))
            piece.part(sums["second"]).add_(b.square().sum(-1))
        for key, values in units.items():
            values[name] = sums[key].flatten()
    return {key: neuron_sums(values, views) for key, values in units.items()}


def _cosine(table: Mapping[str, Tensor], chosen: Tensor) -> float:
    scale = float(table["first"][chosen].sum() * table["second"][chosen].sum()) ** 0.5
    return float(table["product"][chosen].sum()) / scale if scale > 0 else 0.0
