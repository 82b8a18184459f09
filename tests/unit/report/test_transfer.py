import pytest

from interference_guard.errors import ReportError
from interference_guard.history import HISTORY, History
from interference_guard.report.figures import POINTS, thin
from interference_guard.report.run import read_run
from interference_guard.report.transfer import losses, transfer


def history(folder, evaluations, phases=(("a", 10), ("b", 20), ("c", 30)), **metrics):
    made = History(folder / HISTORY, {"budget": 0.02})
    begin = 0
    for name, end in phases:
        for step in range(begin + 2, end + 1, 2):
            made.report(step, metrics, active=[name], seconds=0.5 * step)
            if step in evaluations:
                made.evaluation(step, evaluations[step])
        begin = end
    return read_run(folder)


def with_start(folder, start, evaluations):
    made = History(folder / HISTORY)
    made.evaluation(0, start)
    for name, steps in (("a", (5, 10)), ("b", (15, 20)), ("c", (25, 30))):
        for step in steps:
            made.report(step, {}, active=[name])
            if step in evaluations:
                made.evaluation(step, evaluations[step])
    return read_run(folder)


def test_matrix_and_its_summaries_by_hand(tmp_path):
    rows = {
        10: {"a": 0.9, "b": 0.2, "c": 0.3},
        20: {"a": 0.5, "b": 0.8, "c": 0.1},
        30: {"a": 0.6, "b": 0.4, "c": 1.0},
    }
    found = transfer(with_start(tmp_path, {"a": 0.1, "b": 0.1, "c": 0.2}, rows))
    assert found.phases == ["a", "b", "c"]
    assert found.rows == [rows[10], rows[20], rows[30]]
    assert found.acc == pytest.approx((0.6 + 0.4 + 1.0) / 3)
    assert found.bwt == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert found.fwt == pytest.approx(((0.2 - 0.1) + (0.1 - 0.2)) / 2)
    assert found.by_domain == pytest.approx({"a": 0.3, "b": 0.4})
    assert found.forgetting == pytest.approx(0.35)


def test_without_evaluations_there_is_no_matrix(tmp_path):
    run = history(tmp_path, {}, **{"guard/a/forgetting": 0.07})
    assert transfer(run) is None
    assert losses(run) == {"a": 0.07}


def test_phases_are_those_of_the_reports(tmp_path):
    run = history(tmp_path, {})
    assert [(phase.first, phase.last, phase.active) for phase in run.phases] == [
        (0, 10, ("a",)),
        (10, 20, ("b",)),
        (20, 30, ("c",)),
    ]


def test_interleaved_runs_have_no_phases_to_shade(tmp_path):
    phases = [("ab"[index % 2], 2 * index + 2) for index in range(200)]
    run = history(tmp_path, {20: {"a": 0.5}, 200: {"a": 0.4}}, phases)
    assert run.phases == []
    assert transfer(run) is None


def test_overhead_is_time_over_time_and_a_resumed_clock_is_left_out(tmp_path):
    made = History(tmp_path / HISTORY)
    for step, seconds in ((10, 5.0), (20, 10.0), (30, 2.0), (40, 7.0)):
        made.report(step, {"guard/seconds": 0.05}, active=["a"], seconds=seconds)
    found = read_run(tmp_path).overhead()
    assert [(step, every) for step, _, every in found] == [(20, 0.5), (40, 0.5)]


def test_an_empty_run(tmp_path):
    History(tmp_path / HISTORY)
    with pytest.raises(ReportError, match="holds no step yet: the run is empty"):
        read_run(tmp_path)


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 10_000])
def test_thinned_lines_keep_their_mean_and_end(count):
    points = [(float(step), float(step % 7)) for step in range(count)]
    found = thin(points)
    assert len(found) <= POINTS
    assert found[-1][0] == count - 1
    means = [sum(value for _, value in item) / len(item) for item in (points, found)]
    assert means[0] == pytest.approx(means[1], abs=0.1)


