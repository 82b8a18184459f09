import dataclasses
import math

import pytest
import torch

from interference_guard import (
    Completions,
    ConfigError,
    Guard,
    GuardConfig,
    MissingDomainError,
    ShapeError,
    UnknownDomainError,
    UnsupportedError,
)
from interference_guard.metrics import METRICS
from tests.reference import expand
from tests.unit.helpers import (
    CONFIG,
    Toy,
    guarded,
    pass_rate,
    policy_gradient,
    rollout,
    step_by_hand,
    train,
    two_ranks,
)

ORDER = ["math"] * 40 + ["code"] * 40 + ["qa"] * 40


@pytest.mark.parametrize("seed", range(3))
def test_earlier_domains_keep_their_reward(seed):
    final = {}
    for project in (False, True):
        model, guard, optimizer = guarded(seed, config=dataclasses.replace(CONFIG, project=project))
        own = {}

        def note(step, model=model, own=own):
            own[ORDER[step]] = pass_rate(model, ORDER[step])

        train(model, guard, optimizer, ORDER, after=note)
        assert own["math"] > 0.9
        final[project] = own["math"] - pass_rate(model, "math")
    assert final[False] > 0.15, "the plain run must forget"
    assert final[True] < 0.06


def test_anchors_follow_the_order_of_domains():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3)
    assert guard.protected == ()
    train(model, guard, optimizer, ["code"], start=3)
    assert guard.domains["math"].anchored
    assert not guard.domains["code"].anchored
    guard.begin({"code": 1.0})
    assert guard.protected == ("math",)
    train(model, guard, optimizer, ["math"], start=4)
    assert not guard.domains["math"].anchored
    assert guard.domains["code"].anchored
    guard.begin({"qa": 1.0})
    train(model, guard, optimizer, ["qa"], start=5)
    assert set(guard.domains) == {"math", "code", "qa"}
    assert guard.domains["math"].foreign_steps == 1
    assert guard.domains["code"].foreign_steps == 2


def test_a_domain_left_again_after_a_few_steps_keeps_its_probe():
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, probe_steps=6))
    train(model, guard, optimizer, ["math"] * 30 + ["code"] * 2)
    state = guard.domains["math"]
    scores = state.anchor_scores
    measured = []
    # As after an interruption: two more own steps, and then none for long.
    train(
        model,
        guard,
        optimizer,
        ["math"] * 2 + ["code"] * 7,
        start=32,
        after=lambda step: measured.append(state.measurement is not None),
    )
    assert state.anchor_scores is scores
    assert state.measurable
    # Not after 1, 2 and 4 foreign steps, as after an anchor of its own, but after six.
    assert measured[2:] == [False] * 5 + [True] * 2
    assert state.measurement is not None
    assert math.isfinite(state.measurement.loss)
    # The domain's own steps since that probe are in the loss: it must teach nothing.
    before = dataclasses.replace(state.region)
    guard.measure("math")
    assert state.region == before


def test_a_domain_that_a_recovery_interrupted_gets_a_probe_of_its_end():
    config = dataclasses.replace(CONFIG, recovery=True, probe_steps=1000)
    model, guard, optimizer = guarded(config=config)
    train(model, guard, optimizer, ["code"] * 30 + ["math"] * 30)
    guard.schedule = dataclasses.replace(guard.schedule, phase="recovering", domain="code")
    train(model, guard, optimizer, ["code"], start=60)
    state = guard.domains["math"]
    scores = state.anchor_scores
    assert state.fresh
    assert state.interrupted
    guard.abandon_recovery()
    # Two more steps of its own, and the true end of its training.
    train(model, guard, optimizer, ["math"] * 2 + ["qa"], start=61)
    assert state.fresh
    assert not state.interrupted
    assert state.anchor_scores is not scores


def test_small_shares_stay_protected():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2 + ["code"] * 2)
    guard.begin({"code": 99, "math": 1})
    assert guard.active == ("code",)
    assert guard.protected == ("math",)
    guard.begin({"code": 50, "math": 50})
    assert guard.active == ("code", "math")
    assert guard.protected == ()
    # Sums of parts of batches: a domain at the threshold is not under it by a rounding.
    guard.begin({"code": 1 - 0.05, "math": 0.05 - 1e-15})
    assert guard.active == ("code", "math")
    many = Guard(Toy(), GuardConfig(active_share=0.5))
    many.begin({"a": 1, "b": 1, "c": 1})
    assert many.active == ("a", "b", "c")
    # Where no share is enough, the step is of those that nothing holds yet.
    many.domains["a"].anchored = many.domains["c"].anchored = True
    many.begin({"a": 1, "b": 1, "c": 1})
    assert many.active == ("b",)
    assert many.protected == ("a", "c")


