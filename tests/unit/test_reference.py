import dataclasses
import math
import weakref

import pytest
import torch

from interference_guard import Completions, ConfigError, Guard, GuardedOptimizer, ShapeError, UnsupportedError
from interference_guard.reference import LOSS_SCALE, _gradients, observe_softened
from tests.unit.helpers import CONFIG, PROMPTS, VOCABULARY, Toy, guarded, pass_rate, train, wanted


def given(domain="qa", repeat=8):
    """Prompts with their right answers; no rewards."""
    prompts = torch.tensor(PROMPTS[domain]).repeat(repeat)
    ids = torch.stack([prompts, wanted(domain, prompts)], 1)
    mask = torch.tensor([[0, 1]]).expand(len(ids), 2)
    return Completions(ids, torch.ones_like(ids), mask)


def taught(seed, config=CONFIG):
    """A model that has learned one domain by supervised steps, before any guard."""
    model, _, optimizer = guarded(seed, config=dataclasses.replace(config, enabled=False))
    rows = given()
    for _ in range(60):
        logits = model(rows.input_ids[:, :1])[:, 0]
        torch.nn.functional.cross_entropy(logits, rows.input_ids[:, 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(seed, protect):
    model = taught(seed)
    guard = Guard(model, CONFIG)
    if protect:
        guard.protect("qa", given())
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), guard)
    before = pass_rate(model, "qa")
    train(model, guard, optimizer, ["math"] * 60 + ["code"] * 60)
    return before, before - pass_rate(model, "qa"), model, guard


@pytest.mark.parametrize("seed", range(3))
def test_an_ability_from_before_is_kept(seed):
    before, lost, *_ = trained(seed, protect=False)
    assert before > 0.9
    assert lost > 0.15, "the plain run must forget"
    # Eight of sixteen directions and four prompts: the toy shows the sign, the benchmark the size.
    _, kept, _, guard = trained(seed, protect=True)
    assert kept < 0.6 * lost
    assert guard.domains["qa"].measurement.ratio == "nats"


def test_protecting_touches_nothing_of_the_hosts():
    model = taught(0)
    guard = Guard(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    guard.protect("qa", given())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert model.training
    guard.begin({"math": 1.0})
    assert guard.protected == ("qa",)


def test_curvature_is_the_softened_gauss_newton_matrix():
    """Mean of many drawn gradients squared against the matrix in closed form, for the last layer."""
    torch.manual_seed(0)
    model = Toy()
    rows = given(repeat=1).rows(slice(0, 1))
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(16, 16, dtype=torch.float64)
    draws = 4000
    for _ in range(draws):
        G = _gradients(model, rows, generator)["lm_head.weight"].double() / LOSS_SCALE
        total += G.mT @ G / draws
    captured = {}
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: captured.update(x=args[0][0, 0]))
    logits = model(rows.input_ids)[0, 0]
    hook.remove()
    p = (logits / 2).softmax(-1).double()
    x = captured["x"].double() / 2
    # E |p - onehot(y)|^2 x x' for y drawn from p.
    expected = (1 - p.square().sum()) * torch.outer(x, x)
    assert torch.linalg.matrix_norm(total - expected) < 0.03 * torch.linalg.matrix_norm(expected)
    assert len(p) == VOCABULARY


def test_a_reference_domain_never_recovers():
    config = dataclasses.replace(CONFIG, project=False, recovery=True, recovery_share=0.5, budget_nats=1e-6)
    model = taught(0)
    guard = Guard(model, config)
    guard.protect("qa", given())
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ["math"] * 30)
    assert guard.domains["qa"].measurement.loss > 1e-5
    assert guard.schedule.phases == 0


def test_state_is_saved_and_loaded(tmp_path):
    _, _, model, guard = trained(0, protect=True)
    guard.save(tmp_path)
    other = Guard(model, CONFIG)
    other.load(tmp_path)
    assert other.domains["qa"].reference
    assert other.raw("qa") == guard.raw("qa")
    assert math.isfinite(other.raw("qa"))