def test_what_was_lost_before_the_own_last_phase_is_over(tmp_path):
    made = History(tmp_path / HISTORY)
    for step in range(1, 31):
        name = "aba"[(step - 1) // 10]
        lost = {"guard/a/forgetting": 0.3, "guard/a/measured": 0.3} if name == "b" else {}
        made.report(step, lost | ({"guard/b/forgetting": 0.1} if step > 20 else {}), active=[name])
    run = read_run(tmp_path)
    assert run.current("a", "measured") is None
    assert losses(run) == {"b": 0.1}
    assert (run.followed("a"), run.followed("b")) == (False, True)


def test_each_domain_is_judged_by_what_there_is_of_it(tmp_path):
    made = History(tmp_path / HISTORY)
    for step in range(1, 41):
        figures = {"guard/b/forgetting": 0.9, "guard/a/forgetting": 0.9} if step > 20 else {}
        made.report(step, figures, active=["abcd"[(step - 1) // 10]])
        if step % 10 == 0:
            made.evaluation(step, {"a": 0.8 - step / 100})
    # a by its evaluations, b by the guard's figure, nothing of c.
    assert losses(read_run(tmp_path)) == pytest.approx({"a": 0.3, "b": 0.9})


def test_an_evaluation_of_the_own_phase_alone_says_nothing(tmp_path):
    made = History(tmp_path / HISTORY)
    for step in range(1, 21):
        made.report(step, {}, active=["ab"[(step - 1) // 10]])
        if step == 10:
            made.evaluation(step, {"a": 0.8})
    assert losses(read_run(tmp_path)) == {}


def test_domains_in_turn_are_judged_by_their_evaluations(tmp_path):
    made = History(tmp_path / HISTORY)
    made.evaluation(0, {"a": 0.1, "c": 0.2})
    for step in range(1, 301):
        made.report(step, {f"guard/{name}/forgetting": 0.01 for name in "bc"}, active=["abc"[step % 3]])
        if step % 50 == 0:
            made.evaluation(step, {"a": 1 - step / 300})
    run = read_run(tmp_path)
    assert run.interleaved
    # One evaluation of c before the first step cannot show a loss.
    assert losses(run) == pytest.approx({"a": 1 - 50 / 300, "b": 0.01, "c": 0.01})


def test_what_a_long_run_lost_is_not_thinned_away(tmp_path):
    made = History(tmp_path / HISTORY, limit=64)
    rates = [{"a": 0.8, "b": 0.1, "c": 0.1}, {"a": 0.5, "b": 0.8, "c": 0.1}, {"a": 0.4, "b": 0.4, "c": 0.8}]
    made.evaluation(0, {"a": 0.1, "b": 0.1, "c": 0.1})
    for step in range(1, 1201):
        made.report(step, {}, active=["abc"[(step - 1) // 400]])
        if step % 8 == 0:
            made.evaluation(step, rates[(step - 1) // 400])
    found = transfer(read_run(tmp_path))
    assert found.rows == rates
    assert found.by_domain == pytest.approx({"a": 0.4, "b": 0.4})
    assert found.start["a"] == 0.1


def test_evaluations_that_begin_after_the_loss_do_not_hide_it(tmp_path):
    made = History(tmp_path / HISTORY)
    for step in range(1, 31):
        figures = {"guard/a/forgetting": 0.4, "guard/b/forgetting": 0.0} if step > 10 else {}
        made.report(step, figures, active=["ab"[step > 15]])
        if step in (20, 30):
            made.evaluation(step, {"a": 0.2, "b": 0.5})
    assert losses(read_run(tmp_path))["a"] == 0.4


def test_a_domain_of_an_earlier_phase_is_judged_by_the_guards_figure(tmp_path):
    # Each phase has a trainer, and a folder, of its own.
    made = History(tmp_path / HISTORY, step=10)
    for step in range(11, 31):
        made.report(step, {"guard/a/forgetting": 0.7, "guard/a/measured": 0.6}, active=["b"])
        if step % 10 == 0:
            made.evaluation(step, {"a": 0.2, "b": 0.5})
    assert losses(read_run(tmp_path)) == {"a": 0.7}
