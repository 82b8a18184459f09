import dataclasses
import warnings

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from interference_guard import ConfigError, HostError, UnsupportedError
from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.recovery import RecoverySchedule
from tests.trl.host import CONFIG, StopAt, online, rows, same, supervised, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
# At this rate and budget any displacement counts as a loss.
EAGER = dataclasses.replace(
    CONFIG,
    budget=1e-6,
    recovery=True,
    recovery_budget=1e-6,
    recovery_steps=2,
    recovery_cooldown=1,
    recovery_share=0.5,
    project=False,
)
TWO_PHASES = [("math", 4), ("code", 20)]
SHAPES = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "several steps a generation": {"steps_per_generation": 2, "generation_batch_size": None},
    "several iterations": {"num_iterations": 2},
}


class Watch(TrainerCallback):
    """Writes down what each step trained, and starts a phase at one step."""

    def __init__(self, callback, at=None, domain="math"):
        self.callback, self.at, self.domain, self.trained = callback, at, domain, []

    def on_step_end(self, args, state, control, **kwargs):
        guard = self.callback.guard
        self.trained.append(dict.fromkeys(guard.trained))
        if state.global_step == self.at and self.at is not None:
            guard.schedule = RecoverySchedule(phase="recovering", domain=self.domain)


def guarded(trainer, config=EAGER, **options):
    callback = InterferenceGuardCallback(trainer, config, **options)
    trainer.add_callback(callback)
    return callback


def never(config):
    """The same settings, with nothing that starts a phase by itself."""
    return dataclasses.replace(config, budget=1.0, recovery_budget=99.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_recovery_begins_with_the_next_step(shape, tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), max_steps=8, **SHAPES[shape])
    config = dataclasses.replace(never(EAGER), recovery_share=1.0)
    callback = guarded(trainer, config)
    watch = Watch(callback, at=5)
    trainer.add_callback(watch)
    trainer.train()
    names = [next(iter(step)) for step in watch.trained]
    assert all(len(step) == 1 for step in watch.trained)
    first = names.index("code")
    assert first < 5
    back = [index for index, name in enumerate(names) if index > first and name == "math"]
    # The sixth step at once, and no longer than a phase may last.
    assert back[0] == 5
    assert len(back) <= config.recovery_steps
    assert len(names) == 8
    assert callback.guard.schedule.total == len(back)


def test_rows_of_a_phase_have_the_columns_that_the_trainer_leaves(tmp_path):
    def strict(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [float(len(text)) for text in completions]

    data = rows([("math", 4), ("code", 6)])
    trainer = online("grpo", tmp_path, data, rewards=strict, max_steps=5, remove_unused_columns=True)
    callback = guarded(trainer, dataclasses.replace(never(EAGER), recovery_share=1.0, recovery_steps=1))
    watch = Watch(callback, at=3)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.trained[3] == {"math": None}


def test_planned_rows_go_on_where_they_would_have_been(tmp_path):
    seen = {}
    for name in ("plain", "recovering"):
        data = Dataset.from_list([{**row, "place": i} for i, row in enumerate(rows(TWO_PHASES))])
        trainer = online("grpo", tmp_path / name, data, max_steps=8)
        config = dataclasses.replace(never(EAGER), recovery_share=1.0, recovery_steps=1)
        callback = guarded(trainer, config)
        if name == "recovering":
            trainer.add_callback(Watch(callback, at=5))
        generate, places = trainer._generate_and_score_completions, []

        def note(inputs, generate=generate, places=places):
            places.append(sorted({row["place"] for row in inputs}))
            return generate(inputs)

        trainer._generate_and_score_completions = note
        trainer.train()
        seen[name] = places
    plain, recovering = seen["plain"], seen["recovering"]
    assert [i for i, (a, b) in enumerate(zip(plain, recovering, strict=True)) if a != b] == [5]
    assert all(place < 4 for place in recovering[5])


def test_interference_past_the_budget_starts_a_phase(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), max_steps=12, learning_rate=5e-2)
    callback = guarded(trainer)
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    schedule = callback.guard.schedule
    assert schedule.phases > 0
    assert schedule.total <= EAGER.recovery_share * 12
    names = [next(iter(step)) for step in watch.trained]
    assert names[2:].count("math") == schedule.total
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"guard/recovery/active", "guard/recovery/steps", "guard/recovery/failures"} <= logged


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_resume_inside_a_phase_is_bit_identical(stop, tmp_path):
    config = dataclasses.replace(never(EAGER), recovery_share=1.0)

    def start(folder, **options):
        trainer = online("grpo", folder, rows(TWO_PHASES), max_steps=9, **options)
        callback = guarded(trainer, config)
        trainer.add_callback(Watch(callback, at=5))
        return trainer, callback

    whole, one = start(tmp_path)
    whole.train()
    assert one.guard.schedule.total >= 1

    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 1}
    first, _ = start(tmp_path / "b", **options)
    first.add_callback(StopAt(stop))
    first.train()
    resumed, callback = start(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert callback.guard.schedule.total == one.guard.schedule.total
    assert same(weights(whole), weights(resumed))


def test_without_project_and_recovery_nothing_changes(tmp_path):
    plain = online("grpo", tmp_path, rows(TWO_PHASES))
    plain.train()
    watched = online("grpo", tmp_path, rows(TWO_PHASES))
    callback = guarded(watched, dataclasses.replace(CONFIG, project=False))
    watched.train()
    assert same(weights(plain), weights(watched))
    assert callback.guard.domains["math"].measurement is not None


def test_rows_of_an_earlier_trainer_can_be_given(tmp_path):
    data = rows(TWO_PHASES)
    math = data.filter(lambda row: row["domain"] == "math")
    code = data.filter(lambda row: row["domain"] == "code")
    first = online("grpo", tmp_path, math, max_steps=3)
    config = dataclasses.replace(never(EAGER), recovery_share=1.0)
    callback = guarded(first, config, recovery_datasets={"math": math})
    first.train()
    second = online("grpo", tmp_path, code, model=first.model, max_steps=6)
    callback.attach(second)
    watch = Watch(callback, at=2)
    second.add_callback(watch)
    second.train()
    assert [next(iter(step)) for step in watch.trained][:3] == ["code", "code", "math"]


KEYS = [("maths", False), ("words", True), ("math", False), ("qa", False)]


@pytest.mark.parametrize(("name", "labelled"), KEYS)
def test_rows_that_no_domain_takes_are_told_when_training_begins(name, labelled, tmp_path):
    given = rows([(name, 2)]).remove_columns([] if labelled else ["domain"])
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), max_steps=1)
    callback = guarded(trainer, never(EAGER), recovery_datasets={name: given})
    # As a state does that is loaded.
    callback.guard.state_of("qa")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(item.message) for item in found if "recovery_datasets has rows for" in str(item.message)]
    # Rows that say so themselves are of that domain, which a later phase may train.
    assert len(told) == (name == "maths")
    if told:
        assert "the domains of this run and of those before are ['code', 'math', 'qa']" in told[0]


