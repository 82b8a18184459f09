"""What ranks with rows of their own share: means, the domains they know, and completions when others go on."""

from dataclasses import replace

import pytest
import torch

from interference_guard import Guard, StateError
from interference_guard.checkpoint import load_own, look_own
from tests.unit.helpers import CONFIG, Toy, rollout, step_by_hand, two_ranks
from tests.unit.states import begun, folder_of, trained


def test_means_are_of_all_ranks_rows():
    counts, models = (4, 12), [Toy(), Toy()]
    drawn = [rollout(models[0], "math", count, seed=number) for number, count in enumerate(counts)]

    def rank(number, reduce):
        model = models[number]
        guard = Guard(model, CONFIG, reduce=reduce)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if number == 0:
            # Its steps come later, and the other rank has no such rows yet.
            guard.retain("code", rollout(model, "code", 4))
        step_by_hand(model, guard, optimizer, "math", 0, drawn[number])
        found = [guard.metrics()]
        step_by_hand(model, guard, optimizer, "code", 1)
        return [*found, guard.metrics()]

    first, second = two_ranks(rank)
    rewards = torch.cat([rows.rewards for rows in drawn])
    assert 0 < rewards.mean() < 1
    for found in (first, second):
        assert found[0]["guard/math/reward"] == pytest.approx(rewards.mean().item())
        assert found[0]["guard/math/length"] == 1
        assert "guard/code/reward" not in found[0]
        assert "guard/math/reward" not in found[1]
        assert "guard/code/reward" in found[1]


def test_a_domain_with_few_rows_is_known_to_all_ranks():
    _, second = two_ranks(lambda number, reduce: _thin(Guard(Toy(), CONFIG, reduce=reduce), number))
    assert second == ["math", "code"]


def _thin(guard, number):
    guard.begin({"math": 63.0, "code": 1.0})
    return list(guard.domains)


def test_a_domain_that_one_rank_alone_has_met_does_not_spoil_a_checkpoint(tmp_path):
    first, second = begun(tmp_path, rare=1)
    alone = Guard(Toy(), CONFIG)
    load_own(alone, folder_of(tmp_path), 0, 1)
    assert list(alone.domains) == ["math", "code"]
    assert len(alone.domains["math"].retained) == len(first) + len(second)
    assert alone.domains["code"].own_steps == 1


def test_files_of_runs_that_trained_other_domains_are_refused(tmp_path):
    begun(tmp_path, forgets=1)
    with pytest.raises(StateError, match=r"know different domains, \[\['code', 'math'\], \['math'\]\]"):
        load_own(Guard(Toy(), CONFIG), folder_of(tmp_path), 0, 1)


def test_what_cannot_be_read_is_found_without_reading_it(tmp_path):
    begun(tmp_path)
    guard = Guard(Toy(), CONFIG)
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        look_own(guard, folder_of(tmp_path), rank, world)
    assert not guard.domains
    (tmp_path / "rank1/interference_guard.safetensors").unlink()
    look_own(guard, folder_of(tmp_path), 0, 2)
    for rank, world in ((1, 2), (0, 1)):
        with pytest.raises(StateError, match=r"rank1/interference_guard\.safetensors does not exist"):
            look_own(guard, folder_of(tmp_path), rank, world)
    with pytest.raises(StateError, match="made with rank=8"):
        look_own(Guard(Toy(), replace(CONFIG, rank=4)), folder_of(tmp_path), 0, 2)
    with pytest.raises(StateError, match="saved with the guard attached, or begin without"):
        look_own(guard, folder_of(tmp_path / "none"), 0, 2)


def test_ranks_that_share_their_rows_from_now_on_get_the_same(tmp_path):
    """As where sequence parallelism is switched on: as many ranks, and fewer of them with rows of their own."""
    first, second = begun(tmp_path)
    found = []
    for rank in range(2):
        guard = Guard(Toy(), CONFIG)
        load_own(guard, folder_of(tmp_path), rank, 2, (0, 1))
        found.append(guard.domains["math"].retained)
    assert len(found[0]) == len(first) + len(second)
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    assert torch.equal(found[0].rewards, found[1].rewards)


def test_ranks_that_shared_their_rows_count_once(tmp_path):
    first, _ = begun(tmp_path, places=((0, 1), (0, 1)))
    alone = Guard(Toy(), CONFIG)
    load_own(alone, folder_of(tmp_path), 0, 1)
    assert torch.equal(alone.domains["math"].retained.input_ids, first.input_ids)


def test_what_was_probed_is_not_probed_again_after_a_resume(tmp_path):
    guard = trained(0, None, Toy())
    assert guard.probe()
    guard.save(tmp_path)
    other = Guard(guard.model, CONFIG)
    other.load(tmp_path)
    # A host asks again after a step that was skipped.
    other.begin({"code": 1.0})
    assert other.probe() == {}


def test_means_go_on_where_a_run_is_resumed_between_two_reports(tmp_path):
    models = [Toy(), Toy()]

    def rank(number, reduce):
        guard = trained(number, reduce, models[number])
        guard.save(folder_of(tmp_path)(number), folders=2, place=(number, 2))
        return guard.metrics()

    reported, _ = two_ranks(rank)
    resumed = Guard(models[0], CONFIG)
    load_own(resumed, folder_of(tmp_path), 0, 1)
    found = resumed.metrics()
    for name in ("reward", "length"):
        for domain in ("math", "code"):
            key = f"guard/{domain}/{name}"
            assert found[key] == pytest.approx(reported[key])
    assert resumed.announced == {"math", "code"}


@pytest.mark.parametrize("later", [(True, False), (False, True), (True, True)])
def test_ranks_measure_in_one_unit_where_one_saw_no_rewards_after_a_warm_start(later):
    models = [Toy(), Toy()]

    def rank(number, reduce):
        model, found = models[number], []
        guard = Guard(model, CONFIG, reduce=reduce)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for step, domain in enumerate(["math"] * 4 + ["code"] * 4):
            rows = rollout(model, domain, seed=10 * step + number)
            if domain == "math" and step < 2:
                rows = replace(rows, rewards=None)
            elif domain == "math" and not later[number]:
                rows = None
            step_by_hand(model, guard, optimizer, domain, step, rows)
            found += [(item.ratio, item.loss) for item in guard.probe().values()]
        state = guard.domains["math"]
        return found, state.region.unit, state.radius.item()

    first, second = two_ranks(rank)
    assert first == second
    assert {ratio for ratio, _ in first[0]} == {"sequence"}
    assert first[1] == "reward"
