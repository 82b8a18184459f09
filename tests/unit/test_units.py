import pytest
import torch

from interference_guard.errors import ConfigError, ShapeError
from interference_guard.units import UnitLayout, canonical_name, stored_transposed


def layout(overrides=None, **shapes):
    parameters = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    return UnitLayout(parameters.items(), overrides or {})


@pytest.mark.parametrize(
    ("name", "shape", "kind", "units", "width"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 6), "row", 8, 6),
        ("model.layers.0.self_attn.o_proj.weight", (6, 8), "column", 8, 6),
        ("model.layers.0.mlp.down_proj.weight", (6, 10), "column", 10, 6),
        ("model.embed_tokens.weight", (30, 6), "row", 30, 6),
        ("lm_head.weight", (30, 6), "row", 30, 6),
        ("model.layers.0.mlp.gate.weight", (4, 6), "row", 4, 6),
        ("model.norm.weight", (6,), "vector", 1, 6),
        ("model.layers.0.self_attn.q_proj.bias", (8,), "vector", 1, 8),
        ("scale", (), "vector", 1, 1),
        ("something.never.seen", (5, 7), "row", 5, 7),
        ("conv.weight", (4, 3, 5), "row", 12, 5),
        ("base.layers.0.self_attn.o_proj.lora_A.default.weight", (4, 8), "row", 4, 8),
        ("base.layers.0.self_attn.o_proj.lora_B.default.weight", (6, 4), "row", 6, 4),
        ("base.layers.0.self_attn.o_proj.base_layer.weight", (6, 8), "column", 8, 6),
        ("base.lm_head.modules_to_save.default.weight", (30, 6), "row", 30, 6),
        ("base.o_proj.modules_to_save.default.weight", (6, 8), "column", 8, 6),
    ],
)
def test_view_by_name(name, shape, kind, units, width):
    view = UnitLayout([(name, torch.zeros(shape))]).views[name]
    assert (view.kind, view.units, view.width) == (kind, units, width)
    assert view.neuron is None
    assert view.neuron_index() is None
    tensor = torch.zeros(shape)
    assert tuple(view.view(tensor).shape) == (units, width)
    view.view(tensor).fill_(3.0)
    assert (tensor == 3).all()


def test_a_column_of_a_writer_is_one_unit():
    views = layout(layers__0__mlp__down_proj__weight=(2, 3)).views
    tensor = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert views["layers.0.mlp.down_proj.weight"].view(tensor).tolist() == [[1, 4], [2, 5], [3, 6]]


def test_experts_are_read_one_by_one():
    views = layout(mlp__experts__gate_up_proj=(4, 6, 5), mlp__experts__down_proj=(4, 5, 3)).views
    gate_up, down = views["mlp.experts.gate_up_proj"], views["mlp.experts.down_proj"]
    assert (gate_up.units, gate_up.width, gate_up.kind) == (24, 5, "row")
    assert (down.units, down.width, down.kind) == (12, 5, "column")
    assert tuple(down.view(torch.zeros(4, 5, 3)).shape) == (4, 3, 5)
    # Gate rows 0..2 and up rows 3..5 of an expert are the channels its down columns 0..2 read.
    assert gate_up.neuron_index().tolist()[:12] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert down.neuron_index().tolist() == list(range(12))


def test_stacks_that_are_called_linear_are_read_one_by_one():
    shapes = {"moe__input_linear__weight": (4, 6, 5), "moe__output_linear__weight": (4, 5, 3)}
    views = layout(**shapes).views
    into, out = views["moe.input_linear.weight"], views["moe.output_linear.weight"]
    assert (into.units, into.width, into.kind, into.stacked) == (24, 5, "row", True)
    assert (out.units, out.width, out.kind, out.stacked) == (12, 5, "column", True)
    assert out.neuron_index().tolist() == list(range(12))
    chosen = layout({"*.input_linear.weight": "column"}, **shapes).views["moe.input_linear.weight"]
    assert (chosen.kind, chosen.width) == ("column", 6)


def test_transposed_stacks_and_their_biases():
    class Llama4TextExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 5, 6))
            self.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 6))
            self.down_proj = torch.nn.Parameter(torch.zeros(4, 3, 5))

    model = torch.nn.Module()
    model.experts = Llama4TextExperts()
    # As fully_shard does.
    model.experts.__class__ = type("FSDPLlama4TextExperts", (Llama4TextExperts,), {})
    seen = UnitLayout(model.named_parameters(), module=model)
    saved = stored_transposed("llama4_text", dict(model.named_parameters()))
    assert seen.transposed == saved == {"experts"}
    found = {name: (view.kind, view.units, view.width) for name, view in seen.views.items()}
    assert found == {
        "experts.gate_up_proj": ("column", 24, 5),
        "experts.gate_up_proj_bias": ("row", 4, 6),
        "experts.down_proj": ("row", 12, 5),
    }


def test_neurons_need_a_reader_and_a_writer_of_one_size():
    both = layout(mlp__gate_proj__weight=(6, 4), mlp__up_proj__weight=(6, 4), mlp__down_proj__weight=(4, 6))
    assert {view.neuron for view in both.views.values()} == {"mlp"}
    alone = layout(mlp__up_proj__weight=(6, 4))
    assert alone.views["mlp.up_proj.weight"].neuron is None
    unlike = layout(mlp__up_proj__weight=(6, 4), mlp__down_proj__weight=(4, 7))
    assert {view.neuron for view in unlike.views.values()} == {None}


def test_overrides_win_and_must_match():
    views = layout({"*.mix.weight": "column", "a.*": "vector"}, a__w=(2, 3), b__mix__weight=(4, 5)).views
    assert (views["a.w"].units, views["a.w"].width) == (1, 6)
    assert (views["b.mix.weight"].units, views["b.mix.weight"].width) == (5, 4)
    with pytest.raises(ConfigError, match=r"'\*.typo' matches no trainable parameter"):
        layout({"*.typo": "row"}, a__w=(2, 3))
    with pytest.raises(ConfigError, match=r"'b\.\*' is never reached: '\*\.w' stands before it and takes 'b\.w'"):
        layout({"*.w": "row", "b.*": "column"}, b__w=(2, 3))
    with pytest.raises(ConfigError, match="asks for columns"):
        layout({"a": "column"}, a=(3,))
    with pytest.raises(ConfigError, match="must be one of"):
        layout({"a": "diagonal"}, a=(3, 2))


def test_other_shapes_and_layouts_are_refused():
    view = layout(a__weight=(2, 3)).views["a.weight"]
    with pytest.raises(ShapeError, match=r"has shape \(3, 2\)"):
        view.view(torch.zeros(3, 2))
    flat = layout({"a.*": "vector"}, a__weight=(2, 3)).views["a.weight"]
    with pytest.raises(ShapeError, match="without a copy"):
        flat.view(torch.zeros(3, 2).T)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.w",
        "_orig_mod.module.model.w",
        "_fsdp_wrapped_module.model._checkpoint_wrapped_module.w",
    ],
)
def test_wrappers_do_not_show_in_names(wrapped):
    assert canonical_name(wrapped) == "model.w"
    assert list(UnitLayout([(wrapped, torch.zeros(2, 2))]).views) == ["model.w"]
