"""Batches that the trainer makes smaller by itself, with `auto_find_batch_size`."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from interference_guard import StateError
from interference_guard.integrations.trl import completions, order_by_domain
from tests.trl.host import guarded, rows, supervised

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Began(TrainerCallback):
    """Writes down with which batch size each run began."""

    def __init__(self, trainer):
        self.trainer, self.sizes = trainer, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.sizes.append(self.trainer._train_batch_size)


def ordered(tmp_path, size, order="round_robin", **options):
    data = rows([("math", 12), ("code", 12)]).rename_column("answer", "completion")
    return supervised(
        tmp_path,
        order_by_domain(data, size, order),
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        train_sampling_strategy="sequential",
        **options,
    )


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize(("size", "told"), [(4, 1), (3, 0)])
def test_rows_are_looked_through_with_the_batch_size_that_was_found(size, told, tmp_path):
    trainer = ordered(tmp_path, size)
    callback = guarded(trainer)
    began = Began(trainer)
    trainer.add_callback(began)
    compute = trainer.compute_loss

    def loss(*args, **kwargs):
        if trainer._train_batch_size == 4:
            raise out_of_memory()
        return compute(*args, **kwargs)

    trainer.compute_loss = loss
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert began.sizes == [4, 3]
    assert callback.guard.steps == 6
    found = [
        str(item.message)
        for item in said
        if "lowered the batches of a process from 4 rows to 3" in str(item.message)
    ]
    assert len(found) == told
    assert all("Rows 3 to 5 are one batch" in text and "order_by_domain(dataset, 3)" in text for text in found)


def test_a_resumed_run_that_begins_again_goes_on_from_its_weights(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    first = ordered(tmp_path, 4, "sequential", **options)
    guarded(first)
    first.train()
    trainer = ordered(tmp_path, 4, "sequential", **options)
    callback = guarded(trainer)
    compute, calls = trainer.compute_loss, []

    def loss(*args, **kwargs):
        calls.append(trainer._train_batch_size)
        if calls == [4, 4]:
            raise out_of_memory()
        return compute(*args, **kwargs)

    trainer.compute_loss = loss
    folder = tmp_path / "sft" / "checkpoint-4"
    with pytest.warns(UserWarning, match="began again with a smaller batch, at weights that have been"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert calls[:3] == [4, 4, 3]
    assert callback.guard.steps == trainer.state.global_step == 6
    # Each call of train() reads the checkpoint's weights anew.
    again = ordered(tmp_path, 4, "sequential", **options)
    guarded(again)
    again.train(resume_from_checkpoint=str(folder))
    with torch.no_grad():
        next(again.model.parameters()).add_(1.0)
    again._load_from_checkpoint = lambda *_: None
    with pytest.raises(StateError, match="beside other weights"):
        again.train(resume_from_checkpoint=str(folder))


def test_a_probe_takes_no_more_rows_than_training_does(tmp_path, monkeypatch):
    trainer = ordered(tmp_path, 4)
    callback = guarded(trainer)
    began = Began(trainer)
    trainer.add_callback(began)
    score, sizes = completions.model_policy, []

    def limited(model, batch_size):
        policy = score(model, batch_size)

        def scored(found):
            sizes.append(batch_size)
            if batch_size > 3:
                raise out_of_memory()
            return policy(found)

        return scored

    monkeypatch.setattr(completions, "_has_fused_head", lambda model: False)
    monkeypatch.setattr(completions, "model_policy", limited)
    trainer.train()
    assert began.sizes == [4, 3]
    assert set(sizes) == {4, 3}
    assert callback.guard.domains["math"].measurement is not None
