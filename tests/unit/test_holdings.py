"""A rank that reads one folder of several: its own from as many ranks, or an error in place of lost rows."""

import pytest

from interference_guard import Guard, StateError
from interference_guard.checkpoint import DETAILS, load_own, look_own
from tests.unit.helpers import CONFIG, Toy
from tests.unit.states import begun, edited, folder_of

ADVICE = (
    r"Name the folders of all ranks that saved.*guard\.load\(folder, ranks=\[\.\.\.\], place=\(rank, ranks\)\)"
)


def one_of_several():
    """A guard whose rank has rows of its own; what it sums is of this rank alone."""
    return Guard(Toy(), CONFIG, reduce=lambda values, kind: values)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ((0, 1), "rank 1 of 2, and this is rank 0 of 1"),
        ((1, 4), "rank 1 of 2, and this is rank 1 of 4"),
        ((0, 2), "rank 1 of 2, and this is rank 0 of 2"),
        # One process, where nobody says otherwise.
        (None, "rank 1 of 2, and this is rank 0 of 1"),
    ],
)
def test_rows_of_other_ranks_are_not_lost_without_a_word(tmp_path, place, told):
    begun(tmp_path)
    guard = one_of_several()
    with pytest.raises(StateError, match=f"rank1/{DETAILS} holds the completions of {told}. {ADVICE}"):
        guard.load(tmp_path / "rank1", place=place)
    assert not guard.domains
    guard.load(tmp_path / "rank1", place=(1, 2))
    assert guard.steps == 3


def test_a_process_of_its_own_is_told_to_name_all_folders(tmp_path):
    first, second = begun(tmp_path)
    guard, folders = Guard(Toy(), CONFIG), [tmp_path / "rank0", tmp_path / "rank1"]
    with pytest.raises(StateError, match=ADVICE):
        guard.load(folders[0])
    guard.load(folders[0], ranks=folders)
    assert len(guard.domains["math"].retained) == len(first) + len(second)


def test_ranks_that_share_all_rows_may_read_the_state_of_any(tmp_path):
    begun(tmp_path, places=((0, 1), (0, 1)))
    guard = Guard(Toy(), CONFIG)
    guard.load(tmp_path / "rank1")
    assert guard.steps == 3


def test_by_the_number_of_folders_where_no_place_was_given(tmp_path):
    begun(tmp_path, places=(None, None))
    with pytest.raises(StateError, match=r"completions of one of 2, and this is rank 0 of 1"):
        Guard(Toy(), CONFIG).load(tmp_path / "rank1")
    guard = one_of_several()
    guard.load(tmp_path / "rank1", place=(1, 2))
    assert guard.steps == 3
    with pytest.raises(StateError, match=r"holds the completions of 1 states of 2"):
        guard.load(tmp_path / "rank1", ranks=[tmp_path / "rank1"], place=(0, 1))


def test_all_folders_must_be_named(tmp_path):
    begun(tmp_path)
    guard = Guard(Toy(), CONFIG)
    with pytest.raises(StateError, match=rf"rank1 holds the completions of ranks \[1\] of 2. {ADVICE}"):
        guard.load(tmp_path / "rank1", ranks=[tmp_path / "rank1"])
    (tmp_path / "rank1" / DETAILS).unlink()
    # A host that names them finds the files of one gone.
    for read in (load_own, look_own):
        with pytest.raises(StateError, match=r"holds the completions of ranks \[0\] of 2"):
            read(guard, folder_of(tmp_path), 0, 1)
    assert not guard.domains


@pytest.mark.parametrize("change", [{"place": [0]}, {"place": "x"}, {"place": [0, "x"]}, {"folders": "x"}])
def test_damaged_places_are_told(tmp_path, change):
    begun(tmp_path)
    edited(tmp_path / "rank0", lambda details: details.update(change))
    with pytest.raises(StateError, match="is damaged: it is of rank"):
        one_of_several().load(tmp_path / "rank0", place=(0, 2))
