import pytest
import torch

from interference_guard.analysis import checkpoints, pieces
from interference_guard.analysis.pieces import matrix_shape, unit_pieces
from interference_guard.units import UnitLayout

SHAPES = {
    "up_proj.weight": (12, 5),
    "down_proj.weight": (5, 12),
    "norm.weight": (7,),
    "scalar": (),
    "conv.weight": (4, 3, 2),
    "experts.gate_up_proj": (3, 8, 5),
    "experts.down_proj": (3, 5, 4),
}


@pytest.mark.parametrize("limit", [1, 12, 1 << 20])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("override", [{}, {"*": "vector"}], ids=["own", "vector"])
def test_pieces_are_the_unit_view(monkeypatch, limit, name, override):
    monkeypatch.setattr(pieces, "pieces", lambda shape: checkpoints.pieces(shape, limit))
    tensor = torch.randn(SHAPES[name])
    view = UnitLayout([(name, tensor)], override).views[name]
    whole = view.view(tensor)
    whole = whole if whole.dim() == 3 else whole.unsqueeze(0)
    assert matrix_shape(view) == whole.shape[:2]
    seen, copy = torch.full_like(whole, torch.nan), tensor.clone()
    for piece in unit_pieces(view):
        rows = tensor[piece.first : piece.last] if tensor.dim() else tensor
        piece.part(seen)[..., piece.width] = piece.view(rows.clone())
        written = rows.clone()
        piece.view(written).mul_(2)
        assert torch.equal(written, 2 * rows), "the view must reach the rows themselves"
    assert torch.equal(seen, whole)
    assert torch.equal(copy, tensor)
