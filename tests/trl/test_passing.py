"""How a trainer's rows reach the guard, and what is said where they do not."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator
from trl.trainer import utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from interference_guard import HostError
from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.integrations.trl.collating import DOMAIN_ID, NamingCollator
from interference_guard.integrations.trl.completions import trainer_policy
from interference_guard.probe import model_policy
from tests.trl.host import CONFIG, TWO_PHASES, guarded, online, rows, supervised

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def labelled(blocks=TWO_PHASES):
    return rows(blocks).rename_column("answer", "completion")


def in_order(tmp_path, **options):
    return supervised(tmp_path, labelled(), train_sampling_strategy="sequential", **options)


@pytest.mark.parametrize("again", [False, True])
def test_a_callback_that_comes_while_training_runs_is_an_error(tmp_path, again):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    callback = InterferenceGuardCallback(config=CONFIG)
    if again:
        callback.attach(trainer)

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback.detach()
                callback.attach(trainer)

    trainer.add_callback(Late())
    with pytest.raises(HostError, match=r"attached while training ran\. Attach it before trainer\.train\(\)"):
        trainer.train()
    callback.detach()


def test_batches_that_pass_the_guard_by_are_an_error(tmp_path):
    trainer = in_order(tmp_path)
    collator = trainer.data_collator
    trainer.get_train_dataloader = lambda: DataLoader(
        trainer.train_dataset.select_columns(["input_ids", "labels"]), batch_size=2, collate_fn=collator
    )
    guarded(trainer)
    with pytest.raises(HostError, match="SFTTrainer trains batches that pass neither its data_collator nor"):
        trainer.train()


def test_a_collator_that_makes_no_mapping_is_an_error(tmp_path):
    # As that of SDFTTrainer, which makes its batches of the rows themselves.
    trainer = in_order(tmp_path)
    collate = trainer.data_collator
    trainer.data_collator = list
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, batch, **options: compute(model, collate(batch), **options)
    trainer.floating_point_ops = lambda inputs: 0
    guarded(trainer)
    with pytest.raises(HostError, match="SFTTrainer trains .* of which the data_collator makes no mapping"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_domains_of_rows_that_replace_others_are_numbered_before_the_first_step(tmp_path):
    trainer = in_order(tmp_path)
    callback = guarded(trainer)
    others = labelled([("words", 6), ("art", 6)])
    trainer.train_dataset = supervised(tmp_path, others).train_dataset
    numbered = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            numbered.extend(callback.domains.names)

    trainer.add_callback(Look())
    trainer.train()
    # By name, as on every rank, whichever rows it sees first.
    assert numbered == ["code", "math", "art", "words"]


def test_batches_made_before_the_guard_came_are_not_used_up(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), steps_per_generation=2, max_steps=3)
    trainer.train()
    assert trainer._buffered_inputs
    callback = guarded(trainer)
    trainer.train()
    assert callback.guard.steps == 3


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="TRL has this head since 1.15")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_supervised_trainers_rows_are_scored_without_all_logits(tmp_path, bf16):
    trainer = in_order(tmp_path, bf16=bf16)
    callback = guarded(trainer)
    trainer.train()
    retained = callback.guard.domains["math"].retained
    expected = model_policy(trainer.model)(retained)
    model = trainer.model
    seen = []

    def watch(module, arguments, options, output):
        seen.append(getattr(output, "logits", None))

    handle = model.register_forward_hook(watch, with_kwargs=True)
    found = trainer_policy(trainer)(retained)
    handle.remove()
    assert seen
    assert all(logits is None for logits in seen)
    tolerance = 2e-2 if bf16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    # Rows of a generating trainer's, sampled at another temperature.
    retained.temperature = 0.5
    torch.testing.assert_close(trainer_policy(trainer)(retained), model_policy(trainer.model)(retained))


def test_a_collator_that_is_a_function_can_still_go_to_other_processes(tmp_path):
    trainer = in_order(tmp_path)
    trainer.data_collator = default_data_collator
    callback = guarded(trainer)
    again = pickle.loads(pickle.dumps(trainer.data_collator))
    assert again.collator is default_data_collator
    ours = trainer.data_collator
    callback.detach()
    assert trainer.data_collator is default_data_collator
    # A data loader that is running keeps it, and gets the trainer's own batches from it.
    rows = [{"input_ids": [1, 2], "domain": "math"}]
    assert ours(rows).keys() == default_data_collator(rows).keys()


def test_the_trainer_finds_its_own_collator_in_the_one_that_is_put_around_it(tmp_path):
    trainer = in_order(tmp_path)
    own = trainer.data_collator
    callback = guarded(trainer)
    ours = trainer.data_collator
    assert ours is not own
    assert isinstance(ours, DataCollatorForLanguageModeling)
    assert ours.pad_token_id == own.pad_token_id
    assert not hasattr(ours, "tokenizer")
    ours.pad_to_multiple_of = 8
    assert own.pad_to_multiple_of == 8
    ours.active = False
    example = [{"input_ids": [1, 2], "labels": [1, 2], "domain": "math"}]
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert isinstance(again, NamingCollator)
        assert (again.column, again.active, again.collator.pad_to_multiple_of) == ("domain", False, 8)
        assert again(example).keys() == own(example).keys()
        again.active = True
        assert again(example).keys() == {*own(example), DOMAIN_ID}
    callback.detach()
    assert trainer.data_collator is own


def test_rows_that_fill_a_batch_up_to_a_multiple_are_measured(tmp_path):
    trainer = in_order(tmp_path, padding_free=True, max_length=None, pad_to_multiple_of=8)
    callback = guarded(trainer)
    trainer.train()
    math = callback.guard.domains["math"]
    assert math.measurable
    assert len(math.retained) == 6


def test_a_collator_that_joins_rows_is_told_once(tmp_path, recwarn):
    trainer = in_order(tmp_path)
    collate = trainer.data_collator

    def joined(examples):
        batch = collate(examples)
        return {name: values.reshape(1, -1) for name, values in batch.items()}

    trainer.data_collator = joined
    guarded(trainer)
    trainer.train()
    told = [
        str(item.message)
        for item in recwarn
        if "The data_collator made 1 sequences of 2 rows" in str(item.message)
    ]
    assert len(told) == 1
    assert "Use a collator that makes one sequence of each row" in told[0]


def test_answers_that_were_cut_off_leave_the_probe_to_others(tmp_path):
    data = rows([("math", 16), ("code", 4)])
    options = {"mask_truncated_completions": True, "max_completion_length": 8, "max_steps": 9}
    trainer = online("grpo", tmp_path, data, **options)
    callback = guarded(trainer)
    retain, masks = callback.guard.retain, []

    def watch(name, completions):
        masks.extend(completions.completion_mask.any(1).tolist() if name == "math" else [])
        retain(name, completions)

    callback.guard.retain = watch
    trainer.train()
    assert 0 < sum(masks) < len(masks)
    math = callback.guard.domains["math"]
    assert len(math.retained) == min(sum(masks), CONFIG.retain)
    assert math.retained.completion_mask.any(1).all()
    assert math.measurement is not None
