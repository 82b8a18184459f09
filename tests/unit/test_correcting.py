"""Corrections of several domains in models of many layers."""

import pytest
import torch
from torch import nn

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from interference_guard.correcting import _overlaps
from interference_guard.local_model import displacements

DOMAINS = ("math", "code", "qa")
pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")


class Deep(nn.Module):
    """Layers of two shapes, whose matrices come in turn."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(6, 8), "down_proj": nn.Linear(8, 6)}) for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down_proj"](torch.tanh(layer["up_proj"](x)))
        return x


def run(layers=3, **settings):
    """Three domains in turn, then a fourth, with regions of a size that holds it back."""
    model = Deep(layers)
    guard = Guard(model, GuardConfig(rank=4, sketch=6, residual=2, **settings))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), guard)
    generator = torch.Generator().manual_seed(1)
    for domain in (*DOMAINS, "new"):
        mix = torch.randn(6, 6, generator=generator)
        for step in range(6):
            with guard.domain(domain):
                x = torch.randn(16, 6, generator=generator)
                (model(x) - x @ mix).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if domain == "new" and not step:
                for name in DOMAINS:
                    guard.domains[name].radius = guard.domains[name].radius * 1e-2
    return model, guard


@pytest.mark.parametrize("settings", [{}, {"coverage": 0.8}, {"projection_metric": "gradient"}])
def test_matrices_on_their_own_are_corrected_as_stacked_ones(monkeypatch, settings):
    stacked, guard = run(**settings)
    assert guard.metrics()["guard/update_kept"] < 0.9, "the projection must act"
    monkeypatch.setattr("interference_guard.blocks.STACK_LIMIT", 0)
    alone, other = run(**settings)
    assert len(other.view.blocks) > len(guard.view.blocks)
    for mine, theirs in zip(stacked.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    places, expected = other.places()["projected"], guard.places()["projected"]
    for name in DOMAINS:
        assert places[name] == pytest.approx(expected[name], rel=1e-3), "by layer and module"
    # What corrections for other domains did to each was followed in coordinates alone.
    with torch.no_grad():
        seen = displacements(other.view.weights(), [other.domains[name].model for name in DOMAINS])
    for name, item in zip(DOMAINS, seen, strict=True):
        torch.testing.assert_close(other.domains[name].subspace, item.energy(), rtol=1e-3, atol=1e-6)


def test_layers_of_one_shape_are_one_call(monkeypatch):
    monkeypatch.setattr("interference_guard.blocks.STACK_LIMIT", 0)
    counts = []
    for layers in (2, 5):
        _, guard = run(layers)
        first, second = (guard.domains[name].model for name in DOMAINS[:2])
        overlaps = _overlaps(first, second)
        assert sorted(index for item in overlaps for index in item.blocks) == list(range(len(first.blocks)))
        counts.append((len(first.blocks), len(overlaps)))
    (few, calls), (many, more) = counts
    assert many > few
    assert more == calls
