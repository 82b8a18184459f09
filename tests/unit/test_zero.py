"""Settings of DeepSpeed that are refused; its engines are in tests/distributed/test_zero.py."""

import pytest
import torch

from interference_guard import UnsupportedError
from interference_guard.zero import check_settings, is_engine, partitioned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "ZeRO stage 0, which shards nothing.* 1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, r"on \['cpu', 'none'\].* Take both out"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, r"on \['none', 'nvme'\].* Take both out"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights=True: ZeRO.. .* Take it out"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients=True: ZeRO.. .* Take it out"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size=8: ZeRO.. .* Take it out"),
        ({"stage": 3, "mics_shard_size": 4}, "mics_shard_size=4: MiCS .* Take it out"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload=True: DeepSpeed keeps optimizer states .* Take it out"),
        ({"stage": 3, "cpu_offload_param": True}, "cpu_offload_param=True: DeepSpeed keeps weights .* Take it"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow=.*: ZenFlow .* Take it out"),
    ],
)
def test_what_hides_the_weights_is_refused(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        check_settings({"zero_optimization": settings})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"type": "Muon"}}, "Muon puts its updates in place of the gradients .* Use AdamW"),
        ({"compile": {"deepcompile": True}}, "DeepCompile.* Take compile.deepcompile out"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor or sequence parallelism of 2.* train without it"),
    ],
)
def test_what_takes_over_a_step_is_refused_before_there_is_an_engine(more, message):
    with pytest.raises(UnsupportedError, match=message):
        check_settings({"zero_optimization": {"stage": 2}, **more})
    others = {"optimizer": {"type": "AdamW"}, "compile": {"deepcompile": False}, "tensor_parallel": None}
    check_settings({"zero_optimization": {"stage": 2}, **others})


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 1},
        {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None},
        {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1, "zero_quantized_weights": False},
        {"stage": 2, "cpu_offload": False, "cpu_offload_param": None},
    ],
)
def test_stages_that_are_followed_pass(settings):
    check_settings({"zero_optimization": settings})


def test_other_models_and_optimizers_are_not_taken_for_deepspeed():
    model = torch.nn.Linear(2, 2)
    assert not is_engine(model)
    assert partitioned(torch.optim.SGD(model.parameters(), lr=0.1)) is None
