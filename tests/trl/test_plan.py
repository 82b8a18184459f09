"""What the callback says of the order of the rows before training begins."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from interference_guard import ConfigError, HostError
from interference_guard.integrations.trl import (
    InterferenceGuardCallback,
    order_by_domain,
    prompts_per_generation,
)
from interference_guard.integrations.trl.plan import look_ahead
from tests.trl.host import CONFIG, TWO_PHASES, guarded, online, rows, supervised


def begin(trainer, active_share=0.05, epochs=1, steps=1000):
    state = TrainerState(num_train_epochs=epochs, max_steps=steps)
    look_ahead(trainer.train_dataset, "domain", trainer.args, state, active_share)


def test_rows_drawn_at_random_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"\['code', 'math'\] at random.* Set shuffle_dataset=False"):
        begin(online("grpo", tmp_path, rows(TWO_PHASES), shuffle_dataset=True))
    with pytest.warns(UserWarning, match="Set train_sampling_strategy='sequential'"):
        begin(supervised(tmp_path, rows(TWO_PHASES).rename_column("answer", "completion")))


def test_batches_of_one_row_cannot_mix(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), shuffle_dataset=True, per_device_train_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        begin(trainer)


def test_a_resumed_run_that_begins_its_rows_anew_is_told(tmp_path):
    trainer = online("grpo", tmp_path, order_by_domain(rows(TWO_PHASES), 2), ignore_data_skip=True)
    state = TrainerState(num_train_epochs=1, max_steps=6, global_step=4)
    with pytest.warns(UserWarning, match="ignore_data_skip=True: the run resumes at step 4 with the first rows"):
        look_ahead(trainer.train_dataset, "domain", trainer.args, state, 0.05)


def test_the_first_mixed_batch_is_named(tmp_path):
    # Blocks of three prompts, where a batch has two.
    data = order_by_domain(rows(TWO_PHASES), 3, "round_robin")
    with pytest.warns(UserWarning, match=r"Rows 2 to 3 .*'math': 1.*order_by_domain\(dataset, 2\)"):
        begin(online("grpo", tmp_path, data))


def test_rehearsed_rows_are_in_order_where_they_stay_protected(tmp_path):
    data = order_by_domain(rows([("math", 8), ("code", 8)]), 4, batches=2, rehearsal=0.25)
    trainer = online("grpo", tmp_path, data, per_device_train_batch_size=8)
    with pytest.warns(UserWarning, match=r"Rows 8 to 11 .* set active_share above their share"):
        begin(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        begin(trainer, 0.5)


def test_rehearsed_rows_do_not_hide_a_second_epoch(tmp_path):
    data = order_by_domain(rows([("math", 8), ("code", 8)]), 4, batches=2, rehearsal=0.25)
    trainer = online("grpo", tmp_path, data, per_device_train_batch_size=8)
    with pytest.warns(UserWarning, match=r"domains \['math', 'code'\] one after the other, .* 2 times"):
        begin(trainer, 0.5, 2)


def test_settings_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config is of type dict; give a GuardConfig"):
        InterferenceGuardCallback(config={"budget": 0.02})


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("stream", [False, True])
def test_packing_is_named_as_what_took_the_column(strategy, stream, tmp_path):
    data = rows(TWO_PHASES).rename_column("answer", "completion")
    data = data.to_iterable_dataset() if stream else data
    options = {"packing_strategy": strategy, "max_length": 16, "padding_free": False}
    trainer = supervised(tmp_path, data, packing=True, **options)
    with pytest.raises(HostError, match=r"packing=True joins rows.* Set packing=False"):
        InterferenceGuardCallback(trainer)
    if not stream:
        with pytest.raises(HostError, match=r"packing=True.* [Ss]et packing=False"):
            order_by_domain(trainer.train_dataset, 2)


def test_rows_that_were_replaced_by_others_without_a_domain_are_refused(tmp_path):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES))
    guarded(trainer)
    trainer.train_dataset = trainer.train_dataset.remove_columns("domain")
    with pytest.raises(HostError, match=r"no column 'domain'; it has \['answer', 'prompt'\]"):
        trainer.train()


def trained(trainer):
    """The domains that a run trains, and what it says of those that it leaves out."""
    callback = InterferenceGuardCallback(trainer)
    trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(item.message) for item in caught if "rows the run trains" in str(item.message)]
    return sorted(
        name for name, state in callback.guard.domains.items() if state.own_steps or state.anchored
    ), told


# Three generations of a domain; the last takes two of them for a step.
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 3),
        ({"num_iterations": 2}, 6),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 2}, 6),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 3),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, 2),
    ],
)
@pytest.mark.parametrize("more", [0, 1])
def test_domains_that_max_steps_leaves_out_are_named(options, steps, more, tmp_path):
    data = rows([("math", 8), ("code", 8)])
    made = online("grpo", tmp_path / "made", data, **options)
    prompts = prompts_per_generation(made.args)
    data = order_by_domain(data, prompts, batches=steps if prompts > 2 else 3)
    trainer = online("grpo", tmp_path, data, **options | {"max_steps": steps + more})
    found, told = trained(trainer)
    assert found == (["code", "math"] if more else ["math"])
    assert len(told) == 1 - more
    assert all(f"domains ['code']: it ends after max_steps={steps} steps" in text for text in told)


EPOCH = {"max_steps": -1, "num_train_epochs": 1}
TAILS = {
    "a last batch that is not full": ([("math", 8), ("code", 3)], {}, True),
    "one that is dropped": ([("math", 8), ("code", 3)], {"dataloader_drop_last": True}, False),
    "a last step of fewer batches": ([("math", 8), ("code", 4)], {"gradient_accumulation_steps": 2}, True),
}


@pytest.mark.parametrize("case", TAILS)
def test_the_last_batch_of_an_epoch(case, tmp_path):
    blocks, options, both = TAILS[case]
    options = EPOCH | {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"} | options
    data = rows(blocks).rename_column("answer", "completion")
    found, told = trained(supervised(tmp_path, data, **options))
    assert found == (["code", "math"] if both else ["math"])
    assert len(told) == 1 - both
    assert all("domains ['code']: the trainer drops the last 3" in text for text in told)


@pytest.mark.parametrize(("code", "both"), [(1, False), (2, True)])
def test_the_last_generation_of_an_epoch(code, both, tmp_path):
    # A step takes two generations of two prompts; the last one has a single generation.
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    found, told = trained(online("grpo", tmp_path, rows([("math", 8), ("code", code)]), **EPOCH | options))
    assert found == (["code", "math"] if both else ["math"])
    assert len(told) == 1 - both
    assert all("domains ['code']: the trainer drops the last 1" in text for text in told)


def test_a_last_batch_that_several_processes_fill_up_is_told(tmp_path):
    data = rows([("math", 8), ("code", 9)]).rename_column("answer", "completion")
    trainer = supervised(tmp_path, data, train_sampling_strategy="sequential", per_device_train_batch_size=2)
    # Two processes, as torchrun would start.
    args = SimpleNamespace(**{name: getattr(trainer.args, name) for name in NAMES}, world_size=2)
    state = TrainerState(num_train_epochs=1, max_steps=5)
    with pytest.warns(UserWarning, match=r"last 1 of the 17 rows .* of 'math': .* dataloader_drop_last=True"):
        look_ahead(data, "domain", args, state, 0.05)
    for changes, changed in (({"dataloader_drop_last": True}, data), ({}, data.select(range(16)))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            look_ahead(changed, "domain", SimpleNamespace(**{**vars(args), **changes}), state, 0.05)


def test_a_trainer_that_generates_fills_nothing_up(tmp_path):
    data = rows([("math", 9), ("code", 8)])
    trainer = online("grpo", tmp_path, data, shuffle_dataset=False, per_device_train_batch_size=4)
    args = SimpleNamespace(**{**vars(trainer.args), "world_size": 8, "generation_batch_size": 4})
    args.num_generations = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        look_ahead(data, "domain", args, TrainerState(num_train_epochs=1, max_steps=17), 0.05)


def test_a_transform_makes_no_rows_before_they_are_trained(tmp_path):
    made = []

    def transform(batch):
        made.extend(batch["place"])
        return {name: batch[name] for name in ("prompt", "answer", "domain")}

    data = rows(TWO_PHASES)
    data = data.add_column("place", list(range(12))).with_transform(transform)
    trainer = online("grpo", tmp_path, data, max_steps=3)
    made.clear()
    guarded(trainer, replace(CONFIG, recovery=True))
    with pytest.warns(UserWarning, match=r"after max_steps=3 steps"):
        begin(trainer, steps=3)
    assert made == []


# What is read of the arguments of a trainer that generates nothing.
NAMES = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "ignore_data_skip",
)
