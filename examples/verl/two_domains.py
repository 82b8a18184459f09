"""Two domains one after the other with veRL's real trainer on a CPU, plain and guarded, and a table.

    python -m examples.verl.two_domains                        one seed
    python -m examples.verl.two_domains --out examples/verl    what two_domains.json was made with

Each run is `python -m verl.trainer.main_ppo` as a user starts it; the guarded one differs by one library. Plain
training is shown at a lower rate too. Pass rates are sampled from the checkpoints that the trainer wrote after
each domain.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
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
RATE, LOWER = 7e-4, 2e-4
# One batch is kept to measure with: a policy this small trains so fast that forward passes of more would show.
BUDGET, RETAIN = 0.02, 64
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


def one(folder: Path, seed: int, rate: float, guarded: bool) -> dict[str, Any]:
    """One run and what came out of it."""
    name = f"{'guarded' if guarded else 'plain'}-{rate:g}"
    print(f"seed {seed}: {name} ...", flush=True)
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
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]",
            f"actor_rollout_ref.rollout.seed={seed}",
            *([f"+guard.budget={BUDGET}", f"+guard.retain={RETAIN}"] if guarded else []),
        ],
    )
    # A busy machine is slow and no failure.
    metrics = run.start(settings, folder, name, limit=7200)
    seconds = time.perf_counter() - started
    rates = [
        pass_rates(checkpoints / f"global_step_{step}" / "actor" / "huggingface") for step in (STEPS, 2 * STEPS)
    ]
    first, second = NAMES
    # Once the second domain trains there is something to protect.
    later = [row for row in metrics if row["step"] > STEPS]
    update = sum(row["timing_s/update_actor"] for row in later)
    return {
        "seed": seed,
        "name": name,
        "rate": rate,
        "guarded": guarded,
        "first_own": rates[0][first],
        "first_final": rates[1][first],
        "second_final": rates[1][second],
        "lost": rates[0][first] - rates[1][first],
        "seconds": seconds,
        "update_actor_seconds": update,
        "guard_seconds": sum(row["actor/guard/seconds"] for row in later) if guarded else None,
        "guard_end": {key: value for key, value in metrics[-1].items() if key.startswith("actor/guard/")},
    }


def seed_runs(folder: Path, seed: int) -> dict[str, Any]:
    """The runs of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}: warm start ...", flush=True)
    assets.write_model(folder / "model", NAMES, seed)
    assets.write_rows(folder / "train.parquet", NAMES, PROMPTS * STEPS, seed=20_000 + seed)
    assets.write_rows(folder / "val.parquet", NAMES, 8, seed=10_000)
    start = pass_rates(folder / "model")
    # The guarded run alone, since its time is looked at; the other two share the cores.
    runs = [one(folder, seed, RATE, True)]
    with ThreadPoolExecutor(2) as pool:
        runs += pool.map(lambda rate: one(folder, seed, rate, False), (RATE, LOWER))
    return {"seed": seed, "start": start, "runs": [*runs[1:], runs[0]]}


def table(results: list[dict[str, Any]]) -> str:
    """The results as lines of text."""
    first, second = NAMES
    lines = [
        f"{'seed':<5}{'run':<16}{first + ' own':>13}{first + ' end':>13}{'lost':>8}{second + ' end':>10}"
        f"{'guard / update':>16}"
    ]
    for item in (item for result in results for item in result["runs"]):
        share = f"{item['guard_seconds'] / item['update_actor_seconds']:.1%}" if item["guarded"] else ""
        lines.append(
            f"{item['seed']:<5}{item['name']:<16}{item['first_own']:>13.3f}{item['first_final']:>13.3f}"
            f"{item['lost']:>8.3f}{item['second_final']:>10.3f}{share:>16}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/verl"), help="folder for two_domains.json")
    parser.add_argument(
        "--work", type=Path, default=Path("demo/verl"), help="folder for all else that is written"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, one after the other")
    chosen = parser.parse_args()
    started = time.perf_counter()
    results = [seed_runs(chosen.work.resolve() / f"seed{seed}", seed) for seed in chosen.seeds]
    print(table(results))
    settings = {
        "domains": NAMES,
        "steps": STEPS,
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "guard": {"budget": BUDGET, "retain": RETAIN},
        "tests": TEST_ROWS * len(TEST_SEEDS),
    }
    seconds = time.perf_counter() - started
    path = write("two_domains", {**settings, "seconds": seconds, "seeds": results}, chosen.out)
    print(f"Written to {path} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
