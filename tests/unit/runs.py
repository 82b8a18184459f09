"""A small guarded run on disk: checkpoints with the guard's state after each phase, and a history."""

import json

import torch
from safetensors.torch import save_file

from interference_guard.history import HISTORY, History
from tests.unit.helpers import guarded, pass_rate, train

PHASES = ("math", "code", "qa")
STEPS = 30


def save_model(model, folder, shards=1, dtype=torch.float32):
    """Weights as `save_pretrained` lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def guarded_run(folder, config):
    """Three domains in turn on the toy; `phase-0` to `phase-3` under the folder."""
    model, guard, optimizer = guarded(config=config)
    save_model(model, folder / "phase-0")
    history = History(folder / HISTORY, {"budget": config.budget, "name": "<b>toy</b> $x_1$"})
    history.evaluation(0, {name: pass_rate(model, name) for name in PHASES})

    def after(step):
        history.report(step + 1, guard.metrics(), active=[PHASES[step // STEPS]], seconds=0.1 * (step + 1))
        if (step + 1) % STEPS == 0:
            history.evaluation(step + 1, {name: pass_rate(model, name) for name in PHASES})

    for index, name in enumerate(PHASES):
        train(model, guard, optimizer, [name] * STEPS, start=index * STEPS, after=after)
        save_model(model, folder / f"phase-{index + 1}")
        guard.save(folder / f"phase-{index + 1}")
    return model, guard
