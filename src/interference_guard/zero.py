"""DeepSpeed's ZeRO: which range of each parameter a rank's optimizer steps, in which buffers, and when.

ZeRO steps the torch optimizer on flat fp32 buffers, one for each parameter group (stage 3: for each sub-group),
one after the other, and copies each into the low-precision weights right after its step. The guard reads and
changes the ranges of these buffers that belong to a parameter. It can do so once the last buffer has stepped,
so it keeps the gradients of the earlier ones and copies what it changed in them once more. Nothing is imported
from DeepSpeed and nothing is kept but the optimizer: engines move buffers, so ranges are taken afresh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import HostError, UnsupportedError
from .flat import Cut

# Of stage 3, of stages 1 and 2, and of stage 1 in bf16 with fp32 accumulation.
BUFFERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")

# Settings of ``zero_optimization`` that the guard does not follow: what turns each off, and what it does.
SPECIAL: Mapping[str, tuple[object, str]] = {
    "zero_quantized_weights": (False, "ZeRO++ computes with rounded copies of the weights"),
    "zero_quantized_gradients": (False, "ZeRO++ rounds gradients"),
    "zero_hpz_partition_size": (1, "ZeRO++ keeps a second partition of the weights"),
    "mics_shard_size": (-1, "MiCS shards over a part of the ranks"),
    "zenflow": (None, "ZenFlow updates the weights late"),
    # Former names of offload_optimizer and offload_param, which DeepSpeed still reads.
    "cpu_offload": (False, "DeepSpeed keeps optimizer states on the CPU"),
    "cpu_offload_param": (False, "DeepSpeed keeps weights on the CPU"),
}
MUON = (
    "DeepSpeed's Muon puts its updates in place of the gradients before the optimizer steps, so there are no "
    "gradients to learn from. Use AdamW, or torch.optim.Muon without DeepSpeed."
)
DEEPCOMPILE = (
    "DeepSpeed runs with DeepCompile, which takes over when weights are gathered and given back, and the guard's "
    "own forward passes go past it. Take compile.deepcompile out of DeepSpeed's configuration; engine.compile() "
    "without it is no matter."
)
PARALLEL = (
    "DeepSpeed runs with tensor or sequence parallelism of {}. The guard follows data parallel ranks alone: "
    "train without it."
)


@dataclass(frozen=True)
class Place:
    """Where one parameter lies.

    Args:
        buffer: Number of the flat buffer.
        at: Index in this rank's buffer of the first element held here.
        start: That element's index in the parameter.
        stop: The index after the last element held here; equal to `start` where none is.
        cut: Where ranks cut it.
    """

    buffer: int
    at: int
    start: int
    stop: int
    cut: Cut


class Zero:
    """The buffers of one ZeRO optimizer, as long as its engine lives.

    Args:
        engine: What ``deepspeed.initialize`` returned.

    Raises:
        UnsupportedError: If the engine keeps its weights where the guard cannot follow.
    """

    def __init__(self, engine: Any) -> None:
        check_engine(engine)
        self.optimizer = engine.optimizer
        self.gathers = hasattr(self.optimizer, "fp32_partitioned_groups_flat")
        """Whether parameters are whole only while a module runs (stage 3)."""
        self._held: dict[int, tuple[Tensor | None, int]] = {}
        groups = {id(group): group for group in map(self._group, range(len(self.buffers)))}
        self.group = next(iter(groups.values()))
        ranks = [dist.get_process_group_ranks(group) for group in groups.values()]
        if any(found != ranks[0] for found in ranks):
            raise UnsupportedError(
                f"DeepSpeed shares the parameters out over groups of other ranks, {ranks}, as it "
                "does for experts. The guard sums over one group: train without expert parallelism."
            )
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._places = {id(parameter): place for parameter, place in self._lay_out()}

    # Where parameters lie

    @property
    def buffers(self) -> Sequence[Tensor]:
        """This rank's flat buffers in the order in which they step."""
        found: Sequence[Tensor] = next(
            item for name in BUFFERS if (item := getattr(self.optimizer, name, None)) is not None
        )
        return found

    def _group(self, buffer: int) -> Any:
        if self.gathers:
            return self.optimizer.fp16_groups[buffer][0].ds_process_group
        return self.optimizer.real_dp_process_group[buffer]

    def _lay_out(self) -> Iterator[tuple[Tensor, Place]]:
        for number, buffer in enumerate(self.buffers):
            position = 0
            for index, parameter in enumerate(self._members(number)):
                numel = math.prod(whole_shape(parameter))
                if self.gathers:
                    # Each parameter is shared out by itself.
                    cut, at = Cut(0, parameter.partition_numel()), position  # type: ignore[attr-defined]
                    start, stop = cut.range(self.rank, numel)
                    position += cut.size
                else:
                    cut = Cut(position, buffer.numel())
                    start, stop = cut.range(self.rank, numel)
                    at = max(position - self.rank * cut.size, 0) if start < stop else 0
                    position += numel + self._padding(number, index)
                yield parameter, Place(number, at, start, stop, cut)

    def _members(self, number: int) -> Sequence[Tensor]:
        """The parameters of a buffer in their order there."""
        names = ("fp16_groups",) if self.gathers else ("round_robin_bit16_groups", "bf16_groups")
        groups = next(item for name in names if (item := getattr(self.optimizer, name, None)) is not None)
        found: Sequence[Tensor] = groups[number]
        return found

    def _padding(self, number: int, index: int) -> int:
        padding = getattr(self.optimizer, "round_robin_bit16_padding", None)
        return padding[number][index] if padding else 0

    def place(self, name: str, parameter: Tensor) -> Place:
        """Where a parameter lies; raises `HostError` for one that this engine's optimizer does not step."""
        if id(parameter) not in self._places:
            raise HostError(
                f"Parameter {name!r} is trainable, but DeepSpeed's optimizer does not step it. Give all "
                "trainable parameters to deepspeed.initialize, and freeze the others before."
            )
        return self._places[id(parameter)]

    def master(self, parameter: Tensor) -> Tensor:
        """The range of the fp32 weights held here, 1-d; shares the buffer's memory."""
        place = self._places[id(parameter)]
        return self.buffers[place.buffer].detach().narrow(0, place.at, place.stop - place.start)

    def weight(self, parameter: Tensor) -> Tensor:
        """The range of the weights the model computes with that `master` is of, 1-d; shares their memory."""
        place = self._places[id(parameter)]
        if self.gathers:
            found: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
            return found.narrow(0, 0, place.stop - place.start)
        return parameter.detach().view(-1).narrow(0, place.start, place.stop - place.start)

    def check(self, name: str, parameter: Tensor) -> None:
        """Compare the two, which must be equal up to rounding between steps.

        Raises:
            UnsupportedError: If they differ: this release of DeepSpeed lays its buffers out in another way.
        """
        master, weight = self.master(parameter), self.weight(parameter)
        if not torch.equal(master.to(weight.dtype), weight):
            raise UnsupportedError(
                f"DeepSpeed's fp32 weights of {name!r} are not where the guard looks for them, or were not "
                "loaded with the model. Tested is deepspeed 0.19; load checkpoints with their optimizer states."
            )

    # A step

    def hold(self, optimizer: Optimizer) -> bool:
        """Keep the gradients of the buffers that step now, which DeepSpeed lets go after it.

        Returns:
            Whether a new step begins with them.
        """
        numbers = self._stepping(optimizer)
        begins = not self._held or any(number in self._held for number in numbers)
        if begins:
            self._held.clear()
        for number in numbers:
            gradient = self.buffers[number].grad
            self._held[number] = gradient, 0 if gradient is None else gradient._version
        return begins

    def check_untouched(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that changes gradients; call when it has stepped its buffers.

        Not later: stage 3 may keep the gradients of several buffers in one, and unscale the next in place.

        Raises:
            HostError: If it has changed them.
        """
        for number in self._stepping(optimizer):
            gradient, version = self._held.get(number, (None, 0))
            if gradient is not None and gradient._version != version:
                raise HostError(
                    "The optimizer changed the gradients in place during its step, and the guard reads them once "
                    "more after it. Use an optimizer that leaves them as they are (all of torch.optim do)."
                )

    def put_away(self) -> None:
        """Let stage 3 take back whole parameters that a forward pass within the step left in place.

        A new anchor is scored there. Kept until the next one, they would be those of before the step.
        """
        if self.gathers:
            self.optimizer._partition_all_parameters()

    @property
    def complete(self) -> bool:
        """Whether the gradients of all buffers are there, and the last of them is the one that steps."""
        return len(self._held) == len(self.buffers)

    def release(self) -> None:
        """Let the gradients go."""
        self._held.clear()

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        """The range of the gradients held here, 1-d, as the optimizer steps with it."""
        place = self._places[id(parameter)]
        if place.buffer not in self._held:
            raise HostError(
                f"The gradient of {name!r} is not there: the guard's hooks are not on the engine's optimizer. "
                "Call attach(engine.optimizer, guard), and engine.step() to step."
            )
        gradient, _ = self._held[place.buffer]
        return None if gradient is None else gradient.detach().narrow(0, place.at, place.stop - place.start)

    def publish(self, parameter: Tensor) -> None:
        """Copy the fp32 range into the model's own weights, as DeepSpeed did before the guard changed it."""
        master, weight = self.master(parameter), self.weight(parameter)
        if master.data_ptr() != weight.data_ptr():
            weight.copy_(master)

    def _stepping(self, optimizer: Optimizer) -> list[int]:
        numbers = {id(buffer): number for number, buffer in enumerate(self.buffers)}
        steps = [id(tensor) for group in optimizer.param_groups for tensor in group["params"]]
        return [numbers[item] for item in steps if item in numbers]


def zero_of(model: nn.Module) -> Zero | None:
    """The ZeRO buffers of a model that is a DeepSpeed engine, None for any other model."""
    return Zero(model) if is_engine(model) else None


def is_engine(model: Any) -> bool:
    """Whether a model is a DeepSpeed engine; by its methods, so that DeepSpeed need not be imported."""
    return hasattr(model, "zero_optimization_stage") and hasattr(model, "optimizer")


def partitioned(optimizer: Any) -> Any:
    """The ZeRO optimizer inside wrappers of it, or None."""
    seen: list[int] = []
    while optimizer is not None and id(optimizer) not in seen:
        seen.append(id(optimizer))
        if hasattr(optimizer, "real_dp_process_group") or hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a whole parameter, also where ZeRO-3 has put its elements away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_put_away(parameter: Tensor) -> bool:
    """Whether a parameter belongs to ZeRO-3, which keeps it whole only while a module runs."""
    return hasattr(parameter, "ds_tensor")


def check_engine(engine: Any) -> None:
    """Refuse engines whose weights the guard cannot follow.

    Raises:
        UnsupportedError: As `check_settings`, and under fp16 autocast, DeepSpeed's Muon, DeepCompile, tensor or
            sequence parallelism.
    """
    optimizer = engine.optimizer
    # A path, or the table itself.
    settings = engine.config if isinstance(engine.config, dict) else engine._config._param_dict
    check_settings(settings)
    if partitioned(optimizer) is None or not any(hasattr(optimizer, name) for name in BUFFERS):
        raise UnsupportedError(
            f"DeepSpeed runs with {type(optimizer).__name__}, which the guard does not know. Tested are the "
            "optimizers of ZeRO stages 1, 2 and 3 in deepspeed 0.19."
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        raise UnsupportedError(
            "DeepSpeed runs with torch_autocast in fp16, where parts of a step can be left out. Use bf16."
        )
    if any(group.get("use_muon") for group in optimizer.optimizer.param_groups):
        raise UnsupportedError(MUON)
    compiled = getattr(engine, "is_deepcompile_enabled", None)
    if compiled is not None and compiled():
        raise UnsupportedError(DEEPCOMPILE)
    sizes = [getattr(engine, name, None) for name in ("mp_world_size", "sequence_parallel_size")]
    parallel = max(int(size or 1) for size in sizes if not callable(size))
    if parallel > 1:
        raise UnsupportedError(PARALLEL.format(parallel))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings under which the guard cannot follow the weights, before there is an engine.

    Args:
        settings: DeepSpeed's configuration.

    Raises:
        UnsupportedError: Under stage 0, offload, ZeRO++, MiCS, ZenFlow, DeepSpeed's Muon, DeepCompile and tensor
            parallelism.
    """
    zero = settings.get("zero_optimization") or {}
    if str((settings.get("optimizer") or {}).get("type", "")).lower() == "muon":
        raise UnsupportedError(MUON)
    if (settings.get("compile") or {}).get("deepcompile"):
        raise UnsupportedError(DEEPCOMPILE)
    if (size := (settings.get("tensor_parallel") or {}).get("autotp_size", 0)) > 1:
        raise UnsupportedError(PARALLEL.format(size))
    if zero.get("stage", 0) == 0:
        raise UnsupportedError(
            "DeepSpeed runs with ZeRO stage 0, which shards nothing. Set zero_optimization.stage to 1, 2 or 3, "
            "or train data parallel (DDP)."
        )
    devices = [(zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")]
    if any(device not in ("none", None) for device in devices):
        raise UnsupportedError(
            f"DeepSpeed keeps optimizer states and weights on {devices} (offload_optimizer, offload_param), and "
            "the guard reads the fp32 weights at every step. Take both out of zero_optimization, or shard over "
            "more ranks."
        )
    for name, (off, kind) in SPECIAL.items():
        if (zero.get(name) or off) != off:
            raise UnsupportedError(
                f"DeepSpeed runs with {name}={zero[name]!r}: {kind}, which the guard does not follow. Take it "
                "out of zero_optimization."
            )