class TestRefusals:
    def test_a_row_without_completion(self):
        rows = given()
        mask = rows.completion_mask.clone()
        mask[3] = 0
        guard = Guard(Toy(), CONFIG)
        with pytest.raises(ShapeError, match="Row 3 of reference domain 'qa' has no completion token"):
            guard.protect("qa", dataclasses.replace(rows, completion_mask=mask))
        assert not guard.domains

    def test_a_known_domain(self):
        guard = Guard(Toy(), CONFIG)
        guard.protect("qa", given())
        with pytest.raises(ConfigError, match="'qa' is known already"):
            guard.protect("qa", given())

    def test_a_model_without_logits(self):
        class Bare(Toy):
            def forward(self, input_ids, attention_mask=None):
                return super().forward(input_ids).mean(-1)

        guard = Guard(Bare(), CONFIG)
        with pytest.raises(UnsupportedError, match="returned no logits"):
            guard.protect("qa", given())
        assert not guard.domains

    def test_a_model_without_a_graph(self):
        class Cut(Toy):
            def forward(self, input_ids, attention_mask=None):
                return super().forward(input_ids).detach()

        guard = Guard(Cut(), CONFIG)
        with pytest.raises(UnsupportedError, match="ended with RuntimeError: element 0 of tensors"):
            guard.protect("qa", given())
        assert not guard.domains


def test_gradients_are_those_of_a_loss_on_all_logits_at_once(monkeypatch):
    monkeypatch.setattr("interference_guard.reference.POSITIONS", 5)
    model, rows = Toy(), given(repeat=3)
    found = _gradients(model, rows, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    soft = model(rows.input_ids)[:, :1].flatten(0, 1) / 2
    chances = soft.detach().softmax(-1)
    labels = torch.cat([torch.multinomial(part, 1, generator=generator) for part in chances.split(5)]).squeeze(1)
    loss = torch.nn.functional.cross_entropy(soft, labels) * LOSS_SCALE
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(found[name], expected, msg=name)


def test_gradients_of_one_pass_are_gone_before_the_next(monkeypatch):
    made, left = [], []

    def gradients(*args):
        left.append(sum(item() is not None for item in made))
        found = _gradients(*args)
        made.extend(weakref.ref(item) for item in found.values())
        return found

    monkeypatch.setattr("interference_guard.reference._gradients", gradients)
    guard = Guard(Toy(), CONFIG)
    observe_softened(guard, guard.new_state("qa").curvature, given(), 3, 4)
    assert left == [0, 0, 0]


@pytest.mark.parametrize("fits", [True, False])
def test_rows_that_do_not_fit_together_are_passed_one_by_one(monkeypatch, fits):
    def gradients(model, rows, generator):
        if len(rows) > 1 or not fits:
            raise torch.OutOfMemoryError
        sizes.append(len(rows))
        return _gradients(model, rows, generator)

    sizes = []
    monkeypatch.setattr("interference_guard.reference._gradients", gradients)
    guard = Guard(Toy(), CONFIG)
    if not fits:
        with pytest.raises(UnsupportedError, match="over 1 of its completions does not fit"):
            guard.protect("qa", given(), passes=3, batch_size=4)
        assert not guard.domains
        return
    guard.protect("qa", given(), passes=3, batch_size=4)
    assert sizes == [1] * 12
    assert guard.protected == ("qa",)


def test_padding_that_all_rows_share_is_no_part_of_a_pass():
    rows = given().widened(9)
    widths, guard = [], Guard(Toy(), CONFIG)
    guard.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    observe_softened(guard, guard.new_state("qa").curvature, rows, 2, 4)
    assert widths == [2, 2]


def test_each_process_keeps_all_rows_of_a_reference_domain_and_its_part_of_others():
    guard = Guard(Toy(), CONFIG)
    guard.keepers = 4
    guard.protect("qa", given(repeat=40))
    assert len(guard.domains["qa"].retained) == CONFIG.retain
    optimizer = GuardedOptimizer(torch.optim.SGD(guard.model.parameters(), lr=0.1), guard)
    train(guard.model, guard, optimizer, ["math"] * 6 + ["code"])
    assert len(guard.domains["math"].retained) == CONFIG.retain // 4
