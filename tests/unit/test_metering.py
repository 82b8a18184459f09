from dataclasses import replace

import pytest

from tests.unit.helpers import guarded, policy_gradient, rollout


@pytest.mark.parametrize("rewarded", [True, False])
def test_metrics_say_the_unit_of_interference(rewarded):
    model, guard, optimizer = guarded()
    for step, domain in enumerate(["math"] * 3 + ["code"] * 3):
        rows = rollout(model, domain, seed=step)
        with guard.domain(domain):
            guard.retain(domain, rows if rewarded else replace(rows, rewards=None))
            policy_gradient(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.probe()
    found = guard.metrics()
    assert found["guard/math/nats"] == float(not rewarded)
    assert found["guard/math/measured"] == guard.domains["math"].measurement.loss
    # Nothing was measured of it yet.
    assert "guard/code/nats" not in found
