import json
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch

from interference_guard.errors import ConfigError, StateError
from interference_guard.history import HISTORY, History, find_history, read_history


def test_what_is_written_is_read(tmp_path):
    history = History(tmp_path / HISTORY, {"budget": 0.02})
    history.report(
        5, {"guard/math/reward": 0.5, "guard/math/radius": float("inf")}, active=["math"], seconds=1.25
    )
    history.evaluation(6, {"math": 0.75})
    found = read_history(tmp_path / HISTORY)
    assert found.settings == {"budget": 0.02}
    assert found.skipped == 0
    (step,), (evaluation,) = found.steps, found.evaluations
    assert step["active"] == ["math"]
    assert step["metrics"] == {"guard/math/reward": 0.5, "guard/math/radius": None}
    assert evaluation["rewards"] == {"math": 0.75}


def test_numbers_of_numpy_and_torch_are_written(tmp_path):
    history = History(tmp_path / HISTORY)
    history.evaluation(1, {"math": np.float32(0.5), "code": torch.tensor(0.25), "qa": np.int64(1), "none": None})
    found = read_history(tmp_path / HISTORY)
    assert found.lines[0]["rewards"] == {"math": 0.5, "code": 0.25, "qa": 1.0}


@pytest.mark.parametrize("count", [7, 8, 100, 1000])
def test_length_is_bounded_and_steps_stay_even(tmp_path, count):
    history = History(tmp_path / HISTORY, limit=16)
    for step in range(1, count + 1):
        history.report(step, {"a": step}, active=["math"])
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
        first.report(step, {}, active=["math"])
    second = History(tmp_path / HISTORY, step=6)
    second.report(7, {}, active=["code"])
    found = read_history(tmp_path / HISTORY)
    assert [line["step"] for line in found.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert found.steps[-1]["active"] == ["code"]


def test_a_new_run_starts_anew(tmp_path):
    History(tmp_path / HISTORY).report(1, {}, active=["math"])
    History(tmp_path / HISTORY)
    assert read_history(tmp_path / HISTORY).lines == []


def test_a_fault_of_the_disk_warns_once_and_never_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Training goes on without it"):
        history = History(tmp_path / "file" / HISTORY)
    # Warnings are errors: a second one would fail here.
    history.report(1, {}, active=["math"])
    history.evaluation(2, {"math": 1.0})
    assert history.failed


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / HISTORY
    history = History(path, {"budget": 0.02})
    history.report(1, {"a": 1.0}, active=["math"])
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
    history.report(3, {"a": 2.0}, active=["math"])
    found = read_history(path)
    assert found.skipped == len(damaged)
    assert [line["step"] for line in found.steps] == [1, 3]


def test_no_history_and_no_readable_line(tmp_path):
    with pytest.raises(StateError, match="has no guard history"):
        find_history(tmp_path)
    (tmp_path / HISTORY).write_text("")
    with pytest.raises(StateError, match="is no guard history: it is empty"):
        read_history(tmp_path / HISTORY)
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
    history.report(1, {"a": 1}, active=["math"])
    history.places(1, PLACES)
    found = read_history(tmp_path / HISTORY)
    assert found.places == PLACES
    assert [line["kind"] for line in found.lines] == ["step", "places"]
    for step in range(2, 40):
        history.places(step, {**PLACES, "projected": {}})
        history.report(step, {"a": 1}, active=["math"])
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


def trained(path):
    return {line["active"][0] for line in read_history(path).steps}


@pytest.mark.parametrize("order", ["ab", "abcd", "aabb"])
def test_domains_that_take_turns_all_stay(tmp_path, order):
    history = History(tmp_path / HISTORY, limit=32)
    for step in range(1, 1001):
        history.report(step, {}, active=[order[step % len(order)]])
    assert history.stride > 1
    assert trained(tmp_path / HISTORY) == set(order)
    # Nothing but the stride decides when to write: the whole run keeps one resolution.
    steps = [line["step"] for line in read_history(tmp_path / HISTORY).steps]
    assert max(b - a for a, b in pairwise(steps)) <= 3 * history.stride


def test_a_change_of_domain_is_written_whatever_the_stride_and_stays(tmp_path):
    history = History(tmp_path / HISTORY, limit=32)
    for step in range(1, 1001):
        history.report(step, {}, active=["math" if step <= 333 else "code" if step <= 777 else "qa"])
        assert len((tmp_path / HISTORY).read_text().splitlines()) <= 32
    steps = [line["step"] for line in read_history(tmp_path / HISTORY).steps]
    assert {333, 334, 777, 778} <= set(steps)


def test_a_resumed_run_sees_the_change_and_the_earlier_lines(tmp_path):
    first = History(tmp_path / HISTORY, limit=16)
    for step in range(1, 101):
        first.report(step, {}, active=["math"])
    second = History(tmp_path / HISTORY, step=100, limit=16)
    second.evaluation(100, {"math": 0.5})
    second.report(101, {}, active=["code"])
    found = read_history(tmp_path / HISTORY)
    assert found.steps[-1]["step"] == 101
    assert found.evaluations[0]["active"] == ["math"]


def test_an_evaluation_says_what_was_trained(tmp_path):
    history = History(tmp_path / HISTORY)
    history.evaluation(0, {"math": 0.1}, active=())
    history.report(10, {}, active=["math"])
    history.evaluation(12, {"math": 0.5})
    history.evaluation(15, {"math": 0.4}, active=("code",))
    found = [line.get("active") for line in read_history(tmp_path / HISTORY).evaluations]
    assert found == [None, ["math"], ["code"]]


def test_the_last_report_of_a_run_is_written(tmp_path):
    history = History(tmp_path / HISTORY, limit=8)
    for step in range(1, 100):
        history.report(step, {"a": step}, active=["math"])
    history.places(99, PLACES)
    assert read_history(tmp_path / HISTORY).steps[-1]["step"] == 99


@pytest.mark.parametrize("text", ["", "\x00\x00garbage\n"])
def test_a_damaged_history_does_not_end_a_resuming_run(tmp_path, text):
    path = tmp_path / HISTORY
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"could not be read.*damaged now, and a new one begins"):
        history = History(path, {"budget": 0.02}, step=5)
    history.report(6, {}, active=["math"])
    assert [line["step"] for line in read_history(path).steps] == [6]
    assert path.with_name(f"{HISTORY}.damaged").read_text() == text


