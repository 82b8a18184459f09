"""The report's figures: each draws a run into a matplotlib figure, wide or narrow, or says None for no data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .run import Run, Series
from .style import INK, MUTED, PAPER, colour, dash
from .transfer import Transfer

# Points of one line that a figure can show; more would only make the page larger.
POINTS = 240
# Points of one domain in a cloud.
SPOTS = 80
# Numbers that a coloured table can carry and be read.
WRITTEN = 200
WIDE, NARROW = (9.2, 3.7), (4.4, 4.0)


def thin(points: Series, limit: int = POINTS) -> Series:
    """At most `limit` points: of each stretch the mean, so that no level is lost."""
    if len(points) <= limit:
        return points
    size = -(-len(points) // limit)
    parts = [points[index : index + size] for index in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def canvas(narrow: bool, rows: int = 1, height: float = 1.0) -> tuple[Any, list[Any]]:
    """A figure of `rows` axes, one over the other."""
    from matplotlib.figure import Figure

    width, tall = NARROW if narrow else WIDE
    figure = Figure(figsize=(width, tall * height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def shade(axis: Any, run: Run, narrow: bool, *, label: bool = True) -> None:
    """Phases as bands in their domain's colour, recoveries hatched over them."""
    index = {name: number for number, name in enumerate(run.domains)}
    for phase in run.phases:
        number = index.get(phase.active[0], 0) if phase.active else 0
        axis.axvspan(phase.first, phase.last, color=colour(number), alpha=0.1, linewidth=0)
        wide = (phase.last - phase.first) / max(run.last, 1)
        if label and not narrow and wide > 0.085:
            short = phase.name if len(phase.name) < 16 else phase.name[:14] + "…"
            middle = (phase.first + phase.last) / 2
            axis.annotate(
                short, (middle, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
            )
    for phase in run.recoveries:
        axis.axvspan(
            phase.first, phase.last, facecolor="none", edgecolor=INK, hatch="////", alpha=0.35, linewidth=0
        )
    axis.set_xlim(0, run.last)


def lines(axis: Any, run: Run, table: dict[str, Series], *, marker: str = "") -> None:
    """One line a domain, in its colour and dash."""
    for number, name in enumerate(run.domains):
        points = thin(table.get(name, []))
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, color=colour(number), linestyle=dash(number), linewidth=1.8, marker=marker, markersize=3,
                label=name,
            )  # fmt: skip


def legend(figure: Any, axis: Any, narrow: bool) -> None:
    """The names, beside the axes or below them."""
    handles, names = axis.get_legend_handles_labels()
    if not handles:
        return
    if narrow:
        figure.legend(handles, names, loc="outside lower left", ncols=2, fontsize=8, handlelength=2.6)
    else:
        figure.legend(handles, names, loc="outside right upper", fontsize=9, handlelength=2.8)


def rewards(run: Run, narrow: bool) -> Any:
    """Reward of each domain over the steps."""
    table, kind = run.rates()
    if not any(table.values()):
        return None
    figure, (axis,) = canvas(narrow, height=1.15)
    shade(axis, run, narrow)
    lines(axis, run, table, marker="o" if max(map(len, table.values())) < 60 else "")
    axis.set_ylabel(kind)
    axis.set_xlabel("optimizer step")
    legend(figure, axis, narrow)
    return figure


def interference(run: Run, narrow: bool) -> Any:
    """Predicted interference over steps, and the measured one below, each with the budget."""
    tables = [{name: run.metric(name, key) for name in run.domains} for key in ("predicted", "measured")]
    if not any(any(table.values()) for table in tables):
        return None
    figure, axes = canvas(narrow, rows=2, height=1.6)
    budget = run.settings.get("budget")
    for axis, table, title in zip(axes, tables, ("predicted", "measured"), strict=True):
        shade(axis, run, narrow, label=axis is axes[0])
        lines(axis, run, table)
        axis.set_ylabel(f"{title} interference")
        if budget:
            axis.axhline(budget, color=INK, linewidth=1, linestyle="--")
            axis.annotate(
                f"budget {budget:g}", (1.0, budget), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=8,
            )  # fmt: skip
        _roof(axis, [value for points in table.values() for _, value in points], budget)
    axes[-1].set_xlabel("optimizer step")
    legend(figure, axes[0], narrow)
    return figure


