"""Eight domains, one after the other, plain and guarded: a table and a figure in a few minutes.

    python -m benchmarks.demo [--seed 0] [--rate 7e-4] [--out demo]

Both runs use the real GRPOTrainer, the same warm start, data, seeds and learning rate. They differ by one
callback.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .forgetting import RATE
from .provenance import describe

METHODS = ("plain", "guarded")


def work(method: str, options: dict[str, Any], start: str, news: Any) -> None:
    """One run in a process of its own; what happens is put into the queue `news`."""
    try:
        import torch

        torch.set_num_threads(1)
        from .bed.domains import ORDER
        from .bed.run import Run
        from .bed.training import share_start, train

        share_start(ORDER, options["seed"], Path(start), save=False)
        run = Run(method, options["rate"], options["seed"], ORDER)
        result = train(run, lambda kind, step, rates: news.put((method, kind, step, rates)))
        summary = {"average": result.average, "forgetting": result.forgetting, "bwt": result.bwt}
        news.put((method, "done", 0, {**asdict(result), **summary}))
    except BaseException as error:
        news.put((method, "failed", 0, f"{type(error).__name__}: {error}"))
        raise


def follow(options: dict[str, Any], start: str, console: Any) -> dict[str, dict[str, Any]]:
    """Start the runs, at once where there are two cores, and show how far they are."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .bed.domains import ORDER
    from .bed.run import Run

    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    total = Run.steps * len(ORDER)
    results: dict[str, dict[str, Any]] = {}
    waiting = [context.Process(target=work, args=(method, options, start, news)) for method in METHODS]
    running = []
    columns = ("{task.description}", BarColumn(), "{task.completed:>3.0f}/{task.total:.0f} steps")
    with Progress(
        *columns,
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bars = {method: progress.add_task(f"{method:8}", total=total, now="") for method in METHODS}
        try:
            while len(results) < len(METHODS):
                while waiting and len(running) - len(results) < min(2, os.cpu_count() or 1):
                    running.append(waiting.pop(0))
                    running[-1].start()
                try:
                    method, kind, step, payload = news.get(timeout=1.0)
                except queue.Empty:
                    # One that is killed, for want of memory for instance, says nothing.
                    if killed := [process.exitcode for process in running if (process.exitcode or 0) < 0]:
                        raise SystemExit(f"A run was killed by signal {-(killed[0] or 0)}.") from None
                    continue
                if kind == "failed":
                    raise SystemExit(f"The {method} run failed: {payload}")
                if kind == "done":
                    results[method] = payload
                    continue
                now = ORDER[min((step - 1) // Run.steps, len(ORDER) - 1)]
                progress.update(bars[method], completed=step, now=f"{now:15}")
        finally:
            for process in running:
                if len(results) < len(METHODS):
                    process.terminate()
                process.join()
    return results


def table(results: dict[str, dict[str, Any]]) -> Any:
    """Own and final pass rates of both runs, and what follows from them."""
    from rich.table import Table

    plain, guarded = (results[method] for method in METHODS)
    made = Table(title="Pass rate right after a domain's own phase (own) and at the end (final)")
    for name in ("domain", "start", "own", "final", "own", "final"):
        made.add_column(name, justify="left" if name == "domain" else "right")
    made.columns[2].header, made.columns[3].header = "plain own", "final"
    made.columns[4].header, made.columns[5].header = "guarded own", "final"
    for name in plain["own"]:
        numbers = [plain["start"][name], plain["own"][name], plain["final"][name]]
        numbers += [guarded["own"][name], guarded["final"][name]]
        made.add_row(name, *(f"{value:.2f}" for value in numbers))
    made.add_section()
    for label, key in (("average", "average"), ("forgetting", "forgetting")):
        made.add_row(label, "", "", f"{plain[key]:.3f}", "", f"[bold]{guarded[key]:.3f}[/bold]")
    share = sum(guarded["guard_seconds"].values()) / guarded["seconds"]
    made.add_row("seconds", "", "", f"{plain['seconds']:.0f}", "", f"{guarded['seconds']:.0f}")
    made.add_row("of these the guard", "", "", "", "", f"{share:.1%}")
    return made


def main() -> None:
    """Warm start, both runs, table and figure."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of both runs")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the figure and the numbers")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    from rich.console import Console

    console = Console()
    with console.status("Loading TRL"):
        import torch

        torch.set_num_threads(1)
        from .bed.domains import ORDER
        from .bed.training import share_start
        from .figure import draw
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.pt"
        with console.status("Warm start: supervised steps on noisy answers, about half a minute"):
            share_start(ORDER, options.seed, start, save=True)
        console.print(
            f"GRPO on {len(ORDER)} domains in turn, seed {options.seed}, learning rate {options.rate:g}"
        )
        results = follow({"seed": options.seed, "rate": options.rate}, str(start), console)
    console.print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(results, options.out / "demo.png")
    numbers = {"made_with": describe(), "runs": results}
    (options.out / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    console.print(f"Figure: {options.out / 'demo.png'}   Numbers: {options.out / 'demo.json'}")
    console.print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