def test_a_history_of_a_later_format_is_set_aside_whole(tmp_path):
    path = tmp_path / HISTORY
    History(path, {"budget": 0.02}).report(1, {}, active=["math"])
    later = path.read_text().replace('"version":1,', '"version":9,') + '{"kind":"new"}\n'
    path.write_text(later)
    (note,) = read_history(path).notes
    assert "format version 9, and this release knows 1" in note
    with pytest.warns(UserWarning, match=r"format version 9.*damaged now, and a new one begins"):
        History(path, {"budget": 0.02}, step=1)
    assert path.with_name(f"{HISTORY}.damaged").read_text() == later


def test_a_history_damaged_while_the_run_goes_on_ends_it_with_one_warning(tmp_path, monkeypatch):
    history = History(tmp_path / HISTORY, limit=8)
    for step in range(1, 8):
        history.report(step, {}, active=["math"])

    def damaged(path):
        raise StateError("no line could be read")

    monkeypatch.setattr("interference_guard.history.outline", damaged)
    with pytest.warns(UserWarning, match="Training goes on without it"):
        history.report(8, {}, active=["math"])
    history.report(9, {}, active=["math"])
    assert history.failed


@pytest.mark.parametrize("field", ['"seconds":null', '"seconds":"1"', '"active":null'])
def test_a_line_with_a_damaged_field_is_skipped(tmp_path, field):
    line = '{"kind":"step","step":1,"metrics":{}}\n'
    (tmp_path / HISTORY).write_text(line + line.replace('"metrics"', field + ',"metrics"') + "[" * 100_000 + "\n")
    found = read_history(tmp_path / HISTORY)
    assert (len(found.steps), found.skipped) == (1, 2)


