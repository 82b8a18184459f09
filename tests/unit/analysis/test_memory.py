"""Peak memory of what reads a state and checkpoints, in a process of its own."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from tests.unit.analysis.peaks import PEAK, told

# 41 million elements, 164 MB in fp32.
WORDS, WIDTH = 80_000, 512
CODE = (
    PEAK
    + """
from interference_guard.analysis import *
folder, what = sys.argv[1:]
a, b = open_checkpoint(folder + "/a"), open_checkpoint(folder + "/b")
record = StateFile(folder + "/b").domain("own")
before = peak()
if what == "predict_interference":
    predict_interference(record, b, before=a)
elif what == "conflict_subspace":
    conflict_subspace(record, record, a, b)
elif what == "compare_routes":
    masks = {"mlp": torch.arange(80_000) % 2 == 0}
    compare_routes((masks, a, b), (masks, a, b))
else:
    plan = plan_rollback(record, a, b, what)
    write_rollback(plan, 1.0, 1.0, folder + "/" + what)
sys.stdout.write(str(peak() - before))
"""
)


class Wide(torch.nn.Module):
    """An MLP with many neurons: two large matrices, one with units in rows and one in columns."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.ModuleDict(
            {
                "up_proj": torch.nn.Linear(WIDTH, WORDS, bias=False),
                "down_proj": torch.nn.Linear(WORDS, WIDTH, bias=False),
            }
        )

    def forward(self, x):
        return self.mlp["down_proj"](self.mlp["up_proj"](x))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    model = Wide()
    guard = Guard(model, GuardConfig(rank=4, sketch=8, residual=4, project=False))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), guard)

    def save(name):
        (folder / name).mkdir()
        save_file(
            {key: value.bfloat16() for key, value in model.state_dict().items()},
            folder / name / "model.safetensors",
        )

    for step, name in enumerate(("own", "own", "other")):
        if step == 2:
            save("a")
        with guard.domain(name):
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    save("b")
    guard.save(folder / "b")
    return folder


@pytest.mark.filterwarnings("ignore:No completions of domain:UserWarning")
@told
@pytest.mark.parametrize(
    "what", ["predict_interference", "conflict_subspace", "compare_routes", "units", "directions"]
)
def test_memory_does_not_grow_with_the_largest_tensor(wide, what):
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(wide), what], capture_output=True, text=True, check=True
    )
    # Less than one of the tensors in fp32; what is needed is some pieces and numbers for each unit.
    assert int(run.stdout) < WORDS * WIDTH * 4
