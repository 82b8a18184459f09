"""Time of a report on a long history, and memory of a comparison of two large sharded checkpoints.

    python -m benchmarks.tooling [--parameters 1e9] [--steps 10000] [--folder FOLDER]

Writes `benchmarks/results/tooling.json`. The checkpoints take 4 bytes a parameter on disk, and are removed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from interference_guard.history import HISTORY, History

from .provenance import write

HIDDEN, INNER, WORDS = 2048, 6144, 32_000
SHARD = 400_000_000
MEASURE = r"""
import json, re, sys, time
from interference_guard.cli import main
started, used = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
# Not getrusage: there a child process begins with its parent's peak.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
times = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}
sys.stderr.write(json.dumps({"code": code, **times, "peak_bytes": peak}))
"""


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """A model of about that many parameters, with the shapes of a Qwen3 of width 2048."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    layer = 0
    while sum(math.prod(shape) for shape in found.values()) < parameters:
        prefix = f"model.layers.{layer}."
        for name in ("gate_proj", "up_proj"):
            found[f"{prefix}mlp.{name}.weight"] = (INNER, HIDDEN)
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        found[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        layer += 1
    return found


def save_sharded(folder: Path, parameters: float, seed: int, change: float) -> int:
    """Write a checkpoint in bf16 shards of at most 0.8 GB; `change` parts of the weights differ by seed."""
    folder.mkdir(parents=True)
    table, shards = shapes(parameters), [[]]
    for name, shape in table.items():
        if sum(math.prod(table[item]) for item in shards[-1]) + math.prod(shape) > SHARD and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    index, base, own = {}, torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            weight = torch.randn(table[name], generator=base).mul_(0.02)
            moved = torch.rand(table[name][-1], generator=own) < change
            tensors[name] = torch.where(moved, weight * 1.01, weight).to(torch.bfloat16)
            index[name] = file
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(math.prod(shape) for shape in table.values())


def long_history(folder: Path, steps: int, domains: int = 8) -> None:
    """A synthetic history with one line a step."""
    names = [f"domain_{index}" for index in range(domains)]
    history = History(folder / HISTORY, {"budget": 0.02}, limit=10 * steps)
    noise = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        now = (step - 1) * domains // steps
        values = torch.rand(domains, 4, generator=noise).tolist()
        metrics = {"guard/seconds": 0.01 + 0.001 * values[0][0]}
        for name, (a, b, c, d) in list(zip(names, values, strict=True))[: now + 1]:
            metrics |= {
                f"guard/{name}/predicted": 0.02 * a,
                f"guard/{name}/measured": 0.02 * b,
                f"guard/{name}/radius": 1e-4 * (1 + c),
                f"guard/{name}/reward": d,
            }
        history.report(step, metrics, active=[names[now]], seconds=0.5 * step)
        if step % (steps // 40) == 0:
            history.evaluation(step, {name: row[0] for name, row in zip(names, values, strict=True)})


def measured(arguments: list[str]) -> dict[str, Any]:
    """A command in a process of its own (Linux): exit code, seconds with the program's imports, peak memory."""
    load = os.getloadavg()[0]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    return {**json.loads(run.stderr.strip().splitlines()[-1]), "load_before": load}


def main() -> None:
    """Make the inputs, run the commands, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the inputs are made; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        count = save_sharded(folder / "before", options.parameters, 1, 0.0)
        save_sharded(folder / "after", options.parameters, 2, 0.2)
        started = time.perf_counter()
        comparison = measured(["compare", str(folder / "before"), str(folder / "after"), "--json"])
        print(f"compare: {comparison}, {time.perf_counter() - started:.0f} s in all", flush=True)
        long_history(folder / "run", options.steps)
        report = measured(["report", str(folder / "run")])
        report |= {"steps": options.steps, "page_bytes": (folder / "run/report.html").stat().st_size}
        print(f"report: {report}", flush=True)
    finally:
        shutil.rmtree(folder)
    result = {"compare": {"parameters": count, **comparison}, "report": report}
    print(f"written to {write('tooling', result)}")


if __name__ == "__main__":
    main()
