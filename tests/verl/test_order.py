"""Batches of one domain each, and a recovery that begins with the next batch."""

import pytest

from interference_guard.errors import ConfigError
from interference_guard.integrations.verl.order import DomainOrder

NAMES = ["math"] * 6 + ["code"] * 4


def taken(order, places, recovery=lambda: None):
    return [order.row(place, recovery) for place in places]


def domains(rows):
    return [NAMES[row] for row in rows]


def test_one_domain_follows_the_other():
    order = DomainOrder(NAMES, prompts=2)
    rows = taken(order, range(len(order)))
    assert domains(rows) == ["math"] * 6 + ["code"] * 4
    assert sorted(rows) == list(range(10))


def test_each_in_turn():
    order = DomainOrder(NAMES, prompts=2, order="round_robin")
    assert order.plan == ["math", "code", "math", "code", "math"]


def test_named_domains_and_numbers():
    order = DomainOrder(NAMES, prompts=2, order=["code", "math"], batches={"code": 1, "math": 2})
    assert order.plan == ["code", "math", "math"]


def test_a_domain_that_runs_out_starts_anew_in_another_order():
    order = DomainOrder(NAMES, prompts=6, order=["math"], batches=3)
    rows = taken(order, range(18))
    passes = [rows[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(found) == list(range(6)) for found in passes)
    assert len({tuple(found) for found in passes}) > 1


def test_recovery_takes_the_next_batch_and_only_whole_ones():
    order = DomainOrder(NAMES, prompts=2, order=["code", "math"], batches=2)
    # Asked for while the first batch is drawn, over while the third is.
    wanted = [None, "math", "math", "math", "math", None, None, None]
    found = [order.row(place, lambda place=place: wanted[place]) for place in range(8)]
    assert domains(found) == ["code"] * 2 + ["math"] * 6
    order = DomainOrder(NAMES, prompts=2, order=["code"], batches=4)
    found = [order.row(place, lambda place=place: wanted[place]) for place in range(8)]
    assert domains(found) == ["code"] * 2 + ["math"] * 4 + ["code"] * 2


def test_earlier_domains_are_rehearsed():
    order = DomainOrder(NAMES, prompts=4, order=["code", "math"], batches=2, rehearsal=0.25)
    found = domains(taken(order, range(16)))
    assert found[:8] == ["code"] * 8
    assert [sorted(found[start : start + 4]) for start in (8, 12)] == [["code"] + ["math"] * 3] * 2
    # A domain that comes twice does not rehearse itself.
    again = DomainOrder(NAMES, prompts=4, order=["code", "math", "code"], batches=1, rehearsal=0.25)
    assert sorted(domains(taken(again, range(12)))[8:]) == ["code"] * 3 + ["math"]


def test_rows_that_are_not_in_the_order_are_of_former_runs():
    order = DomainOrder(NAMES, prompts=4, order=["code"], batches=2, rehearsal=0.25)
    assert sorted(domains(taken(order, range(4)))) == ["code"] * 3 + ["math"]
    with pytest.raises(ConfigError, match="has no domain to rehearse"):
        DomainOrder(["code"] * 4, prompts=4, batches=2, rehearsal=0.25)


def test_a_recovery_rehearses_nothing():
    order = DomainOrder(NAMES, prompts=4, order=["code", "math"], batches=2, rehearsal=0.25)
    found = domains([order.row(place, lambda place=place: "code" if place == 8 else None) for place in range(16)])
    assert found[8:12] == ["code"] * 4
    assert sorted(found[12:]) == ["code"] + ["math"] * 3


def test_a_recovery_of_the_planned_domain_is_whole():
    order = DomainOrder(NAMES, prompts=4, order=["code", "math"], batches=2, rehearsal=0.25)
    found = domains([order.row(place, lambda place=place: "math" if place == 8 else None) for place in range(12)])
    assert found[8:] == ["math"] * 4


@pytest.mark.parametrize("recovery", [None, "code", "math"])
def test_a_rehearsal_is_resumed_within_a_batch(recovery):
    made = [DomainOrder(NAMES, prompts=4, order=["code", "math"], batches=2, rehearsal=0.25) for _ in range(2)]
    taken(made[0], range(10), lambda: recovery)
    made[1].load_state_dict(made[0].state_dict())
    assert taken(made[1], range(10, 16)) == taken(made[0], range(10, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rehearsal": 0.7}, r"data\.domain_rehearsal=0\.7 is not allowed"),
        ({"rehearsal": 0.25, "order": "round_robin"}, "not allowed with data.domain_order=round_robin"),
    ],
)
def test_rehearsals_that_cannot_be_served(options, message):
    with pytest.raises(ConfigError, match=message):
        DomainOrder(NAMES, prompts=4, batches=1, **options)


def test_a_resumed_order_goes_on_with_the_same_rows():
    first = DomainOrder(NAMES, prompts=2, order="round_robin", batches=4)
    taken(first, range(6), lambda: "math")
    second = DomainOrder(NAMES, prompts=2, order="round_robin", batches=4)
    second.load_state_dict(first.state_dict())
    assert taken(second, range(6, 16)) == taken(first, range(6, 16))


def test_what_follows_the_order_is_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        DomainOrder(NAMES, 2, "sequential", 1)


def test_a_domain_without_rows_cannot_recover():
    with pytest.raises(ConfigError, match="'art' must recover and has no rows"):
        DomainOrder(NAMES, prompts=2).row(0, lambda: "art")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "random"}, "domain_order='random' is not allowed"),
        ({"order": ["art"]}, r"domain_order=\['art'\] is not allowed"),
        ({"prompts": 5}, "'code' has 4 rows and would get 0 batches of 5"),
        (
            {"order": ["math"], "batches": {"math": 2, "cod": 5}},
            r"domain_batches names \['cod'\], .* rows of \['code', 'math'\]",
        ),
        ({"batches": {"math": 2}}, "'code' has 4 rows and would get 0 batches"),
    ],
)
def test_what_cannot_be_served_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DomainOrder(NAMES, **{"prompts": 2, **settings})


def test_a_state_of_other_domains_is_refused():
    order = DomainOrder(NAMES, prompts=2)
    with pytest.raises(ConfigError, match="Resume with the same data"):
        order.load_state_dict({"used": {"art": 1}, "present": "art"})
