"""Supervised streams: their domains pass worker processes, and are numbered behind them."""

import pickle
import re

import pytest
from datasets import IterableDataset

from interference_guard import HostError, MissingDomainError
from interference_guard.integrations.trl.collating import DOMAIN_ID, NamingCollator, pack, unnamed, unpack
from tests.trl.host import guarded, rows, supervised

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def completed(blocks):
    return rows(blocks).map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_behind_worker_processes(workers, tmp_path):
    data = completed([("math", 6), ("code", 6)]).to_iterable_dataset()
    trainer = supervised(tmp_path, data, dataloader_num_workers=workers)
    callback = guarded(trainer)
    trainer.train()
    assert callback.domains.names == ["math", "code"]
    assert callback.guard.domains["math"].foreign_steps == callback.guard.domains["code"].own_steps == 3


@pytest.mark.parametrize(("value", "workers"), [(None, 0), (None, 1), ("", 0), (7, 1), (["math"], 0)])
def test_a_streamed_row_without_a_domain(value, workers, tmp_path):
    table = completed([("math", 4)]).to_list()
    table[1]["domain"] = value

    def stream():
        yield from table

    trainer = supervised(tmp_path, IterableDataset.from_generator(stream), dataloader_num_workers=workers)
    guarded(trainer)
    with pytest.raises(
        MissingDomainError, match=rf"A row in training has domain={re.escape(repr(value))}:.*1 \+ 1 ="
    ):
        trainer.train()


def test_names_survive_as_bytes():
    names = ["math", "数学", "x" * 256, ""]
    assert unpack(pack(names)) == names
    table = pack([None, 3, "", ["é" * 256]])
    assert unpack(table) == [""] * 4
    assert [unnamed(row)[:6] for row in table] == ["None", "3", "''", "['éééé"]
    with pytest.raises(HostError, match=r"'xxx.* has 257 bytes in UTF-8; 256 are allowed"):
        pack(["x" * 257])


def length(batch):
    return {"length": len(batch), "columns": sorted(batch[0])}


def test_the_collator_can_go_to_a_worker_that_is_started_anew():
    collator = pickle.loads(pickle.dumps(NamingCollator(length, "domain")))
    batch = collator([{"text": "a", "domain": "math"}, {"text": "b"}])
    assert unpack(batch.pop(DOMAIN_ID)) == ["math", ""]
    assert batch == {"length": 2, "columns": ["text"]}
