"""Evaluations of the trainer: rows without a domain, several sets, and predictions in between."""

import warnings

import pytest
from datasets import ClassLabel, Dataset

from tests.trl.host import guarded, online, rows, supervised

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


def listening(callback):
    """What the guard is told of true rewards."""
    heard = []
    calibrate = callback.guard.calibrate
    callback.guard.calibrate = lambda name, value: (heard.append((name, value)), calibrate(name, value))
    return heard


@pytest.mark.parametrize("some", [False, True])
def test_rows_of_an_evaluation_need_no_domain(some, tmp_path):
    evaluation = rows([("math", 4)])
    names = ["math", None, None, ""] if some else [None] * 4
    evaluation = evaluation.remove_columns("domain")
    if some:
        evaluation = evaluation.add_column("domain", names)
    trainer = online("grpo", tmp_path, rows([("math", 8)]), evaluation=evaluation, max_steps=4, **EVALUATING)
    heard = listening(guarded(trainer))
    trainer.train()
    assert trainer.state.global_step == 4
    assert [name for name, _ in heard] == (["math"] * 2 if some else [])


def test_rows_of_an_evaluation_whose_labels_are_no_names_are_told(tmp_path):
    data = rows([("math", 8)])
    coded = data.select(range(4)).cast_column("domain", ClassLabel(names=["math", "code"]))
    trainer = online("grpo", tmp_path, data, evaluation=coded, max_steps=4, **EVALUATING)
    heard = listening(guarded(trainer))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(item.message) for item in found if "Rows of an evaluation" in str(item.message)]
    assert len(told) == 1
    assert "have domain=0, which is no string and so no domain: the guard ignores them" in told[0]
    assert heard == []


@pytest.mark.parametrize("domain", [False, True])
def test_a_supervised_evaluation_needs_no_domain(domain, tmp_path):
    data = rows([("math", 8)]).map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")
    evaluation = data if domain else data.remove_columns("domain")
    trainer = supervised(tmp_path, data, evaluation.select(range(4)), **EVALUATING)
    guarded(trainer)
    trainer.train()
    assert len([line for line in trainer.state.log_history if "eval_loss" in line]) == 3


def scored(completions, answer, **columns):
    table = {"easy": 0.9, "hard": 0.2}
    return [table.get(kind, float(len(text) % 2)) for text, kind in zip(completions, answer, strict=True)]


def of_kind(kind):
    return Dataset.from_list([{"prompt": "1 + 1 =", "answer": kind, "domain": "math"}] * 4)


def test_sets_of_one_evaluation_are_one_reward(tmp_path):
    sets = {"easy": of_kind("easy"), "hard": of_kind("hard")}
    data = rows([("math", 4), ("code", 12)])
    trainer = online("grpo", tmp_path, data, evaluation=sets, rewards=scored, max_steps=8, **EVALUATING)
    callback = guarded(trainer)
    heard = listening(callback)
    trainer.train()
    assert heard == [("math", pytest.approx(0.55))] * 4
    # The rewards never changed: the domain has lost nothing.
    state = callback.guard.domains["math"]
    assert state.anchor_reward == pytest.approx(state.true_reward)
    callback.detach()
    assert "evaluate" not in vars(trainer)


def trained(tmp_path):
    data, easy = rows([("math", 8)]), of_kind("easy")
    options = {"evaluation": easy, "rewards": scored, "per_device_eval_batch_size": 4}
    trainer = online("grpo", tmp_path, data, max_steps=1, **options)
    heard = listening(guarded(trainer))
    trainer.train()
    return trainer, heard


def test_what_is_predicted_is_no_evaluation(tmp_path):
    trainer, heard = trained(tmp_path)
    trainer.predict(of_kind("hard"))
    trainer.evaluate()
    assert heard == [("math", pytest.approx(0.9))]


def test_an_evaluation_that_fails_leaves_nothing_behind(tmp_path):
    trainer, heard = trained(tmp_path)
    with pytest.raises(KeyError):
        trainer.evaluate({"hard": of_kind("hard"), "broken": of_kind("hard").remove_columns("prompt")})
    trainer.evaluate()
    assert heard == [("math", pytest.approx(0.9))]
