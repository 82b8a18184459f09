import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from interference_guard.analysis import active_neurons, compare_routes, open_checkpoint
from interference_guard.errors import CheckpointError, UnsupportedError
from tests.unit.helpers import Toy
from tests.unit.runs import save_model


def test_active_neurons_are_the_largest_activations():
    model = Toy().train()
    model.embed.eval()
    ids = torch.tensor([[0, 1, 2, 3]])
    found = active_neurons(model, [{"input_ids": ids}], share=0.25)
    with torch.no_grad():
        size = torch.tanh(model.mlp["up_proj"](model.embed(ids))).abs().sum((0, 1))
    assert set(found["mlp"].nonzero().flatten().tolist()) == set(size.topk(8).indices.tolist())
    assert model.training
    assert not model.embed.training
    assert not model.mlp["down_proj"]._forward_pre_hooks


def test_masked_tokens_do_not_count():
    model = Toy()
    padded = torch.tensor([[9, 9, 0, 1]])
    mask = torch.tensor([[0, 0, 1, 1]])
    a = active_neurons(model, [{"input_ids": padded, "attention_mask": mask}])
    b = active_neurons(model, [{"input_ids": padded[:, 2:]}])
    assert torch.equal(a["mlp"], b["mlp"])


class Flat(Toy):
    """Its MLP sees all tokens of a batch in one row, or some of them, as routed experts do."""

    seen = slice(None)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).flatten(0, 1)[self.seen]
        return self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))


def test_tokens_in_one_row_are_masked_too():
    ids, mask = torch.tensor([[9, 9, 0, 1], [2, 3, 4, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert torch.equal(active_neurons(Flat(), batches)["mlp"], active_neurons(Toy(), batches)["mlp"])
    some = Flat()
    some.seen = slice(5)
    with pytest.raises(UnsupportedError, match="mlp saw 5 tokens of a batch of 8"):
        active_neurons(some, batches)
    assert active_neurons(some, [{"input_ids": ids}])["mlp"].any()


def test_hooks_are_removed_after_an_error():
    model = Toy()
    with pytest.raises(TypeError):
        active_neurons(model, [{"nonsense": torch.zeros(1)}])
    assert not model.mlp["down_proj"]._forward_pre_hooks


def test_a_model_without_neurons():
    with pytest.raises(UnsupportedError, match="no neurons to watch"):
        active_neurons(nn.Linear(2, 2), [])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layers", [["up_proj", "down_proj"], ["lm_head"]], ids=str)
def test_an_adapted_model_has_the_names_of_its_base(tmp_path, layers):
    plain = Toy()
    save_model(plain, tmp_path / "base")
    batches = [{"input_ids": torch.tensor([[0, 1, 2, 3]])}]
    expected = active_neurons(plain, batches)
    adapted = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=4, target_modules=layers))
    found = active_neurons(adapted, batches)
    # Factors begin at zero.
    assert list(found) == ["mlp"]
    assert torch.equal(found["mlp"], expected["mlp"])
    base = open_checkpoint(tmp_path / "base")
    assert compare_routes((found, base, base), (found, base, base)).overlap == 1


def test_a_model_that_does_not_meet_the_checkpoint(tmp_path):
    base = open_checkpoint(save_model(Toy(), tmp_path))
    mask = torch.arange(32) < 16
    for masks in ({"body.mlp": mask}, {"mlp": mask[:8]}):
        with pytest.raises(CheckpointError, match="and the watched model do not meet: .* called like 'mlp'"):
            compare_routes((masks, base, base), (masks, base, base))
    with pytest.raises(CheckpointError, match="active neurons are of different models: 'mlp' is in one"):
        compare_routes(({"mlp": mask}, base, base), ({}, base, base))


def test_directions_on_shared_routes(tmp_path):
    start = Toy()
    moves = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    paths = [save_model(start, tmp_path / "start")]
    for sign in (1.0, -1.0):
        model = Toy()
        with torch.no_grad():
            # The first half of the neurons moves alike in both domains, the second half in opposite ways.
            model.mlp["up_proj"].weight[:16] += moves[:16]
            model.mlp["up_proj"].weight[16:] += sign * moves[16:]
        paths.append(save_model(model, tmp_path / str(sign)))
    before, first, second = map(open_checkpoint, paths)
    shared = torch.arange(32) < 16
    found = compare_routes(({"mlp": shared}, before, first), ({"mlp": shared}, before, second))
    assert found.overlap == 1
    assert found.shared == 16
    assert found.shared_cosine == pytest.approx(1, abs=1e-5)
    assert found.other_cosine == pytest.approx(-1, abs=1e-5)
    assert found.synergy == 1
    rest = compare_routes(({"mlp": shared}, before, first), ({"mlp": ~shared}, before, second))
    assert (rest.overlap, rest.shared, rest.synergy) == (0, 0, 0)
    assert rest.chance == pytest.approx(8 / 24)
