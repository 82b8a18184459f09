"""What a guard says of objects and numbers that it is not meant to be given."""

import dataclasses

import pytest
import torch

from interference_guard import Completions, ConfigError, Guard, ShapeError, UnsupportedError
from tests.unit.helpers import guarded


def test_other_objects_are_refused():
    with pytest.raises(ConfigError, match=r"The model is of type str\. Give Guard"):
        Guard("Qwen/Qwen3-0.6B")
    with pytest.raises(ConfigError, match=r"settings are of type dict\. Give a GuardConfig"):
        Guard(torch.nn.Linear(3, 3), {"budget": 0.02})
    guard = Guard(torch.nn.Linear(3, 3))
    with pytest.raises(ShapeError, match="was given dict"):
        guard.retain("math", {"input_ids": torch.ones(1, 2)})
    assert not guard.domains


def test_a_module_that_is_called_like_a_wrapper_hides_no_parameter():
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(2, 2)
    model.module = torch.nn.Module()
    model.module.layer = torch.nn.Linear(2, 2)
    with pytest.raises(
        UnsupportedError, match=r"Two .* 'layer.weight' once .* the second is 'module.layer.weight'"
    ):
        Guard(model)


def test_a_reward_far_outside_the_range_is_warned_about():
    _model, guard, _ = guarded()
    ids = torch.zeros(64, 2, dtype=torch.int64)
    rows = Completions(ids, torch.ones_like(ids), torch.ones_like(ids), torch.arange(64.0) % 2)
    for _ in range(2):
        guard.retain("math", rows)
    spread = dataclasses.replace(rows, rewards=rows.rewards * 2)
    guard.retain("math", spread)
    rows.rewards[3] = -100.0
    with pytest.warns(UserWarning, match=r"192 rewards .*'math' lay in 0 to 2, and now .* from -100 to 1"):
        guard.retain("math", rows)
    guard.retain("math", rows)
