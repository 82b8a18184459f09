"""Reward of the CPU runs."""

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """1 where the completion is the answer, else 0."""
    return float(solution_str.replace("<|im_end|>", "").strip() == ground_truth)
