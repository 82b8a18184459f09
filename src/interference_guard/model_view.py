"""The model as the guard sees it: its trainable parameters in unit view, and the random matrices they meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import STACK_LIMIT, Block, Blocks, make_blocks
from .checks import difference, trainable_parameters
from .config import GuardConfig
from .curvature import sketch_matrices
from .errors import HostError, ShapeError, StateError
from .flat import FlatView
from .local_block import Correction
from .residual import full_matrices, rank_of, residual_matrices
from .rounding import round_at_random
from .shards import Shards, Spread, is_sharded, reshard
from .units import UnitLayout, canonical_name
from .zero import Zero, whole_shape, zero_of

# Steps between two seeds, more than a run has.
SEEDS = 1 << 40


class ModelView:
    """Reads weights and gradients in unit view, same-shaped matrices batched, and changes weights in place.

    Args:
        model: The policy; its trainable parameters are meant. Under DeepSpeed the engine around it.
        config: Settings.

    Raises:
        UnsupportedError: If the model holds something that cannot be guarded.
    """

    def __init__(self, model: nn.Module, config: GuardConfig) -> None:
        self._model = model
        # A forward pass before, of an evaluation, leaves whole parameters in place of the pieces.
        reshard(model)
        self._parameters = trainable_parameters(model)
        shapes = {
            name: torch.empty(whole_shape(tensor), device="meta") for name, tensor in self._parameters.items()
        }
        self.layout = UnitLayout(shapes.items(), config.overrides(), module=model)
        self._config = config
        self.shards = Shards(self._parameters, zero_of(model))
        self._lay_out()
        self.place()

    def bind(self, model: nn.Module, *, known: Sequence[str] = ()) -> None:
        """Go on with another object of the same model.

        Args:
            model: The same model.
            known: Domains the guard has sums of, which are of the pieces here.

        Raises:
            ShapeError: If its trainable parameters differ; nothing is changed then.
            StateError: If they lie on the ranks in other pieces and there are sums of the former ones.
        """
        found = self._same(model)
        shards = Shards(found, zero_of(model))
        agrees = self.shards.agrees(shards)
        if known and not agrees:
            raise StateError(
                f"The guard knows {sorted(known)} from a model that lay on the ranks in other pieces. "
                "Go on with the model as it was sharded, or build the guard after it is sharded."
            )
        self._model, self._parameters = model, found
        self.shards = shards
        if not agrees:
            self._lay_out()
        self.place()

    def check_in_place(self) -> None:
        """Check that the model still has the parameters that are watched.

        Engines that share parameters out show others while a module runs, and are not asked.

        Raises:
            HostError: If some were replaced since.
        """
        if self.shards.managed:
            return
        present = set(map(id, self._model.parameters()))
        gone = [name for name, parameter in self._parameters.items() if id(parameter) not in present]
        if gone:
            raise HostError(
                f"{len(gone)} of the {len(self._parameters)} parameters that the guard watches are no longer "
                f"the model's, for instance {gone[0]!r}: they were replaced after the guard was built, as "
                "by load_state_dict(assign=True), a resized embedding or sharding, and what training does to the "
                "new ones would not be seen. Call guard.bind(model) where shapes are as before, else build the "
                "guard afterwards."
            )

    def shared_since(self, model: nn.Module) -> bool:
        """Whether ranks share the parameters of the same model, which were whole here; `ShapeError` as `bind`."""
        found = self._same(model)
        return not self.shards.sharded and Shards(found, zero_of(model)).sharded

    def _same(self, model: nn.Module) -> dict[str, nn.Parameter]:
        reshard(model)
        found = trainable_parameters(model)
        mine = {name: whole_shape(tensor) for name, tensor in self._parameters.items()}
        theirs = {name: whole_shape(tensor) for name, tensor in found.items()}
        if mine != theirs:
            raise ShapeError(
                "The guard was built for other trainable parameters: "
                f"{difference(mine, theirs, ('before', 'now'))}. Go on with the same model, or build a new guard."
            )
        return found

    @property
    def spread(self) -> Spread | None:
        """How the blocks lie on several ranks; None where all of them lie here."""
        return Spread([block.region for block in self.blocks], self.shards) if self.shards.sharded else None

    @property
    def gathered(self) -> bool:
        """Whether a forward pass gathers weights from ranks, which must all make it then.

        The frozen weights of a base model may be sharded where the trained adapters are whole.
        """
        return self.shards.sharded or any(is_sharded(tensor) for tensor in self._model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the parameters lie, and with them all tensors of the guard."""
        return next(iter(self._parameters.values())).device

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable parameters by name."""
        return self._parameters

    @property
    def zero(self) -> Zero | None:
        """The buffers of the DeepSpeed engine the model is trained by, or None."""
        return self.shards.zero

    def _lay_out(self) -> None:
        config = self._config
        self.blocks = make_blocks(self.layout, self.pieces(), self.shards)
        self.omegas = sketch_matrices(self.blocks, config.sketch, config.seed)
        """Test matrices of the curvature per block, ``(width, sketch)`` fp32; shared by blocks of one width."""
        self.residuals = residual_matrices(self.blocks, config.residual, config.seed)
        """Random directions R of the residual part per block; see `residual.residual_matrices`."""
        self.edits = full_matrices(self.blocks, config.residual, config.seed)
        """Random directions through which edits are seen per block, ``(width, residual)`` fp32."""
        self.ranks = [rank_of(block, config.rank) for block in self.blocks]
        """Most directions kept of a matrix per block."""

    def pieces(self) -> dict[str, Tensor]:
        """What of each trainable parameter lies on this rank, sharing its memory."""
        return {name: self.shards.local(parameter) for name, parameter in self._parameters.items()}

    def place(self) -> None:
        """Follow the model to another device."""
        if self.omegas and self.omegas[0].device != self.device:
            memo: dict[int, Tensor] = {}

            def move(tensor: Tensor) -> Tensor:
                return memo.setdefault(id(tensor), tensor.to(self.device))

            # In place: the curvatures share these lists.
            self.omegas[:] = [move(item) for item in self.omegas]
            self.residuals[:] = [move(item) for item in self.residuals]
            self.edits[:] = [move(item) for item in self.edits]

    def reshard(self) -> None:
        """Call after a forward pass that no backward pass follows; see `shards.reshard`."""
        reshard(self._model)

    def weights(self) -> Blocks:
        """What lies here per block, ``(matrices, units, width)`` fp32, as it is when a block is asked for.

        Take them afresh at every use: blocks may share memory with the parameters, and engines swap it.
        """
        return Blocks(self.blocks, self.pieces())

    def gradients(self, scale: Tensor | None = None) -> Blocks:
        """The parameters' gradients, laid out as `weights`, divided by a loss scale that is still in them."""
        table = {
            name: _readable(self.shards.gradient(name, parameter)) for name, parameter in self._parameters.items()
        }
        return Blocks(self.blocks, table, self.device, scale)

    def arrange(self, gradients: Mapping[str, Tensor | None], scale: Tensor | None = None) -> Blocks:
        """Gradients given by parameter name, laid out as `weights`; None, or a name not given, reads as zero."""
        table: dict[str, Tensor | None] = dict.fromkeys(self._parameters)
        for name, gradient in gradients.items():
            # `torch.autograd.grad` gives them in the layout of the activations, and not of the parameters.
            dense = _dense(gradient)
            table[canonical_name(name)] = None if dense is None else dense.contiguous()
        return Blocks(self.blocks, table, self.device, scale)

    @torch.no_grad()
    def subtract(self, corrections: Iterable[Correction], step: int) -> None:
        """Subtract a correction of every block from the parameters in place.

        Args:
            corrections: In the order of `blocks`.
            step: Of the guard. With the seed it says how bf16 weights are rounded, so that ranks that hold the
                same weights round alike, and a resumed run as an uninterrupted one.
        """
        tensors = self.pieces()
        generators = self._generators(tensors.values(), step)
        for block, correction in zip(self.blocks, corrections, strict=True):
            if block.padded:
                _subtract_ranges(block, tensors, correction)
            else:
                whole = block.region.size == block.region.shape
                _subtract(block.targets(tensors), correction, generators.get(whole))
        self.shards.publish(self._parameters.values())

    def _generators(self, pieces: Iterable[Tensor], step: int) -> dict[bool, torch.Generator]:
        """Of the bits that round bf16 weights, if some are: of blocks that are whole here, and of the others.

        Of a cut block ranks draw as many as they hold, after which those of the rest would differ.
        """
        if not (self._config.stochastic_rounding and any(piece.dtype == torch.bfloat16 for piece in pieces)):
            return {}
        seed = SEEDS * self._config.seed + step
        return {
            whole: torch.Generator(device=self.device).manual_seed((seed + (not whole) * SEEDS // 2) % 2**63)
            for whole in (True, False)
        }


def _dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient that has all rows, also where an embedding keeps those of its batch alone."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _readable(gradient: Tensor | None) -> Tensor | None:
    """A gradient as a unit view can read it, since a host may lay one out unlike its parameter.

    Matrices can be read in any layout and are not copied.
    """
    dense = _dense(gradient)
    return dense if dense is None or dense.dim() == 2 else dense.contiguous()


def _subtract_ranges(block: Block, tensors: Mapping[str, Tensor], correction: Correction) -> None:
    """Subtract a correction where boxes hold more than the pieces here, so that their views are copies."""
    changes = correction.dense()
    for piece, change in zip(block.pieces, changes.chunk(len(block.pieces)), strict=True):
        if isinstance(piece, FlatView):
            target = tensors[piece.name]
            target.sub_(piece.back(change).to(target.dtype))


def _subtract(targets: list[Tensor], correction: Correction, generator: torch.Generator | None) -> None:
    coefficients, directions = correction
    if len(targets) == 1 and targets[0].dtype == torch.float32 and targets[0].numel() > STACK_LIMIT:
        # In place and in one pass: a change of the weights' size would double the memory traffic.
        whole = targets[0] if targets[0].dim() == 3 else targets[0].unsqueeze(0)
        whole.baddbmm_(coefficients, directions.mT, alpha=-1)
        return
    change = correction.dense()
    parts = [change.squeeze(0) if targets[0].dim() == 2 else change]
    if len(targets) > 1:
        parts = list(change.unbind(0))
    if targets[0].dtype == torch.float32:
        torch._foreach_sub_(targets, parts)
        return
    for target, part in zip(targets, parts, strict=True):
        if target.dtype == torch.float64:
            target.sub_(part)
            continue
        # Into the change's own memory: this is the step's largest piece of work in fp32.
        projected = torch.sub(target.float(), part, out=part)
        if generator is not None and target.dtype == torch.bfloat16:
            projected = round_at_random(projected, generator)
        target.copy_(projected)
