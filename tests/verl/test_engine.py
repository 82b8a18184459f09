"""The guard inside veRL's real engine: what a mini-batch does, and what is refused."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from verl.utils import tensordict_utils as tu

from interference_guard import GuardError, StateError
from interference_guard.errors import HostError, MissingDomainError, UnsupportedError
from interference_guard.files import HISTORY
from interference_guard.history import History, read_history
from interference_guard.integrations.verl import batch, plugin
from tests.verl import host

# veRL 0.7 runs forward in bf16 whatever the engine is set to.
ROUGH = host.platform.VERSION < (0, 8)
PLAN = ["math"] * 3 + ["code"] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def guarded(model):
    """A run through both domains: its worker and the metrics of each step."""
    made = host.worker(model, host.SMALL)
    return made, host.train(made, PLAN)


def test_the_registry_holds_guarded_engines(guarded):
    assert type(guarded[0].engine).__name__ == "GuardedCpuEngine"


def test_a_foreign_step_is_projected_onto_the_region(guarded):
    guard = guarded[0].engine.interference.guard
    assert guard.protected == ("math",)
    state = guard.domains["math"]
    assert state.foreign_steps == 5
    assert guard.raw_parts(["math"])["math"].inside <= state.radius.item() * (1 + 1e-3)


def test_the_steps_without_a_guard_leave_the_region(model, guarded):
    made = host.worker(model, host.SMALL | {"project": False})
    host.train(made, PLAN)
    watched = made.engine.interference.guard
    radius = guarded[0].engine.interference.guard.domains["math"].radius.item()
    assert watched.raw_parts(["math"])["math"].inside > 1.2 * radius


def test_metrics_come_with_the_actors(guarded):
    last = guarded[1][-1]
    for name in ("guard/math/predicted", "guard/math/measured", "guard/math/radius", "guard/seconds"):
        (value,) = last[name]
        assert math.isfinite(value)
    assert "grad_norm" in last


def test_completions_and_rewards_come_from_the_batch(guarded):
    rows = guarded[0].engine.interference.guard.domains["math"].retained
    assert len(rows) == host.SMALL["retain"]
    for row in range(len(rows)):
        step, place = divmod(row, 16)
        data = host.batch(step, ("math",), padded=False)
        real = rows.attention_mask[row].bool()
        assert torch.equal(rows.input_ids[row][real], data["input_ids"].unbind()[place])
        answer = rows.input_ids[row][rows.completion_mask[row].bool()]
        assert torch.equal(answer, data["responses"].unbind()[place])
        assert rows.rewards[row] == data["rm_scores"].unbind()[place].sum()


def test_of_a_large_batch_every_prompt_is_kept(model):
    made = host.worker(model, host.SMALL | {"retain": 16 // host.COMPLETIONS})
    host.train(made, ["math"])
    (kept,) = made.engine.interference.guard.domains["math"].pending
    ids = host.batch(0, ("math",), padded=False)["input_ids"].unbind()
    last = range(host.COMPLETIONS - 1, 16, host.COMPLETIONS)
    for row, place in enumerate(last):
        assert torch.equal(kept.input_ids[row][kept.attention_mask[row].bool()], ids[place])
    assert len(kept) == len(last)


def test_the_older_trainers_padded_batches_are_read_alike(guarded, model):
    made = host.worker(model, host.SMALL)
    found = host.losses(host.train(made, PLAN, padded=True))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in host.losses(guarded[1])], abs=2e-4)
    rows, expected = (worker.engine.interference.guard.domains["math"].retained for worker in (made, guarded[0]))
    for name in ("input_ids", "attention_mask", "completion_mask", "rewards"):
        assert torch.equal(getattr(rows, name), getattr(expected, name))


def test_a_batch_in_another_layout_is_refused(guarded):
    data = host.batch(0, ("math",), padded=False)
    del data["rm_scores"]
    with pytest.raises(HostError, match=r"no response_mask and rm_scores.*it has \['advantages'"):
        batch.completions(data, [0], 1.0)


def test_scores_are_those_of_the_model_itself(guarded, model):
    from interference_guard.probe import model_policy

    engine = guarded[0].engine
    rows = engine.interference.guard.domains["math"].retained
    scores = engine.interference._scores(rows)
    expected = model_policy(engine.module)(rows)
    tolerance = 5e-2 if ROUGH else 1e-5
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


def test_measuring_leaves_the_engine_as_it_was(guarded):
    engine = guarded[0].engine
    before = host.weights(guarded[0])
    engine.module.train()
    random = torch.get_rng_state()
    engine.interference.guard.measure("math")
    assert engine.module.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.weights(guarded[0]).items())


def test_a_disabled_guard_gives_the_hosts_own_losses(model):
    host.unguarded_engines()
    plain = host.worker(model, loaded=False)
    assert type(plain.engine).__name__ == "CpuEngine"
    expected = host.losses(host.train(plain, PLAN))
    disabled = host.worker(model, {"enabled": False})
    assert type(disabled.engine).__name__ == "GuardedCpuEngine"
    assert host.losses(host.train(disabled, PLAN)) == expected
    assert all(torch.equal(tensor, host.weights(plain)[name]) for name, tensor in host.weights(disabled).items())


def test_resuming_equals_going_on(model, guarded, tmp_path):
    first = host.worker(model, host.SMALL)
    host.train(first, PLAN[:5])
    first.save_checkpoint(str(tmp_path), global_step=5)
    assert (tmp_path / "interference_guard_rank0").is_dir()
    second = host.worker(model, host.SMALL)
    second.load_checkpoint(str(tmp_path), del_local_after_load=False)
    assert second.engine.interference.guard.trained == ("code",)
    found = host.losses(host.train(second, PLAN[5:], start=5))
    assert found == host.losses(guarded[1])[5:]
    expected = host.weights(guarded[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in host.weights(second).items())


def test_resuming_without_a_guards_state_is_an_error(model, tmp_path):
    first = host.worker(model, {"enabled": False})
    host.train(first, PLAN[:1])
    first.save_checkpoint(str(tmp_path), global_step=1)
    second = host.worker(model, host.SMALL)
    with pytest.raises(GuardError, match="saved with the guard attached"):
        second.load_checkpoint(str(tmp_path), del_local_after_load=False)


def test_a_state_that_cannot_be_written_is_an_error_after_the_hosts_checkpoint(model, tmp_path, monkeypatch):
    """Critic, data and the number of the last checkpoint are written by veRL's trainer after the engine's."""
    made = host.worker(model, host.SMALL)
    host.train(made, PLAN[:2])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("interference_guard.checkpoint.save_file", full)
        made.save_checkpoint(str(tmp_path), global_step=2)
    assert any(tmp_path.glob("model_world_size_1_rank_0.pt"))
    with pytest.raises(StateError, match="No space left on device"):
        host.train(made, PLAN[2:3], start=2)
    # Once: who caught it goes on.
    host.train(made, PLAN[2:3], start=2)
    assert made.engine.interference.guard.steps == 3


def test_without_a_path_nothing_is_saved_or_read(model):
    made = host.worker(model, host.SMALL)
    made.engine.load_checkpoint(None)
    made.engine.save_checkpoint(None)


def test_a_step_that_is_skipped_after_a_resume_measures_nothing_again(model, tmp_path):
    first, second = host.worker(model, host.SMALL), host.worker(model, host.SMALL)
    host.train(first, PLAN[:5])
    first.save_checkpoint(str(tmp_path), global_step=5)
    second.load_checkpoint(str(tmp_path), del_local_after_load=False)
    found = []
    for made in (first, second):
        made.train_mini_batch(not_finite(host.batch(5, ("code",))))
        found.append(made.engine.interference.guard.domains["math"].region.state())
    assert found[0] == found[1]


def not_finite(data):
    values = data["advantages"]
    data["advantages"] = (
        torch.nested.nested_tensor_from_jagged(values.values() * torch.nan, offsets=values.offsets())
        if values.is_nested
        else values * torch.nan
    )
    return data


def test_rows_of_several_temperatures_are_refused(model):
    made = host.worker(model, host.SMALL)
    data = host.batch(0, ("math",))
    tu.assign_non_tensor(data, temperature=torch.linspace(0.5, 1.5, 16))
    made.engine.interference.expect(data)
    with pytest.raises(HostError, match=r"temperatures from 0\.5 to 1\.5"):
        made.engine.interference.begin(data)


def test_accumulated_gradients_equal_one_pass(model):
    whole = host.worker(model, host.SMALL, micro=16)
    parts = host.worker(model, host.SMALL, micro=4)
    found = [loss for loss, _ in host.losses(host.train(parts, PLAN))]
    tolerance = 1e-2 if ROUGH else 2e-4
    assert found == pytest.approx([loss for loss, _ in host.losses(host.train(whole, PLAN))], abs=tolerance)
    for name, tensor in host.weights(whole).items():
        torch.testing.assert_close(tensor, host.weights(parts)[name], rtol=1e-2, atol=5e-2 if ROUGH else 1e-3)


def test_mini_batches_and_epochs_are_steps_and_bring_each_row_once(model):
    made = host.worker(model, host.SMALL)
    host.train(made, ["math", "code"], mini=8, epochs=2)
    guard = made.engine.interference.guard
    assert guard.steps == 8
    assert guard.domains["code"].own_steps == 4
    assert sum(map(len, guard.domains["code"].pending)) == 16


def test_rows_are_told_apart_by_their_number_alone():
    fresh = batch.FreshRows()
    # A rank that holds two of each prompt's eight rows, over two epochs; then another update.
    found = [fresh.take(numbers) for numbers in ([0, 1], [2, 3], [3, 0], [2, 1])]
    assert found == [[0, 1], [0, 1], [], []]
    fresh.clear()
    assert fresh.take([1, None, None]) == [0, 1, 2]


@pytest.mark.parametrize("first", [False, True])
def test_a_mini_batch_of_padding_alone_is_a_step_of_its_updates_domain(model, first):
    made = host.worker(model, host.SMALL)
    guard = made.engine.interference.guard
    host.train(made, ["code"] * 2)
    real, padding = [f"0_{row // host.COMPLETIONS}" for row in range(8)], ["padabc"] * 8
    uids = padding + real if first else real + padding
    made.train_mini_batch(host.batch(2, ("math",), mini=8, uid=uids))
    assert guard.steps == 4
    assert {name: state.own_steps for name, state in guard.domains.items()} == {"code": 0, "math": 2}
    assert guard.domains["code"].anchored
    assert sum(map(len, guard.domains["math"].pending)) == 8


def test_the_history_shows_the_settings_as_they_were_given(model, tmp_path):
    made = host.worker(model, host.SMALL)
    session = made.engine.interference
    # As with two ranks.
    session.guard.config = dataclasses.replace(session.guard.config, retain=host.SMALL["retain"] // 2)
    session.settings = dataclasses.replace(session.settings, folder=str(tmp_path))
    host.train(made, ["math"])
    assert read_history(tmp_path / HISTORY).settings["retain"] == host.SMALL["retain"]


def test_rows_are_numbered_for_a_guarded_engine_alone(guarded):
    class Worker:
        engine = SimpleNamespace(interference=None)

        def train_mini_batch(self, data):
            return data

    plugin._number(Worker)
    plugin._number(Worker)
    made, rows = Worker(), host.batch(0, ("math",))
    # A critic's worker is of the same class, and gets a handle whose rows come later.
    assert made.train_mini_batch("handle") == "handle"
    assert batch.ROW not in made.train_mini_batch(rows).keys()  # noqa: SIM118
    made.engine = guarded[0].engine
    assert made.train_mini_batch("handle") == "handle"
    assert batch.row_numbers(made.train_mini_batch(rows)) == list(range(16))


def test_a_new_run_does_not_go_on_with_an_older_history(model, tmp_path):
    old = History(tmp_path / HISTORY, {}, 0)
    for step in range(1, 9):
        old.report(step, {"loss": 1.0}, active=("old",))
    made = host.worker(model, host.SMALL)
    session = made.engine.interference
    session.settings = dataclasses.replace(session.settings, folder=str(tmp_path))
    host.train(made, ["math", "code"], mini=8)
    found = read_history(tmp_path / HISTORY)
    assert [(line["step"], line["active"]) for line in found.steps] == [(2, ["math"]), (4, ["code"])]


def test_pictures_are_refused():
    data = host.batch(0, ("math",), padded=False, multi_modal_inputs=[{"pixel_values": 1}] * 16)
    with pytest.raises(HostError, match="multi_modal_inputs"):
        batch.completions(data, [0], 1.0)


def test_a_domains_name_does_not_choose_how_its_metrics_are_reduced(model):
    made = host.worker(model, host.SMALL)
    found = host.train(made, ["minerva", "max_code"], mini=8)
    # Once an update, however many steps it has.
    for step, name in zip(found, ("minerva", "max_code"), strict=True):
        (reward,) = step[f"guard/{name}/reward"]
        assert isinstance(reward, float)
        assert 0 < reward < 1
    with made.engine.train_mode():
        data = host.batch(9, ("minerva",))
        tu.assign_non_tensor(data, update_lr_scheduler=True)
        outputs = {"metrics": {}}
        made.engine.interference.begin(data)
        made.engine.interference.end(data, outputs)
    assert {metric.aggregation.value for metric in outputs["metrics"].values()} == {"mean"}


class Told:
    """In the place of the Ray actor that tells the data who must recover."""

    def __init__(self):
        self.reports = []

    def domains(self):
        return frozenset({"math", "code"})

    def report(self, wanted):
        self.reports.append(wanted)


def test_a_phase_lasts_whole_updates_and_keeps_the_old_anchor(model, monkeypatch):
    monkeypatch.setattr("interference_guard.integrations.verl.session.Link", Told)
    settings = {"project": False, "recovery": True, "recovery_budget": 1e-4, "recovery_tolerance": 5e-5}
    made = host.worker(model, host.SMALL | settings | {"recovery_share": 0.9, "recovery_cooldown": 1})
    guard, told = made.engine.interference.guard, made.engine.interference.link
    host.train(made, ["math"] * 3, rows=32, mini=8)
    step = 3
    while guard.recovery is None and step < 20:
        host.train(made, ["code"], start=step, rows=32, mini=8)
        step += 1
    assert guard.recovery == "math"
    assert told.reports == [None] * (step - 1) + ["math"]
    state = guard.domains["math"]
    old, target = state.model, state.target_reward
    host.train(made, ["math"], start=step, rows=32, mini=8)
    # Two steps would be the most, but a batch is used up first.
    assert guard.schedule.taken == guard.schedule.total == 4
    assert guard.recovery is None
    assert state.anchored
    assert state.target_reward == target
    host.train(made, ["code"], start=step + 1, rows=32, mini=8)
    assert (state.model is old) == (not guard.schedule.regained)


def test_a_skipped_step_is_no_step(model):
    made = host.worker(model, host.SMALL)
    host.train(made, PLAN[:4])
    guard, before = made.engine.interference.guard, host.weights(made)
    made.train_mini_batch(not_finite(host.batch(4, ("code",))))
    assert guard.steps == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.weights(made).items())


def test_adapters_are_guarded(model):
    made = host.worker(model, host.SMALL, lora=4)
    host.train(made, PLAN)
    guard = made.engine.interference.guard
    assert all("lora_" in view.name for block in guard.view.blocks for view in block.views)
    assert guard.raw_parts(["math"])["math"].inside <= guard.domains["math"].radius.item() * (1 + 1e-3)


def test_padding_rows_belong_to_nobody(model):
    made = host.worker(model, host.SMALL)
    uids = [f"0_{row // host.COMPLETIONS}" for row in range(12)] + ["padabc"] * 4
    names = ["math"] * 12 + ["code"] * 4
    made.train_mini_batch(host.batch(0, ("math",), uid=uids, data_source=names))
    guard = made.engine.interference.guard
    assert list(guard.domains) == ["math"]
    assert sum(map(len, guard.domains["math"].pending)) == 12


def test_flat_parameters_are_refused_before_anything_is_built(model):
    with pytest.raises(UnsupportedError, match=r"actor\.strategy=fsdp2"):
        host.worker(model, host.SMALL, strategy="fsdp")


def test_a_row_without_a_domain_is_named(model):
    made = host.worker(model, host.SMALL)
    names = ["math"] * 15 + [""]
    with pytest.raises(MissingDomainError, match=r"Row 15 of the batch \(uid 0_3\)"):
        made.train_mini_batch(host.batch(0, ("math",), data_source=names))


def test_a_model_that_only_runs_forward_has_no_guard(model):
    made = host.worker(model, host.SMALL, forward_only=True)
    assert made.engine.interference is None