def test_a_step_without_usable_gradients_leaves_no_anchor():
    model, guard, optimizer = guarded()

    def steps(count):
        for _ in range(count):
            with guard.domain("math"):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()

    # A step or two say nothing yet: domains may take turns.
    steps(2)
    train(model, guard, optimizer, ["code"])
    steps(3)
    with pytest.warns(UserWarning, match=r"All gradients of domain 'math' were zero .*Guard\.protect"):
        train(model, guard, optimizer, ["code"], start=1)
    assert not guard.domains["math"].anchored
    assert guard.domains["code"].own_steps == 1


def test_an_empty_probe_costs_no_forward_pass():
    model, guard, optimizer = guarded()
    calls = []

    def policy(rows):
        calls.append(len(rows))
        return torch.zeros(rows.input_ids.shape)

    guard.policy = policy
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 11)
    # Scores at the anchor, then after foreign steps 1, 2, 4, 5 and 10.
    assert len(calls) == 6
    # The toy's answers are few, and each is scored once.
    assert max(calls) < len(guard.domains["math"].retained)


def test_measurement_is_near_the_true_loss():
    errors = []
    for seed in range(5):
        model, guard, optimizer = guarded(
            seed, rate=0.004, config=dataclasses.replace(CONFIG, project=False, retain=256)
        )
        train(model, guard, optimizer, ["math"] * 60)
        before = pass_rate(model, "math")
        train(model, guard, optimizer, ["code"] * 12, start=60)
        found = guard.measure("math")
        errors.append(found.loss - (before - pass_rate(model, "math")))
    assert abs(sum(errors) / len(errors)) < 0.05


def test_evaluations_correct_the_measurements():
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, project=False))
    train(model, guard, optimizer, ["math"] * 40)
    guard.calibrate("math", 0.9)
    train(model, guard, optimizer, ["code"] * 20, start=40)
    plain = guard.measure("math").loss
    guard.calibrate("math", 0.9 - 0.5 * plain)
    region = guard.domains["math"].region
    assert region.scale == pytest.approx(0.5, abs=0.2)
    assert guard.measure("math").loss == pytest.approx(plain * region.scale, rel=1e-6)
    assert guard.metrics()["guard/math/forgetting"] == pytest.approx(0.5 * plain)
    with pytest.raises(UnknownDomainError, match="'poetry' has no anchor"):
        guard.calibrate("poetry", 0.5)


def test_metrics_are_the_documented_ones_and_bounded():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 5 + ["qa"] * 5)
    found = guard.metrics()
    allowed = set(expand(guard.domains))
    assert set(found) <= allowed
    for name in ("predicted", "measured", "kl", "radius", "reward", "forgetting", "protected_share"):
        assert f"guard/math/{name}" in found
    for name in ("guard/update_kept", "guard/overlap/code/math", "guard/seconds"):
        assert name in found
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    assert 0 < found["guard/update_kept"] <= 1
    assert all(METRICS.values())
    again = guard.metrics()
    assert "guard/math/reward" not in again


def test_domains_must_be_named():
    model, guard, optimizer = guarded()
    policy_gradient(model, rollout(model, "math")).backward()
    with pytest.raises(MissingDomainError, match=r"no domain is set.*guard\.domain"):
        optimizer.step()
    for shares, error, message in (
        ({}, MissingDomainError, "names one"),
        ({"math": 0.0}, MissingDomainError, "names one"),
        ({"": 1.0}, MissingDomainError, "non-empty string"),
        ({3: 1.0}, MissingDomainError, "non-empty string"),
        ({"math": -1.0}, ConfigError, "has share -1.0"),
        ({"math": math.nan}, ConfigError, "has share nan"),
    ):
        with pytest.raises(error, match=message):
            guard.begin(shares)
    with pytest.raises(MissingDomainError, match=r"was given \['math'\]"):
        guard.begin(["math"])
    with pytest.raises(MissingDomainError, match="named 3"), guard.domain(3):
        pass


def test_domains_without_an_anchor_cannot_be_asked_for():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2)
    for call in (guard.measure, guard.raw, guard.predicted):
        with pytest.raises(UnknownDomainError, match=r"'math' has no anchor\. Known domains: \['math'\]"):
            call("math")
        with pytest.raises(UnknownDomainError, match="'poetry' has no anchor"):
            call("poetry")


def test_a_domain_without_completions_is_warned_about():
    model, guard, optimizer = guarded()
    for domain in ("math", "code"):
        with guard.domain(domain):
            policy_gradient(model, rollout(model, domain)).backward()
            if domain == "code":
                with pytest.warns(UserWarning, match="No completions of domain 'math'"):
                    optimizer.step()
            else:
                optimizer.step()
    with pytest.raises(UnknownDomainError, match="no retained completions"):
        guard.measure("math")
    assert guard.probe() == {}


class Dora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_magnitude_vector = torch.nn.Parameter(torch.ones(3))