def test_a_phase_without_rows_in_the_next_trainer_is_given_up(tmp_path):
    data = rows(TWO_PHASES)
    code = data.filter(lambda row: row["domain"] == "code")
    config = dataclasses.replace(never(EAGER), recovery_share=1.0)
    first = online("grpo", tmp_path, data, max_steps=4)
    callback = guarded(first, config)
    first.add_callback(Watch(callback, at=4))
    first.train()
    assert callback.guard.recovery == "math"
    second = online("grpo", tmp_path, code, model=first.model, max_steps=2)
    callback.attach(second)
    with pytest.warns(UserWarning, match=r"no rows of \['math'\], which were trained before"):
        second.train()
    assert callback.guard.recovery is None
    assert callback.guard.schedule.failures == 1


def test_rows_that_replace_others_after_attaching_are_recovered_from(tmp_path):
    others = rows([("words", 4), ("code", 20)])
    config = dataclasses.replace(never(EAGER), recovery_share=1.0)
    found = []
    for first in (others, rows(TWO_PHASES)):
        trainer = online("grpo", tmp_path, first, max_steps=8)
        callback = guarded(trainer, config)
        trainer.train_dataset = others
        watch = Watch(callback, at=5, domain="words")
        trainer.add_callback(watch)
        trainer.train()
        assert callback.guard.recoverable == {"words", "code"}
        assert watch.trained[5] == {"words": None}
        found.append(weights(trainer))
    assert same(*found)


def test_rows_that_cannot_be_recovered_from_are_refused_before_training(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    callback = guarded(trainer)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(HostError, match="is a stream, which cannot be searched"):
        trainer.train()
    assert callback.guard.steps == 0


def test_detach_leaves_nothing(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    before = dict(vars(trainer))
    callback = guarded(trainer)
    assert "get_batch_samples" in vars(trainer)
    callback.detach()
    assert vars(trainer) == before


class TestRefusals:
    def refused(self, trainer, error, message, **options):
        before = dict(vars(trainer))
        with pytest.raises(error, match=message):
            InterferenceGuardCallback(trainer, EAGER, **options)
        assert vars(trainer) == before

    def test_no_rows(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        empty = rows([("math", 2)]).select([])
        self.refused(trainer, ConfigError, "'math'. has no rows", recovery_datasets={"math": empty})

    def test_a_missing_column(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        bare = rows([("math", 2)]).remove_columns("answer")
        self.refused(trainer, HostError, r"lacks the columns \['answer'\]", recovery_datasets={"math": bare})

    def test_rows_of_another_domain(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        mixed = rows([("math", 2), ("code", 2)])
        message = (
            r"2 of the 4 rows of recovery_datasets\['math'\] are not of that domain: row 2 has domain='code'"
        )
        self.refused(trainer, ConfigError, message, recovery_datasets={"math": mixed})

    def test_a_key_that_is_no_name(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        message = r"recovery_datasets has the key 3; it must be a domain's name"
        self.refused(trainer, ConfigError, message, recovery_datasets={3: rows([("math", 2)])})

    def test_rows_without_recovery(self, tmp_path):
        given = {"recovery_datasets": {"math": rows([("math", 2)])}}
        with pytest.raises(ConfigError, match=r"rows for \['math'\], and recovery=False trains none of them"):
            InterferenceGuardCallback(config=CONFIG, **given)
        # Where the whole guard is off, nothing has to be taken back.
        InterferenceGuardCallback(config=dataclasses.replace(CONFIG, enabled=False), **given)

    def test_rows_that_cannot_be_drawn(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        self.refused(trainer, ConfigError, "is a list; it must be", recovery_datasets={"math": [{"prompt": "a"}]})

    def test_a_stream(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES).to_iterable_dataset())
        self.refused(trainer, HostError, "is a stream, which cannot be searched")

    def test_a_trainer_that_does_not_generate(self, tmp_path):
        data = rows(TWO_PHASES).map(lambda row: {"completion": " a"}, remove_columns="answer")
        trainer = supervised(tmp_path, data)
        self.refused(trainer, UnsupportedError, "SFTTrainer does not generate completions")

    def test_a_missing_seam(self, tmp_path):
        trainer = online("grpo", tmp_path, rows(TWO_PHASES))
        del trainer._buffered_inputs
        self.refused(trainer, HostError, "has no '_buffered_inputs', which the guard needs")
