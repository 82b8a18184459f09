import json
import math
import os
import threading

import pytest
import torch

from interference_guard import Guard, GuardConfig, StateError, StateVersionError
from interference_guard.checkpoint import DETAILS, TENSORS
from tests.unit.helpers import CONFIG, Toy, guarded


def fingerprint(guard):
    return guard.steps, {name: guard.raw(name) for name in guard.domains if guard.domains[name].anchored}


def test_round_trip(trained):
    model, guard, folder = trained
    assert sorted(os.listdir(folder)) == sorted([DETAILS, TENSORS])
    other = Guard(model, CONFIG)
    other.load(folder)
    assert fingerprint(other) == fingerprint(guard)
    assert other.domains["math"].retained.rewards.tolist() == guard.domains["math"].retained.rewards.tolist()
    again = Guard(model, CONFIG)
    again.load_state_dict(guard.state_dict())
    assert fingerprint(again) == fingerprint(guard)


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def edit(**values):
    def apply(folder):
        path = folder / DETAILS
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def edit_domain(**values):
    def apply(folder):
        path = folder / DETAILS
        details = json.loads(path.read_text())
        details["domains"]["math"] |= values
        path.write_text(json.dumps(details))

    return apply


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (damage(TENSORS, lambda data: data[:-100]), StateError, "is damaged: it has .* bytes where"),
        (damage(TENSORS, lambda data: data[:-1] + bytes([data[-1] ^ 1])), StateError, "is damaged"),
        (damage(TENSORS, lambda data: b""), StateError, "is damaged: it has 0 bytes"),
        (damage(DETAILS, lambda data: data[: len(data) // 2]), StateError, "is damaged.*Resume from another"),
        (damage(DETAILS, lambda data: b"[]"), StateError, "holds no table"),
        (damage(DETAILS, lambda data: b"\xff\xfe"), StateError, "is damaged"),
        (edit(version=99), StateVersionError, "format version 99; this version reads 9"),
        (edit(format="other"), StateError, "was not written by interference_guard"),
        (edit(domains={"math": {}}), StateError, "incomplete"),
        (edit(domains=[1]), StateError, "incomplete"),
        (edit(settings=[]), StateError, "names no settings"),
        (edit(shards=None), StateError, "its rank and their number are None"),
        (edit(shards=[0]), StateError, r"its rank and their number are \[0\]"),
        (edit(steps=[]), StateError, "incomplete: TypeError"),
        (edit(steps={}), StateError, "incomplete: TypeError"),
        (edit(save_id={}, steps=[[]]), StateError, "incomplete: TypeError"),
        (
            edit(announced=[[]]),
            StateError,
            r"incomplete: ValueError: announced is \[\[\]\] where a list of domains",
        ),
        (edit(announced=["math", {}]), StateError, "incomplete: ValueError: announced is"),
        (edit(announced="math"), StateError, "incomplete: ValueError: announced is 'math'"),
        (edit(trained=[[]]), StateError, "incomplete: ValueError: trained is"),
        (edit(fruitless={"math": "x"}), StateError, "incomplete: ValueError: fruitless is 'x'"),
        (edit(weights=[1]), StateError, "its weights are no checksums"),
        (edit(recovery={"failed": []}), StateError, r"incomplete: ValueError: failed is \[\] where"),
        (edit(recovery={"domain": []}), StateError, r"its recovery is of \[\], and its domains"),
        (edit_domain(recent=[[1]]), StateError, r"incomplete: ValueError: recent is \[\[1\]\] where"),
        (edit_domain(low=None), StateError, "incomplete: ValueError: low is None where"),
        (edit_domain(model=None), StateError, "incomplete: ValueError: 'math' has an anchor and no local model"),
        (edit_domain(measurement={"loss": "x"}), StateError, "incomplete: ValueError: loss is 'x' where"),
        (edit(steps=math.inf), StateError, "incomplete: OverflowError"),
        (edit(kept=["a", 1]), StateError, "incomplete: ValueError: kept is 'a'"),
        (edit_domain(own_steps="a"), StateError, "incomplete: ValueError: own_steps is 'a' where"),
        (edit_domain(recent=3), StateError, "incomplete: ValueError: recent is 3 where"),
        (edit_domain(region={"radius": "x"}), StateError, "incomplete: ValueError: radius is 'x' where"),
        (
            edit(recovery={"phase": "recovering", "domain": "other"}),
            StateError,
            "recovery is of 'other', and its domains",
        ),
        (lambda folder: (folder / TENSORS).unlink(), StateError, "does not exist.*side by side"),
        (lambda folder: (folder / DETAILS).unlink(), StateError, "does not exist"),
    ],
)
def test_damaged_files_are_refused_and_change_nothing(trained, harm, error, message):
    _model, guard, folder = trained
    before = fingerprint(guard)
    harm(folder)
    with pytest.raises(error, match=message):
        guard.load(folder)
    assert fingerprint(guard) == before
    assert guard.announced == {"math", "code"}


def test_other_models_and_settings_are_refused(trained):
    _, _, folder = trained
    with pytest.raises(StateError, match=r"of another model: \d+ of \d+ parameters differ, for instance"):
        Guard(Toy(hidden=8), CONFIG).load(folder)
    with pytest.raises(StateError, match="made with rank=8, this guard has rank=4.*Use the same value"):
        Guard(Toy(), GuardConfig(rank=4, sketch=12, residual=4)).load(folder)


def test_budgets_may_change(trained):
    model, _, folder = trained
    other = Guard(model, GuardConfig(rank=8, sketch=12, residual=4, budget=0.5))
    other.load(folder)
    assert other.domains["math"].region.budget == 0.5


def test_a_state_that_is_none_is_refused():
    _, guard, _ = guarded()
    with pytest.raises(StateError, match="must be what Guard.state_dict"):
        guard.load_state_dict({"state": {}})


@pytest.mark.parametrize("name", ["model/0/z0", "model/0/q0", "sums/0/energy", "sums/0/basis"])
def test_a_tensor_of_another_shape_is_refused_before_anything_changes(trained, name):
    model, guard, _ = trained
    state, other = guard.state_dict(), Guard(model, CONFIG)
    key = next(key for key in state["tensors"] if key.endswith(name))
    state["tensors"] = {**state["tensors"], key: state["tensors"][key][..., :-1]}
    with pytest.raises(StateError, match=r"incomplete: ValueError: \w+ of .* has shape .* is needed"):
        other.load_state_dict(state)
    assert not other.domains


def test_a_full_disk_leaves_the_earlier_state(trained, monkeypatch):
    _model, guard, folder = trained
    before = {name: (folder / name).read_bytes() for name in (DETAILS, TENSORS)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("interference_guard.checkpoint.save_file", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(StateError, match="No space left on device.*not touched.*Free space"):
                guard.save(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_torn_pair_is_found(trained, monkeypatch):
    # The process dies between the two renames, as where nothing can be put back: new tensors beside old details.
    _model, guard, folder = trained
    guard.domains["math"].curvature.sums[0].energy.add_(1.0)
    calls = []
    real = os.replace

    def dies(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("killed")
        real(source, target)

    def no_links(source, target):
        raise OSError("not on this file system")

    monkeypatch.setattr("interference_guard.checkpoint.os.replace", dies)
    monkeypatch.setattr("interference_guard.checkpoint.os.link", no_links)
    with pytest.raises(StateError, match="could not be written"):
        guard.save(folder)
    with pytest.raises(StateError, match="is damaged"):
        guard.load(folder)


def test_memory_that_is_used_up_is_reported(trained, monkeypatch):
    _, guard, folder = trained
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("interference_guard.checkpoint.pack", full)
    with pytest.raises(StateError, match="could not be written .*can't allocate memory.*not touched"):
        guard.save(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_threads_may_save_at_the_same_time(trained):
    model, guard, folder = trained
    failures = []

    def save():
        try:
            guard.save(folder)
        except StateError as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(os.listdir(folder)) == sorted([DETAILS, TENSORS])
    Guard(model, CONFIG).load(folder)


def test_a_folder_that_cannot_be_made_is_reported(trained, tmp_path):
    _, guard, _ = trained
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="could not be written"):
        guard.save(tmp_path / "file" / "below")


def test_saving_does_not_change_the_run(trained, tmp_path):
    _model, guard, _ = trained
    before = {name: tensor.clone() for name, tensor in guard.state_dict()["tensors"].items()}
    guard.save(tmp_path / "again")
    after = guard.state_dict()["tensors"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
