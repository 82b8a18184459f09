import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from interference_guard import GuardConfig, HostError, StateError
from interference_guard.checkpoint import DETAILS, TENSORS
from tests.trl.host import SHAPES, TWO_PHASES, StopAt, guarded, model_and_words, online, rows, same, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


# Inside a generation batch TRL itself generates anew when it resumes, so those stop at its ends.
STOPS = [(shape, stop) for shape in SHAPES for stop in ((2, 4) if "several" in shape else (2, 3, 5))]


@pytest.mark.parametrize(("shape", "stop"), STOPS)
def test_resume_is_bit_identical(shape, stop, tmp_path):
    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 1, **SHAPES[shape]}
    data = rows([("math", 8), ("code", 8), ("math", 8)])
    whole = online("grpo", tmp_path, data, **options)
    guarded(whole)
    whole.train()

    first = online("grpo", tmp_path / "b", data, **options)
    guarded(first)

    first.add_callback(StopAt(stop))
    first.train()
    resumed = online("grpo", tmp_path / "b", data, **options)
    callback = guarded(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert callback.guard.steps == 6
    assert same(weights(whole), weights(resumed))


class Saving(TrainerCallback):
    """Saves by itself at the end of a step and ends the run, as the trainer's own does for SIGTERM."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True


def assert_resumed_is_whole(tmp_path, data, interrupt, **options):
    """A run that `interrupt` ends goes on to the same weights and regions as one that it does not."""
    whole = online("grpo", tmp_path, data, **options)
    expected = guarded(whole)
    whole.train()
    first = online("grpo", tmp_path / "b", data, **options)
    interrupt(first)
    first.train()
    resumed = online("grpo", tmp_path / "b", data, **options)
    found = guarded(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    regions = [item.guard.domains["math"].region.state() for item in (expected, found)]
    assert regions[0] == regions[1]


def test_a_callback_before_the_guards_may_save_by_itself(tmp_path):
    def interrupt(trainer):
        trainer.add_callback(Saving(trainer, 4))
        guarded(trainer)

    assert_resumed_is_whole(tmp_path, rows([("math", 4), ("code", 8)]), interrupt)


def test_an_evaluation_that_begins_a_resumed_run_is_of_no_other_weights(tmp_path):
    def interrupt(trainer):
        guarded(trainer)
        trainer.add_callback(StopAt(4))

    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    evaluation = rows([("math", 2), ("code", 2)])
    saving = {"save_strategy": "steps", "save_steps": 4}
    assert_resumed_is_whole(
        tmp_path, rows([("math", 4), ("code", 8)]), interrupt, evaluation=evaluation, **options, **saving
    )


SAVING = {"save_strategy": "steps", "save_steps": 4}


def fill_disk(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interference_guard.checkpoint.save_file", full)


class TestSaving:
    def saved(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), **SAVING)
        callback = guarded(trainer)
        trainer.train()
        return callback, tmp_path / "run" / "checkpoint-4"

    def test_a_full_disk_leaves_the_hosts_checkpoint_whole(self, tmp_path, monkeypatch):
        plain = online("grpo", tmp_path / "plain", rows(TWO_PHASES), **SAVING)
        plain.train()
        fill_disk(monkeypatch)
        with pytest.raises(StateError, match="No space left on device"):
            self.saved(tmp_path)
        theirs = {path.name for path in (tmp_path / "plain" / "run" / "checkpoint-4").iterdir()}
        mine = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
        assert mine == theirs

    def test_memory_that_a_probe_lacks_leaves_the_hosts_checkpoint_whole(self, tmp_path, monkeypatch):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), save_strategy="steps", save_steps=2)
        callback = guarded(trainer)

        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("nothing left")

        monkeypatch.setattr(callback.guard, "save", full)
        with pytest.raises(torch.OutOfMemoryError, match="nothing left"):
            trainer.train()
        assert {"trainer_state.json", "rng_state.pth"} <= set(os.listdir(tmp_path / "run/checkpoint-2"))

    def test_a_full_disk_leaves_no_state_of_an_earlier_attempt(self, tmp_path, monkeypatch):
        _, folder = self.saved(tmp_path)

        fill_disk(monkeypatch)
        with pytest.raises(StateError, match="No space left on device"):
            self.saved(tmp_path)
        assert (folder / "optimizer.pt").is_file()
        assert not any(folder.glob("interference_guard*"))

    def test_a_full_disk_is_told_where_another_callback_saves(self, tmp_path, monkeypatch):
        fill_disk(monkeypatch)
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        trainer.add_callback(Saving(trainer, 4))
        guarded(trainer)
        with pytest.warns(UserWarning, match="without the guard's state.*No space left on device"):
            trainer.train()

    def test_the_state_lies_beside_the_checkpoint(self, tmp_path):
        _callback, folder = self.saved(tmp_path)
        assert (folder / DETAILS).is_file()
        assert (folder / TENSORS).is_file()
        assert (folder / "optimizer.pt").is_file()

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda folder: (folder / DETAILS).unlink(), "does not exist"),
            (lambda folder: (folder / TENSORS).write_bytes(b"short"), "is damaged"),
        ],
    )
    def test_resuming_without_a_whole_state_is_refused(self, tmp_path, harm, message):
        _, folder = self.saved(tmp_path)
        harm(folder)
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), **SAVING)
        guarded(trainer)
        with pytest.raises(StateError, match=message):
            trainer.train(resume_from_checkpoint=str(folder))

    def test_checkpoints_of_the_model_alone_are_told_at_once(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), save_only_model=True, **SAVING)
        with pytest.warns(UserWarning, match="save_only_model=True: the guard's state is not saved"):
            guarded(trainer)
        trainer.train()
        again = online("grpo", tmp_path, rows(TWO_PHASES), save_only_model=True, **SAVING)
        guarded(again)
        with pytest.raises(StateError, match=r"with save_only_model=True a checkpoint is the model alone.*False"):
            again.train(resume_from_checkpoint=True)

    def test_a_run_that_began_without_the_guard_goes_on_with_it(self, tmp_path):
        data = rows([("math", 4), ("code", 8)])
        plain = online("grpo", tmp_path, data, **(SAVING | {"save_steps": 1}))
        plain.train()
        start = tmp_path / "run" / "checkpoint-1"
        refused = online("grpo", tmp_path / "b", data)
        guarded(refused)
        with pytest.raises(StateError, match=r"holds no state of the guard.*began without it.*callback\.save\("):
            refused.train(resume_from_checkpoint=str(start))
        again = online("grpo", tmp_path / "b", data, model=str(start))
        callback = guarded(again)
        callback.save(start)
        seen = {}

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen[state.global_step] = weights(again)

        again.add_callback(Watch())
        again.train(resume_from_checkpoint=str(start))
        # The second step is as it would have been, of a domain that its own step under the guard then protects.
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2", dtype=torch.float32)
        assert same(seen[2], dict(expected.named_parameters()))
        assert callback.guard.steps == 5
        assert callback.guard.protected == ("math",)

    @pytest.mark.filterwarnings("error:save_only_model")
    def test_nothing_is_told_where_nothing_is_saved(self, tmp_path):
        guarded(online("grpo", tmp_path, rows(TWO_PHASES), save_only_model=True))

    def test_the_state_can_be_saved_beside_a_model(self, tmp_path):
        callback, _folder = self.saved(tmp_path)
        callback.save(tmp_path / "end")
        again = guarded(online("grpo", tmp_path, rows(TWO_PHASES)))
        again.guard.load(tmp_path / "end")
        assert again.guard.steps == 6
        callback.detach()
        with pytest.raises(HostError, match="has no trainer"):
            callback.save(tmp_path / "end")
        off = online("grpo", tmp_path / "off", rows(TWO_PHASES))
        guarded(off, GuardConfig(enabled=False)).save(tmp_path / "off" / "end")
        assert not (tmp_path / "off" / "end").exists()

    def test_state_of_another_model_is_refused(self, tmp_path):
        _, folder = self.saved(tmp_path)
        peft = LoraConfig(r=4, target_modules=["q_proj"])
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), peft=peft)
        callback = guarded(trainer)
        with pytest.raises(StateError, match="of another model"):
            callback.guard.load(folder)


def experts(folder=None):
    """A mixture of experts, whose stacks transformers 5 saves as single matrices."""
    torch.manual_seed(0)
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))


def test_weights_that_the_trainer_did_not_read_are_told(tmp_path):
    data = rows([("math", 4), ("code", 8)])
    options = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    whole = online("grpo", tmp_path, data, model=experts(), **options)
    guarded(whole)
    whole.train()
    first = online("grpo", tmp_path / "b", data, model=experts(), **options)
    guarded(first)
    first.add_callback(StopAt(4))
    first.train()
    resumed = online("grpo", tmp_path / "b", data, model=experts(), **options)
    callback = guarded(resumed)
    with pytest.raises(StateError, match=r"parameters differ, for instance '.*experts.*from_pretrained"):
        resumed.train(resume_from_checkpoint=True)
    assert callback.guard.domains == {}
    read = experts(tmp_path / "b" / "run" / "checkpoint-4")
    resumed = online("grpo", tmp_path / "b", data, model=read, **options)
    guarded(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


def test_an_adapter_that_the_trainer_did_not_read_is_told(tmp_path):
    # With beta above 0 TRL makes an adapter "ref", and some versions of transformers then read no other.
    options = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2, "beta": 0.1}
    data = rows([("math", 4), ("code", 8)])

    def begun(folder=None):
        base = model_and_words(tmp_path / "model")[0]
        torch.manual_seed(0)
        if folder is not None:
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))

    def trainer(folder=None):
        found = online("grpo", tmp_path, data, model=begun(folder), **options)
        guarded(found)
        return found

    first = trainer()
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    saved, read = trainer(checkpoint), trainer()
    read._load_from_checkpoint(str(checkpoint))
    found, wanted = (
        {name: value for name, value in weights(item).items() if "default" in name} for item in (read, saved)
    )
    assert wanted
    if same(found, wanted):
        read.train(resume_from_checkpoint=str(checkpoint))
        assert same(weights(read), weights(first))
    else:
        message = r"beside other weights.*PeftModel\.from_pretrained\(base, CHECKPOINT"
        with pytest.raises(StateError, match=message):
            read.train(resume_from_checkpoint=str(checkpoint))
    saved.train(resume_from_checkpoint=str(checkpoint))
    assert saved.state.global_step == 6
