"""States of two ranks, each in a folder of its own, made by two threads of one process."""

import json

import torch

from interference_guard import Guard
from interference_guard.checkpoint import DETAILS
from tests.unit.helpers import CONFIG, Toy, rollout, step_by_hand, two_ranks


def folder_of(root):
    """By rank the folder that it saves into."""
    return lambda rank: root / f"rank{rank}"


def trained(number, reduce, model, plan=("math", "math", "code")):
    guard = Guard(model, CONFIG, reduce=reduce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, domain in enumerate(plan):
        step_by_hand(model, guard, optimizer, domain, step, rollout(model, domain, 8, seed=10 * step + number))
    return guard


def begun(tmp_path, places=((0, 2), (1, 2)), plan=("math", "math", "code"), seed=0, **options):
    """Two ranks that trained and saved; `options` are for `alter`."""
    models = [Toy(seed), Toy(seed)]

    def rank(number, reduce):
        guard = trained(number, reduce, models[number], plan)
        alter(guard, number, **options)
        guard.save(folder_of(tmp_path)(number), folders=2, place=places[number])
        return guard.domains["math"].retained

    return two_ranks(rank)


def alter(guard, number, rare=None, forgets=None):
    if number == rare:
        guard.retain("rare", rollout(guard.model, "qa", 4))
    if number == forgets:
        guard.domains["code"].own_steps = 0


def edited(folder, change):
    """Change what the JSON file in a folder says."""
    path = folder / DETAILS
    details = json.loads(path.read_text())
    change(details)
    path.write_text(json.dumps(details))
