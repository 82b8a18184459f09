"""veRL has an environment of its own, `make env-verl`; without it there is nothing to collect here."""

import importlib.metadata
import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["*.py"]
# Read once, when veRL is first imported.
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "tests.verl.platform"}


def pytest_configure(config):
    # veRL and Ray warn about themselves at every turn; what the guard's own code sets off stays an error.
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::interference_guard.*")
    # Its own warnings name the line of a test.
    config.addinivalue_line("filterwarnings", "error::UserWarning:tests.*")


def pytest_report_header():
    return f"veRL {importlib.metadata.version('verl')}" if importlib.util.find_spec("verl") else None
