import gc
import weakref

import pytest
import torch

from interference_guard import correcting
from interference_guard.curvature import DomainCurvature, sketch_matrix
from interference_guard.local_model import Displacement, anchor_domain, displacements, predict
from interference_guard.residual import residual_matrix
from tests.reference import quadratic

WIDTH, UNITS = 20, 9


def anchored(curvature, weights, R, rank, rows=None, reuse=None):
    return anchor_domain(curvature, curvature.energies(), weights, R, [rank], [rows], reuse)


def project(models, seen, radii, sweeps, grams=None):
    """The correction of all domains alike, without products from earlier calls."""
    energies = torch.stack([item.energy() for item in seen])
    return correcting.project(models, seen, energies, radii, sweeps, {} if grams is None else grams, None)


def make(seed, rank=6, sketch=20, residual=4000, matrices=2, inner=4, rows=None):
    """A domain whose gradients span `inner` strong directions, and its anchor weights."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.randn(matrices, inner, WIDTH, generator=generator)
    curvature = DomainCurvature(1.0, [sketch_matrix(WIDTH, sketch, 0)])
    steps = []
    for _ in range(5):
        strong = torch.randn(matrices, UNITS, inner, generator=generator) @ span
        steps.append(strong + 0.1 * torch.randn(matrices, UNITS, WIDTH, generator=generator))
        curvature.observe([steps[-1]])
    weights = [torch.randn(matrices, UNITS, WIDTH, generator=generator)]
    matrices_r = [residual_matrix(WIDTH, residual, 0)]
    return curvature, steps, weights, matrices_r, anchored(curvature, weights, matrices_r, rank, rows)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_prediction_is_the_dense_quadratic_form(rank):
    _curvature, steps, weights, R, model = make(0, rank=rank)
    rank = model.blocks[0].rank
    move = 0.1 * torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(9))
    ((_, inside, outside),) = predict([weights[0] + move], [model], R)
    truth_in = truth_out = 0.0
    for m in range(2):
        second = sum(G[m].double().T @ G[m].double() for G in steps) / len(steps)
        energy = sum(G[m].double().square().sum(1) for G in steps)
        a, b = quadratic(move[m], energy, second, rank)
        truth_in, truth_out = truth_in + a, truth_out + b
    # One number a domain scales both, so that the largest weight is 1.
    scale = float(model.blocks[0].weights().max())
    assert scale == pytest.approx(1.0, rel=1e-5)
    assert (inside / (inside + outside)).item() == pytest.approx(truth_in / (truth_in + truth_out), rel=0.05)
    shares = torch.stack([sum(G[m].square().sum(1) for G in steps) for m in range(2)])
    shares = shares / shares.sum(1, keepdim=True)
    top = max(
        float(shares[m].max() * torch.linalg.eigvalsh(sum(G[m].T @ G[m] for G in steps) / len(steps))[-1])
        for m in range(2)
    )
    assert inside.item() == pytest.approx(truth_in / top, rel=1e-3)
    assert outside.item() == pytest.approx(truth_out / top, rel=0.1)


def test_prediction_grows_with_the_square_of_the_displacement():
    _, _, weights, R, model = make(1)
    move = torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(3))
    small = sum(predict([weights[0] + 0.01 * move], [model], R)[0][1:]).item()
    large = sum(predict([weights[0] + 0.1 * move], [model], R)[0][1:]).item()
    assert large / small == pytest.approx(100, rel=0.02)
    assert sum(predict(weights, [model], R)[0][1:]).item() < 1e-9


def test_scale_of_gradients_does_not_matter():
    values = []
    for scale in (1e-10, 1.0, 1e4):
        generator = torch.Generator().manual_seed(0)
        curvature = DomainCurvature(1.0, [sketch_matrix(WIDTH, 12, 0)])
        for _ in range(4):
            curvature.observe([scale * torch.randn(1, UNITS, WIDTH, generator=generator)])
        weights, R = [torch.zeros(1, UNITS, WIDTH)], [residual_matrix(WIDTH, 8, 0)]
        model = anchored(curvature, weights, R, 6)
        values.append(sum(predict([torch.ones(1, UNITS, WIDTH)], [model], R)[0][1:]).item())
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[2] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("protected", [None, torch.tensor([0, 3, 4, 11, 17])])
def test_projected_weights_are_inside_and_move_only_along_the_directions(protected):
    _, _, weights, _, model = make(2, rows=protected)
    move = torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(4))
    new = weights[0] + move
    seen = displacements([new], [model])
    radius = seen[0].energy() / 10
    (correction,) = project([model], seen, [radius], 3)
    change = correction.dense()
    after = displacements([new - change], [model])[0]
    assert after.energy().item() == pytest.approx(radius.item(), rel=1e-3)
    torch.testing.assert_close(after.flat, seen[0].flat, rtol=1e-3, atol=1e-4)
    U = model.blocks[0].U
    torch.testing.assert_close(change, change @ U @ U.mT, rtol=1e-4, atol=1e-5)
    if protected is not None:
        outside = torch.ones(2 * UNITS, dtype=torch.bool)
        outside[protected] = False
        assert change.reshape(-1, WIDTH)[outside].abs().max() == 0


def test_nothing_moves_inside_the_region():
    _, _, weights, _, model = make(3)
    seen = displacements([weights[0] + 0.01], [model])
    radius = seen[0].energy() * 2
    assert project([model], seen, [radius], 3) is None


def several(count):
    """Domains at one anchor, weights that are too far for all of them, and their radii."""
    made = [make(seed, rank=6) for seed in range(count)]
    models = [item[-1] for item in made]
    anchor = made[0][2][0]
    for model in models[1:]:
        block = model.blocks[0]
        block.z0 = block.select(anchor @ block.U).contiguous()
    new = anchor + torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(5))
    return models, new, [item.energy() / 20 for item in displacements([new], models)]


def test_several_domains_end_within_five_percent():
    models, new, radii = several(3)
    seen = displacements([new], models)
    (correction,) = project(models, seen, radii, 10)
    for item, radius in zip(displacements([new - correction.dense()], models), radii, strict=True):
        assert item.energy().item() <= radius.item() * 1.05


def test_products_that_are_kept_keep_the_models_they_are_of():
    (models, new, radii), grams = several(2), {}
    seen = displacements([new], models)
    list(project(models, seen, radii, 3, grams))
    kept = [weakref.ref(model) for model in models]
    del models, seen
    gc.collect()
    # Else a later model could have the id of one that is gone, and be projected with its products.
    assert all(model() is not None for model in kept)
    grams.clear()
    gc.collect()
    assert not any(model() is not None for model in kept)


def test_energies_that_are_known_are_not_read_again(monkeypatch):
    models, new, radii = several(3)
    seen = displacements([new], models)
    energies = torch.stack([item.energy() for item in seen])
    # The last one alone is outside, which the first sweep can tell from what it was given.
    radii = [energies[0] * 2, energies[1] * 2, radii[2]]
    asked, energy = [], Displacement.energy

    def counted(self):
        asked.append(next(place for place, item in enumerate(seen) if item is self))
        return energy(self)

    monkeypatch.setattr(Displacement, "energy", counted)
    assert correcting.project(models, seen, energies, radii, 1, {}, None) is not None
    assert not asked


def test_reused_directions_only_move_the_anchor():
    curvature, _, weights, R, model = make(4)
    curvature.observe([torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(6))])
    moved = anchored(curvature, [weights[0] + 1], R, 6, reuse=model)
    assert moved.blocks[0].U is model.blocks[0].U
    assert sum(predict([weights[0] + 1], [moved], R)[0][1:]).item() < 1e-9


def test_what_rounding_makes_follows_the_anchor():
    _, _, weights, R, model = make(5)
    before = model.rounding()
    assert model.rounding() is before
    model.stand([10 * weights[0]], R)
    assert model.rounding().item() == pytest.approx(100 * before.item(), rel=1e-4)
