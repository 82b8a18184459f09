"""States of several attempts at the same steps, and what ranks share by which they are told apart."""

import json
import math
import shutil

import pytest

from interference_guard import Guard, StateError
from interference_guard.checkpoint import DETAILS, load_own
from interference_guard.moment import differ
from tests.unit.helpers import CONFIG, Toy, two_ranks
from tests.unit.states import begun, edited, folder_of

# Before the first anchor, and with a protected domain.
PLANS = [("math", "math"), ("math", "math", "code")]


def mixed(tmp_path, plan):
    """The folder of two ranks, of which the second one's state is of another attempt; both are of `plan`."""
    for name, seed in (("first", 0), ("second", 1)):
        begun(tmp_path / name, plan=plan, seed=seed)
    shutil.copytree(tmp_path / "first/rank0", tmp_path / "mixed/rank0")
    shutil.copytree(tmp_path / "second/rank1", tmp_path / "mixed/rank1")
    return folder_of(tmp_path / "mixed")


@pytest.mark.parametrize("plan", PLANS)
def test_files_of_two_attempts_at_one_step_are_refused(tmp_path, plan):
    folders = mixed(tmp_path, plan)
    guard = Guard(Toy(), CONFIG)
    with pytest.raises(StateError, match=rf"several attempts at step {len(plan)}: energy of domain .* by rank"):
        load_own(guard, folders, 0, 1)
    assert not guard.domains
    load_own(guard, folder_of(tmp_path / "first"), 0, 1)
    assert guard.steps == len(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda details: details["domains"]["math"].update(foreign_steps=2), r"foreign_steps .* is \[1, 2\]"),
        (lambda details: details["shared"]["math"].update(radius=1.0), r"radius of domain 'math' is \["),
        (lambda details: details["shared"]["math"].update(curvature=1.0), r"curvature of domain 'math' is \["),
        (lambda details: details["shared"]["math"].update(subspace=1.0), r"subspace of domain 'math' is \["),
        (lambda details: details.pop("shared"), "what ranks share is told by 1 of 2 files"),
        (lambda details: details.update(shared=[]), "incomplete: TypeError"),
        (lambda details: details["shared"].pop("math"), "incomplete: KeyError: 'math'"),
        (lambda details: details["shared"]["math"].update(radius="x"), "incomplete: ValueError: could not"),
    ],
)
def test_what_differs_is_named(tmp_path, change, message):
    begun(tmp_path)
    edited(tmp_path / "rank1", change)
    with pytest.raises(StateError, match=message):
        load_own(Guard(Toy(), CONFIG), folder_of(tmp_path), 0, 1)


def test_rounding_is_no_difference(tmp_path):
    begun(tmp_path)
    table = json.loads((tmp_path / "rank1" / DETAILS).read_text())["shared"]["math"]
    assert table.keys() == {"energy", "curvature", "radius", "subspace"}
    assert all(map(math.isfinite, table.values()))
    rounded = {key: value * (1 + 1e-5) for key, value in table.items()}
    edited(tmp_path / "rank1", lambda details: details["shared"]["math"].update(rounded, subspace=0.0))
    edited(tmp_path / "rank0", lambda details: details["shared"]["math"].update(subspace=1e-5 * table["radius"]))
    load_own(Guard(Toy(), CONFIG), folder_of(tmp_path), 0, 1)


def test_what_is_no_number_says_nothing():
    assert not differ([math.nan, 1.0, math.inf])
    assert not differ([math.inf, math.nan])
    assert not differ([0.0, 0.0])
    assert differ([1.0, math.nan, 1.1])


def test_states_of_before_there_were_such_numbers_are_read(tmp_path):
    begun(tmp_path)
    for rank in range(2):
        edited(tmp_path / f"rank{rank}", lambda details: details.pop("shared"))
    both = two_ranks(lambda number, reduce: read(folder_of(tmp_path), number, reduce))
    assert both == (("", 3), ("", 3))


def read(folders, number, reduce, place=None):
    """What a rank is told when it reads its own folder, and the steps of its guard afterwards."""
    guard, told = Guard(Toy(), CONFIG, reduce=reduce), ""
    try:
        guard.load(folders(number), place=place or (number, 2))
    except StateError as error:
        told = str(error)
    return told, guard.steps


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_that_read_two_attempts_refuse_together(tmp_path, plan):
    folders = mixed(tmp_path, plan)
    first, second = two_ranks(lambda number, reduce: read(folders, number, reduce))
    assert first == second
    assert "different moments. They are of several attempts: energy of domain" in first[0]
    assert first[1] == 0


def test_ranks_that_read_two_moments_refuse_together(tmp_path):
    begun(tmp_path, plan=("math",) * 2)
    begun(tmp_path / "later", plan=("math",) * 3)
    shutil.rmtree(tmp_path / "rank0")
    shutil.copytree(tmp_path / "later/rank0", tmp_path / "rank0")
    first, second = two_ranks(lambda number, reduce: read(folder_of(tmp_path), number, reduce))
    assert first == second
    assert "different moments. They are at steps 2 to 3. No rank has taken anything over." in first[0]
    assert first[1] == 0


def test_ranks_that_know_other_domains_refuse_together(tmp_path):
    begun(tmp_path, forgets=1)
    first, second = two_ranks(lambda number, reduce: read(folder_of(tmp_path), number, reduce))
    assert first == second
    assert "At step 3 they are of several attempts, or of domains that were counted otherwise" in first[0]


@pytest.mark.parametrize("harm", ["gone", "cut off", "unfit"])
def test_a_rank_that_cannot_read_its_file_lets_no_other_go_on(tmp_path, harm):
    begun(tmp_path)
    path = tmp_path / "rank1" / DETAILS
    if harm == "gone":
        path.unlink()
    elif harm == "cut off":
        path.write_text(path.read_text()[:-100])
    else:
        edited(tmp_path / "rank1", lambda details: details.update(asked="x"))
    first, second = two_ranks(lambda number, reduce: read(folder_of(tmp_path), number, reduce))
    assert "Another rank could not read its part of the state, and its own error says why" in first[0]
    assert second[0]
    assert "Another rank" not in second[0]
    assert first[1] == second[1] == 0


def test_a_resumed_state_is_told_apart_like_the_first(tmp_path):
    """What ranks share comes back with the state: one that is saved again is of the same attempt."""
    begun(tmp_path)
    again = tmp_path / "again"

    def rank(number, reduce):
        guard = Guard(Toy(), CONFIG, reduce=reduce)
        guard.load(folder_of(tmp_path)(number), place=(number, 2))
        guard.save(folder_of(again)(number), folders=2, place=(number, 2))

    two_ranks(rank)
    for number in range(2):
        before, after = (
            json.loads((root / f"rank{number}" / DETAILS).read_text())["shared"] for root in (tmp_path, again)
        )
        assert before == after


def test_numbers_are_read_where_a_step_was_of_no_use(tmp_path):
    """Gradients that are zero have no energy, and a domain without rows of use no radius."""
    model = Toy()
    guard = Guard(model, CONFIG)
    guard.begin({"math": 1.0})
    for parameter in model.parameters():
        parameter.grad = parameter.new_zeros(parameter.shape)
    guard.before_step()
    guard.after_step()
    guard.save(tmp_path)
    assert json.loads((tmp_path / DETAILS).read_text())["shared"] == {"math": {"energy": 0.0}}
    Guard(model, CONFIG).load(tmp_path, ranks=[tmp_path])
