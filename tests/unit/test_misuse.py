"""What a guard says of objects and numbers that it is not meant to be given."""

import dataclasses
import math

import pytest
import torch

from interference_guard import (
    Completions,
    ConfigError,
    Guard,
    GuardConfig,
    GuardedOptimizer,
    MissingDomainError,
    ShapeError,
    StateError,
    UnknownDomainError,
    UnsupportedError,
)
from interference_guard.probe import model_policy
from tests.unit.helpers import CONFIG, Toy, guarded, rollout, train


def test_other_objects_are_refused():
    with pytest.raises(ConfigError, match=r"The model is of type str\. Give Guard"):
        Guard("Qwen/Qwen3-0.6B")
    with pytest.raises(ConfigError, match=r"settings are of type dict\. Give a GuardConfig"):
        Guard(torch.nn.Linear(3, 3), {"budget": 0.02})
    guard = Guard(torch.nn.Linear(3, 3))
    with pytest.raises(ShapeError, match="was given dict"):
        guard.retain("math", {"input_ids": torch.ones(1, 2)})
    assert not guard.domains


def test_arguments_that_cannot_be_are_named_before_anything_changes():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"])
    rows, before = rollout(model, "qa"), guard.state_dict()["details"]
    calls = [
        (lambda: guard.protect("qa", rows, passes=0), ConfigError, r"'qa', .* passes=0\. It is a whole number"),
        (lambda: guard.protect("qa", rows, batch_size=0), ConfigError, "batch_size=0"),
        (lambda: guard.protect("qa", None), ShapeError, r"protect\('qa', \.\.\.\) was given NoneType"),
        (lambda: guard.begin({"qa": None}), ConfigError, "'qa' has share None. Give a finite number"),
        (lambda: guard.begin({"qa": "all"}), ConfigError, "'qa' has share 'all'"),
        (lambda: guard.bind(None), ConfigError, "The model is of type NoneType"),
        (lambda: guard.load_state_dict(None), StateError, "must be what Guard.state_dict"),
        (lambda: guard.calibrate("math", "x"), ConfigError, r"calibrate\('math', .* was given 'x'\. Give it"),
        (lambda: guard.calibrate("math", torch.ones(2)), ConfigError, "the mean reward, a number"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    assert guard.state_dict()["details"] == before


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


@pytest.mark.parametrize("name", [1, None, ""])
def test_a_name_that_is_no_text_is_refused_wherever_it_is_given(name):
    model, guard, _ = guarded()
    rows = rollout(model, "math")
    for call in (guard.retain, guard.protect, lambda name, _: guard.begin({name: 1.0})):
        with pytest.raises(MissingDomainError, match="must be a non-empty string"):
            call(name, rows)
    assert not guard.domains


def test_a_guard_that_is_off_predicts_nothing_and_says_so_where_it_must():
    guard = Guard(Toy(), GuardConfig(enabled=False))
    assert math.isnan(guard.raw("math"))
    assert math.isnan(guard.predicted("math"))
    for ask in (guard.measure, guard.state_of, guard.anchored):
        with pytest.raises(UnknownDomainError, match=r"guard is off \(enabled=False.* domain 'math'\. Ask"):
            ask("math")
    assert guard.device == torch.device("cpu")
    assert Guard(torch.nn.Identity(), GuardConfig(enabled=False)).device == torch.device("cpu")


@pytest.mark.parametrize("enabled", [True, False])
def test_one_domain_may_be_named_by_a_word(enabled):
    guard = Guard(Toy(), GuardConfig(enabled=enabled))
    guard.begin("math")
    assert guard.active == ("math",)
    assert list(guard.domains) == ["math"] * enabled
    for given, message in (("", "must be a non-empty string"), (5, r"was given 5\. Give it a domain's name, or")):
        with pytest.raises(MissingDomainError, match=message):
            guard.begin(given)


class Tokens(Toy):
    def forward(self, idx):
        return super().forward(idx)


class Pair(Toy):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids), None


class Table(Toy):
    def forward(self, input_ids, attention_mask=None):
        return {"logits": super().forward(input_ids)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tokens, r"Tokens was given token ids .* raised TypeError: .*unexpected keyword.*policy=\.\.\."),
        (Pair, r"Pair returned no logits of shape .*policy=\.\.\."),
    ],
)
def test_a_model_that_is_no_language_model_is_told_of_policies(kind, message):
    rows = rollout(Toy(), "math")
    with pytest.raises(UnsupportedError, match=message):
        model_policy(kind())(rows)


def test_logits_may_lie_in_a_table():
    rows = rollout(Toy(), "math")
    assert torch.equal(model_policy(Table())(rows), model_policy(Toy())(rows))


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        (lambda rows: None, "NoneType"),
        (lambda rows: rows.input_ids[:, :1].float(), r"shape \(\d+, 1\)"),
        (lambda rows: rows.input_ids.float().tolist(), "list"),
    ],
)
def test_a_policy_must_score_every_token(policy, found):
    model = Toy()
    guard = Guard(model, CONFIG, policy=policy)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    with pytest.raises(ShapeError, match=rf"The policy returned {found} for rows of shape \(\d+, 2\)"):
        train(model, guard, optimizer, ["math", "code"])


def test_rows_without_a_token_to_score_measure_nothing():
    model, guard, optimizer = guarded()

    def bare(rows):
        return dataclasses.replace(rows, completion_mask=torch.zeros_like(rows.completion_mask))

    with pytest.warns(
        UserWarning, match=r"'math' with a token to score.*Guard\.retain\(\) such.*in TRL and veRL"
    ):
        train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3, keep=bare)
    assert not guard.domains["math"].measurable
    assert "guard/math/measured" not in guard.metrics()
