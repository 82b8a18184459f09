"""What the guard reads of a batch's columns, whatever a trainer leaves of them, and what it begins with."""

import pytest
import torch
from verl.utils import tensordict_utils as tu

from interference_guard.errors import HostError, MissingDomainError, StateError
from interference_guard.integrations.verl import batch
from tests.verl import host

UIDS = ["0_0"] * 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host.write_model(tmp_path_factory.mktemp("model"))


def test_a_label_is_also_found_where_older_trainers_leave_it():
    carried = [{"index": row, "skill": "math" if row < 8 else "code"} for row in range(16)]
    data = host.batch(0, ("math",), padded=False, extra_info=carried)
    assert batch.labels(data, "skill", UIDS) == ["math"] * 8 + ["code"] * 8
    # The column itself goes first.
    assert batch.labels(data, "data_source", UIDS) == ["math"] * 16


def test_a_row_whose_label_is_missing_among_others_is_named():
    carried = [{"skill": "math"}] * 15 + [{}]
    data = host.batch(0, ("math",), padded=False, extra_info=carried)
    with pytest.raises(MissingDomainError, match=r"Row 15 of the batch .* has skill=None"):
        batch.labels(data, "skill", UIDS)


def test_a_column_that_was_lost_is_said_to_be():
    data = host.batch(0, ("math",), padded=False, extra_info=[{"index": 1}] * 16)
    with pytest.raises(HostError, match=r"no column 'skill'.*trainer V0 .* hands on data_source and extra_info"):
        batch.labels(data, "skill", UIDS)


def test_positions_along_several_axes_are_refused():
    data = host.batch(0, ("math",), padded=False)
    rows = [torch.arange(len(row)).expand(4, -1) for row in data["input_ids"].unbind()]
    data["position_ids"] = torch.nested.as_nested_tensor(
        [row.mT.contiguous() for row in rows], layout=torch.jagged
    ).transpose(1, 2)
    with pytest.raises(HostError, match="position_ids along several axes"):
        batch.completions(data, [0], 1.0)


def test_probes_take_the_smaller_batches_and_no_rows_in_vain(model, monkeypatch):
    made = host.worker(model, host.SMALL)
    host.train(made, ["math"] * 2)
    engine, seen = made.engine, []
    infer = engine.infer_batch

    def watch(data, **options):
        seen.append((len(data), tu.get(data, "micro_batch_size_per_gpu")))
        return infer(data, **options)

    monkeypatch.setattr(engine, "infer_batch", watch)
    monkeypatch.setattr(engine.engine_config, "infer_micro_batch_size_per_gpu", 64)
    rows = engine.interference.guard.domains["math"].latest(48)
    for count in (5, 12):
        chosen = rows.rows(slice(0, count))
        engine.interference.temperature = 1.0
        assert batch.log_probabilities(engine, chosen).shape == chosen.input_ids.shape
    # The worker's micro-batches in training hold eight.
    assert seen == [(5, 5), (16, 8)]


def test_ranks_that_share_their_rows_are_counted(model, monkeypatch, capsys):
    session = host.worker(model, host.SMALL).engine.interference
    assert "on 1 ranks: budget" in capsys.readouterr().out
    monkeypatch.setattr(host.dist, "get_world_size", lambda group=None: 2)
    session._introduce()
    assert "on 2 ranks (data-parallel size 1): budget" in capsys.readouterr().out


def test_a_new_run_begins_with_the_state_of_a_former_one(model, tmp_path):
    former = host.worker(model, host.SMALL)
    host.train(former, ["math"] * 3 + ["code"] * 2)
    former.save_checkpoint(str(tmp_path / "actor"), global_step=5)
    made = host.worker(model, {**host.SMALL, "state": str(tmp_path / "actor")})
    host.put_weights(made, host.weights(former))
    guard, before = made.engine.interference.guard, former.engine.interference.guard
    host.train(made, ["code"] * 2, start=5)
    assert guard.steps == before.steps + 2 == 7
    assert guard.domains["math"].foreign_steps == 4


def test_a_runs_own_checkpoint_goes_before_a_former_runs_state(model, tmp_path):
    former = host.worker(model, host.SMALL)
    host.train(former, ["math"] * 3)
    former.save_checkpoint(str(tmp_path / "own"), global_step=3)
    made = host.worker(model, {**host.SMALL, "state": str(tmp_path / "gone")})
    made.load_checkpoint(str(tmp_path / "own"))
    host.train(made, ["math"], start=3)
    assert made.engine.interference.guard.steps == 4


def test_a_state_that_is_not_there_is_an_error(model, tmp_path):
    made = host.worker(model, {**host.SMALL, "state": str(tmp_path)})
    with pytest.raises(StateError, match="does not exist"):
        host.train(made, ["math"])


def test_a_phase_of_a_former_run_is_given_up_where_its_rows_are_missing(model, tmp_path, monkeypatch):
    told = []

    class Link:
        served = frozenset({"math", "code"})

        def domains(self):
            return self.served

        def report(self, wanted):
            told.append(wanted)

    monkeypatch.setattr("interference_guard.integrations.verl.session.Link", Link)
    settings = {"project": False, "recovery": True, "recovery_budget": 1e-4, "recovery_tolerance": 5e-5}
    settings |= host.SMALL | {"recovery_share": 0.9, "recovery_cooldown": 1}
    former = host.worker(model, settings)
    host.train(former, ["math"] * 3, rows=32, mini=8)
    step = 3
    while former.engine.interference.guard.recovery is None and step < 20:
        host.train(former, ["code"], start=step, rows=32, mini=8)
        step += 1
    assert told[-1] == "math"
    former.save_checkpoint(str(tmp_path / "actor"), global_step=step)
    Link.served = frozenset({"code"})
    told.clear()
    made = host.worker(model, {**settings, "state": str(tmp_path / "actor")})
    host.put_weights(made, host.weights(former))
    host.train(made, ["code"], start=step)
    assert made.engine.interference.guard.recovery is None
    assert set(told) == {None}
