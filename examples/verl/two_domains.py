"""Two domains one after the other with veRL's real trainer on a CPU, plain and guarded, and a table.

    python -m examples.verl.two_domains                       plain and guarded
    python -m examples.verl.two_domains --rates 7e-4 2e-4     plain at a lower rate too

Each run is `python -m verl.trainer.main_ppo` as a user starts it; the guarded one differs by one library.
Pass rates are sampled from the checkpoints that the trainer wrote after each domain.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bed import domains, model
from benchmarks.provenance import write
from examples.verl import assets
from examples.verl.on_cpu import run

NAMES = ("products", "gcd")
PROMPTS, COMPLETIONS, LONGEST = 8, 8, 4
STEPS = 40
RATE = 7e-4
SEED = 0
TEST_ROWS, TEST_SEEDS = 512, (0, 1, 2, 3)


def pass_rates(folder: Path) -> dict[str, float]:
    """Sampled pass rate of each domain for a model on disk, mean over several samples of every row."""
    torch.set_num_threads(1)
    words = AutoTokenizer.from_pretrained(folder)
    words.padding_side = "left"
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tests = {name: domains.rows(name, TEST_ROWS, seed=10_000) for name in NAMES}
    found = [model.pass_rates(student, words, tests, seed=seed, longest=LONGEST) for seed in TEST_SEEDS]
    return {name: sum(item[name] for item in found) / len(found) for name in NAMES}


def one(folder: Path, name: str, rate: float, guarded: bool) -> dict[str, Any]:
    """One run and what came out of it."""
    started = time.perf_counter()
    checkpoints = folder / f"{name}.checkpoints"
    settings = run.overrides(
        folder,
        steps=2 * STEPS,
        prompts=PROMPTS,
        completions=COMPLETIONS,
        rate=rate,
        longest=LONGEST,
        guarded=guarded,
        more=[
            f"trainer.save_freq={STEPS}",
            f"trainer.default_local_dir={checkpoints}",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
            *(["+guard.budget=0.02"] if guarded else []),
        ],
    )
    metrics = run.start(settings, folder, name)
    seconds = time.perf_counter() - started
    rates = [
        pass_rates(checkpoints / f"global_step_{step}" / "actor" / "huggingface") for step in (STEPS, 2 * STEPS)
    ]
    first, second = NAMES
    # Once the second domain trains there is something to protect.
    later = [row for row in metrics if row["step"] > STEPS]
    update = sum(row["timing_s/update_actor"] for row in later)
    return {
        "name": name,
        "rate": rate,
        "guarded": guarded,
        "first_own": rates[0][first],
        "first_final": rates[1][first],
        "second_final": rates[1][second],
        "seconds": seconds,
        "update_actor_seconds": update,
        "guard_seconds": sum(row.get("actor/guard/seconds", 0.0) for row in later) if guarded else None,
        "metrics": [
            {key: value for key, value in row.items() if key == "step" or key.startswith("actor/guard/")}
            for row in metrics
        ],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as lines of text."""
    first, second = NAMES
    lines = [
        f"{'run':<18} {first + ' own':>12} {first + ' end':>12} {'lost':>7} {second + ' end':>10} "
        f"{'guard / update':>15}"
    ]
    for item in results:
        share = "" if not item["guarded"] else f"{item['guard_seconds'] / item['update_actor_seconds']:.1%}"
        lines.append(
            f"{item['name']:<18} {item['first_own']:>12.3f} {item['first_final']:>12.3f} "
            f"{item['first_own'] - item['first_final']:>7.3f} {item['second_final']:>10.3f} {share:>15}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/verl"), help="folder for all that is written")
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="rates of plain runs")
    chosen = parser.parse_args()
    folder = chosen.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print("Warm start ...", flush=True)
    assets.write_model(folder / "model", NAMES, SEED)
    assets.write_rows(folder / "train.parquet", NAMES, PROMPTS * STEPS, seed=20_000)
    assets.write_rows(folder / "val.parquet", NAMES, 8, seed=10_000)
    start = pass_rates(folder / "model")
    print("Start:", {name: round(value, 3) for name, value in start.items()}, flush=True)
    results = []
    for guarded, rate in [*((False, rate) for rate in chosen.rates), (True, RATE)]:
        name = f"{'guarded' if guarded else 'plain'}-{rate:g}"
        print(f"{name} ...", flush=True)
        results.append(one(folder, name, rate, guarded))
    print(table(results))
    written = {"domains": NAMES, "steps": STEPS, "prompts": PROMPTS, "completions": COMPLETIONS, "start": start}
    path = write("two_domains", {**written, "runs": results}, folder)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
