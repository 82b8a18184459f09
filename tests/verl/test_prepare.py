"""Rows for veRL, out of those that TRL's example writes."""

import json
import runpy
from pathlib import Path

import pandas
import pytest

SCRIPT = str(Path(__file__).resolve().parents[2] / "examples/verl/prepare.py")


@pytest.fixture
def source(tmp_path):
    # A line separator is no end of a row.
    rows = [{"prompt": [{"role": "user", "content": f"{n}\u2028?"}], "answer": n} for n in range(3)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return tmp_path


def prepared(monkeypatch, source, *options):
    monkeypatch.setattr("sys.argv", [SCRIPT, str(source), str(source / "out"), *options])
    runpy.run_path(SCRIPT, run_name="__main__")
    return [pandas.read_parquet(source / "out" / name) for name in ("math.parquet", "validation.parquet")]


def test_the_last_rows_are_held_back(monkeypatch, source):
    trained, held = prepared(monkeypatch, source, "--validation", "1")
    assert [row["content"] for (row,) in trained["prompt"]] == ["0\u2028?", "1\u2028?"]
    assert [row["ground_truth"] for row in held["reward_model"]] == ["2"]
    assert set(held["data_source"]) == {"math"}


@pytest.mark.parametrize(("validation", "message"), [("0", "1 row a domain"), ("3", "more than --validation 3")])
def test_numbers_that_leave_no_rows_are_refused(monkeypatch, capsys, source, validation, message):
    with pytest.raises(SystemExit) as refused:
        prepared(monkeypatch, source, "--validation", validation)
    assert message in f"{refused.value}{capsys.readouterr().err}"
    assert not (source / "out" / "validation.parquet").exists()
