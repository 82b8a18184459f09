import pytest

from tests.unit.helpers import guarded, train


@pytest.fixture
def trained(tmp_path):
    """A model and its guard after three steps of each of two domains, and the folder of its saved state."""
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3)
    guard.save(tmp_path / "state")
    return model, guard, tmp_path / "state"
