"""What a guard keeps between steps, and where."""

import torch

from tests.unit.helpers import guarded, train


def test_the_state_follows_weights_that_an_engine_brings_back_from_the_cpu():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 2)
    guard.load_state_dict(guard.state_dict())
    steps, names = guard.steps, list(guard.domains)
    # The parameters stay the same objects, as those of sharded models do. No second device is at hand here.
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    guard._place()
    state = guard.domains["math"]
    found = [state.device, state.radius.device, state.anchor_scores.device, state.retained.input_ids.device]
    found += [tensor.device for block in state.model.blocks for tensor in (block.U, block.z0, block.q0)]
    assert {device.type for device in found} == {"meta"}
    assert (guard.steps, list(guard.domains)) == (steps, names)
