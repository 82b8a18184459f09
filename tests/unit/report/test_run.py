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
            history.report(step, [letter.lower()], metrics)
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
        history.report(step, ["a"], {"loss": 1.0})
    run = read_run(tmp_path)
    assert spans(run.phases) == [(0, 2, "a")]
    assert run.recoveries == []
