import re

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from interference_guard import (
    ConfigError,
    GuardConfig,
    HostError,
    MissingDomainError,
    ShapeError,
    UnsupportedError,
)
from interference_guard.integrations.trl import InterferenceGuardCallback
from tests.reference import expand
from tests.trl.host import (
    COMMON,
    CONFIG,
    SHAPES,
    TWO_PHASES,
    guarded,
    model_and_words,
    online,
    rows,
    same,
    supervised,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_one_ordered_dataset(kind, tmp_path):
    trainer = online(kind, tmp_path, rows(TWO_PHASES))
    callback = guarded(trainer)
    trainer.train()
    guard = callback.guard
    assert guard.steps == 6
    assert guard.domains["math"].anchored
    assert guard.domains["math"].foreign_steps == 3
    assert guard.domains["code"].own_steps == 3
    assert len(guard.domains["math"].retained) == 12
    assert guard.domains["math"].retained.rewards.std() > 0
    inside = guard.raw_parts()["math"].inside
    assert inside <= guard.domains["math"].radius.item() * (1 + 1e-3)
    assert guard.domains["math"].measurement.ratio == "sequence"
    logged = {name for line in trainer.state.log_history for name in line if name.startswith("guard/")}
    assert logged <= set(expand(["code", "math"]))
    for name in ("predicted", "measured", "kl", "radius", "reward", "length", "forgetting"):
        assert f"guard/math/{name}" in logged
    rewards = [line["guard/math/reward"] for line in trainer.state.log_history if "guard/math/reward" in line]
    assert len(rewards) == 3


def test_scores_at_the_anchor_are_those_of_the_policy(tmp_path):
    # The anchor's log-probabilities, by the trainer's own function, equal a plain forward pass.
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), temperature=0.7)
    callback = guarded(trainer)
    found = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            found[state.global_step] = weights(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    state = callback.guard.domains["math"]
    model, _ = model_and_words(tmp_path / "model")
    model.load_state_dict(found[3], strict=False)
    retained = state.retained
    with torch.no_grad():
        logits = model(input_ids=retained.input_ids, attention_mask=retained.attention_mask).logits / 0.7
    scores = torch.log_softmax(logits[:, :-1], -1).gather(-1, retained.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    expected = torch.nn.functional.pad(scores, (1, 0)) * retained.completion_mask
    torch.testing.assert_close(state.anchor_scores, expected, rtol=1e-4, atol=1e-5)
    assert retained.completion_mask.sum() > 0


def test_rewards_stay_with_their_completions(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    callback = guarded(trainer)
    trainer.train()
    _, words = model_and_words(tmp_path / "model")
    kept = callback.guard.domains["math"].retained
    for ids, mask, value in zip(kept.input_ids, kept.completion_mask, kept.rewards, strict=True):
        text = words.decode(ids[mask.bool()], skip_special_tokens=True)
        assert value.item() == pytest.approx(float("1" in text) + 0.01 * len(text), abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_disabled_is_bit_identical(kind, tmp_path):
    plain = online(kind, tmp_path, rows(TWO_PHASES))
    plain.train()
    watched = online(kind, tmp_path, rows(TWO_PHASES))
    guarded(watched, GuardConfig(enabled=False))
    watched.train()
    assert same(weights(plain), weights(watched))
    assert [line.keys() for line in plain.state.log_history] == [
        line.keys() for line in watched.state.log_history
    ]


def test_one_domain_alone_is_bit_identical(tmp_path):
    plain = online("grpo", tmp_path, rows([("math", 12)]))
    plain.train()
    watched = online("grpo", tmp_path, rows([("math", 12)]))
    guarded(watched)
    watched.train()
    assert same(weights(plain), weights(watched))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_step_knows_its_domains(shape, tmp_path):
    trainer = online(
        "grpo", tmp_path, rows([("math", 4), ("code", 4), ("math", 4), ("code", 4)]), **SHAPES[shape]
    )
    callback = guarded(trainer)
    seen = []
    begin = callback.guard.begin
    callback.guard.begin = lambda shares: (seen.append(dict(shares)), begin(shares))
    trainer.train()
    assert len(seen) == 6
    if shape != "several steps a generation":
        assert all(len(shares) == 1 for shares in seen)
        assert all(sum(shares.values()) == 4 for shares in seen)
    assert {name for shares in seen for name in shares} == {"math", "code"}


def test_mixed_batches_count_rows(tmp_path):
    data = rows([("math", 1), ("code", 1)] * 6)
    trainer = online("grpo", tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    callback = guarded(trainer)
    seen = []
    begin = callback.guard.begin
    callback.guard.begin = lambda shares: (seen.append(dict(shares)), begin(shares))
    trainer.train()
    assert seen == [{"math": 2, "code": 2}] * 6
    assert callback.guard.protected == ()


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_lora(kind, tmp_path):
    trainer = online(kind, tmp_path, rows(TWO_PHASES), peft=LoraConfig(r=4, target_modules="all-linear"))
    callback = guarded(trainer)
    trainer.train()
    assert all("lora" in name for name in callback.guard.view.layout.views)
    inside = callback.guard.raw_parts()["math"].inside
    assert inside <= callback.guard.domains["math"].radius.item() * (1 + 1e-3)


def test_supervised_training_uses_its_labels(tmp_path):
    data = rows(TWO_PHASES).map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")
    trainer = supervised(tmp_path, data, train_sampling_strategy="sequential")
    callback = guarded(trainer)
    trainer.train()
    state = callback.guard.domains["math"]
    assert state.anchored
    assert state.measurement.ratio == "nats"
    assert state.retained.rewards is None
    assert state.retained.completion_mask.sum() > 0
    inside = callback.guard.raw_parts()["math"].inside
    assert inside <= state.radius.item() * (1 + 1e-3)
    callback.detach()


def test_evaluations_reach_the_guard_by_domain(tmp_path):
    evaluation = rows([("math", 4), ("code", 2)])
    trainer = online(
        "grpo",
        tmp_path,
        rows(TWO_PHASES),
        evaluation=evaluation,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=2,
    )
    callback = guarded(trainer)
    heard = []
    calibrate = callback.guard.calibrate
    callback.guard.calibrate = lambda name, value: (heard.append((name, value)), calibrate(name, value))
    trainer.train()
    # Before its first own step a domain has nothing to compare with.
    assert [name for name, _ in heard] == ["math", "math", "code"]
    state = callback.guard.domains["math"]
    assert state.evaluated
    assert state.anchor_reward == heard[0][1]
    assert state.true_reward == heard[1][1]
    totals = [line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line]
    assert (4 * heard[1][1] + 2 * heard[2][1]) / 6 == pytest.approx(totals[1], abs=1e-5)


class TestRefusals:
    def test_unknown_column(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES, column="subject"))
        with pytest.raises(HostError, match=r"no column 'domain'; it has .*'subject'.*domain_column"):
            InterferenceGuardCallback(trainer, CONFIG)
        InterferenceGuardCallback(trainer, GuardConfig(domain_column="subject")).detach()

    @pytest.mark.parametrize("bad", [None, ""])
    def test_row_without_a_domain(self, tmp_path, bad):
        data = rows(TWO_PHASES)
        names = data["domain"][:]
        names[7] = bad
        trainer = online("grpo", tmp_path, data.remove_columns("domain").add_column("domain", names))
        before = dict(vars(trainer))
        with pytest.raises(MissingDomainError, match=r"Row 7 has domain=.*: every row needs.*reverse"):
            InterferenceGuardCallback(trainer, CONFIG)
        assert vars(trainer) == before

    def test_streamed_row_without_a_domain(self, tmp_path):
        data = rows([("math", 4)]).to_list()
        data[1]["domain"] = None
        from datasets import Dataset

        trainer = online("grpo", tmp_path, Dataset.from_list(data).to_iterable_dataset())
        guarded(trainer)
        # Its number in the stream is not known, and that in the batch is another.
        with pytest.raises(MissingDomainError, match=r"A row in training has domain=None.*'prompt': '1 \+ 1 ='"):
            trainer.train()

    def test_dora(self, tmp_path):
        peft = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), peft=peft)
        before = dict(vars(trainer))
        with pytest.raises(UnsupportedError, match="uses DoRA"):
            InterferenceGuardCallback(trainer, CONFIG)
        assert vars(trainer) == before

    def test_another_model_in_the_next_phase(self, tmp_path):
        first = online("grpo", tmp_path, rows([("math", 6)]))
        callback = guarded(first)
        second = online("grpo", tmp_path, rows([("code", 6)]), peft=LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(ShapeError, match="other trainable parameters"):
            callback.attach(second)
        assert "log" in vars(first)
        assert "log" not in vars(second)

    def test_missing_seam(self, tmp_path, monkeypatch):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        monkeypatch.setattr(type(trainer), "_calculate_rewards", None)
        with pytest.raises(HostError, match="has no '_calculate_rewards', which the guard needs"):
            InterferenceGuardCallback(trainer, CONFIG)

    def test_a_seam_that_fails_while_it_is_wrapped(self, tmp_path, monkeypatch):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        before = dict(vars(trainer))
        callback = InterferenceGuardCallback(config=CONFIG)

        def fails(*args):
            raise AttributeError("no pad_token_id")

        monkeypatch.setattr("interference_guard.integrations.trl.attached.PassingRows", fails)
        with pytest.raises(AttributeError, match="no pad_token_id"):
            callback.attach(trainer)
        assert vars(trainer) == before

    def test_trainers_that_generate_in_other_ways(self, tmp_path):
        model, words = model_and_words(tmp_path / "model")
        args = DistillationConfig(output_dir=str(tmp_path / "run"), max_completion_length=3, **COMMON)
        trainer = DistillationTrainer(
            model, teacher_model=model, args=args, train_dataset=rows(TWO_PHASES), processing_class=words
        )
        before = dict(vars(trainer))
        with pytest.raises(
            HostError, match="DistillationTrainer is not supported: it has no '_calculate_rewards'"
        ):
            InterferenceGuardCallback(trainer, CONFIG)
        assert vars(trainer) == before

    def test_no_trainer(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        trainer.add_callback(InterferenceGuardCallback(config=CONFIG))
        with pytest.raises(HostError, match=r"Call attach\(trainer\)"):
            trainer.train()

    def test_a_callback_that_is_not_added_or_added_twice(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        callback = InterferenceGuardCallback(trainer, CONFIG)
        with pytest.raises(HostError, match="is 0 times among the trainer's"):
            trainer.train()
        trainer.add_callback(callback)
        callback.attach(trainer)
        trainer.add_callback(callback)
        with pytest.raises(HostError, match="is 2 times among the trainer's"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_two_callbacks(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        guarded(trainer)
        before = dict(vars(trainer))
        with pytest.raises(HostError, match="Another InterferenceGuardCallback is on this trainer"):
            InterferenceGuardCallback(trainer, CONFIG)
        assert vars(trainer) == before

    def test_wrong_arguments(self, tmp_path):
        with pytest.raises(HostError, match="A GuardConfig was given to guard"):
            InterferenceGuardCallback(CONFIG)
        with pytest.raises(ConfigError, match="reference is of type Dataset; it must be a mapping"):
            InterferenceGuardCallback(config=CONFIG, reference=rows(TWO_PHASES))
        with pytest.raises(ConfigError, match="reference has the key 3; it must be a domain's name"):
            InterferenceGuardCallback(config=CONFIG, reference={3: rows(TWO_PHASES)})

    @pytest.mark.parametrize("folder", [None, 5, ["run"]])
    def test_folders_that_are_no_paths(self, tmp_path, folder):
        callback = guarded(online("grpo", tmp_path, rows(TWO_PHASES)))
        for call in (callback.load, callback.save):
            with pytest.raises(ConfigError, match=rf"state is {re.escape(repr(folder))}; it must be a path"):
                call(folder)


def test_detach_leaves_nothing(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    before = dict(vars(trainer))
    callbacks = list(trainer.callback_handler.callbacks)
    callback = guarded(trainer)
    assert vars(trainer) != before
    callback.detach()
    assert vars(trainer) == before
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert callback.guard.steps == 0


def test_a_crash_leaves_hooks_that_the_next_run_replaces(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    callback = guarded(trainer)

    class Crash(TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.on:
                raise KeyboardInterrupt

    crash = Crash()
    trainer.add_callback(crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    crash.on = False
    trainer.train()
    assert callback.guard.steps == 1 + 6
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
