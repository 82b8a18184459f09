import pytest
import torch

from interference_guard.blocks import STACK_LIMIT
from interference_guard.curvature import DomainCurvature, nystrom, sketch_matrix, truncate
from interference_guard.errors import ShapeError
from interference_guard.observation import unit_energy


def curvature(width=24, sketch=12, half_life=4.0):
    return DomainCurvature(0.5 ** (1 / half_life), [sketch_matrix(width, sketch, 0)])


def gradients(steps, units=10, width=24, seed=0, matrices=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(matrices, units, width, generator=generator) for _ in range(steps)]


def test_sums_are_the_decayed_sums_by_definition():
    found, steps = curvature(), gradients(7)
    for gradient in steps:
        found.observe([gradient])
    omega, decay = found.omegas[0].double(), found.decay
    weights = [decay ** (len(steps) - 1 - i) for i in range(len(steps))]
    sketch = sum(c * (G.double().mT @ (G.double() @ omega)) for c, G in zip(weights, steps, strict=True))
    energy = sum(c * G.double().square().sum(-1) for c, G in zip(weights, steps, strict=True))
    torch.testing.assert_close(found.sums[0].sketch.double(), sketch, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.sums[0].energy.double(), energy, rtol=1e-5, atol=1e-5)
    assert found.count.item() == pytest.approx(sum(weights))


def test_energies_of_a_large_block_are_the_same_whichever_way_it_lies():
    (block,) = gradients(1, units=600, width=300, matrices=2)
    assert block.numel() > STACK_LIMIT
    energy = block.double().square().sum(-1)
    for way in (block, block.mT.contiguous().mT):
        torch.testing.assert_close(unit_energy(way).double(), energy, rtol=1e-6, atol=0)
    block[0, 0, 0], block[0, 1, 0] = float("inf"), float("nan")
    assert unit_energy(block)[0, 0].isinf()
    assert unit_energy(block)[0, 1].isnan()


def test_half_life_is_exact():
    found = curvature(half_life=5.0)
    found.observe(gradients(1))
    first = found.sums[0].energy.clone()
    tiny = torch.full_like(gradients(1)[0], 1e-20)
    for _ in range(5):
        found.observe([tiny])
    torch.testing.assert_close(found.sums[0].energy, first / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("on_device", [False, True])
def test_steps_without_usable_gradients_are_not_counted(bad, on_device, monkeypatch):
    found = curvature()
    found.observe(gradients(1))
    before = (found.sums[0].sketch.clone(), found.sums[0].energy.clone(), found.count.clone())
    gradient = torch.zeros(2, 10, 24)
    gradient[0, 0, 0] = bad
    if on_device:
        # The masked path of accelerators, here on the CPU.
        monkeypatch.setattr("interference_guard.curvature.READS_BACK", ())
    found.observe([gradient])
    after = (found.sums[0].sketch, found.sums[0].energy, found.count)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_masked_path_counts_what_the_reading_path_counts(monkeypatch):
    reading, masked = curvature(), curvature()
    for gradient in gradients(3):
        reading.observe([gradient])
    monkeypatch.setattr("interference_guard.curvature.READS_BACK", ())
    for gradient in gradients(3):
        masked.observe([gradient])
    torch.testing.assert_close(reading.sums[0].sketch, masked.sums[0].sketch)
    torch.testing.assert_close(reading.sums[0].energy, masked.sums[0].energy)
    assert reading.count.item() == pytest.approx(masked.count.item())


def test_sums_of_two_ranks_add_up_to_those_of_both():
    a, b, both = curvature(half_life=1e9), curvature(half_life=1e9), curvature(half_life=1e9)
    for gradient in gradients(4, seed=1):
        a.observe([gradient])
        both.observe([gradient])
    for gradient in gradients(3, seed=2):
        b.observe([gradient])
        both.observe([gradient])
    added, energy = a.sums[0].sketch + b.sums[0].sketch, a.sums[0].energy + b.sums[0].energy
    torch.testing.assert_close(added, both.sums[0].sketch, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(energy, both.sums[0].energy, rtol=1e-4, atol=1e-4)
    assert (a.count + b.count).item() == pytest.approx(both.count.item())


def test_other_shapes_are_refused():
    found = curvature()
    found.observe(gradients(1, units=10))
    with pytest.raises(ShapeError, match="Observe the parameters"):
        found.observe(gradients(1, units=11))


def test_observe_leaves_gradients_alone():
    found, gradient = curvature(), gradients(1)[0]
    copy = gradient.clone()
    found.observe([gradient])
    assert torch.equal(gradient, copy)


def low_rank(rank, scale):
    generator = torch.Generator().manual_seed(rank)
    factor = torch.randn(3, 24, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.mT * scale


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e8])
@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_nystrom_is_exact_up_to_the_sketch(rank, scale):
    A, omega = low_rank(rank, scale), sketch_matrix(24, 12, 0)
    U, lam = nystrom(A @ omega.double(), omega)
    values, vectors = torch.linalg.eigh(A)
    torch.testing.assert_close(lam.double() / scale, values.flip(-1)[:, :12] / scale, rtol=1e-4, atol=1e-4)
    kept = U[:, :, :rank].double()
    torch.testing.assert_close(kept.mT @ kept, torch.eye(rank).double().expand(3, -1, -1), rtol=0, atol=1e-5)
    # The same span as the dense eigenvectors.
    dense = vectors.flip(-1)[:, :, :rank]
    torch.testing.assert_close(kept @ kept.mT, dense @ dense.mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e8])
