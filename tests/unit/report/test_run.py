from interference_guard.history import HISTORY, History
from interference_guard.report.run import read_run
from interference_guard.report.transfer import transfer


def recorded(tmp_path, plan, every=1):
    """A run with one letter a step, capitals for recovery steps; evaluated after each planned phase."""
    history, total = History(tmp_path / HISTORY), 0
    for step, letter in enumerate(plan, 1):
        total += letter.isupper()
        # What the guard logs: the flag of the step to come, and the count of those made.
        following = plan[step : step + 1].isupper()
        if step % every == 0:
            metrics = {"guard/recovery/active": float(following), "guard/recovery/steps": float(total)}
            history.report(step, metrics, active=[letter.lower()])
        if not following and letter.islower() and plan[step : step + 1] != letter:
            history.evaluation(step, dict.fromkeys("abc", step / 100))
    return read_run(tmp_path)


def spans(phases):
    return [(phase.first, phase.last, *phase.active) for phase in phases]


def test_a_recovery_interrupts_a_phase_and_does_not_end_it(tmp_path):
    run = recorded(tmp_path, "aaabbAAbbbbcccABBcccc")
    assert spans(run.phases) == [(0, 3, "a"), (3, 11, "b"), (11, 21, "c")]
    assert spans(run.recoveries) == [(5, 7, "a"), (14, 15, "a"), (15, 17, "b")]
    found = transfer(run)
    assert found.phases == ["a", "b", "c"]
    assert all(set(row) == {"a", "b", "c"} for row in found.rows)


def test_a_recovery_at_the_end_of_a_phase(tmp_path):
    run = recorded(tmp_path, "aaabbbAAcccc")
    assert spans(run.phases) == [(0, 3, "a"), (3, 8, "b"), (8, 12, "c")]


def test_reports_of_several_steps(tmp_path):
    run = recorded(tmp_path, "aaaabbbbAAbbbbcccc", every=2)
    assert spans(run.phases) == [(0, 4, "a"), (4, 14, "b"), (14, 18, "c")]
    assert spans(run.recoveries) == [(8, 10, "a")]


def test_without_recoveries_none_is_found(tmp_path):
    history = History(tmp_path / HISTORY)
    for step in (1, 2):
        history.report(step, {"loss": 1.0}, active=["a"])
    run = read_run(tmp_path)
    assert spans(run.phases) == [(0, 2, "a")]
    assert run.recoveries == []


def test_an_evaluation_after_a_phase_belongs_to_it(tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 31):
        if step % 4 == 0:
            history.report(step, {}, active=["abc"[(step - 1) // 10]])
        if step % 10 == 0:
            history.evaluation(step, dict.fromkeys("abc", step / 100))
    run = read_run(tmp_path)
    assert spans(run.phases) == [(0, 10, "a"), (10, 20, "b"), (20, 30, "c")]
    assert [set(row) for row in transfer(run).rows] == [{"a", "b", "c"}] * 3


def test_an_evaluation_begins_no_second_phase(tmp_path):
    history = History(tmp_path / HISTORY)
    for step, active, total in ((5, "a", 0), (10, "b", 0), (15, "a", 1), (20, "b", 1)):
        history.report(step, {"guard/recovery/steps": total}, active=[active])
        # By default of the domain last reported: here once of a recovery that is over by then.
        history.evaluation(step + 2, {"a": 0.5})
    history.evaluation(23, {"a": 0.5}, active=["a"])
    assert spans(read_run(tmp_path).phases) == [(0, 7, "a"), (7, 22, "b")]


def test_a_history_that_does_not_say_what_evaluations_are_of(tmp_path):
    lines = [
        '{"kind":"run","version":1,"stride":1,"settings":{}}',
        '{"kind":"step","step":8,"active":["a"],"seconds":1,"metrics":{}}',
        '{"kind":"evaluation","step":10,"rewards":{"a":0.5}}',
        '{"kind":"step","step":16,"active":["b"],"seconds":1,"metrics":{}}',
    ]
    (tmp_path / HISTORY).write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert spans(run.phases) == [(0, 8, "a"), (8, 16, "b")]
    assert run.evaluations == {"a": [(10, 0.5)]}


def test_domains_are_also_those_that_metrics_name(tmp_path):
    history = History(tmp_path / HISTORY)
    metrics = {
        "guard/general/measured": 0.1,
        "guard/openai/gsm8k/kl": float("nan"),
        "guard/recovery/steps": 1.0,
        "guard/recovery/radius": 1.0,
        "guard/overlap/a/b": 0.5,
        "guard/overlap/a/reward": 0.5,
        "guard/update_kept": 1.0,
        "guard/seconds": 0.1,
        "eval/reward": 0.5,
    }
    history.report(1, metrics, active=["a"])
    history.evaluation(1, {"b": 0.5})
    assert read_run(tmp_path).domains == ["a", "general", "openai/gsm8k", "recovery", "b"]


def test_each_domain_has_rewards_of_one_kind(tmp_path):
    history = History(tmp_path / HISTORY)
    history.report(1, {"guard/a/reward": 0.1, "guard/b/reward": 0.2, "guard/c/measured": 0.3}, active=["a"])
    assert read_run(tmp_path).rates()[1] == {"a": "training", "b": "training"}
    history.evaluation(1, {"a": 0.5, "b": float("nan")})
    assert read_run(tmp_path).rates() == (
        {"a": [(1, 0.5)], "b": [(1, 0.2)]},
        {"a": "evaluated", "b": "training"},
    )
