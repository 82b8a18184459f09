"""A state between its writing and its place, and an earlier one that goes before."""

import os

import pytest

from interference_guard import Guard, StateError
from interference_guard.checkpoint import DETAILS, TENSORS, write
from interference_guard.written import withdraw
from tests.unit.helpers import CONFIG


def test_a_state_is_none_before_it_is_in_place(trained, tmp_path):
    model, guard, _ = trained
    folder, other = tmp_path / "next", Guard(model, CONFIG)
    written = write(guard, folder)
    with pytest.raises(StateError, match=r"interference_guard\.json does not exist"):
        other.load(folder)
    written.publish()
    assert sorted(os.listdir(folder)) == sorted([DETAILS, TENSORS])
    other.load(folder)
    assert other.raw("math") == guard.raw("math")


def test_what_is_dropped_leaves_the_earlier_state_alone(trained):
    _, guard, folder = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(guard, folder).drop()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_files_of_a_state_alone_are_withdrawn(tmp_path):
    others = ["interference_guard_history.jsonl", "interference_guard_rank1", "model.safetensors"]
    killed = f".{TENSORS}.tmp-1-2"
    for name in (DETAILS, TENSORS, "interference_guard_rank2.json", killed, *others):
        (tmp_path / name).touch()
    withdraw(tmp_path)
    assert sorted(os.listdir(tmp_path)) == others
    withdraw(tmp_path / "none")


def test_what_cannot_be_withdrawn_is_an_error(tmp_path):
    (tmp_path / DETAILS).mkdir()
    with pytest.raises(StateError, match="could not be deleted.*Delete it, or choose another folder"):
        withdraw(tmp_path)
