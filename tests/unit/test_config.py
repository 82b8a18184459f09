import dataclasses
import json

import numpy as np
import pytest
import torch

from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("budget", 0, "a number above 0"),
        ("budget", -0.1, "a number above 0"),
        ("budget", float("nan"), "a number above 0"),
        ("budget", "0.02", "a number above 0"),
        ("budget", 2, "at most 1"),
        ("project", "no", "True or False"),
        ("recovery", "False", "True or False"),
        ("enabled", None, "True or False"),
        ("budget_nats", 0.0, "a number above 0"),
        ("half_life", float("inf"), "a number above 0"),
        ("rank", 0, "an integer >= 1"),
        ("rank", 2.5, "an integer >= 1"),
        ("rank", True, "an integer >= 1"),
        ("sketch", 8, "at least rank=16"),
        ("retain", 0, "an integer >= 1"),
        ("coverage", 0, "above 0 and at most 1"),
        ("coverage", 1.5, "above 0 and at most 1"),
        ("active_share", 0, "above 0 and at most 1"),
        ("selection", "best", "one of"),
        ("domain_column", "", "a column name"),
        ("seed", 1.5, "an integer"),
        ("seed", 2**50, "below"),
        ("unit_overrides", "*.w=row", "a list of strings"),
        ("unit_overrides", 5, "a list of strings"),
        ("unit_overrides", [1], "a list of strings"),
        ("unit_overrides", ["*.w=row", None], "a list of strings"),
    ],
)
def test_values_outside_their_range_are_refused(field, value, allowed):
    with pytest.raises(ConfigError, match=rf"{field}=.* is not allowed: it must be .*{allowed}"):
        GuardConfig(**{field: value})


def test_numbers_of_numpy_become_pythons_own():
    given = {
        "budget": np.float32(0.5),
        "half_life": np.int32(9),
        "rank": np.int64(4),
        "recovery_budget": np.float64(1),
    }
    config = GuardConfig(**given)
    assert config == GuardConfig(budget=0.5, half_life=9, rank=4, recovery_budget=1.0)
    assert [type(getattr(config, name)) for name in given] == [float, int, int, float]
    assert json.loads(json.dumps(dataclasses.asdict(config)))["rank"] == 4


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("project", np.True_, r"numpy\.bool"),
        ("rank", torch.tensor(4), r"torch\.Tensor"),
        ("rank", np.float32(2.5), None),
        ("budget", np.float32("nan"), None),
    ],
)
def test_what_is_refused_is_named_with_a_type_that_its_value_may_not_show(field, value, kind):
    kind = rf" \(a {kind}_?\)" if kind else ""
    with pytest.raises(ConfigError, match=rf"{field}=\S+{kind} is not allowed: it must be"):
        GuardConfig(**{field: value})


@pytest.mark.parametrize("entry", ["weight", "=row", "x=diagonal"])
def test_unit_overrides_must_name_a_pattern_and_a_kind(entry):
    with pytest.raises(ConfigError, match="must read 'pattern=kind'"):
        GuardConfig(unit_overrides=[entry])


def test_overrides_are_a_table():
    assert GuardConfig(unit_overrides=["*.mix=column", "a=b=row"]).overrides() == {
        "*.mix": "column",
        "a=b": "row",
    }


def test_overrides_are_kept_as_a_list():
    assert GuardConfig(unit_overrides=["*.w=column", "*.w=row"]).overrides() == {"*.w": "column"}
    assert GuardConfig(unit_overrides=("*.mix=column",)) == GuardConfig(unit_overrides=["*.mix=column"])


def test_every_field_has_help_and_cannot_be_changed():
    config = GuardConfig()
    assert all(item.metadata["help"].endswith(".") for item in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1.0