def many(step, count=400):
    return {f"guard/overlap/a/{number}": step + number / 7 for number in range(count)}


def test_bytes_are_bounded_too(tmp_path):
    size = 100_000
    history = History(tmp_path / HISTORY, size=size)
    for step in range(1, 201):
        history.report(step, many(step), active=["math" if step <= 120 else "code"])
        assert (tmp_path / HISTORY).stat().st_size <= size
    found = read_history(tmp_path / HISTORY)
    steps = [line["step"] for line in found.steps]
    assert {120, 121} <= set(steps)
    assert history.stride == found.stride > 1
    # What is kept is as it was written.
    assert all(line["metrics"]["guard/overlap/a/7"] == line["step"] + 1 for line in found.steps)
    assert found.skipped == 0


def test_sums_that_are_out_of_date_cost_no_steps(tmp_path):
    size = 50_000
    history = History(tmp_path / HISTORY, size=size)
    places = {"curvature": {"math": {(str(layer), "mlp"): layer / 7 for layer in range(200)}}, "projected": {}}
    for step in range(1, 101):
        history.report(step, {"guard/math/measured": 0.1}, active=["math"])
        history.places(step, places)
        assert (tmp_path / HISTORY).stat().st_size <= size
    found = read_history(tmp_path / HISTORY)
    assert found.stride == 1
    assert [line["step"] for line in found.steps] == list(range(1, 101))


def test_a_few_steps_stay_however_long_they_are(tmp_path):
    history = History(tmp_path / HISTORY, size=10)
    for step in range(1, 101):
        history.report(step, many(step), active=["math"])
        history.evaluation(step, {"math": 0.5})
    found = read_history(tmp_path / HISTORY)
    assert 4 <= len(found.steps) <= 8
    assert history.stride == 16
    assert len(found.evaluations) == 100


def test_a_resumed_run_thins_a_history_that_was_longer(tmp_path):
    first = History(tmp_path / HISTORY)
    for step in range(1, 41):
        first.report(step, many(step), active=["math"])
    long = (tmp_path / HISTORY).stat().st_size
    second = History(tmp_path / HISTORY, step=40, size=long // 3)
    for step in range(41, 60):
        second.report(step, many(step), active=["math"])
    assert (tmp_path / HISTORY).stat().st_size <= long // 3
    assert read_history(tmp_path / HISTORY).steps[0]["step"] <= 8


def test_thinning_holds_no_numbers(tmp_path):
    history = History(tmp_path / HISTORY, limit=300)
    for step in range(1, 300):
        history.report(step, many(step, 2000), active=["math"])
    tracemalloc.start()
    history.report(300, many(300, 2000), active=["math"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert history.stride == 2
    assert peak < (tmp_path / HISTORY).stat().st_size / 2


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_steps_may_be_integers_of_numpy_and_torch(tmp_path, integer):
    history = History(tmp_path / HISTORY)
    history.evaluation(integer(2), {"math": 0.5})
    history.report(integer(3), {"a": 1.0}, active=["math"])
    history.places(integer(4), PLACES)
    assert [line["step"] for line in read_history(tmp_path / HISTORY).lines] == [2, 3, 4]


def test_a_step_that_is_no_integer_is_refused(tmp_path):
    history = History(tmp_path / HISTORY)
    with pytest.raises(ConfigError, match=r"step=1\.5 is not allowed"):
        history.report(1.5, {}, active=["math"])
    with pytest.raises(ConfigError, match="step='1' is not allowed"):
        history.evaluation("1", {})
    with pytest.raises(ConfigError, match="step=None is not allowed"):
        history.places(None, PLACES)


def test_only_a_fault_of_the_disk_is_told_as_one(tmp_path):
    with pytest.warns(UserWarning, match="JSON") as told:
        History(tmp_path / HISTORY, {"budget": object()})
    assert "space" not in str(told[0].message)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="free space or choose another output folder"):
        History(tmp_path / "file" / HISTORY)
