import pytest
import torch
from torch import nn

from interference_guard.evaluating import evaluating


class Merging(nn.Linear):
    """Changes its weights when its mode is changed, as loralib's layers do."""

    def train(self, mode=True):
        self.weight.data += 1.0 if self.training and not mode else 0.0
        return super().train(mode)


def test_a_layer_that_merges_at_eval_keeps_its_weights_and_every_module_its_mode():
    model = nn.Sequential(Merging(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[2].eval()
    weight = model[0].weight.detach().clone()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model[0].weight, weight)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes
