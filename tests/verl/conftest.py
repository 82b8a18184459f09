"""veRL has an environment of its own, `make env-verl`; without it there is nothing to collect here."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]
