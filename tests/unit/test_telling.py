"""Warnings name a line of the user's program, whatever lies between it and their cause."""

import _thread
import contextlib
import threading
import warnings

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer, attach
from interference_guard.telling import warn
from tests.unit.helpers import CONFIG, Toy, policy_gradient, rollout

STEP = """\
def step():
    with guard.domain({"math": 0.5, "code": 0.5}):
        backward()
        optimizer.step()
"""


def program(text, file="user.py", **names):
    """Names that a program of its own file leaves."""
    exec(compile(text, file, "exec"), names)
    return names


def guarded(attached):
    """A model, and its guard in an optimizer by either way."""
    model = Toy()
    guard, optimizer = Guard(model, CONFIG), torch.optim.SGD(model.parameters(), 0.1)
    if attached:
        attach(optimizer, guard)
        return model, guard, optimizer
    return model, guard, GuardedOptimizer(optimizer, guard)


@pytest.mark.parametrize("attached", [False, True])
def test_a_mixed_step_is_told_at_the_line_that_steps(attached):
    model, guard, optimizer = guarded(attached)
    rows = rollout(model, "math")
    step = program(
        STEP, guard=guard, optimizer=optimizer, backward=lambda: policy_gradient(model, rows).backward()
    )
    with pytest.warns(UserWarning, match="trained the domains") as told:
        step["step"]()
    assert [(item.filename, item.lineno) for item in told] == [("user.py", 4)]


@pytest.mark.parametrize("attached", [False, True])
def test_a_domain_without_gradients_is_told_at_a_line_of_the_program(attached):
    model, guard, optimizer = guarded(attached)

    def backward():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    text = STEP.replace('{"math": 0.5, "code": 0.5}', "name").replace("step()", "steps(names)", 1)
    text = text.replace("    with", "    for name in names:\n     with")
    steps = program(text, guard=guard, optimizer=optimizer, backward=backward)["steps"]
    with pytest.warns(UserWarning, match="All gradients of domain 'math' were zero") as told:
        steps(["math"] * 10 + ["code"] * 2)
    assert {item.filename for item in told} == {"user.py"}


def test_frames_of_hosts_and_of_decorators_lie_in_between():
    text = "@contextlib.contextmanager\ndef context():\n    yield\n    warn('here')"
    context = program(text, "ours.py", __name__="interference_guard.x", contextlib=contextlib, warn=warn)[
        "context"
    ]
    text = "def call():\n    with context():\n        pass"
    # That of a context manager is the innermost line outside, also where it is left.
    alone = program(text, context=context)
    hosted = program(text, "trainer.py", __name__="verl.trainer", context=context)
    user = program("\n\n\n\ndef call():\n    host()", host=torch.no_grad()(hosted["call"]))
    for called, line in ((alone, 2), (user, 6)):
        with pytest.warns(UserWarning, match="here") as told:
            called["call"]()
        # Python names the end of a block or its beginning.
        assert [(item.filename, abs(item.lineno - line) < 2) for item in told] == [("user.py", True)]


def test_without_any_other_frame_the_outermost_is_named():
    done = threading.Event()
    text = "def inner():\n    warn('here')\n    done.set()\n\ndef outer():\n    inner()"
    outer = program(text, "hook.py", __name__="torch.x", warn=warn, done=done)["outer"]

    def begin():
        _thread.start_new_thread(outer, ())
        assert done.wait(60)

    with pytest.warns(UserWarning, match="here") as told:
        begin()
    assert [(item.filename, item.lineno) for item in told] == [("hook.py", 6)]


def test_it_is_told_once_a_line_by_default():
    user = program("def call():\n    warn('here')\n    warn('here')", warn=warn)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        user["call"]()
        user["call"]()
    assert [item.lineno for item in told] == [2, 3]