@pytest.mark.parametrize("rank", [1, 6, 9])
def test_nystrom_from_fp32_sums_keeps_three_digits(rank, scale):
    A, omega = low_rank(rank, scale), sketch_matrix(24, 12, 0)
    U, lam = nystrom((A @ omega.double()).float(), omega)
    rebuilt = (U.double() * lam.double().unsqueeze(-2)) @ U.double().mT
    assert (rebuilt - A).norm() <= 1e-3 * A.norm()
    assert (lam[:, rank:] <= 1e-6 * lam[:, :1]).all()


def test_nystrom_error_is_bounded_for_decaying_spectra():
    # Halko, Martinsson and Tropp 2011, theorem 10.5: E|A - QQ'A|_F <= sqrt(1 + k/(p-1)) * tail, with
    # k + p = sketch; Nystrom with the same sketch is no worse in expectation up to a small factor.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    for power in (1.0, 2.0, 3.0):
        values = torch.arange(1, 41, dtype=torch.float64) ** -power
        A = (basis * values) @ basis.mT
        errors = []
        for seed in range(20):
            omega = sketch_matrix(40, 20, seed)
            U, lam = nystrom((A @ omega.double()).float().unsqueeze(0), omega)
            U, lam = U[0, :, :10].double(), lam[0, :10].double()
            errors.append(float((A - (U * lam) @ U.mT).norm()))
        tail = float(values[10:].norm())
        assert tail * (1 - 1e-6) <= sum(errors) / len(errors) <= tail * (1 + 10 / 9) ** 0.5 * 1.1


def test_eigenvalues_are_sorted_and_never_negative():
    found = curvature()
    for gradient in gradients(3, units=2):
        found.observe([gradient])
    basis, lam, trace = found.factor(found.energies(), [12])[0]
    assert (lam >= 0).all()
    assert (lam[:, :-1] >= lam[:, 1:]).all()
    assert basis.shape == (2, 24, 12)
    energy = sum(0.5 ** ((2 - i) / 4) * g.square().sum((-1, -2)) for i, g in enumerate(gradients(3, units=2)))
    torch.testing.assert_close(trace, energy / found.count)


def test_factoring_then_observing_goes_on_from_the_same_sums():
    plain, factored = curvature(), curvature()
    for gradient in gradients(3, units=2, seed=5):
        plain.observe([gradient])
        factored.observe([gradient])
    factored.factor(factored.energies(), [12])
    assert factored.sums[0].sketch is None
    for gradient in gradients(2, units=2, seed=6):
        plain.observe([gradient])
        factored.observe([gradient])
    torch.testing.assert_close(plain.sums[0].sketch, factored.sums[0].sketch, rtol=1e-3, atol=1e-3)


def test_the_leading_eigenvectors_alone_are_kept_and_go_on_from_there():
    whole, kept = curvature(), curvature()
    for gradient in gradients(6, units=2, seed=5):
        whole.observe([gradient])
        kept.observe([gradient])
    (U, lam, trace), (few, few_lam, few_trace) = (
        item.factor(item.energies(), [rank])[0] for item, rank in ((whole, 12), (kept, 3))
    )
    assert torch.equal(few, U[:, :, :3])
    assert torch.equal(few_lam, lam[:, :3])
    assert torch.equal(few_trace, trace)
    assert few.untyped_storage().nbytes() == 4 * few.numel()
    # Of what was let go the energy alone is known; what is kept decays as before beside further steps.
    sums = whole.count * (few * few_lam.unsqueeze(-2)) @ few.mT
    for gradient in gradients(4, units=2, seed=6):
        kept.observe([gradient])
        sums = kept.decay * sums + gradient.mT @ gradient
    torch.testing.assert_close(kept.sums[0].sketch, sums @ kept.omegas[0], rtol=1e-3, atol=1e-3)


def test_truncate_stops_at_the_rank_and_where_the_energy_is_covered():
    basis = torch.eye(6).unsqueeze(0)
    lam = torch.tensor([[8.0, 1.0, 0.5, 0.0, 0.0, 0.0]])
    U, kept, rho = truncate(basis, lam, torch.tensor([10.0]), 2)
    assert kept.tolist() == [[8.0, 1.0]]
    assert rho.item() == pytest.approx(1.0 / 4)
    U, kept, rho = truncate(basis, lam, torch.tensor([9.5]), 5)
    assert kept.tolist() == [[8.0, 1.0, 0.5]]
    assert U.shape == (1, 6, 3)
    assert U.untyped_storage().data_ptr() == basis.untyped_storage().data_ptr()
    assert rho.item() == 0


def test_the_test_matrix_is_the_same_everywhere_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert torch.equal(sketch_matrix(16, 8, 3), sketch_matrix(16, 8, 3))
    assert not torch.equal(sketch_matrix(16, 8, 3), sketch_matrix(16, 8, 4))
    assert torch.equal(torch.get_rng_state(), state)
