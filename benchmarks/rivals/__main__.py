"""Tune every method on one seed, then compare them on others, in two orders.

    python -m benchmarks.rivals --bed digits [--only plain guard ...] [--workers 2] [--seeds 0 1 2]
    python -m benchmarks.rivals --bed digits --show

Writes `benchmarks/results/rivals_<bed>.json` after every run and goes on from it when started again. A run
takes about a minute on one core. Where that file was made on a processor of another maker, the runs go to
`rivals_<bed>_<maker>.json`; only what methods were tuned on is taken from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from typing import Any

from ..bed.run import Run
from ..processes import pool
from ..provenance import RESULTS, here, write
from .registry import RIVALS
from .running import work
from .table import markdown, show, summarise
from .tuning import SEEDS, TUNING_SEED, Tuning, key, tuning_runs


def main() -> None:
    """Run what is missing, or show what there is."""
    from ..bed.beds import BEDS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--only", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="only show the results there are")
    parser.add_argument("--markdown", action="store_true", help="only print the documentation's table")
    options = parser.parse_args()
    if TUNING_SEED in options.seeds:
        parser.error(f"--seeds {options.seeds}: seed {TUNING_SEED} is what methods are tuned on; leave it out.")
    bed, name = BEDS[options.bed], here(f"rivals_{options.bed}")
    runs = _runs(name)
    elsewhere = tuning_runs(_runs(f"rivals_{options.bed}")) if name != f"rivals_{options.bed}" else []
    if options.show or options.markdown:
        summary = summarise(bed, runs, options.seeds, elsewhere)
        if options.markdown:
            print(markdown(summary))
        else:
            show(summary)
        return
    started = time.perf_counter()
    # A process for each run: what one leaves behind cannot reach another.
    with tempfile.TemporaryDirectory() as starts, pool(options.workers, runs_each=1) as running:
        waiting: dict[Future[dict[str, Any]], str] = {}
        while True:
            found = {key(run["run"]): run["average"] for run in (*elsewhere, *runs)}
            wanted: list[Run] = []
            for rival in options.only:
                wanted += Tuning(rival, RIVALS[rival], bed, found, options.seeds).needed()[0]
            for run in wanted:
                text = key(asdict(run))
                if text not in waiting.values() and len(waiting) < options.workers:
                    waiting[running.submit(work, run, starts)] = text
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                del waiting[future]
                runs.append(future.result())
                runs.sort(key=lambda item: key(item["run"]))
                write(name, {"summary": summarise(bed, runs, options.seeds, elsewhere), "runs": runs})
                _say(future.result(), (time.perf_counter() - started) / 60)
    show(summarise(bed, runs, options.seeds, elsewhere))


def _runs(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return found


def _say(found: dict[str, Any], minutes: float) -> None:
    run = found["run"]
    print(
        f"{minutes:.0f} min: {run['method']} {run['rate']:g} {run['strength']} seed {run['seed']}: average "
        f"{found['average']:.3f}, forgetting {found['forgetting']:.3f}, {found['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
