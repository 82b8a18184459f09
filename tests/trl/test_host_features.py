"""What hosts use beside plain training goes on working, and the guard with it."""

import asyncio

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from interference_guard import ConfigError, GuardConfig, HostError, MissingDomainError
from interference_guard.integrations.trl import (
    InterferenceGuardCallback,
    for_domain,
    order_by_domain,
    prompts_per_generation,
    route,
)
from interference_guard.integrations.trl.completions import generated, labelled
from tests.trl.host import CONFIG, TWO_PHASES, guarded, online, reward, rows, same, supervised, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


def trained(trainer, steps):
    """Train with a guard; the domains of each step."""
    callback, found = guarded(trainer), []
    for step in range(1, steps + 1):
        trainer.add_callback(At(step, lambda: found.append(callback.guard.trained)))
    trainer.train()
    return found


class TestTemperature:
    @pytest.mark.parametrize("loaded", [False, True])
    def test_a_domain_is_measured_at_the_temperature_of_its_own_rollouts(self, loaded, tmp_path):
        first = online("grpo", tmp_path, rows(TWO_PHASES), temperature=0.7)
        callback = guarded(first)
        first.train()
        before = callback.guard.measure("math")
        assert abs(before.kl) > 0
        callback.save(tmp_path / "state")
        following = online("grpo", tmp_path, rows(TWO_PHASES), model=first.model, temperature=1.5)
        if loaded:
            callback = InterferenceGuardCallback(following, CONFIG)
            callback.load(tmp_path / "state")
        else:
            callback.attach(following)
        math = callback.guard.domains["math"]
        assert math.temperature == math.retained.temperature == 0.7
        after = callback.guard.measure("math")
        assert after.kl == pytest.approx(before.kl, rel=1e-4)
        assert after.loss == pytest.approx(before.loss, abs=1e-5)

    def test_rows_that_wait_for_their_anchor_keep_theirs(self, tmp_path):
        first = online("grpo", tmp_path, rows(TWO_PHASES), temperature=0.7)
        callback = guarded(first)
        first.train()
        state = callback.guard.state_dict()
        other = online("grpo", tmp_path / "b", rows(TWO_PHASES))
        again = InterferenceGuardCallback(other, CONFIG).guard
        again.load_state_dict(state)
        assert {part.temperature for part in again.domains["code"].pending} == {0.7}


class TestOrder:
    @pytest.mark.parametrize(
        ("steps", "iterations", "accumulation", "batches"),
        [(1, 1, 2, 2), (2, 1, 3, 3), (4, 1, 2, 1), (1, 2, 2, 1), (2, 1, 4, 2), (3, 1, 2, 2)],
    )
    def test_a_unit_fills_whole_steps(self, steps, iterations, accumulation, batches, tmp_path):
        trainer = online(
            "grpo",
            tmp_path,
            rows([("math", 8), ("code", 8)]),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=steps,
            num_iterations=iterations,
        )
        assert prompts_per_generation(trainer.args) == steps * batches

    def test_no_step_mixes_domains_where_it_takes_several_generation_batches(self, tmp_path):
        options = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
            "max_steps": 4,
        }
        data = rows([("math", 4), ("code", 4)])
        args = online("grpo", tmp_path, data, **options).args
        ordered = order_by_domain(data, prompts_per_generation(args), "round_robin")
        trainer = online("grpo", tmp_path, ordered, **options)
        assert trained(trainer, 4) == [("math",), ("code",), ("math",), ("code",)]

    @pytest.mark.parametrize(
        ("blocks", "options", "said"),
        [
            ([("math", 4), ("code", 4)], {"num_train_epochs": 2}, True),
            ([("math", 4), ("code", 4)], {"num_train_epochs": 1}, False),
            ([("math", 4), ("code", 4), ("math", 4)], {"num_train_epochs": 2}, False),
            ([("math", 4), ("code", 4)], {"num_train_epochs": 2, "shuffle_dataset": True}, False),
        ],
        ids=["two epochs", "one epoch", "in turn", "shuffled"],
    )
    def test_finished_domains_that_are_taken_up_again_are_told_of(self, blocks, options, said, tmp_path, recwarn):
        trainer = online("grpo", tmp_path, rows(blocks), max_steps=-1, **options)
        guarded(trainer)
        trainer.train()
        text = "goes through all of them 2 times"
        assert any(text in str(item.message) for item in recwarn.list) == said

    def test_a_stream_cannot_be_ordered(self):
        with pytest.raises(ConfigError, match="IterableDataset"):
            order_by_domain(rows(TWO_PHASES).to_iterable_dataset(), 2)

    def test_supervised_rows_are_ordered_after_the_trainer_has_prepared_them(self, tmp_path):
        # TRL drops a row that has nothing left to learn from, and every row after it moves up.
        texts = [
            {"prompt": "a " * 40 if i == 0 else "1 + 1 =", "completion": " 2", "domain": "math"} for i in range(5)
        ]
        texts += [{"prompt": "reverse a b", "completion": " b a", "domain": "code"} for _ in range(4)]
        options = {"max_length": 16, "train_sampling_strategy": "sequential", "max_steps": 4}
        trainer = supervised(tmp_path, Dataset.from_list(texts), **options)
        assert len(trainer.train_dataset) == 8
        trainer.train_dataset = order_by_domain(trainer.train_dataset, 2, "round_robin")
        assert trained(trainer, 4) == [("math",), ("code",), ("math",), ("code",)]


