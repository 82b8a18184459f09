"""Whether weights are those that a state was saved beside."""

import dataclasses
import json
import warnings

import pytest
import torch

from interference_guard import Guard, StateError
from interference_guard.checkpoint import check_weights, weights_beside
from interference_guard.files import DETAILS
from interference_guard.handover import compare, compare_regions
from tests.unit.helpers import CONFIG, Toy, guarded, train


def read(model, folder, config=CONFIG):
    guard = Guard(model, config)
    guard.load(folder)
    return guard


def test_weights_that_are_the_same_are_compared_in_silence(trained):
    model, _, folder = trained
    guard = read(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(weights_beside(folder), guard.view, "saved")
        assert not compare(None, guard.view, "saved")
        compare_regions(guard, "saved", "Load them.")


def test_others_are_told_with_what_to_do(trained):
    guard = read(Toy(1), trained[2])
    with pytest.warns(UserWarning, match=r"weights are not those saved: .* parameters differ.* Load them\.$"):
        compare(weights_beside(trained[2]), guard.view, "saved", "Load them.")
    with pytest.warns(UserWarning, match=r"not those saved.*domain 'math' is .* times its radius.* Load them\.$"):
        compare_regions(guard, "saved", "Load them.")


def test_weights_in_bf16_are_rounded_after_a_step(tmp_path):
    model, guard, optimizer = guarded(rate=2e-4, dtype=torch.bfloat16)
    train(model, guard, optimizer, ["math"] * 6 + ["code"] * 7)
    guard.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_regions(read(model, tmp_path), "saved", "")
    with pytest.warns(UserWarning, match="weights are not those saved"):
        compare_regions(read(Toy(0).to(torch.bfloat16), tmp_path), "saved", "")


def test_a_region_that_nothing_held_is_compared_with_where_it_was(tmp_path):
    """Where steps are not projected, a domain may be far outside of its radius."""
    model, guard, optimizer = guarded(config=(config := dataclasses.replace(CONFIG, project=False)))
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 12)
    assert guard.raw_parts(["math"])["math"].inside > 2 * guard.domains["math"].radius
    guard.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_regions(read(model, tmp_path, config), "saved", "")


def test_without_a_radius_nothing_is_said(tmp_path):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3)
    guard.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_regions(read(Toy(1), tmp_path), "saved", "")


def test_a_domain_that_was_being_trained_was_not_held(trained):
    guard = read(Toy(1), trained[2])
    guard.domains["math"].own_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_regions(guard, "saved", "")
    assert torch.isfinite(guard.domains["math"].radius)


def test_other_weights_than_the_states_in_one_checkpoint_are_refused(trained):
    model, _, folder = trained
    check_weights(read(model, folder), folder, "Take another.")
    # Of a run in another number format nothing is known.
    check_weights(read(Toy(1).to(torch.bfloat16), folder), folder, "Take another.")
    guard = read(Toy(1), folder)
    with pytest.raises(StateError, match=r"beside other weights.* parameters differ.*attempt.* Take another\.$"):
        check_weights(guard, folder, "Take another.")
    # As of a release that noted none.
    change_details(folder, weights=None)
    check_weights(guard, folder, "Take another.")


def test_a_state_of_other_ranks_says_nothing_of_these_weights(trained):
    guard, folder = read(Toy(1), trained[2]), trained[2]
    change_details(folder, shards=[0, 2])
    check_weights(guard, folder, "Take another.")
    (folder / DETAILS).unlink()
    check_weights(guard, folder, "Take another.")


def change_details(folder, **values):
    path = folder / DETAILS
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
