"""One trainer a phase: a guard that goes from one to the next, with its state or in the same process."""

import gc
import warnings
import weakref
from dataclasses import replace

import pytest
from peft import LoraConfig, PeftModel

from interference_guard import HostError
from interference_guard.integrations.trl import InterferenceGuardCallback
from tests.trl.host import CONFIG, guarded, model_and_words, online, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def test_one_trainer_a_phase(tmp_path):
    first = online("grpo", tmp_path, rows([("math", 6)]), max_steps=3)
    callback = InterferenceGuardCallback(config=CONFIG)
    assert callback.attach(first) is callback
    first.train()
    assert not callback.guard.domains["math"].anchored
    second = online("grpo", tmp_path, rows([("code", 6)]), model=first.model, max_steps=3)
    callback.attach(second)
    second.train()
    assert callback.guard.steps == 6
    assert callback.guard.domains["math"].foreign_steps == 3
    # The first trainer is as it was.
    assert not any(name in vars(first) for name in ("log", "_prepare_inputs", "_calculate_rewards"))
    assert not any(isinstance(item, InterferenceGuardCallback) for item in first.callback_handler.callbacks)


def released(trainer):
    """Whether nothing holds the trainer and its optimizer any more, once the caller has let go of it."""
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    seen = weakref.ref(trainer), weakref.ref(inner)
    return lambda: gc.collect() >= 0 and all(item() is None for item in seen)


@pytest.mark.parametrize("detach", [False, True])
def test_a_trainer_that_is_left_can_be_freed(detach, tmp_path):
    model, _ = model_and_words(tmp_path / "model")
    callback = InterferenceGuardCallback(config=replace(CONFIG, recovery=True))
    former = None
    for domain in ("math", "code", "math"):
        trainer = online("grpo", tmp_path, rows([(domain, 4)]), model=model, max_steps=2)
        callback.attach(trainer)
        assert former is None or former()
        trainer.train()
        former = released(trainer)
        if detach:
            callback.detach()
            # The guard itself can still measure.
            assert not callback.guard.protected or callback.guard.measure(callback.guard.protected[0])
        del trainer
    assert former() == detach
    assert callback.guard.steps == 6


@pytest.mark.parametrize("trained", [False, True])
def test_a_next_trainer_that_it_is_only_added_to(trained, tmp_path):
    first = online("grpo", tmp_path, rows([("math", 2)]), max_steps=1)
    callback = guarded(first)
    if trained:
        first.train()
    second = online("grpo", tmp_path, rows([("code", 2)]), model=first.model, max_steps=1)
    second.add_callback(callback)
    with pytest.raises(
        HostError, match=r"attached to another trainer than the one that trains.*attach\(trainer\)"
    ):
        second.train()
    assert callback.guard.steps == trained
    callback.attach(second)
    second.train()
    assert callback.guard.steps == trained + 1


def test_one_trainer_a_phase_with_saved_state(tmp_path):
    first = online("grpo", tmp_path, rows([("math", 6)]), max_steps=3)
    callback = guarded(first)
    first.train()
    first.save_model(str(tmp_path / "phase"))
    callback.guard.save(tmp_path / "phase")
    second = online("grpo", tmp_path, rows([("code", 6)]), model=str(tmp_path / "phase"), max_steps=3)
    again = guarded(second)
    again.guard.load(tmp_path / "phase")
    second.train()
    assert again.guard.domains["math"].foreign_steps == 3


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)])
def test_a_state_beside_other_weights_is_told(peft, tmp_path):
    first = online("grpo", tmp_path, rows([("math", 6)]), max_steps=3, peft=peft)
    callback = guarded(first)
    first.train()
    first.save_model(str(tmp_path / "phase"))
    callback.save(tmp_path / "phase")
    # Without a checkpoint of its own the second trainer begins anew.
    fresh = guarded(online("grpo", tmp_path, rows([("code", 6)]), max_steps=3, peft=peft))
    with pytest.warns(UserWarning, match=r"not those saved in .*phase: .* for instance"):
        fresh.load(tmp_path / "phase")
    model, _ = model_and_words(tmp_path / "model")
    if peft is None:
        model = str(tmp_path / "phase")
    else:
        model = PeftModel.from_pretrained(model, tmp_path / "phase", is_trainable=True)
    second = guarded(online("grpo", tmp_path, rows([("code", 6)]), model=model, max_steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        second.load(tmp_path / "phase")


@pytest.mark.parametrize("by_name", [False, True])
def test_a_next_phase_that_begins_with_other_weights(by_name, tmp_path):
    first = online("grpo", tmp_path, rows([("math", 6)]), max_steps=2)
    callback = InterferenceGuardCallback(config=CONFIG)
    callback.attach(first)
    first.train()
    model = str(tmp_path / "model") if by_name else first.model
    second = online("grpo", tmp_path, rows([("code", 6)]), model=model, max_steps=2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        callback.attach(second)
    text = [str(item.message) for item in found if "not those the run before ended with" in str(item.message)]
    assert len(text) == by_name
    assert not by_name or "give each of them the same model object" in text[0]
