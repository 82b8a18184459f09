"""Protected sets by edits: of which steps they are, and what recoveries do to them."""

import dataclasses

import pytest
import torch

from interference_guard.local_model import see_through
from interference_guard.protected import select_units
from interference_guard.protection import by_parameter
from interference_guard.recovery import RecoverySchedule
from tests.unit.helpers import CONFIG, guarded, step_by_hand

EDITS = dataclasses.replace(CONFIG, coverage=0.5, selection="edits", recovery=True)
# Its loops retain none.
pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")


class Run:
    """Steps of a host that calls the guard itself, numbered."""

    def __init__(self):
        self.model, self.guard, self.optimizer = guarded(config=EDITS)
        # A host of its own calls the guard; the wrapper's hooks would count each step twice.
        self.optimizer = self.optimizer.detach()
        self.number = 0

    def train(self, *domains):
        for domain in domains:
            step_by_hand(self.model, self.guard, self.optimizer, domain, self.number)
            self.number += 1

    def seen(self):
        return [part.clone() for part in see_through(self.guard.view.weights(), self.guard.view.edits, None)]

    def chosen(self, before, after):
        """What the edits between two moments choose."""
        moved = [(a - b).square().sum(-1) for a, b in zip(after, before, strict=True)]
        blocks, views = self.guard.view.blocks, self.guard.view.layout.views
        return select_units(by_parameter(blocks, moved), views, EDITS.coverage)

    def recover(self, domain):
        phase = {"phase": "idle"} if domain is None else {"phase": "recovering", "domain": domain}
        self.guard.schedule = RecoverySchedule(**phase)


def same(a, b):
    return all(torch.equal(mask, b.masks[name]) for name, mask in a.masks.items())


@pytest.mark.parametrize("turn", [1, 2, 5])
def test_a_later_turn_is_judged_by_its_own_edits(turn):
    run = Run()
    run.train(*["math"] * 5, *["code"] * 5)
    before = run.seen()
    run.train(*["math"] * turn)
    after = run.seen()
    run.train("code")
    assert same(run.guard.domains["math"].protected_set, run.chosen(before, after))


def test_a_recovery_of_another_leaves_the_beginning_where_it_was():
    run = Run()
    run.train(*["math"] * 5)
    before = run.seen()
    run.train(*["code"] * 4)
    run.recover("math")
    run.train("math", "math")
    run.recover(None)
    state = run.guard.state_dict()
    run.guard.load_state_dict(state)
    run.train(*["code"] * 4)
    after = run.seen()
    run.train("qa")
    assert same(run.guard.domains["code"].protected_set, run.chosen(before, after))


def test_a_domain_that_is_not_taken_up_again_begins_anew():
    run = Run()
    run.train(*["math"] * 5, *["code"] * 4)
    run.recover("math")
    run.train("math")
    assert run.guard.domains["code"].start is not None
    run.recover(None)
    run.train("qa")
    assert run.guard.domains["code"].start is None


def test_a_recovered_domain_keeps_the_set_of_its_training():
    run = Run()
    run.train(*["math"] * 5, *["code"] * 4)
    chosen = run.guard.domains["math"].protected_set
    run.recover("math")
    run.train("math", "math")
    run.recover(None)
    assert run.guard.domains["math"].start is None
    # Its next foreign step sets the new anchor.
    run.train("code")
    state = run.guard.domains["math"]
    assert state.anchored
    assert state.foreign_steps == 1
    assert same(state.protected_set, chosen)


def test_a_mixed_step_that_keeps_the_anchor_is_no_beginning():
    run = Run()
    run.train(*["math"] * 5, *["code"] * 4)
    run.guard.begin({"math": 0.5, "code": 0.5})
    with pytest.warns(UserWarning, match="A step trained the domains"):
        run.guard.before_step()
    run.guard.after_step()
    assert run.guard.domains["math"].start is None
