import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from interference_guard.forward import logits_of
from interference_guard.probe import Completions, model_policy
from tests.unit.helpers import Toy


def rows(length=6, count=3, prompt=4):
    ids = torch.randint(1, 12, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    scored = mask.clone()
    scored[:, :prompt] = 0
    return Completions(ids, mask, scored)


def qwen():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config)


class Wrapper(nn.Module):
    """Passes on what it is given, or keeps it."""

    def __init__(self, inner, passes):
        super().__init__()
        self.inner, self.passes = inner, passes

    def forward(self, input_ids, attention_mask, **kwargs):
        self.given = kwargs
        return self.inner(input_ids, attention_mask, **(kwargs if self.passes else {}))


def test_a_model_of_transformers_keeps_no_cache_and_computes_the_logits_that_count():
    model, given = qwen(), {}
    model.register_forward_hook(lambda module, args, output: given.update(output=output))
    found = logits_of(model, rows(), 3)
    assert given["output"].past_key_values is None
    assert given["output"].logits.shape == (3, 3, 12)
    torch.testing.assert_close(found, model(rows().input_ids, rows().attention_mask).logits[:, 3:])


@pytest.mark.parametrize("passes", [True, False])
def test_a_wrapper_that_takes_more_is_asked_for_less(passes):
    model = Wrapper(qwen(), passes)
    found = logits_of(model, rows(), 2)
    assert model.given == {"use_cache": False, "logits_to_keep": 4}
    torch.testing.assert_close(found, logits_of(model.inner, rows(), 2))


def test_other_models_are_called_with_ids_and_mask_alone():
    model = Wrapper(Toy(), passes=True)
    assert logits_of(model, rows()).shape == (3, 6, 12)
    assert model.given == {}
    torch.testing.assert_close(logits_of(Toy(), rows(), 4), Toy()(rows().input_ids)[:, 4:])


@pytest.mark.parametrize(("tokens", "expected"), [(8192, [3]), (12, [2, 1]), (11, [1, 1, 1]), (1, [1, 1, 1])])
def test_a_pass_has_a_limit_of_tokens(tokens, expected):
    model, counts = Toy(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = model_policy(model, tokens=tokens)(rows())
    assert counts == expected
    torch.testing.assert_close(found, model_policy(Toy())(rows()))
