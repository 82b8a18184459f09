import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from interference_guard import ConfigError, HostError, MissingDomainError
from interference_guard.integrations.trl import order_by_domain, prompts_per_generation


@pytest.fixture
def data():
    names = ["math", "code", "math", "qa", "code"] * 8
    return Dataset.from_dict({"domain": names, "index": list(range(40))})


def blocks(ordered, size):
    names = ordered["domain"][:]
    cut = [names[i : i + size] for i in range(0, len(names), size)]
    assert all(len(set(block)) == 1 for block in cut)
    return [block[0] for block in cut]


def test_sequential(data):
    ordered = order_by_domain(data, 4)
    assert blocks(ordered, 4) == ["math"] * 4 + ["code"] * 4 + ["qa"] * 2
    assert sorted(ordered["index"][:]) == sorted(data["index"][:])


def test_round_robin(data):
    assert blocks(order_by_domain(data, 4, "round_robin"), 4) == ["math", "code", "qa"] * 2 + ["math", "code"] * 2


def test_weights(data):
    found = blocks(order_by_domain(data, 4, {"math": 3, "code": 1, "qa": 0}, batches=400), 4)
    assert found.count("qa") == 0
    assert 250 < found.count("math") < 350


def test_rows_start_anew_in_another_order(data):
    rows = order_by_domain(data, 4, batches={"math": 8, "code": 1, "qa": 1})["index"][:32]
    assert sorted(rows[:16]) == sorted(rows[16:])
    assert rows[:16] != rows[16:]


def test_seeds(data):
    state = torch.get_rng_state()
    first = order_by_domain(data, 4, seed=1)["index"][:]
    assert first == order_by_domain(data, 4, seed=1)["index"][:]
    assert first != order_by_domain(data, 4, seed=2)["index"][:]
    assert torch.equal(state, torch.get_rng_state())


def test_rehearsal(data):
    ordered = order_by_domain(data, 4, rehearsal=0.25)
    names = ordered["domain"][:]
    batches = [sorted(names[start : start + 4]) for start in range(0, len(names), 4)]
    assert batches[:4] == [["math"] * 4] * 4
    assert batches[4:8] == [["code"] * 3 + ["math"]] * 4
    assert sorted(batches[8:]) == [["code", "qa", "qa", "qa"], ["math", "qa", "qa", "qa"]]
    # Rows of a domain go on where they stood, and start anew once they have run out.
    of_math = [index for index, name in zip(ordered["index"][:], names, strict=True) if name == "math"]
    assert sorted(of_math[:16]) == sorted(index for index in data["index"][:] if index % 5 in (0, 2))


def test_domains_of_former_runs_are_rehearsed(data):
    batches = {"math": 0, "code": 3, "qa": 0}
    names = order_by_domain(data, 8, batches=batches, rehearsal=0.25)["domain"][:]
    assert [sorted(names[start : start + 8]) for start in (0, 8, 16)] == [["code"] * 6 + ["math", "qa"]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 1.5}, "batches=1.5 is not allowed: 1.5 is no integer"),
        ({"order": {"math": 1.0, "code": 1.0, "qa": 1.0}, "batches": 0}, "number of all batches, at least 1"),
        ({"rehearsal": 0.5}, "rehearsal=0.5 is not allowed"),
        ({"rehearsal": 0.1}, "is 0 of a batch of 4 prompts"),
        ({"rehearsal": 0.4}, "is 2 of a batch of 4 prompts"),
        ({"rehearsal": 0.25, "batches": {"math": 0, "code": 0, "qa": 0}}, "has no domain to rehearse"),
        ({"rehearsal": 0.25, "order": "round_robin"}, "goes with order='sequential' alone"),
        ({"rehearsal": 0.25, "order": {"math": 1.0}}, "goes with order='sequential' alone"),
        ({"prompts": 0}, "prompts=0 is not allowed"),
        ({"prompts": 9}, "'qa' has 8 rows, fewer than the 9 prompts"),
        ({"order": "random"}, "order='random' is not allowed"),
        ({"order": {"math": 1.0}}, "a weight of"),
        ({"order": {"math": 0.0, "code": 0.0, "qa": 0.0}}, "a weight of"),
        ({"order": {"math": "2", "code": 1.0, "qa": 1.0}}, "the weight of domain 'math' is '2', and must be"),
        ({"order": {"math": 2, "code": 1.0, "qa": torch.nan}}, "the weight of domain 'qa' is nan, and must be"),
        ({"prompts": 2.0}, "prompts=2.0 is not allowed"),
        ({"batches": {"math": 1}}, "at least 1 for each"),
        ({"batches": 0}, "at least 1 for each"),
    ],
)
def test_refusals(data, options, message):
    with pytest.raises(ConfigError, match=message):
        order_by_domain(data, **({"prompts": 4} | options))


def test_integers_of_numpy_are_integers(data):
    four, two = np.int64(4), np.int64(2)
    assert order_by_domain(data, four)["index"][:] == order_by_domain(data, 4)["index"][:]
    for order in ("round_robin", {"math": np.float32(1), "code": 1, "qa": 1}):
        found = order_by_domain(data, four, order, batches=two)["index"][:]
        assert found == order_by_domain(data, 4, order, batches=2)["index"][:]


@pytest.mark.parametrize("wrap", [lambda name: [name], lambda name: {"is": name}])
def test_domains_of_a_kind_that_cannot_be_read_are_told_with_their_row(data, wrap):
    rows = Dataset.from_list([row | {"domain": wrap(row["domain"])} for row in data.to_list()])
    with pytest.raises(MissingDomainError, match=r"Row 0 has domain=[\[{].*'math'.*'index': '0'"):
        order_by_domain(rows, 4)


def test_numbers_of_a_class_label_are_refused_and_its_names_are_not(data):
    coded = data.cast_column("domain", ClassLabel(names=["math", "code", "qa"]))
    with pytest.raises(MissingDomainError, match="Row 0 has domain=0.*become names by its int2str"):
        order_by_domain(coded, 4)
    # As docs/trl.md has it.
    names = coded.features["domain"].int2str(coded["domain"][:])
    named = coded.remove_columns("domain").add_column("domain", names)
    assert order_by_domain(named, 4)["index"][:] == order_by_domain(data, 4)["index"][:]


def test_the_domains_are_read_as_they_are_stored(data):
    made = []

    def transform(batch):
        made.extend(batch["index"])
        return {"prompt": batch["index"]}

    ordered = order_by_domain(data.with_transform(transform), 4)
    assert made == []
    assert ordered.with_format(None)["index"][:] == order_by_domain(data, 4)["index"][:]


def test_bad_rows(data):
    with pytest.raises(
        HostError, match=r"no column 'subject'.*another one with order_by_domain\(\.\.\., column="
    ):
        order_by_domain(data, 4, column="subject")
    rows = data.to_list()
    rows[5]["domain"] = None
    with pytest.raises(MissingDomainError, match=r"Row 5.*another one with order_by_domain\(\.\.\., column="):
        order_by_domain(Dataset.from_list(rows), 4)


def test_prompts_of_a_generation_batch():
    class Arguments:
        generation_batch_size, num_generations = 64, 8
        steps_per_generation, num_iterations, gradient_accumulation_steps = 2, 1, 2

    assert prompts_per_generation(Arguments()) == 8
    with pytest.raises(ConfigError, match="object has no generation batches"):
        prompts_per_generation(object())