class TestRewards:
    def test_an_async_function_stays_one(self, tmp_path):
        async def judged(completions, **columns):
            await asyncio.sleep(0)
            return [float(len(text)) for text in completions]

        class Judge:
            async def __call__(self, completions, **columns):
                return await judged(completions)

        functions = route({"math": [judged, Judge()], "code": [reward]})
        trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=functions)
        callback = guarded(trainer)
        trainer.train()
        assert callback.guard.domains["math"].rewarded == 12
        logged = {name for line in trainer.state.log_history for name in line}
        assert "rewards/math_judged/mean" in logged

    def test_columns_that_functions_log_stay_with_their_rows(self):
        table = {}

        def log(column, values):
            table.setdefault(column, []).extend(values)

        def noting(completions, log_extra, **columns):
            log_extra("note", [f"n{text}" for text in completions])
            return [0.0] * len(completions)

        scored = for_domain(noting, "math")
        for domains in (["math", "code"], ["code", "code"], ["code", "math"]):
            scored(["p", "q"], ["x", "y"], domain=domains, log_extra=log)
        assert table == {"math_note": ["nx", None, None, None, None, "ny"]}

    def test_a_reward_model_is_no_function(self):
        with pytest.raises(ConfigError, match="'math' has Linear .* it must be a function"):
            for_domain(torch.nn.Linear(1, 1), "math")
        with pytest.raises(ConfigError, match="'math' has str 'some/model'"):
            for_domain("some/model", "math")


