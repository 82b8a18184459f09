"""The actor that carries recovery requests, in a Ray of its own."""

import time

import pytest
import ray

from interference_guard.errors import HostError
from interference_guard.integrations.verl import coordinator


@pytest.fixture(scope="module", autouse=True)
def local():
    limits = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    ray.init(address="local", namespace="tests", log_to_driver=False, **limits)
    yield
    coordinator._own = None
    ray.shutdown()


def test_both_ends_meet_and_a_second_data_set_starts_anew():
    data, engine = coordinator.launch(["math", "code"]), coordinator.Link()
    assert engine.domains() == {"math", "code"}
    engine.report("math")
    assert data.wanted() == "math"
    again = coordinator.launch(["qa"])
    assert again.wanted() is None
    assert coordinator.Link().domains() == {"qa"}


def test_another_runs_actor_is_not_taken(monkeypatch):
    coordinator.launch(["math"])
    other = coordinator._own
    monkeypatch.setattr(coordinator, "_own", None)
    with pytest.raises(HostError, match="Another run in this Ray namespace"):
        coordinator.launch(["code"])
    assert ray.get(other.domains.remote()) == ["math"]


def test_an_actor_that_died_is_missed():
    link = coordinator.launch(["math"])
    ray.kill(coordinator._own)

    def asked_again():
        # Ray kills it a little later.
        for _ in range(200):
            link.wanted()
            time.sleep(0.05)

    with pytest.raises(HostError, match="is gone"):
        asked_again()
