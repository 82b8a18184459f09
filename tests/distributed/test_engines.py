"""The guard inside a real trainer on two processes: DDP and FSDP2 give the same weights."""

import functools

import pytest
import torch

from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.trl.host import model_and_words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_fsdp2_equals_ddp_after_twenty_guarded_steps(tmp_path):
    model_and_words(tmp_path / "model")
    found = {}
    for how in ("ddp", "fsdp2"):
        call = functools.partial(engines.supervised_run, how, tmp_path)
        found[how], other = run_ranks(2, call, folder=tmp_path / f"ranks_{how}")
        for name, value in found[how]["weights"].items():
            assert torch.equal(other["weights"][name], value), name
        for name in ("radius", "subspace", "loss", "foreign"):
            assert found[how][name] == other[name], name
    ddp, fsdp2 = found["ddp"], found["fsdp2"]
    assert (ddp["kind"], fsdp2["kind"]) == ("Parameter", "DTensor")
    assert fsdp2["foreign"] == 20
    assert fsdp2["kept"] < 0.99, "the projection must have acted"
    # AdamW at 3e-3; the two engines add gradients up in another order.
    for name, value in ddp["weights"].items():
        torch.testing.assert_close(fsdp2["weights"][name], value, rtol=1e-3, atol=1e-4)
    for name in ("radius", "subspace", "loss"):
        assert fsdp2[name] == pytest.approx(ddp[name], rel=1e-2), name
