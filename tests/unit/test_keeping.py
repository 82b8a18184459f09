"""What a guard keeps between steps, and where."""

import torch

from interference_guard import stepping
from tests.unit.helpers import guarded, rollout, train


def test_the_state_follows_weights_that_an_engine_brings_back_from_the_cpu():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 2)
    guard.load_state_dict(guard.state_dict())
    # An engine loads its checkpoint on the CPU, and the first update's rows come before its first step.
    guard.begin({"code": 1.0})
    guard.retain("code", rollout(model, "code"))
    steps, names = guard.steps, list(guard.domains)
    # The parameters stay the same objects, as those of sharded models do. No second device is at hand here.
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    rewards = guard.domains["code"].rewards.sums()
    stepping.follow(guard)
    state = guard.domains["math"]
    found = [state.device, state.radius.device, state.anchor_scores.device, state.retained.input_ids.device]
    found += [tensor.device for block in state.model.blocks for tensor in (block.U, block.z0, block.q0)]
    assert {device.type for device in found} == {"meta"}
    assert (guard.steps, list(guard.domains)) == (steps, names)
    assert guard.domains["code"].rewards.sums() == rewards != (0, 0)
    assert guard.announced == {"math", "code"}
