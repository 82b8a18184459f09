import json
from itertools import pairwise

import pytest

from interference_guard.errors import ConfigError, StateError
from interference_guard.history import HISTORY, History, find_history, read_history


def test_what_is_written_is_read(tmp_path):
    history = History(tmp_path / HISTORY, {"budget": 0.02})
    history.report(5, ["math"], {"guard/math/reward": 0.5, "guard/math/radius": float("inf")}, 1.25)
    history.evaluation(6, {"math": 0.75})
    found = read_history(tmp_path / HISTORY)
    assert found.settings == {"budget": 0.02}
    assert found.skipped == 0
    (step,), (evaluation,) = found.steps, found.evaluations
    assert step["active"] == ["math"]
    assert step["metrics"] == {"guard/math/reward": 0.5, "guard/math/radius": None}
    assert evaluation["rewards"] == {"math": 0.75}


@pytest.mark.parametrize("count", [7, 8, 100, 1000])
def test_length_is_bounded_and_steps_stay_even(tmp_path, count):
    history = History(tmp_path / HISTORY, limit=16)
    for step in range(1, count + 1):
        history.report(step, ["math"], {"a": step})
        assert len((tmp_path / HISTORY).read_text().splitlines()) <= 16
    steps = [line["step"] for line in read_history(tmp_path / HISTORY).steps]
    gaps = {b - a for a, b in pairwise(steps)}
    assert len(gaps) == 1
    assert steps[0] <= 2 * max(gaps)
    assert count - steps[-1] < max(gaps)


def test_evaluations_are_bounded_too(tmp_path):
    history = History(tmp_path / HISTORY, limit=8)
    for step in range(50):
        history.evaluation(step, {"math": 0.5})
    assert len((tmp_path / HISTORY).read_text().splitlines()) <= 8
    assert read_history(tmp_path / HISTORY).evaluations[-1]["step"] == 49


def test_resumption_drops_what_will_be_run_again(tmp_path):
    first = History(tmp_path / HISTORY)
    for step in range(1, 11):
        first.report(step, ["math"], {})
    second = History(tmp_path / HISTORY, step=6)
    second.report(7, ["code"], {})
    found = read_history(tmp_path / HISTORY)
    assert [line["step"] for line in found.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert found.steps[-1]["active"] == ["code"]


def test_a_new_run_starts_anew(tmp_path):
    History(tmp_path / HISTORY).report(1, ["math"], {})
    History(tmp_path / HISTORY)
    assert read_history(tmp_path / HISTORY).lines == []


def test_a_fault_of_the_disk_warns_once_and_never_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Training goes on without it"):
        history = History(tmp_path / "file" / HISTORY)
    # Warnings are errors: a second one would fail here.
    history.report(1, ["math"], {})
    history.evaluation(2, {"math": 1.0})
    assert history.failed


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / HISTORY
    history = History(path, {"budget": 0.02})
    history.report(1, ["math"], {"a": 1.0})
    damaged = [
        "{",
        "[]",
        "null",
        json.dumps({"kind": "step"}),
        json.dumps({"kind": "step", "step": "x", "metrics": {}}),
        json.dumps({"kind": "step", "step": 2, "metrics": {"a": "b"}}),
        json.dumps({"kind": "other", "step": 2}),
        "\x00\xff",
    ]
    with path.open("a") as file:
        file.write("\n".join(damaged) + "\n\n")
    history.report(3, ["math"], {"a": 2.0})
    found = read_history(path)
    assert found.skipped == len(damaged)
    assert [line["step"] for line in found.steps] == [1, 3]


def test_no_history_and_no_readable_line(tmp_path):
    with pytest.raises(StateError, match="has no guard history"):
        find_history(tmp_path)
    (tmp_path / HISTORY).write_text("nonsense\n")
    with pytest.raises(StateError, match="none of its 1 lines could be read"):
        read_history(tmp_path / HISTORY)
    with pytest.raises(StateError, match="cannot be read"):
        read_history(tmp_path)


def test_a_bound_too_small(tmp_path):
    with pytest.raises(ConfigError, match="needs 8 lines or more"):
        History(tmp_path / HISTORY, limit=7)


PLACES = {
    "curvature": {"math": {(0, "q_proj"): 1.5, (None, "lm_head"): 0.25}},
    "projected": {"math": {(0, "q_proj"): 0.5}},
}


def test_sums_by_place_are_read_back_and_bounded(tmp_path):
    history = History(tmp_path / HISTORY, limit=8)
    history.report(1, ["math"], {"a": 1})
    history.places(1, PLACES)
    found = read_history(tmp_path / HISTORY)
    assert found.places == PLACES
    assert [line["kind"] for line in found.lines] == ["step", "places"]
    for step in range(2, 40):
        history.places(step, {**PLACES, "projected": {}})
        history.report(step, ["math"], {"a": 1})
    assert len((tmp_path / HISTORY).read_text().splitlines()) <= 8
    assert read_history(tmp_path / HISTORY).places["projected"] == {}
    # A run that goes on writes them again when it ends.
    History(tmp_path / HISTORY, step=39)
    assert read_history(tmp_path / HISTORY).places == {}


@pytest.mark.parametrize(
    "places", ["3", "[]", '{"curvature": [1]}', '{"a": {"math": [[0, 1, 2]]}}', '{"a": {"math": [[0]]}}']
)
def test_damaged_sums_are_skipped_and_counted(tmp_path, places):
    (tmp_path / HISTORY).write_text(
        '{"kind":"places","step":1,"places":' + places + '}\n{"kind":"evaluation","step":1,"rewards":{}}\n'
    )
    found = read_history(tmp_path / HISTORY)
    assert (found.skipped, found.places) == (1, {})
