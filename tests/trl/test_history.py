import warnings

import pytest

from interference_guard.history import HISTORY, read_history
from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.report.run import read_run
from tests.trl.host import CONFIG, online, rows, same, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
TWO_PHASES = [("math", 6), ("code", 6)]


def guarded(tmp_path, name="run", **options):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), output_dir=str(tmp_path / name), **options)
    trainer.add_callback(InterferenceGuardCallback(trainer, CONFIG))
    return trainer


def test_a_run_writes_its_history_beside_its_checkpoints(tmp_path):
    evaluation = rows([("math", 2), ("code", 2)])
    guarded(
        tmp_path, evaluation=evaluation, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4
    ).train()
    run = read_run(tmp_path / "run")
    assert run.settings["budget"] == CONFIG.budget
    assert [(phase.last, phase.active) for phase in run.phases] == [(3, ("math",)), (6, ("code",))]
    assert [step for step, _ in run.metric("math", "reward")] == [1, 2, 3]
    assert [step for step, _ in run.metric("math", "predicted")]
    assert {step for step, _ in run.evaluations["code"]} == {3, 6}
    assert "loss" in run.series
    assert run.overhead()
    assert set(run.recorded.places["curvature"]) == {"math", "code"}
    projected = run.recorded.places["projected"]["math"]
    assert (0, "q_proj") in projected
    assert sum(projected.values()) > 0


def test_resumption_writes_each_step_once(tmp_path):
    guarded(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = guarded(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    steps = [line["step"] for line in read_history(tmp_path / "run" / HISTORY).steps]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_phases_of_several_trainers_make_one_history(tmp_path):
    callback = InterferenceGuardCallback(config=CONFIG)
    model = None
    for name in ("math", "code"):
        trainer = online("grpo", tmp_path, rows([(name, 6)]), model=model, max_steps=3)
        callback.attach(trainer)
        trainer.train()
        model = trainer.model
    run = read_run(tmp_path / "run")
    assert [(phase.first, phase.last, phase.active) for phase in run.phases] == [
        (0, 3, ("math",)),
        (3, 6, ("code",)),
    ]


def test_a_history_that_cannot_be_written_changes_nothing(tmp_path):
    whole = guarded(tmp_path, "whole")
    whole.train()
    broken = guarded(tmp_path, "broken")
    # A folder stands where the file belongs.
    (tmp_path / "broken" / HISTORY).mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken.train()
    assert any("Training goes on without it" in str(item.message) for item in caught)
    assert same(weights(whole), weights(broken))