def _roof(axis: Any, values: Sequence[float], budget: float | None) -> None:
    """Leave single spikes out of the picture, so that the level stays readable."""
    if not values:
        return
    ranked = sorted(values)
    roof = max(ranked[int(0.99 * (len(ranked) - 1))] * 1.15, 2.5 * (budget or 0.0), 1e-9)
    floor = min(0.0, ranked[int(0.01 * (len(ranked) - 1))] * 1.15)
    axis.set_ylim(floor, roof)
    above = sum(value > roof for value in values)
    if above:
        axis.annotate(
            f"{above} values above", (0.0, 1.0), xycoords="axes fraction", ha="left", va="top", fontsize=8
        )


def agreement(run: Run, narrow: bool) -> Any:
    """Measured against predicted interference, a point a probe."""
    found: dict[str, Series] = {}
    for name in run.domains:
        predicted = dict(run.metric(name, "predicted"))
        pairs, before = [], None
        for step, value in run.metric(name, "measured"):
            # A metric repeats the last probe until the next one.
            if step in predicted and value != before:
                pairs.append((predicted[step], value))
            before = value
        found[name] = pairs[:: max(1, -(-len(pairs) // SPOTS))]
    values = [value for pairs in found.values() for pair in pairs for value in pair]
    if len(values) < 4:
        return None
    figure, (axis,) = canvas(narrow, height=1.3)
    marks = "os^Dv<>"
    for number, name in enumerate(run.domains):
        if found[name]:
            axis.scatter(
                *zip(*found[name], strict=True), s=16, color=colour(number), alpha=0.75, linewidths=0,
                marker=marks[number % len(marks)], label=name,
            )  # fmt: skip
    ranked = sorted(values)
    high = max(ranked[int(0.98 * (len(ranked) - 1))] * 1.1, 1e-6)
    low = min(0.0, ranked[int(0.02 * (len(ranked) - 1))] * 1.1)
    axis.plot([low, high], [low, high], color=MUTED, linewidth=1)
    budget = run.settings.get("budget")
    if budget:
        for draw in (axis.axhline, axis.axvline):
            draw(budget, color=INK, linewidth=1, linestyle="--")
        high = max(high, 1.5 * budget)
        axis.annotate("budget", (high, budget), ha="right", va="bottom", fontsize=8)
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.set_xlabel("predicted interference")
    axis.set_ylabel("measured interference")
    legend(figure, axis, narrow)
    return figure


def radius(run: Run, narrow: bool) -> Any:
    """Radius of each trust region, on a logarithmic axis."""
    table = {
        name: [(step, value) for step, value in run.metric(name, "radius") if value > 0] for name in run.domains
    }
    if not any(table.values()):
        return None
    figure, (axis,) = canvas(narrow)
    shade(axis, run, narrow)
    lines(axis, run, table)
    axis.set_yscale("log")
    # The default labels are mathematics, which is switched off because names may hold dollar signs.
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:.0e}")
    axis.yaxis.set_minor_formatter(lambda value, position: "")
    axis.set_ylabel("radius (raw)")
    axis.set_xlabel("optimizer step")
    legend(figure, axis, narrow)
    return figure


def overhead(run: Run, narrow: bool) -> Any:
    """The guard's part of the time of a step."""
    points = [(step, 100 * guard / every) for step, guard, every in run.overhead() if every > 0]
    if not points:
        return None
    figure, (axis,) = canvas(narrow)
    shade(axis, run, narrow)
    axis.plot(*zip(*thin(points), strict=True), color=INK, linewidth=1.6)
    _roof(axis, [value for _, value in points], None)
    axis.set_ylabel("guard, % of step time")
    axis.set_xlabel("optimizer step")
    return figure


def matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    top: float | None = None,
    digits: int = 2,
    ring: Sequence[tuple[int, int]] = (),
) -> Any:
    """A table of numbers as colours, light to dark; each number is written where there is room."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    size = (2.0 + 0.62 * max(len(columns), 4), min(1.3 + 0.36 * len(rows), 12.0))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    scale = colormaps["cividis"].reversed()
    known = [value for row in values for value in row if value is not None]
    roof = top if top is not None else max([*known, 1e-12])
    table = [[math.nan if value is None else min(max(value / roof, 0.0), 1.0) for value in row] for row in values]
    axis.pcolormesh(table, cmap=scale, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    written = len(known) <= WRITTEN
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is None or not written:
                continue
            parts = zip((0.299, 0.587, 0.114), scale(table[y][x]), strict=False)
            light = sum(weight * part for weight, part in parts) > 0.5
            text = f"{value:.{digits}f}".removeprefix("0")
            # Not the page's own colours, which change with its ground: the field's does not.
            axis.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8.5,
                color="#000000" if light else "#fffffe",
            )  # fmt: skip
    for y, x in ring:
        axis.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, fill=False, edgecolor=INK, linewidth=1.8))
    axis.set_xlim(0, len(columns))
    axis.set_ylim(len(rows), 0)
    axis.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=40, ha="right", fontsize=8)
    axis.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=8)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if not written:
        axis.set_title(f"darkest: {roof:.{digits}f}", loc="left", fontsize=8, color=MUTED)
    return figure


def overlap(run: Run) -> Any:
    """Jaccard indices of the units that carry half of each domain's curvature energy."""
    found = run.overlaps()
    if not found:
        return None
    names = [name for name in run.domains if any(name in pair for pair in found)]
    table = [[1.0 if a == b else found.get((a, b), found.get((b, a))) for b in names] for a in names]
    return matrix(table, names, names, top=1.0)


def curvature(maps: dict[str, dict[tuple[int, str], float]], narrow: bool) -> Any:
    """Where each domain's curvature energy sits: layers by modules, all domains on one scale."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not maps:
        return None
    keys = list(dict.fromkeys(key for table in maps.values() for key in table))
    modules = list(dict.fromkeys(module for layer, module in keys if layer >= 0))
    layers = sorted({layer for layer, _ in keys if layer >= 0})
    outside = [module for layer, module in keys if layer < 0]
    names = [*modules, *outside]
    # One field for all domains, block under block: many axes would take seconds to lay out.
    block = max(len(layers), 1)
    cells: list[list[float]] = []
    for table in maps.values():
        beside = [table.get((-1, module), math.nan) for module in outside]
        cells += [[*(table.get((layer, module), 0.0) for module in modules), *beside] for layer in layers or [0]]
        cells.append([math.nan for _ in names])
    size = ((NARROW if narrow else WIDE)[0], min(1.9 + len(maps) * (0.25 + min(block * 0.06, 2.0)), 40.0))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    scaled = [[100 * value for value in row] for row in cells]
    mesh = axis.pcolormesh(scaled, cmap=colormaps["cividis"].reversed(), vmin=0)
    axis.set_ylim(len(cells) - 1, 0)
    axis.set_yticks([index * (block + 1) + block / 2 for index in range(len(maps))], maps, fontsize=8)
    axis.set_xticks([index + 0.5 for index in range(len(names))], names, rotation=90, fontsize=7 if narrow else 8)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    figure.colorbar(mesh, ax=axis, label="% of energy", aspect=30)
    return figure


def accuracy(found: Transfer, run: Run) -> Any:
    """Reward of each domain after each phase; a domain's own phase is framed."""
    names = [name for name in run.domains if any(name in row for row in found.rows)]
    rows: list[list[float | None]] = [[row.get(name) for name in names] for row in found.rows]
    labels = [f"{index + 1} {name}" for index, name in enumerate(found.phases)]
    ring = [(index, names.index(name)) for index, name in enumerate(found.phases) if name in names]
    if found.start:
        rows.insert(0, [found.start.get(name) for name in names])
        labels.insert(0, "start")
        ring = [(y + 1, x) for y, x in ring]
    return matrix(rows, labels, names, ring=ring)
