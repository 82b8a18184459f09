"""The paper's claims on the bed's checkpoints, and rollback on its unguarded run.

    python -m benchmarks.paper [--seed 0] [--rate 7e-4] [--keep runs/paper] [--reuse]

Trains the eight domains twice, unguarded ("observed": the guard predicts and measures, and changes
nothing) and guarded, with a checkpoint after every phase, and writes `benchmarks/results/paper.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from interference_guard.analysis import (
    RollbackPlan,
    StateFile,
    active_neurons,
    compare_routes,
    conflict_subspace,
    gradient_cosines,
    jaccard,
    measure_edits,
    open_checkpoint,
    plan_rollback,
    predict_interference,
    stored_gradients,
    top_neurons,
    write_rollback,
)
from interference_guard.analysis.rollback import MODES

from .bed import domains
from .bed import model as policy
from .bed.domains import ORDER
from .bed.run import Run
from .bed.training import LONGEST, PROMPTS, train
from .forgetting import RATE, spearman
from .provenance import write

PHASES = len(ORDER)
# Rollback is chosen on one set of rows and reported on another.
CHOOSE_SEED, REPORT_SEED, ROWS = 11_000, 12_000, 512
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
STRENGTHS = (0.5, 1.0)
DATA_ROWS = 64
# The largest share of units that counts as sparse.
SPARSE = 0.1
KINDS = ("best", "uniform", "sparse", "random")
# Two points of pass rate: less is the noise of sampling.
LEAST_LOSS = 0.02


def checkpoint(folder: Path, phase: int) -> Path:
    """Where the weights after a phase lie; phase 0 is the warm start."""
    return folder / f"phase-{phase}"


def edits(folder: Path) -> dict[str, Any]:
    """Claims 2 and 3: share of unchanged parameters, and overlap of the most changed neurons."""
    found = [
        measure_edits(*(open_checkpoint(checkpoint(folder, phase + i)) for i in (0, 1)))
        for phase in range(PHASES)
    ]
    tops = [top_neurons(item.neurons()) for item in found]
    overlaps = {
        f"{ORDER[i]}, {ORDER[j]}": jaccard(tops[i], tops[j]) for i in range(PHASES) for j in range(i + 1, PHASES)
    }
    return {
        "by_domain": {name: item.summary() for name, item in zip(ORDER, found, strict=True)},
        "top_neurons_jaccard": {"pairs": overlaps, "mean": mean(overlaps.values()), "chance": 0.1 / 1.9},
    }


def routes(folder: Path) -> dict[str, Any]:
    """Claim 4: overlap of active neurons, and the updates' directions on shared ones."""
    active = {}
    for index, name in enumerate(ORDER):
        student, words = _student(checkpoint(folder, index + 1))
        rows = domains.rows(name, DATA_ROWS, seed=CHOOSE_SEED)
        texts = [row["prompt"] + row["answer"] for row in rows]
        batch = words(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        active[name] = active_neurons(student, [dict(batch)])
    moves = [tuple(open_checkpoint(checkpoint(folder, index + i)) for i in (0, 1)) for index in range(PHASES)]
    pairs = {}
    for i, a in enumerate(ORDER):
        for j in range(i + 1, PHASES):
            b = ORDER[j]
            pairs[f"{a}, {b}"] = asdict(compare_routes((active[a], *moves[i]), (active[b], *moves[j])))
    keys = ("overlap", "chance", "shared_cosine", "other_cosine", "synergy")
    summary = {key: mean(pair[key] for pair in pairs.values()) for key in keys}
    return {"pairs": pairs, "mean": summary, "active_share": 0.1}


def gradients(folder: Path) -> dict[str, Any]:
    """Claim 1: cosines of two domains' gradients, from the state and from data at the same weights."""
    stored, pairs = StateFile(checkpoint(folder, PHASES)), {}
    means = {name: stored_gradients(stored.domain(name)) for name in ORDER}
    for i, a in enumerate(ORDER):
        for b in ORDER[i + 1 :]:
            pairs[f"{a}, {b}"] = _cosines(means[a], means[b])
    student, words = _student(checkpoint(folder, 0))
    fresh = {name: policy_gradient(student, words, name) for name in ORDER}
    from_data = {f"{a}, {b}": _cosines(fresh[a], fresh[b]) for i, a in enumerate(ORDER) for b in ORDER[i + 1 :]}
    return {"stored": _spread(pairs), "data_at_start": _spread(from_data)}


def _cosines(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    found = gradient_cosines(a, b)
    return {"whole": found.whole, "lowest": found.most_conflicting, "highest": found.most_synergistic}


def _spread(pairs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "pairs": pairs,
        "mean_whole": mean(pair["whole"] for pair in pairs.values()),
        "mean_size_whole": mean(abs(pair["whole"]) for pair in pairs.values()),
        "mean_lowest": mean(pair["lowest"][1] for pair in pairs.values()),
        "mean_highest": mean(pair["highest"][1] for pair in pairs.values()),
    }


def policy_gradient(student: Any, words: Any, name: str) -> dict[str, torch.Tensor]:
    """Gradient of the expected reward of one domain from fresh completions, centred by prompt."""
    rows = [row for row in domains.rows(name, PROMPTS, seed=CHOOSE_SEED) for _ in range(8)]
    inputs = words(
        [row["prompt"] for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    student.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = student.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=LONGEST)
    start = inputs["input_ids"].shape[1]
    texts = words.batch_decode(ids[:, start:], skip_special_tokens=True)
    rewards = torch.tensor(domains.reward(texts, [row["answer"] for row in rows])).view(-1, 8)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    # Everything after the first end counts no more.
    ended = (ids[:, start:] == words.eos_token_id).long().cumsum(1)
    real = (ended - (ids[:, start:] == words.eos_token_id).long() == 0).float()
    mask = torch.cat([inputs["attention_mask"], real.long()], 1)
    logits = student(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1]
    scores = torch.log_softmax(logits, -1).gather(-1, ids[:, start:].unsqueeze(-1)).squeeze(-1)
    student.zero_grad()
    (-(advantages.unsqueeze(1) * scores * real).sum() / len(rows)).backward()
    found = {key: value.grad.clone() for key, value in student.named_parameters() if value.grad is not None}
    student.zero_grad()
    return found


def prediction(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Claim 5: predicted damage against measured, where it sits, and the conflict subspace."""
    state = StateFile(checkpoint(folder, PHASES))
    final = open_checkpoint(checkpoint(folder, PHASES))
    found: dict[str, Any] = {}
    for index, name in enumerate(ORDER[:-1]):
        record = state.domain(name)
        guess = predict_interference(record, final)
        inside = sum(float(part.double().sum()) for part in guess.inside.values())
        units = torch.cat(list(guess.units.values())).sort(descending=True).values
        pairs = [pair for pair in result["pairs"] if pair["domain"] == name]
        before, after = (open_checkpoint(checkpoint(folder, index + 1 + i)) for i in (0, 1))
        near = StateFile(checkpoint(folder, index + 2))
        conflict = conflict_subspace(near.domain(name), near.domain(ORDER[index + 1]), before, after)
        found[name] = {
            "predicted": guess.calibrated,
            "lost": result["own"][name] - result["final"][name],
            "inside": inside / guess.raw,
            "damage_of_top_1_percent_of_units": float(units[: len(units) // 100].sum() / units.sum()),
            "spearman_loss": spearman([pair["raw"] for pair in pairs], [pair["loss"] for pair in pairs]),
            "spearman_kl": spearman([pair["raw"] for pair in pairs], [pair["kl"] for pair in pairs]),
            "conflict_with_next": {
                "next": ORDER[index + 1],
                "largest_cosine": conflict.mean_cosine(),
                "largest_cosine_at_random": conflict.mean_chance(),
                "displacement_inside": conflict.share,
                "displacement_inside_if_flat": conflict.flat_share,
                "damage_inside": conflict.inside_interference,
                "damage_in_shared_directions": conflict.shared_interference,
            },
        }
    keys = ("inside", "damage_of_top_1_percent_of_units", "spearman_loss", "spearman_kl")
    summary = {key: mean(item[key] for item in found.values()) for key in keys}
    parts = [item["conflict_with_next"] for item in found.values()]
    summary |= {key: mean(part[key] for part in parts) for key in parts[0] if key != "next"}
    return {"by_domain": found, "mean": summary}


def rollback(folder: Path, scratch: Path) -> dict[str, Any]:
    """Claim 7: every earlier domain in turn restored in the unguarded run's last checkpoint.

    Share, strength and mode are chosen on one set of rows, where they cost the last domain at most a third of
    its gain, and the effect is reported on another.
    """
    last, final = ORDER[-1], open_checkpoint(checkpoint(folder, PHASES))
    rates = {
        seed: {phase: _rates(checkpoint(folder, phase), seed, ORDER) for phase in range(PHASES + 1)}
        for seed in (CHOOSE_SEED, REPORT_SEED)
    }
    state, found = StateFile(checkpoint(folder, PHASES)), {}
    for index, name in enumerate(ORDER[:-1]):
        before = open_checkpoint(checkpoint(folder, index + 1))
        plans = {mode: plan_rollback(state.domain(name), before, final, mode) for mode in MODES}
        tried = []
        for mode, plan in plans.items():
            for share in SHARES:
                for strength in STRENGTHS:
                    predicted = write_rollback(plan, share, strength, scratch, force=True)
                    after = _rates(scratch, CHOOSE_SEED, (name, last))
                    effect = _effect(rates[CHOOSE_SEED], after, name, last, index + 1)
                    tried.append({"mode": mode, **predicted, **effect})
        best = _best(tried)
        sparse = _best([row for row in tried if row["share"] <= SPARSE])
        # Controls: the whole edit scaled down until as much of it is left, and as many units at random.
        uniform = {"share": 1.0, "strength": 1 - best["edit_left"] ** 0.5}
        candidates = {
            "best": (plans[best["mode"]], best),
            "uniform": (plans["units"], uniform),
            "sparse": (plans[sparse["mode"]], sparse),
            "random": (_shuffled(plans[sparse["mode"]]), sparse),
        }
        effects = {}
        for kind, (plan, how) in candidates.items():
            write_rollback(plan, how["share"], how["strength"], scratch, force=True)
            after = _rates(scratch, REPORT_SEED, ORDER)
            effects[kind] = _effect(rates[REPORT_SEED], after, name, last, index + 1)
            effects[kind]["average"] = mean(after.values()) - mean(rates[REPORT_SEED][PHASES].values())
        found[name] = {
            "lost": effects["best"]["lost"] >= LEAST_LOSS,
            "reached": {kind: _reaches(effect) for kind, effect in effects.items()},
            "effects": effects,
            "settings": {"best": best, "uniform": uniform, "sparse": sparse},
            "tried": tried,
        }
        print(f"rollback for {name}: {effects}", flush=True)
    return {
        "rates": {str(phase): value for phase, value in rates[REPORT_SEED].items()},
        "last": last,
        "by_domain": found,
        "domains_that_lost": sum(item["lost"] for item in found.values()),
        "reached": {kind: sum(item["reached"][kind] for item in found.values()) for kind in KINDS},
        "mean": {
            kind: {
                key: mean(item["effects"][kind][key] for item in found.values() if item["lost"])
                for key in ("regained", "cost", "average")
            }
            for kind in KINDS
        },
    }


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """What regains most of those that cost the last domain at most a third of its gain."""
    allowed = [row for row in tried if row["cost"] <= 1 / 3]
    return max(allowed or tried, key=lambda row: row["regained"])


def _reaches(effect: dict[str, float]) -> bool:
    return effect["lost"] >= LEAST_LOSS and effect["regained"] >= 1 / 3 and effect["cost"] <= 1 / 3


def _shuffled(plan: RollbackPlan) -> RollbackPlan:
    """The same plan with random scores."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: edit * (0.5 + torch.rand(edit.shape, generator=generator, dtype=edit.dtype))
        for name, edit in plan.edit.items()
    }
    return replace(plan, interference=scores)


def _effect(
    rates: dict[int, dict[str, float]], after: dict[str, float], name: str, last: str, own: int
) -> dict[str, float]:
    lost = rates[own][name] - rates[PHASES][name]
    gain = rates[PHASES][last] - rates[PHASES - 1][last]
    return {
        "lost": lost,
        "gain_of_last": gain,
        "regained": (after[name] - rates[PHASES][name]) / lost if lost > 0 else 0.0,
        "cost": (rates[PHASES][last] - after[last]) / gain if gain > 0 else 0.0,
    }


def _rates(path: Path, seed: int, names: Sequence[str]) -> dict[str, float]:
    student, words = _student(path)
    tests = {name: domains.rows(name, ROWS, seed=seed) for name in names}
    return policy.pass_rates(student, words, tests, longest=LONGEST)


def _student(path: Path) -> tuple[Any, Any]:
    """The policy with a checkpoint's weights, and its tokenizer."""
    words = _tokenizer()
    student, opened = policy.build(words, 0), open_checkpoint(path)
    student.load_state_dict({name: opened.rows(name) for name in opened.shapes}, strict=False)
    return student, words


@cache
def _tokenizer() -> Any:
    return policy.tokenizer(sorted(ORDER))


def runs(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both runs' results; made, or taken from the folder."""
    results = {}
    for method, guard in (("observed", {"first_order": True}), ("guarded", {})):
        keep = folder / method
        if not (options.reuse and (keep / "result.json").is_file()):
            keep.mkdir(parents=True, exist_ok=True)
            found = train(Run(method, options.rate, options.seed, ORDER, guard=guard), keep=keep)
            extra = {"average": found.average, "forgetting": found.forgetting}
            (keep / "result.json").write_text(json.dumps({**asdict(found), **extra}))
            print(f"{method}: average {found.average:.3f}, forgetting {found.forgetting:.3f}", flush=True)
        results[method] = json.loads((keep / "result.json").read_text())
    return results


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--keep", type=Path, default=Path("runs/paper"), help="folder of the checkpoints")
    parser.add_argument("--reuse", action="store_true", help="take runs that the folder already holds")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    results = runs(options.keep, options)
    started = time.perf_counter()
    found: dict[str, Any] = {"seed": options.seed, "rate": options.rate}
    for method, result in results.items():
        folder = options.keep / method
        own = {key: result[key] for key in ("start", "own", "final", "average", "forgetting")}
        found[method] = {**own, "edits": edits(folder), "routes": routes(folder)}
    observed = options.keep / "observed"
    found["gradients"] = gradients(observed)
    found["prediction"] = prediction(observed, results["observed"])
    found["rollback"] = rollback(observed, options.keep / "rolled-back")
    found["seconds_of_analysis"] = time.perf_counter() - started
    print(f"written to {write('paper', found)}")


if __name__ == "__main__":
    main()