class TestUnannouncedSteps:
    def test_a_callback_that_was_taken_off_in_the_middle(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        callback = guarded(trainer)
        trainer.add_callback(At(2, lambda: trainer.remove_callback(callback)))
        with pytest.raises(MissingDomainError, match="nobody announced; the step before it trained .*math"):
            trainer.train()
        assert callback.guard.domains["math"].own_steps == 2

    def test_detached_in_the_middle_the_run_goes_on_unguarded(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        callback = guarded(trainer)
        trainer.add_callback(At(2, callback.detach))
        trainer.train()
        assert trainer.state.global_step == 6
        assert callback.guard.steps == 2

    def test_steps_after_an_interrupt_are_not_the_guards(self, tmp_path):
        def interrupt():
            raise KeyboardInterrupt

        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        callback = guarded(trainer)
        trainer.add_callback(At(2, interrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.optimizer.step()
        assert callback.guard.steps == 2


class TestDetach:
    def test_the_columns_are_those_of_before(self, tmp_path):
        trainer = supervised(tmp_path, rows(TWO_PHASES).rename_column("answer", "completion"))
        callback = guarded(trainer)
        trainer.train()
        assert "domain" in trainer._signature_columns
        callback.detach()
        assert "domain" not in trainer._signature_columns

    def test_a_method_that_was_wrapped_since_goes_on_without_the_guard(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        callback = guarded(trainer)
        inner, lines = trainer.log, []

        def log(logs, *args, **kwargs):
            lines.append(logs)
            return inner(logs, *args, **kwargs)

        trainer.log = log
        callback.detach()
        trainer.log({"loss": 1.0})
        assert [line["loss"] for line in lines] == [1.0]
        assert trainer.log is log


def test_lines_of_the_hosts_own_hold_no_metrics_of_the_guard(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    guarded(trainer)
    trainer.add_callback(At(5, lambda: trainer.log({"mine": 1.0})))
    trainer.train()
    mine = [line for line in trainer.state.log_history if "mine" in line]
    assert len(mine) == 1
    assert not [name for name in mine[0] if name.startswith("guard/")]


def test_the_best_model_comes_with_its_own_state(tmp_path):
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    texts = [
        {"prompt": "1 + 1 =", "completion": " 2", "domain": name} for name in ("math", "code") for _ in range(6)
    ]
    data = Dataset.from_list(texts)
    trainer = supervised(tmp_path, data, evaluation=data, train_sampling_strategy="sequential", **options)
    callback = guarded(trainer, GuardConfig(rank=4, sketch=8, residual=4))
    # The third evaluation is the best, whatever it finds.
    evaluate, losses = trainer.evaluate, iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0])

    def rigged(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        found["eval_loss"] = next(losses)
        return found

    trainer.evaluate = rigged
    kept = {}
    trainer.add_callback(At(3, lambda: kept.update(weights(trainer))))
    trainer.train()
    assert same(weights(trainer), kept)
    assert callback.guard.steps == 3
    assert set(callback.guard.domains) == {"math"}
    assert not callback.guard.domains["math"].anchored


class TestSupervised:
    def test_a_collator_that_reads_the_domain(self, tmp_path):
        trainer = supervised(
            tmp_path, rows(TWO_PHASES).rename_column("answer", "completion"), remove_unused_columns=False
        )
        inner, seen = trainer.data_collator, []

        def collate(examples):
            seen.extend(row["domain"] for row in examples)
            return {**inner(examples), "domain_id": torch.ones(len(examples))}

        trainer.data_collator = collate
        compute, batches = trainer.compute_loss, []

        def loss(model, inputs, *args, **kwargs):
            inputs = dict(inputs)
            batches.append(inputs.pop("domain_id").tolist())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = loss
        callback = guarded(trainer)
        trainer.train()
        assert set(seen) == {"math", "code"}
        assert batches[0] == [1.0, 1.0]
        assert callback.guard.steps == 6

    def test_after_detach_a_strict_collator_is_given_what_it_was_before(self, tmp_path):
        trainer = supervised(tmp_path, rows(TWO_PHASES).rename_column("answer", "completion"))
        trainer.data_collator = DataCollatorForSeq2Seq(trainer.processing_class)
        callback = guarded(trainer)
        trainer.train()
        callback.detach()
        trainer.train()
        assert callback.guard.steps == 6

    @pytest.mark.parametrize("filled", [0, 3])
    def test_rows_without_padding_are_measured_apart(self, filled):
        # Up to a multiple of a length, as TRL does.
        batch = {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9] + [1] * filled]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1] + [0] * filled]),
            "labels": torch.tensor([[-100, 6, 7, 8, 9] + [-100] * filled]),
        }
        found = labelled(batch, 2)
        assert found.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert found.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
        # Nothing foretells a first token.
        assert found.completion_mask.tolist() == [[0, 1, 1], [0, 1, 0]]

    def test_prompt_tuning(self, tmp_path):
        data = Dataset.from_list(
            [
                {"prompt": "1 + 1 =", "completion": " 2", "domain": name}
                for name in ("math", "code")
                for _ in range(6)
            ]
        )
        trainer = supervised(tmp_path, data)
        tuned = get_peft_model(trainer.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        trainer = type(trainer)(
            tuned, args=trainer.args, train_dataset=data, processing_class=trainer.processing_class
        )
        callback = guarded(trainer, GuardConfig(rank=4, sketch=8, residual=4, probe_steps=2))
        trainer.train()
        assert callback.guard.steps == 6


def test_rows_with_pictures_are_refused():
    ids = torch.ones(1, 3, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids, "pixel_values": torch.ones(1, 3)}
    with pytest.raises(HostError, match="'pixel_values'.*text alone"):
        labelled(batch, 1)
    with pytest.raises(HostError, match="'pixel_values'"):
        generated({**batch, "prompt_ids": ids}, None, 1.0)


def test_columns_that_the_trainer_would_remove(tmp_path):
    # The domain stays; other columns go, as the host has asked for.
    def counted(completions, **columns):
        return [float(len(text)) for text in completions]

    trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=counted, remove_unused_columns=True)
    callback = guarded(trainer)
    trainer.train()
    assert callback.guard.domains["math"].anchored