def test_models_that_cannot_be_guarded_are_refused():
    packed = torch.nn.Linear(3, 3)
    packed.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    packed.weight.quant_state = object()
    Guard(packed)  # frozen packed weights are how QLoRA trains
    loose = torch.nn.Linear(3, 3)
    loose.weight.quant_state = object()
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    for model, message in (
        (Dora(), "uses DoRA"),
        (loose, "packed low-bit weights"),
        (frozen, "no trainable parameter"),
        (torch.nn.Linear(3, 3, device="meta"), "not loaded"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            Guard(model)


def test_a_guard_follows_to_the_same_model_elsewhere():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3)
    other = Toy(5)
    other.load_state_dict(model.state_dict())
    before = guard.raw("math")
    guard.bind(other)
    assert guard.raw("math") == before
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert guard.raw("math") == before
    with pytest.raises(ShapeError, match="2 differ|differ, for instance"):
        guard.bind(torch.nn.Linear(3, 3))
    assert guard.raw("math") == before


@pytest.mark.parametrize("selection", ["energy", "edits", "random"])
def test_only_protected_units_are_moved_back(selection):
    config = dataclasses.replace(CONFIG, coverage=0.5, selection=selection)
    model, guard, optimizer = guarded(config=config)
    train(model, guard, optimizer, ["math"] * 10 + ["code"] * 10)
    state = guard.domains["math"]
    assert 0 < state.protected_set.share < 1
    guard.begin({"code": 1.0})
    state.radius.fill_(1e-6)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    guard.after_step()
    moved = {name: (new - old).abs() for (name, new), old in zip(model.named_parameters(), before, strict=True)}
    for name, mask in state.protected_set.masks.items():
        by_unit = guard.view.layout.views[name].view(moved[name].detach()).amax(-1)
        assert by_unit[~mask].sum() == 0
    assert sum(change.sum() for change in moved.values()) > 0


def test_retained_rows_are_copies():
    _model, guard, _ = guarded(config=dataclasses.replace(CONFIG, retain=4))
    ids = torch.arange(24).reshape(12, 2) % 12
    rows = Completions(ids, torch.ones_like(ids), torch.ones_like(ids), torch.arange(12.0))
    guard.retain("math", rows)
    guard.retain("math", rows.rows(slice(0, 3)))
    rows.rewards.zero_()
    # Both are of one step. Of what is dropped at once the range of rewards is known all the same.
    (kept,) = guard.domains["math"].pending
    assert kept.rewards.tolist() == [2, 8, 0, 2]
    assert guard.domains["math"].span == (0.0, 11.0)


def test_a_first_step_at_rate_zero_sets_no_radius():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, guard, optimizer, ["code"] * 3, start=5)
    assert guard.domains["math"].radius.isinf()
    assert "guard/math/radius" not in guard.metrics()
    optimizer.param_groups[0]["lr"] = rate
    train(model, guard, optimizer, ["code"], start=8)
    assert 1e-9 < guard.domains["math"].radius.item() < 1


def test_a_warm_up_of_the_next_phase_does_not_leave_a_tiny_region():
    radii = []
    for warm_up in (0, 100):
        model, guard, optimizer = guarded(rate=2e-4, config=dataclasses.replace(CONFIG, probe_steps=1000))
        train(model, guard, optimizer, ["math"] * 5)
        group = optimizer.param_groups[0]
        for step in range(max(warm_up, 5)):
            group["lr"] = 2e-4 * min((step + 1) / max(warm_up, 1), 1.0)
            train(model, guard, optimizer, ["code"], start=5 + step)
        radii.append(guard.domains["math"].radius.item())
    plain, warmed = radii
    # Its first step is a ten-thousandth of the other's, by energy.
    assert warmed > plain / 4


def test_watching_a_long_run_without_projection():
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, project=False, probe_steps=1))
    train(model, guard, optimizer, ["math"] * 20 + ["code"] * 200)
    assert guard.metrics()["guard/math/excess"] > 0


@pytest.mark.parametrize("holders", [(0, 1), (0,)])
def test_ranks_agree_also_where_one_has_no_rows(holders):
    """Two ranks as two guards whose reductions meet; rows may lie on one of them only."""
    models = [Toy(), Toy()]

    def rank(number, reduce):
        model = models[number]
        guard = Guard(model, CONFIG, reduce=reduce)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for step, domain in enumerate(["math"] * 3 + ["code"] * 6):
            # The ranks meet the domains in another order than they train them.
            holds = number in holders or domain != "math"
            kept = rollout(model, domain, seed=100 * number + step) if holds else None
            step_by_hand(model, guard, optimizer, domain, step, kept)
            found += [(m.loss, m.kl) for m in guard.probe().values()]
        return found, guard.domains["math"].radius.item(), guard.domains["math"].anchor_reward

    first, second = two_ranks(rank)
    assert first == second
    assert len(first[0]) == 4
    assert not math.isnan(first[2])
