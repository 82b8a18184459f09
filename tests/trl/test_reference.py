import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from interference_guard import ConfigError, HostError, ShapeError
from interference_guard.integrations.trl import InterferenceGuardCallback, route
from tests.trl.host import CONFIG, StopAt, online, reward, rows, same, supervised, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def general(**changes):
    found = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]
    found[2] |= changes
    return Dataset.from_list(found)


def guarded(trainer, **options):
    callback = InterferenceGuardCallback(trainer, CONFIG, **options)
    trainer.add_callback(callback)
    return callback


def test_a_reference_is_protected_from_the_first_step(tmp_path):
    # Five steps: the probe after the sixth would move the radius under the weights.
    trainer = online("grpo", tmp_path, rows([("math", 12)]), max_steps=5)
    start = weights(trainer)
    callback = guarded(trainer, reference={"general": general()})
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                seen["anchored"] = callback.guard.domains["general"].anchored
                seen["same"] = same(start, weights(trainer))
                seen["grads"] = [p.grad for p in trainer.model.parameters() if p.grad is not None]

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == {"anchored": True, "same": True, "grads": []}
    state = callback.guard.domains["general"]
    assert state.foreign_steps == 5
    assert state.measurement.ratio == "nats"
    assert state.subspace.item() <= state.radius.item() * (1 + 1e-3)
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"guard/general/predicted", "guard/general/measured", "guard/general/kl"} <= logged


def test_completions_are_scored_up_to_their_end(tmp_path):
    trainer = online("grpo", tmp_path, rows([("math", 12)]))
    callback = guarded(trainer, reference={"general": general()})
    trainer.train()
    kept = callback.guard.domains["general"].retained
    words = trainer.processing_class
    texts = [
        words.decode(ids[mask.bool()]).split()
        for ids, mask in zip(kept.input_ids, kept.completion_mask, strict=True)
    ]
    assert texts == [[str(i + 1), words.eos_token] for i in range(6)]


def test_a_resumed_run_takes_it_from_its_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    whole = online("grpo", tmp_path, rows([("math", 12)]), **options)
    guarded(whole, reference={"general": general()})
    whole.train()

    first = online("grpo", tmp_path / "b", rows([("math", 12)]), **options)
    guarded(first, reference={"general": general()})
    first.add_callback(StopAt(3))
    first.train()
    resumed = online("grpo", tmp_path / "b", rows([("math", 12)]), **options)
    callback = guarded(resumed, reference={"general": general()})
    resumed.train(resume_from_checkpoint=True)
    assert callback.guard.domains["general"].foreign_steps == 6
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            lambda: general(completion=""),
            ShapeError,
            r"Row 2 of reference\['general'\] has completion=''",
        ),
        (lambda: general().remove_columns("completion"), HostError, r"has no column 'completion'"),
        (lambda: general().select([]), HostError, r"reference\['general'\] has no rows"),
        (lambda: general().to_list(), ConfigError, r"\['general'\] is a list; it must be a datasets\.Dataset"),
        (lambda: "general.jsonl", ConfigError, r"is a str; .* load_dataset"),
        (lambda: None, ConfigError, "is a NoneType; it must be"),
        (lambda: DatasetDict(train=general()), ConfigError, "is a DatasetDict; .* one split of several"),
        (
            lambda: general(prompt=None),
            ConfigError,
            r"Row 2 of reference\['general'\] has prompt=None and .*' 3'",
        ),
        (
            lambda: general().map(lambda row: {"completion": 1}),
            ConfigError,
            "Row 0 .* completion=1; both must be",
        ),
        (
            lambda: general().map(lambda row: {name: [] for name in ("prompt", "completion")}),
            ConfigError,
            "both must be text, or both lists of messages",
        ),
    ],
)
def test_bad_rows_are_refused_when_attaching(data, error, message, tmp_path):
    trainer = online("grpo", tmp_path, rows([("math", 12)]))
    before = dict(vars(trainer))
    with pytest.raises(error, match=message):
        InterferenceGuardCallback(trainer, CONFIG, reference={"general": data()})
    assert vars(trainer) == before


def test_a_reference_named_like_a_trained_domain_is_refused(tmp_path):
    trainer = online("grpo", tmp_path, rows([("math", 12)]))
    with pytest.raises(ConfigError, match="'math' is also a domain of the training rows"):
        InterferenceGuardCallback(trainer, CONFIG, reference={"math": general()})


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_nor_may_its_name_come_up_in_a_stream(kind, tmp_path):
    data = rows([("math", 4), ("general", 4)]).rename_column("answer", "completion").to_iterable_dataset()
    if kind == "sft":
        trainer = supervised(tmp_path, data)
    else:
        trainer = online("grpo", tmp_path, data, rewards=lambda completions, **columns: [1.0] * len(completions))
    callback = guarded(trainer, reference={"general": general()})
    with pytest.raises(ConfigError, match="'general' is also a domain of the training rows"):
        trainer.train()
    assert callback.guard.steps == 2
    assert callback.guard.domains["general"].reference


def test_an_evaluation_may_be_of_a_reference(tmp_path):
    data = rows([("math", 8), ("general", 2)])
    trainer = online(
        "grpo",
        tmp_path,
        data.select(range(8)).to_iterable_dataset(),
        evaluation=data.select(range(8, 10)),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        max_steps=2,
    )
    callback = guarded(trainer, reference={"general": general()})
    trainer.train()
    callback.detach()
    callback.attach(online("grpo", tmp_path / "b", data.select(range(8)), model=trainer.model))
    assert callback.guard.domains["general"].true_reward > 0


def test_rewards_reach_their_own_domain(tmp_path):
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    functions = route({"math": [reward], "code": [length]})
    prompts, texts = ["a", "b", "c"], ["1", "22", "1"]
    columns = {"domain": ["math", "code", "math"], "answer": ["1", "", "2"]}
    assert functions[0](prompts=prompts, completions=texts, **columns) == [1.01, None, 0.01]
    assert functions[1](prompts=prompts, completions=texts, **columns) == [None, 2.0, None]
    assert [function.__name__ for function in functions] == ["math_reward", "code_length"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"math": [reward], "code": []}, r"domains \['code'\] have no reward function"),
        ({3: [reward], "code": None}, r"domains \['code'\] have no reward function; there are \[3, 'code'\]"),
        ({"math": reward}, r"'math' has a function, no list\. Write {'math': \[function\]}"),
        (
            {"math": "module.reward"},
            r"'math' has 'module\.reward' of type str as its rewards; .*a list of functions",
        ),
        ({"math": 5}, "'math' has '5' of type int as its rewards"),
        ({3: [reward]}, "is of domain 3; it must be a name"),
        ({}, "was given no domain; it must be a mapping"),
        ([reward], r"was given a list; it must be a mapping, {'math': \[function\]}"),
        (None, "was given a NoneType"),
    ],
)
def test_what_is_no_mapping_of_functions_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        route(given)
