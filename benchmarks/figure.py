"""The demo's figure: pass rates over steps, plain and guarded, and the interference below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BUDGET = 0.02


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw both runs.

    Args:
        results: By method, a run's result as written by the demo.
        path: Where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain, guarded = results["plain"], results["guarded"]
    order, steps = plain["run"]["order"], plain["run"]["steps"]
    colours = dict(zip(order, plt.get_cmap("Dark2").colors, strict=False))
    figure, axes = plt.subplots(4, 1, figsize=(11, 12.5), sharex=True, height_ratios=(3, 3, 2, 2))
    for axis, run, title in ((axes[0], plain, "plain"), (axes[1], guarded, "guarded")):
        for name in order:
            points = run["curve"]
            own = order.index(name) * steps
            x, y = [point["step"] for point in points], [point[name] for point in points]
            axis.plot(x, y, color=colours[name], linewidth=0.8, alpha=0.35)
            later = [(a, b) for a, b in zip(x, y, strict=True) if a >= own]
            axis.plot(*zip(*later, strict=True), color=colours[name], linewidth=2, label=name)
        axis.set_ylim(0, 1)
        axis.set_ylabel("pass rate")
        axis.set_title(
            f"{title}: average {run['average']:.3f}, forgetting {run['forgetting']:.3f}",
            loc="left",
            fontsize=11,
        )
    for axis, key, title in (
        (axes[2], "predicted", "guarded: predicted interference (free, every step)"),
        (axes[3], "measured", "guarded: measured interference (retained completions, now and then)"),
    ):
        for name in order[:-1]:
            metric = f"guard/{name}/{key}"
            points = [(line["step"], line[metric]) for line in guarded["metrics"] if metric in line]
            if points:
                axis.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.4)
        axis.axhline(BUDGET, color="black", linewidth=1, linestyle="--")
        axis.text(2, BUDGET, " budget", va="bottom", fontsize=8)
        axis.set_ylabel("reward lost")
        axis.set_title(title, loc="left", fontsize=11)
    for axis in axes:
        for index, name in enumerate(order):
            axis.axvspan(index * steps, (index + 1) * steps, color=colours[name], alpha=0.09, linewidth=0)
        axis.set_xlim(0, len(order) * steps)
        axis.spines[["top", "right"]].set_visible(False)
    for index, name in enumerate(order):
        axes[0].text((index + 0.5) * steps, 1.0, name, ha="center", va="bottom", fontsize=8, color=colours[name])
    axes[0].set_title(axes[0].get_title(loc="left"), loc="left", fontsize=11, pad=18)
    axes[-1].set_xlabel("optimizer step; a band is the phase of the domain it is named after")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
