"""Each rival does what its name says: a broken one would be an easy one to beat."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.bed import domains
from benchmarks.bed import model as policy
from benchmarks.bed.beds import DIGITS
from benchmarks.bed.method import Method, Mixed
from benchmarks.bed.run import Run
from benchmarks.bed.training import share_start, train
from benchmarks.rivals.agem import AGEM, turn
from benchmarks.rivals.ewc import EWC
from benchmarks.rivals.kl import PhaseKL
from benchmarks.rivals.osf import OSF
from benchmarks.rivals.registry import RIVALS
from benchmarks.rivals.replay import GuardedReplay, Replay
from benchmarks.rivals.separate import Separate
from benchmarks.rivals.subspaces import OSFTLike, RandomSubspace
from benchmarks.rivals.turns import Turns

ORDER, STEPS = DIGITS.orders[0][:3], 3
TOTAL = STEPS * len(ORDER) * DIGITS.prompts


@pytest.fixture(scope="module", autouse=True)
def start(tmp_path_factory):
    """Random weights in place of the warm start, which takes a minute."""
    path = tmp_path_factory.mktemp("start") / "weights.pt"
    torch.save(policy.build(policy.tokenizer(sorted(ORDER), DIGITS), 0).state_dict(), path)
    share_start(ORDER, 0, path, save=False, bed=DIGITS)

    def reward(completions, **columns):
        """Random weights never answer right: anything that tells completions apart gives a gradient."""
        return [float(len(set(text)) > 2) for text in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domains, "reward", reward)
        yield


def run(strength=None):
    return Run("rival", 1e-3, 0, ORDER, STEPS, bed="digits", strength=strength, tests=8)


def trained(kind, strength=None):
    """A method that was trained by, and the weights at the start and the end of every phase."""
    seen = []

    class Watched(kind):
        def begin(self, phase):
            super().begin(phase)
            seen.append([{name: weight.clone() for name, weight in self.matrices()}])

        def end(self, phase):
            super().end(phase)
            seen[-1].append({name: weight.clone() for name, weight in self.matrices()})

    method = Watched(run(strength))
    train(method.run, every=STEPS, method=method)
    return method, seen


def rows():
    return {name: DIGITS.rows(name, 60, 1) for name in ORDER}


def test_a_gem_leaves_gradients_that_agree_and_turns_those_that_do_not():
    reference = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    agreeing = [torch.tensor([0.5, 3.0]), torch.tensor([0.1])]
    assert turn(agreeing, reference) is agreeing
    against = [torch.tensor([-3.0, 1.0]), torch.tensor([0.5])]
    turned = turn(against, reference)
    assert sum((g * r).sum() for g, r in zip(turned, reference, strict=True)) == pytest.approx(0, abs=1e-6)
    # Only the part along the reference is gone.
    assert turned[0].tolist() == pytest.approx([-3 + 2 / 5, 1.0])
    assert turned[1].tolist() == pytest.approx([0.5 + 4 / 5])


def test_a_gem_remembers_rewarded_rollouts_of_every_domain():
    method, _ = trained(AGEM, 8)
    assert len(method.memory) == len(ORDER)
    assert all((memory["rewards"] > 0).all() for memory in method.memory)


def test_ewc_pulls_back_by_its_fisher():
    method, seen = trained(EWC, 2.0)
    assert len(method.anchors) == len(ORDER)
    everything = torch.cat([f.flatten() for _, f in method.anchors[0].values()])
    assert everything.mean() == pytest.approx(1, rel=1e-4)
    name, now = next(iter(method.model.named_parameters()))
    (gradient,) = torch.autograd.grad(method.penalty(), [now])
    wanted = sum(2.0 * a[name][1] * (now - a[name][0]) for a in method.anchors)
    torch.testing.assert_close(gradient, wanted)
    assert method.penalty() > 0
    torch.testing.assert_close(method.anchors[0][name][0], seen[0][1][name])


def test_the_kl_is_to_the_weights_a_phase_began_with():
    method, seen = trained(PhaseKL, 0.1)
    reference = dict(method.trainer.ref_model.named_parameters())
    for name, weight in seen[-1][0].items():
        torch.testing.assert_close(reference[name].data, weight)
    assert any(not torch.equal(weight, seen[-1][1][name]) for name, weight in seen[-1][0].items())
    assert method.trainer.beta == 0.1


@pytest.mark.parametrize(("side", "share"), [("right", 0.5), ("left", 0.5), ("both", 0.25)])
def test_osft_like_steps_stay_out_of_leading_directions(side, share):
    _, seen = trained(OSFTLike, f"{side} {share}")
    for name, before in seen[-1][0].items():
        moved = seen[-1][1][name] - before
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        count = round(share * min(before.shape))
        kept = []
        if side != "left":
            kept.append(moved @ right[:count].T)
        if side != "right":
            kept.append(left[:, :count].T @ moved)
        assert moved.norm() > 1e-3
        assert all(part.norm() < 1e-4 * moved.norm() for part in kept)


def test_the_first_phase_of_a_confined_method_is_free():
    _, plain = trained(_Plain)
    _, seen = trained(OSFTLike, "both progressive")
    name = next(iter(plain[0][1]))
    assert torch.equal(seen[0][1][name], plain[0][1][name])
    assert not torch.equal(seen[1][1][name], plain[1][1][name])


def test_random_subspaces_have_their_rank_and_change_with_the_phase():
    _, seen = trained(RandomSubspace, 0.1)
    name = "model.layers.0.mlp.gate_proj.weight"
    spaces = []
    for before, after in seen[1:]:
        moved = after[name] - before[name]
        values = torch.linalg.svdvals(moved)
        assert values[5] > 1e-4
        assert values[6:].max() < 1e-5
        spaces.append(torch.linalg.svd(moved).Vh[:6])
    overlap = (spaces[0] @ spaces[1].T).square().sum() / 6
    assert overlap < 0.5


def test_osf_begins_and_ends_with_the_same_function():
    method = OSF(run(0.5))
    words = policy.tokenizer(sorted(ORDER), DIGITS)
    student = policy.build(words, 0)
    ids = torch.arange(12).view(2, 6)
    before = student(input_ids=ids).logits
    assert method.policy(student, None) is student, "the first domain trains all weights"
    assert method.release(student) is student
    wrapped = method.policy(student, None)
    assert any(not parameter.requires_grad for parameter in wrapped.parameters())
    torch.testing.assert_close(wrapped(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    # The frozen factors of each matrix weigh about as much as it does.
    assert 0.5 < method.bytes() / sum(4 * p.numel() for p in policy.build(words, 0).parameters()) < 2.5
    merged = method.release(wrapped)
    torch.testing.assert_close(merged(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in policy.build(words, 0).named_parameters()
    ]


def test_osf_trains_domain_after_domain():
    method = OSF(run("progressive"))
    result = train(method.run, every=STEPS, method=method)
    assert [point["step"] for point in result.curve] == [0, 3, 6, 9]
    assert set(result.own) == set(ORDER)


class _Plain(AGEM):
    """Plain training, watched."""

    def before_step(self):
        pass


def test_every_plan_has_the_same_number_of_prompts():
    for kind, strength in ((Method, None), (Mixed, "rows"), (Mixed, "batches"), (Replay, 0.25), (Separate, None)):
        plan = kind(run(strength)).plan(rows())
        assert sum(len(data) for data in plan) == TOTAL


def test_replay_mixes_in_its_share_of_earlier_domains_alone():
    (data,) = Replay(run(0.25)).plan(rows())
    size = STEPS * DIGITS.prompts
    for phase, name in enumerate(ORDER):
        names = data["domain"][phase * size : (phase + 1) * size]
        assert names.count(name) == (size if not phase else 0.75 * size)
        assert set(names) <= set(ORDER[: phase + 1])


def test_the_guard_protects_what_is_replayed():
    settings = RIVALS["guard, replay"].settings(0.25)
    method = GuardedReplay(replace(run(0.25), guard=settings))
    (data,), (alone,) = method.plan(rows()), Replay(run(0.25)).plan(rows())
    assert data["domain"][:] == alone["domain"][:]
    train(method.run, every=STEPS, method=method)
    states = method.callback.guard.domains
    # Each was trained in its own phase alone, and held in all later ones, which replayed it.
    assert [states[name].foreign_steps for name in ORDER] == [2 * STEPS, STEPS, 0]
    assert [states[name].anchored for name in ORDER] == [True, True, False]


def test_a_mixed_batch_holds_one_domain_where_it_is_asked_to():
    (data,) = Mixed(run("batches")).plan(rows())
    names = data["domain"]
    for start in range(0, len(names), DIGITS.prompts):
        assert len(set(names[start : start + DIGITS.prompts])) == 1


def test_two_runs_take_their_steps_in_turns():
    first, second = Turns.pair(threading, 10.0)
    order = []

    def steps(turns, name, trainers):
        for count in trainers:
            for _ in range(count):
                turns.on_step_begin(None, None, None)
                order.append(name)
                time.sleep(0.01)
            turns.on_train_end(None, None, None)
        turns.leave()

    other = threading.Thread(target=steps, args=(second, "b", [6]))
    other.start()
    steps(first, "a", [2, 2])
    other.join()
    assert order == ["a", "b"] * 4 + ["b", "b"]
    assert 0.04 <= first.seconds < 0.06
    assert 0.06 <= second.seconds < 0.08
