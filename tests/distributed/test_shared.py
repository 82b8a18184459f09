"""What the ranks of one trainer share: the domains of a stream, and the state that each of them saves."""

import functools
import json

import pytest
import yaml

from interference_guard import Guard
from interference_guard.checkpoint import DETAILS
from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.trl.host import model_and_words, script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and what two ranks returned by run: they are started once."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "rewards.py").write_text("def brief(completions, **columns): return [-len(t) for t in completions]")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} + 1 ="}) for n in range(4)))
    domain = {"path": str(folder / "rows.jsonl"), "rewards": [f"{folder}/rewards.py:brief"], "batches": 2}
    domains = [{"name": name, **domain} for name in ("math", "code")]
    settings = script(folder, domains, output="script", rows=2)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    calls = [
        functools.partial(engines.streamed_run, folder),
        functools.partial(engines.script_run, ["--config", str(folder / "run.yaml")]),
        # Last: its patches stay.
        functools.partial(engines.supervised_run, "fsdp2", folder, steps=6),
        functools.partial(
            engines.supervised_run, "fsdp2", folder, steps=4, blocks=[("code", 16)], before=folder / "fsdp2_6"
        ),
    ]
    results = run_ranks(2, engines.in_turn, calls, folder=folder / "ranks")
    return folder, list(zip(*results, strict=True))


def test_a_stream_counts_the_same_domains_on_all_ranks(found):
    _, (streamed, *_) = found
    assert streamed == ([{"math": 4}, {"math": 2, "code": 2}, {"code": 4}, {"code": 4}],) * 2


def test_the_script_saves_what_every_rank_retained(found):
    folder, (_, steps, *_) = found
    assert steps == (4, 4)
    for place in (folder / "script", folder / "script" / "interference_guard_rank1"):
        assert json.loads((place / DETAILS).read_text())["folders"] == 2


def test_a_sharded_state_is_saved_whole(found):
    folder, (*_, sharded, _) = found
    assert {table["kind"] for table in sharded} == {"DTensor"}
    first = folder / "fsdp2_6"
    model, _ = model_and_words(folder / "model")
    guard = Guard(model, engines.CONFIG)
    guard.load(first, ranks=[first, first / "interference_guard_rank1"])
    assert guard.domains["math"].radius.item() == pytest.approx(sharded[0]["radius"])
    assert guard.protected == ("math",)


def test_a_next_run_goes_on_from_the_state_before_it_shards_the_model(found):
    _, (*_, before, after) = found
    assert before[0]["foreign"] == 1
    for table in after:
        assert (table["kind"], table["foreign"], table["steps"]) == ("DTensor", 5, 10)
        assert table["loss"] == after[0]["loss"]
        assert table["radius"] == after[0]["radius"]
