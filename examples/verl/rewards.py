"""One reward function for all domains of a run: veRL calls it row by row with the row's `data_source`."""

import importlib.util
from pathlib import Path
from typing import Any

# veRL loads this file by its path, so its neighbour is loaded the same way.
_PATH = Path(__file__).resolve().parents[1] / "trl/rewards.py"
_SPEC = importlib.util.spec_from_file_location("example_rewards", _PATH)
if _SPEC is None or _SPEC.loader is None:
    raise ImportError(f"{_PATH} is missing; keep examples/trl beside examples/verl.")
_rules = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_rules)

BY_DOMAIN = {
    "math": _rules.exact_match,
    "code": _rules.tests_pass,
    "qa": _rules.choice,
    "writing": _rules.prose,
}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """The row's reward by the rules of its own domain."""
    if data_source not in BY_DOMAIN:
        raise ValueError(f"data_source={data_source!r} has no reward; there are rules for {sorted(BY_DOMAIN)}.")
    (score,) = BY_DOMAIN[data_source](completions=[solution_str], answer=[ground_truth])
    return float(score)
