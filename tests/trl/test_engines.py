from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from interference_guard import UnsupportedError
from interference_guard.integrations.trl.engines import check_engine


@pytest.mark.parametrize(
    ("kind", "second", "message"),
    [
        (DistributedType.FSDP, False, "FSDP version 1 packs .* Set fsdp_config="),
        (DistributedType.MEGATRON_LM, False, "The accelerate engine MEGATRON_LM spreads"),
    ],
)
def test_engines_that_are_not_followed_are_refused(kind, second, message):
    with pytest.raises(UnsupportedError, match=message):
        check_engine(SimpleNamespace(distributed_type=kind, is_fsdp2=second))


@pytest.mark.parametrize(
    ("kind", "second"),
    [(DistributedType.NO, False), (DistributedType.MULTI_GPU, False), (DistributedType.FSDP, True)],
)
def test_engines_that_are_followed_pass(kind, second):
    check_engine(SimpleNamespace(distributed_type=kind, is_fsdp2=second))


def deepspeed(**zero):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )


def test_deepspeed_is_followed_where_it_keeps_its_weights_at_hand():
    check_engine(deepspeed(stage=3))
    with pytest.raises(UnsupportedError, match="ZeRO stage 0, which shards nothing"):
        check_engine(deepspeed())
    with pytest.raises(UnsupportedError, match="offload_optimizer, offload_param.* Take both out"):
        check_engine(deepspeed(stage=2, offload_optimizer={"device": "cpu"}))
