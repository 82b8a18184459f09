"""The report's figures: each draws a run into a matplotlib figure, wide or narrow, or says None for no data."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .run import Run, Series
from .style import INK, MUTED, colour, dash
from .text import shortened, width

# Points of one line that a figure can show; more would only make the page larger.
POINTS = 240
# Points of one line from which it needs no marks.
DENSE = 60
# Points of one domain in a cloud.
SPOTS = 80
# Cells of the longest name beside which a narrow legend has a second column.
COLUMN = 20
# Inches of a legend's line for each point of its letters.
LINE = 1.75 / 72
WIDE, NARROW = (9.2, 3.7), (4.4, 4.0)


def thin(points: Series) -> Series:
    """At most `POINTS` points: of each stretch the mean, so that no level is lost."""
    if len(points) <= POINTS:
        return points
    size = -(-len(points) // POINTS)
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
            middle = (phase.first + phase.last) / 2
            axis.annotate(
                shortened(phase.name, 15),
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
            )
    for phase in run.recoveries:
        axis.axvspan(
            phase.first, phase.last, facecolor="none", edgecolor=INK, hatch="////", alpha=0.5, linewidth=0
        )
    axis.set_xlim(0, max(run.last, 1))


def thinned(run: Run, name: str) -> dict[str, Series]:
    """A metric of every domain as `thin` points."""
    return run.once(f"thin/{name}", lambda: {domain: thin(run.metric(domain, name)) for domain in run.domains})


def lines(axis: Any, run: Run, table: dict[str, Series], *, mark: bool = False) -> None:
    """One line a domain, in its colour and dash; with `mark` the points of those that have few are marked."""
    for number, name in enumerate(run.domains):
        points = table.get(name, [])
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, color=colour(number), linestyle=dash(number), linewidth=1.8, markersize=3,
                marker="o" if mark and len(points) < DENSE else "", label=str(number),
            )  # fmt: skip


def legend(figure: Any, axis: Any, run: Run, narrow: bool, marks: Mapping[str, str] | None = None) -> None:
    """The names, beside the axes or below them, with what `marks` says of a domain behind its name."""
    handles, numbers = axis.get_legend_handles_labels()
    if not handles:
        return
    # The labels are numbers until the legend is made: it leaves out what begins with an underscore.
    shown = [run.domains[int(number)] for number in numbers]
    names = [shortened(name) + (f" ({marks[name]})" if marks and name in marks else "") for name in shown]
    # A second column of long names would end beyond a phone's edge.
    columns = 2 if narrow and max(map(width, names)) <= COLUMN else 1
    size = 8 if narrow else 9
    tall = LINE * size * -(-len(names) // columns)
    if narrow:
        made = figure.legend(
            handles, numbers, loc="outside lower left", ncols=columns, fontsize=size, handlelength=2.6
        )
        # Below the axes, which keep the room that four lines leave them.
        figure.set_figheight(figure.get_figheight() + max(0.0, tall - 4 * LINE * size))
    else:
        made = figure.legend(handles, numbers, loc="outside right upper", fontsize=size, handlelength=2.8)
        figure.set_figheight(max(figure.get_figheight(), tall + 0.3))
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_text(name)


def in_nats(run: Run) -> dict[str, str]:
    """Marks of the domains whose interference is in nats per token."""
    return {name: "nats" for name in run.domains if run.in_nats(name)}


def budgets(run: Run) -> list[tuple[float, str]]:
    """The budget of each unit that interference is measured in, and what it is called."""
    nats = {run.in_nats(name) for name in run.domains if run.metric(name, "measured")} or {False}
    keys = [("budget", "budget")] * (False in nats) + [("budget_nats", "budget in nats")] * (True in nats)
    return [(run.settings[key], label) for key, label in keys if isinstance(run.settings.get(key), int | float)]


def rewards(run: Run, narrow: bool) -> Any:
    """Reward of each domain over the steps."""
    table, kinds = run.once("rates", lambda: _thin_rates(run))
    if not table:
        return None
    figure, (axis,) = canvas(narrow, height=1.15)
    shade(axis, run, narrow)
    lines(axis, run, table, mark=True)
    # Evaluations and training rows are not the same rows: lines of both must not pass for one kind.
    mixed = len(set(kinds.values())) > 1
    axis.set_ylabel("reward" if mixed else f"{next(iter(kinds.values()))} reward")
    axis.set_xlabel("optimizer step")
    legend(figure, axis, run, narrow, kinds if mixed else None)
    return figure


def _thin_rates(run: Run) -> tuple[dict[str, Series], dict[str, str]]:
    table, kinds = run.rates()
    return {name: thin(points) for name, points in table.items()}, kinds


def interference(run: Run, narrow: bool) -> Any:
    """Predicted interference over steps, and the measured one below, each with the budget."""
    names = ("predicted", "measured")
    tables = [thinned(run, name) for name in names]
    if not any(any(table.values()) for table in tables):
        return None
    figure, axes = canvas(narrow, rows=2, height=1.6)
    allowed = budgets(run)
    for axis, table, title in zip(axes, tables, names, strict=True):
        shade(axis, run, narrow, label=axis is axes[0])
        lines(axis, run, table)
        axis.set_ylabel(f"{title} interference")
        for budget, label in allowed:
            axis.axhline(budget, color=INK, linewidth=1, linestyle="--")
            axis.annotate(
                f"{label} {budget:g}", (0.005, budget), xycoords=("axes fraction", "data"), ha="left",
                va="bottom", fontsize=8,
            )  # fmt: skip
        ranked = run.once(f"ranked/{title}", partial(_ranked, run, title))
        _roof(axis, ranked, max((budget for budget, _ in allowed), default=None))
    axes[-1].set_xlabel("optimizer step")
    legend(figure, axes[0], run, narrow, in_nats(run))
    return figure


def _ranked(run: Run, name: str) -> list[float]:
    return sorted(value for domain in run.domains for _, value in run.metric(domain, name))


def _roof(axis: Any, ranked: Sequence[float], budget: float | None) -> None:
    """Leave single spikes of ascending values out of the picture, so that the level stays readable."""
    if not ranked:
        return
    roof = max(ranked[int(0.99 * (len(ranked) - 1))] * 1.15, 2.5 * (budget or 0.0), 1e-9)
    floor = min(0.0, ranked[int(0.01 * (len(ranked) - 1))] * 1.15)
    axis.set_ylim(floor, roof)
    above = len(ranked) - bisect_right(ranked, roof)
    if above:
        axis.annotate(
            f"{above} values above", (0.0, 1.0), xycoords="axes fraction", ha="left", va="top", fontsize=8
        )


def _probes(run: Run) -> dict[str, Series]:
    """Predicted and measured interference at each probe, by domain."""
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
    return found


def agreement(run: Run, narrow: bool) -> Any:
    """Measured against predicted interference, a point a probe."""
    found = run.once("probes", lambda: _probes(run))
    values = [value for pairs in found.values() for pair in pairs for value in pair]
    if len(values) < 4:
        return None
    figure, (axis,) = canvas(narrow, height=1.3)
    marks = "os^Dv<>"
    for number, name in enumerate(run.domains):
        if found[name]:
            axis.scatter(
                *zip(*found[name], strict=True), s=16, color=colour(number), alpha=0.75, linewidths=0,
                marker=marks[number % len(marks)], label=str(number),
            )  # fmt: skip
    ranked = sorted(values)
    high = max(ranked[int(0.98 * (len(ranked) - 1))] * 1.1, 1e-6)
    low = min(0.0, ranked[int(0.02 * (len(ranked) - 1))] * 1.1)
    axis.plot([low, high], [low, high], color=MUTED, linewidth=1)
    allowed = budgets(run)
    high = max([high, *(1.5 * budget for budget, _ in allowed)])
    for budget, label in allowed:
        for draw in (axis.axhline, axis.axvline):
            draw(budget, color=INK, linewidth=1, linestyle="--")
        axis.annotate(label, (high, budget), ha="right", va="bottom", fontsize=8)
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.set_xlabel("predicted interference")
    axis.set_ylabel("measured interference")
    legend(figure, axis, run, narrow, in_nats(run))
    return figure


def radius(run: Run, narrow: bool) -> Any:
    """Radius of each trust region, on a logarithmic axis."""
    table = {
        name: [(step, value) for step, value in points if value > 0]
        for name, points in thinned(run, "radius").items()
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
    legend(figure, axis, run, narrow)
    return figure


def overhead(run: Run, narrow: bool) -> Any:
    """The guard's part of the time of a step."""
    points = run.once("overhead", lambda: [(step, 100 * guard / every) for step, guard, every in run.overhead()])
    if not points:
        return None
    figure, (axis,) = canvas(narrow)
    shade(axis, run, narrow)
    axis.plot(*zip(*thin(points), strict=True), color=INK, linewidth=1.6)
    _roof(axis, sorted(value for _, value in points), None)
    axis.set_ylabel("guard, % of step time")
    axis.set_xlabel("optimizer step")
    return figure
