"""A host's default device is not the guard's: its own random numbers, masks and places lie on the CPU."""

import dataclasses

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer
from interference_guard.analysis import measure_edits, open_checkpoint, top_neurons
from interference_guard.renewing import renew
from tests.unit.helpers import CONFIG, Toy, rollout, train
from tests.unit.runs import save_model


@pytest.fixture(scope="module")
def rows():
    """Completions by domain and step, made before the default device is another one."""
    model = Toy(1)
    steps = [(name, 1000 + step) for name in ("math", "code") for step in range(9)]
    return {(name, step): rollout(model, name, seed=step) for name, step in steps}


def run(rows, config, folder):
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with torch.device("meta") if folder.name == "meta" else torch.device("cpu"):
        guard = Guard(model, config)
        guarded = GuardedOptimizer(optimizer, guard)
        names = ["math"] * 4 + ["code"] * 5
        train(model, guard, guarded, names, roll=lambda model, domain, seed: rows[domain, seed])
        renew(guard, guard.domains["math"])
        guard.save(folder)
        other = Guard(model, config)
        other.load(folder)
        other.load(folder, ranks=[folder])
    return list(model.parameters()), guard.state_dict()["tensors"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"selection": "random", "coverage": 0.6, "first_order": True}, {"selection": "edits", "coverage": 0.6}],
    ids=["defaults", "random", "edits"],
)
def test_a_run_is_the_same_whatever_the_default_device(rows, tmp_path, changes):
    config = dataclasses.replace(CONFIG, retain=16, **changes)
    (weights, state), (others, theirs) = (run(rows, config, tmp_path / name) for name in ("cpu", "meta"))
    assert all(map(torch.equal, weights, others))
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in state)


def test_checkpoints_are_compared_on_the_cpu(tmp_path):
    folders = [save_model(Toy(seed), tmp_path / str(seed)) for seed in (0, 1)]
    with torch.device("meta"):
        edits = measure_edits(*map(open_checkpoint, folders))
        top = top_neurons({"mlp": edits.parameters["mlp.up_proj.weight"].units})
    assert int(top["mlp"].sum()) == 3
