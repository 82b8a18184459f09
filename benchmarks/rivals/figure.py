"""Draws what the methods reach against what they cost, and how the accuracy of each domain goes.

python -m benchmarks.rivals.figure [--bed digits] [--out docs/rivals_digits.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..provenance import RESULTS
from .tuning import SEEDS

# Drawn as matrices, where they were run.
MATRICES = ("plain", "guard", "mixed")

Point = tuple[float, float]


def draw(bed: str, path: Path) -> None:
    """Read both result files of a bed and write a PNG.

    Args:
        bed: Its name.
        path: Where the figure goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads((RESULTS / f"rivals_{bed}.json").read_text(encoding="utf-8"))
    cost = json.loads((RESULTS / f"rivals_{bed}_cost.json").read_text(encoding="utf-8"))["methods"]
    rows = {row["method"]: row for row in found["summary"]["rows"] if row["tuned"]}
    shown = [name for name in MATRICES if name in rows]
    figure = plt.figure(figsize=(12, 9))
    # Twice as many columns, so that two plots stand above any number of matrices.
    grid = figure.add_gridspec(2, 2 * len(shown), height_ratios=(1.25, 1))
    places = {name: (100 * (found["ratio"] - 1), found["bytes"]) for name, found in cost.items()}
    places["plain"] = (0.0, 0.0)
    titles = ("time beyond plain training, %", "memory at the end, in sizes of the weights")
    for index, title in enumerate(titles):
        axis = figure.add_subplot(grid[0, index * len(shown) : (index + 1) * len(shown)])
        points = {name: (places[name][index], rows[name]["average"]) for name in rows if name in places}
        for name, point in points.items():
            _point(axis, point, rows[name], _crowded(point, list(points.values())))
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.3)
    figure.axes[0].set_ylabel("final pass rate, mean of domains")
    figure.suptitle(f"{bed}: every method at its tuned rate and strength", x=0.02, ha="left")
    for place, name in enumerate(shown):
        _matrix(figure.add_subplot(grid[1, 2 * place : 2 * place + 2]), found["runs"], rows[name])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _crowded(point: Point, points: list[Point]) -> bool:
    """Whether a name on the right of a point would run into another point's."""
    x, y = ([item[axis] for item in points] for axis in (0, 1))
    near, level = 0.25 * (max(x) - min(x)), 0.04 * (max(y) - min(y))
    return any(0 < other[0] - point[0] < near and abs(other[1] - point[1]) < level for other in points)


def _point(axis: Any, at: Point, row: dict[str, Any], left: bool) -> None:
    """One method, with its name on one side."""
    name = row["method"]
    colour = "#0f766e" if name.startswith("guard") else "#b45309" if row["rehearses"] else "#475569"
    axis.plot(*at, "o", color=colour)
    side = {"xytext": (-6, 3), "ha": "right"} if left else {"xytext": (6, 3), "ha": "left"}
    axis.annotate(name, at, textcoords="offset points", fontsize=8, color=colour, **side)


def _matrix(axis: Any, runs: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Mean pass rate of each domain, in the order of training, at the end of each phase."""
    chosen = [
        run
        for run in runs
        if (run["run"]["method"], run["run"]["rate"], run["run"]["strength"])
        == (row["method"], row["rate"], row["strength"])
        and run["run"]["seed"] in SEEDS
    ]
    tables = [[[point[name] for name in run["run"]["order"]] for point in run["curve"][1:]] for run in chosen]
    size = len(tables[0])
    mean = [[sum(t[i][j] for t in tables) / len(tables) for j in range(size)] for i in range(size)]
    axis.imshow(mean, cmap="BuGn", vmin=0, vmax=1)
    for i in range(size):
        for j in range(size):
            dark = mean[i][j] > 0.6
            text = f"{100 * mean[i][j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_title(f"{row['method']}, {row['rate']:g}", loc="left", fontsize=10)
    axis.set_xlabel("domain, in order of training")
    axis.set_ylabel("phase")
    axis.set_xticks(range(size), [str(i + 1) for i in range(size)])
    axis.set_yticks(range(size), [str(i + 1) for i in range(size)])


def main() -> None:
    """Draw one bed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", default="digits")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path("docs") / f"rivals_{options.bed}.png"
    draw(options.bed, out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
