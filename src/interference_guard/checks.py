"""What the guard refuses to protect, checked on the whole model before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .errors import UnsupportedError
from .units import WRAPPERS, canonical_name
from .zero import is_put_away


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by canonical name, tied ones once.

    Raises:
        UnsupportedError: If there are none, or if one of them is a DoRA magnitude, a packed low-bit
            weight, flattened by FSDP version 1, or not real floating point, or if the model itself changes its
            weights from mode to mode.
    """
    _check_wrappers(model)
    _check_modes(model)
    dora = [name for name, _ in model.named_parameters() if "lora_magnitude_vector" in name]
    if dora:
        raise UnsupportedError(
            f"The adapter uses DoRA ({dora[0]!r}): its magnitude rescales whole weight columns at every step, "
            "so a displacement of the factors does not say what the model's weights did. "
            "Use plain LoRA (use_dora=False) or full fine-tuning."
        )
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if packed or parameter.is_complex():
            raise UnsupportedError(
                f"Trainable parameter {name!r} holds {str(parameter.dtype).removeprefix('torch.')} values, "
                "packed low-bit weights or numbers without a gradient direction. Protected weights must be "
                "floating point (fp32, bf16, fp16). Freeze it and train adapters on top, as QLoRA does."
            )
        if parameter.device.type == "meta" or (parameter.numel() == 0 and not is_put_away(parameter)):
            raise UnsupportedError(
                f"Parameter {name!r} has no values here (device {parameter.device}, {parameter.numel()} "
                "elements): it is sharded or not loaded. Build the guard after the weights are in place."
            )
        if canonical_name(name) in found:
            raise UnsupportedError(
                f"Two trainable parameters are called {canonical_name(name)!r} once the names of wrappers "
                f"{list(WRAPPERS)} are taken out of them, the second is {name!r}. Rename the module that is no "
                "wrapper."
            )
        found[canonical_name(name)] = parameter
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no trainable parameter, so there is nothing to protect. "
            "Set requires_grad on the weights you train before building the guard; a PEFT adapter is loaded for "
            "training with is_trainable=True."
        )
    devices = {parameter.device for parameter in found.values()}
    if len(devices) > 1:
        raise UnsupportedError(
            f"The trainable parameters lie on {len(devices)} devices ({sorted(map(str, devices))}); the guard "
            "needs them on one. Load the model without device_map splitting."
        )
    return found


def difference(mine: Mapping[str, object], theirs: Mapping[str, object], where: tuple[str, str]) -> str:
    """What to say of two tables of shapes that differ; `where` is which is which.

    >>> difference({"up": [4, 2]}, {"up": [4, 3], "down": [2]}, ("there", "here"))
    "2 of 2 parameters differ, for instance 'down' with shape None there and [2] here"
    """
    names = {*mine, *theirs}
    found = sorted(name for name in names if mine.get(name) != theirs.get(name))
    return (
        f"{len(found)} of {len(names)} parameters differ, for instance {found[0]!r} with shape "
        f"{mine.get(found[0])} {where[0]} and {theirs.get(found[0])} {where[1]}"
    )


def _check_wrappers(model: nn.Module) -> None:
    """Engines that keep the weights in flat pieces, in which no unit can be found."""
    flat = next((item for item in model.modules() if type(item).__name__ == "FullyShardedDataParallel"), None)
    if flat is not None:
        raise UnsupportedError(
            "The model is wrapped by FullyShardedDataParallel (FSDP version 1), which packs the weights of a "
            "block into one flat parameter, in which units cannot be told apart. Use fully_shard (FSDP2)."
        )


def _check_modes(model: nn.Module) -> None:
    """RWKV halves deep layers' weights by a forward pass in evaluation mode, and doubles them by the next one."""
    for module in model.modules():
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if hasattr(module, "layers_are_rescaled") and 0 < every < len(getattr(module, "blocks", ())):
            raise UnsupportedError(
                f"{type(module).__name__} divides the weights of its layers from {every} on when it is evaluated,"
                " so that a measurement would change the model. Set rescale_every=0 in its config before "
                "training."
            )
