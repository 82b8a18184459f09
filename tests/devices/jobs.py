"""What runs on the CPU and on the pretended device, each in a process of its own."""

import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType

import torch

from interference_guard import GuardConfig
from tests.unit.helpers import Toy, guarded, pass_rate, rollout, train

from .pretended import Elsewhere, pretended_device

SETTINGS = {"rank": 8, "sketch": 12, "residual": 4, "probe_steps": 5}
PHASES = ["math"] * 12 + ["code"] * 12 + ["qa"] * 12


@contextmanager
def chosen(pretend):
    """The device to run on, without what hosts warn of."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), pretended_device() if pretend else nullcontext(torch.device("cpu")) as device:
        warnings.simplefilter("ignore")
        yield device


def mixes(device):
    """What each of some operations says that meet a tensor of the CPU."""
    there, here = torch.ones(3, device=device), torch.ones(3)
    tries = {
        "add": lambda: there + here,
        "in place": lambda: there.add_(here),
        "product": lambda: there @ here,
        "stack": lambda: torch.stack([there, here]),
        "where": lambda: torch.where(there > 0, here, there),
        "gather": lambda: there.gather(0, torch.zeros(1, dtype=torch.long)),
        "one number of no element-wise operation": lambda: torch.stack([there.sum(), here.sum()]),
        "one number": lambda: there + here.sum(),
        "index": lambda: there[torch.tensor([0, 2])],
        "copy": lambda: there.copy_(here),
        "move": lambda: there.cpu() + here,
    }
    said = {}
    for name, work in tries.items():
        try:
            found = work()
            said[name] = str(found.device)
        except RuntimeError as error:
            said[name] = "same device" if "same device" in str(error) else str(error)
    return said


def mixed(pretend):
    with chosen(pretend) as device:
        return mixes(device)


def core(pretend, changes, rows_there=True, dtype=torch.float32, moves=False):
    """A toy's three domains; its weights, what was measured, and which parts of the guard acted."""
    with chosen(pretend) as device:
        model, guard, optimizer = made(device, changes, dtype)
        recovered = []

        def trained():
            for step, domain in enumerate(PHASES):
                if moves and step in (17, 22):
                    # As engines do that take the weights off the device for a while.
                    model.to("cpu" if step == 17 else device)
                recovered.append(guard.recovery is not None)
                yield guard.recovery or domain

        def keep(rows):
            return rows.to(device if rows_there else "cpu")

        train(model, guard, optimizer, trained(), roll=roll, keep=keep)
        states = guard.domains
        return {
            "device": str(guard.device),
            "weights": weights(model),
            "metrics": guard.metrics(),
            "rates": [pass_rate(copied(model), domain) for domain in ("math", "code", "qa")],
            "acted": {
                "projection": any(state.moved is not None for state in states.values()),
                "renewal": any(state.renewals for state in states.values()),
                "recovery": any(recovered),
            },
        }


def saved(pretend):
    """A state saved on one device goes on there, and on the CPU."""
    with chosen(pretend) as device, tempfile.TemporaryDirectory() as folder:
        model, guard, optimizer = made(device)
        train(model, guard, optimizer, PHASES[:18], roll=roll)
        guard.save(folder)
        kept = weights(model)
        found = []
        for target in (device, torch.device("cpu")):
            model, guard, optimizer = made(target)
            model.load_state_dict({name: value.to(target) for name, value in kept.items()})
            guard.load(folder)
            train(model, guard, optimizer, PHASES[18:], 18, roll=roll)
            found.append({"device": str(guard.device), "weights": weights(model), "metrics": guard.metrics()})
        return found


def made(device, changes=MappingProxyType({}), dtype=torch.float32):
    config = GuardConfig(**SETTINGS | changes)
    return guarded(rate=0.5, config=config, dtype=dtype, make=torch.optim.SGD, device=device)


def roll(model, domain, seed):
    """Rollouts of a copy on the CPU, where the model is."""
    return rollout(copied(model), domain, seed=seed).to(next(model.parameters()).device)


def copied(model):
    """The same model on the CPU, for rollouts."""
    found = Toy().to(next(model.parameters()).dtype)
    found.load_state_dict(weights(model))
    return found


def weights(model):
    values = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    assert not any(isinstance(value, Elsewhere) for value in values.values())
    return {name: value.clone() for name, value in values.items()}


def trainer(pretend, kind):
    """A real trainer's run of two domains: its last metrics, and where guard and model were."""
    with chosen(pretend) as device, tempfile.TemporaryDirectory() as folder:
        if pretend:
            _everywhere(device)
        from . import trainers

        return getattr(trainers, kind)(Path(folder), {"max_steps": 8, "use_cpu": not pretend})


def _everywhere(device):
    """Make it the device that Accelerate and transformers choose."""
    from accelerate.state import PartialState
    from transformers import TrainingArguments

    before = TrainingArguments.device.fget
    if before.__name__ == "chosen_device":
        return

    def chosen_device(arguments):
        before(arguments)
        return device

    PartialState.default_device = property(lambda state: device)
    TrainingArguments.device = property(chosen_device)
