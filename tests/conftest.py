from dataclasses import replace

import pytest


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """Folder of an unguarded run with the guard watching, its model and its guard."""
    from tests.unit.helpers import CONFIG
    from tests.unit.runs import guarded_run

    folder = tmp_path_factory.mktemp("toy") / "run"
    model, guard = guarded_run(folder, replace(CONFIG, project=False, first_order=True))
    return folder, model, guard
