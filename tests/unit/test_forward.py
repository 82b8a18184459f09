import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from interference_guard.forward import logits_of
from interference_guard.probe import Completions, model_policy
from tests.docs.preludes import SIZES
from tests.unit.helpers import Toy


def rows(length=6, count=3, prompt=4):
    ids = torch.randint(1, 12, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    scored = mask.clone()
    scored[:, :prompt] = 0
    return Completions(ids, mask, scored)


def qwen():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=12, **SIZES))


class Wrapper(nn.Module):
    """Around a model that could be asked for less, with something of its own to do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, **kwargs):
        self.given = kwargs
        logits = self.inner(input_ids, attention_mask, use_cache=True, **kwargs).logits
        return logits * attention_mask.unsqueeze(-1)


def test_a_model_of_transformers_keeps_no_cache_and_computes_the_logits_that_count():
    model, given = qwen(), {}
    model.register_forward_hook(lambda module, args, output: given.update(output=output))
    found = logits_of(model, rows(), 3)
    assert given["output"].past_key_values is None
    assert given["output"].logits.shape == (3, 3, 12)
    torch.testing.assert_close(found, model(rows().input_ids, rows().attention_mask).logits[:, 3:])


@pytest.mark.parametrize("around", ["peft", "compile"])
def test_what_passes_arguments_on_is_asked_for_less(around):
    model, given = qwen(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    expected = model(rows().input_ids, rows().attention_mask).logits[:, 2:]
    if around == "peft":
        outer = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    else:
        outer = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits_of(outer, rows(), 2), expected)
    assert given[-1]["use_cache"] is False
    assert given[-1]["logits_to_keep"] == 4


def test_other_models_are_called_with_ids_and_mask_alone():
    model = Wrapper(qwen())
    torch.testing.assert_close(logits_of(model, rows(), 2), logits_of(model.inner, rows(), 2))
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


def test_long_rows_do_not_part_short_ones():
    lengths = [2] * 6 + [40]
    ids = torch.randint(1, 12, (7, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor(lengths).unsqueeze(1)).long()
    scored = mask.clone()
    scored[:, 0] = 0
    some, model, shapes = Completions(ids, mask, scored), Toy(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    policy = model_policy(model, tokens=40)
    found = policy(some)
    assert shapes == [(1, 40), (6, 2)]
    shapes.clear()
    # Ranks that pass forward at once must make as many passes, whatever the lengths of their rows.
    torch.testing.assert_close(policy.together(some), found)
    assert len(shapes) == 7
