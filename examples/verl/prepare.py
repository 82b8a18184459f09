"""Turns the JSON lines of examples/trl/prepare.py into the Parquet files that veRL reads.

python examples/verl/prepare.py data/public data/verl
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas


def row(domain: str, index: int, found: dict[str, Any]) -> dict[str, Any]:
    """One row; `data_source` is its domain, by which the guard and the reward tell rows apart."""
    return {
        "data_source": domain,
        "prompt": found["prompt"],
        "ability": domain,
        "reward_model": {"style": "rule", "ground_truth": str(found["answer"])},
        "extra_info": {"index": index},
    }


def convert(source: Path, target: Path, validation: int) -> None:
    """Write one file a domain, and one with the last rows of each for validation."""
    target.mkdir(parents=True, exist_ok=True)
    held: list[dict[str, Any]] = []
    for path in sorted(source.glob("*.jsonl")):
        # Not str.splitlines, which ends a line at characters that JSON strings may hold as they are.
        with path.open(encoding="utf-8") as lines:
            rows = [row(path.stem, index, json.loads(line)) for index, line in enumerate(lines)]
        trained = len(rows) - validation
        if trained < 1:
            raise SystemExit(f"{path} has {len(rows)} rows; more than --validation {validation} are needed.")
        pandas.DataFrame(rows[:trained]).to_parquet(target / f"{path.stem}.parquet")
        held += rows[trained:]
    if not held:
        raise SystemExit(f"{source} holds no .jsonl file; make them with examples/trl/prepare.py first.")
    pandas.DataFrame(held).to_parquet(target / "validation.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of .jsonl files, one a domain")
    parser.add_argument("target", type=Path, help="folder for .parquet files")
    parser.add_argument("--validation", type=int, default=128, help="rows of each domain held back (default 128)")
    chosen = parser.parse_args()
    if chosen.validation < 1:
        parser.error(f"--validation is {chosen.validation}; veRL validates on a file of at least 1 row a domain.")
    convert(chosen.source, chosen.target, chosen.validation)
