"""Parts of one number of ranks for another; several ranks are in tests/distributed/test_shards.py."""

import json
import shutil

import pytest
import torch

from interference_guard import Guard, StateError
from interference_guard.checkpoint import DETAILS
from tests.unit.helpers import CONFIG


def test_one_part_for_one_rank_is_itself(trained):
    model, guard, folder = trained
    other = Guard(model, CONFIG)
    other.load(folder, [folder])
    expected, found = guard.state_dict(), other.state_dict()
    assert json.dumps(found["details"]) == json.dumps(expected["details"])
    # What one process shares with the sums is stored once more.
    shared = {key for key in found["tensors"] if key.endswith(("/U", "/energy")) and "/model/" in key}
    assert found["tensors"].keys() - shared == expected["tensors"].keys() - shared
    for key in expected["tensors"].keys() - shared:
        assert torch.equal(found["tensors"][key], expected["tensors"][key]), key
    assert other.raw("math") == guard.raw("math")


def changed(folder, name, change):
    target = folder.parent / name
    shutil.copytree(folder, target)
    details = json.loads((target / DETAILS).read_text())
    change(details)
    (target / DETAILS).write_text(json.dumps(details))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda details: details.pop("blocks"), "incomplete: KeyError: 'blocks'"),
        (
            lambda details: details.update(shards=[1, 2]),
            r"ranks \[\(1, 2\)\] at steps \[6\], rank \[0\] is missing",
        ),
        (lambda details: details["domains"]["math"].pop("recent"), "incomplete: KeyError: 'recent'"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_change_nothing(trained, change, message):
    _, guard, folder = trained
    before = guard.raw("math")
    with pytest.raises(StateError, match=message):
        guard.load(folder, [changed(folder, "other", change)])
    assert guard.raw("math") == before


def test_parts_of_two_moments_are_refused(trained):
    _, guard, folder = trained
    later = changed(folder, "later", lambda details: details.update(steps=7))
    with pytest.raises(StateError, match=r"at steps \[6, 7\]"):
        guard.load(folder, [folder, later])


def test_without_any_part_the_file_is_named(trained, tmp_path):
    _, guard, _ = trained
    with pytest.raises(StateError, match=r"interference_guard\.json does not exist"):
        guard.load(tmp_path / "none", [])
