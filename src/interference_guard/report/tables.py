"""The report's coloured tables: accuracy, overlap, and sums by layer and module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .figures import NARROW, WIDE
from .run import Run
from .style import INK, MUTED, PAPER
from .text import plain, shortened, width
from .transfer import Transfer

if TYPE_CHECKING:
    from interference_guard.places import Places

# Numbers that a coloured table can carry and be read.
WRITTEN = 200
# Inches of a letter of the names.
LETTER = 0.07
# Maps of more domains than this would make the page long and large.
MAPS = 12
PLACES = (("curvature", "curvature"), ("taken back by projections", "projected"))
# The one row of a model without numbered layers.
NO_LAYER: Sequence[int | None] = (None,)


def matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    top: float | None = None,
    ring: Sequence[tuple[int, int]] = (),
) -> Any:
    """A table of numbers as colours, light to dark; each number is written where there is room."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    below, beside = ([shortened(name) for name in names] for names in (columns, rows))
    # Names below are turned, and take less height than width.
    left = max(2.0, 0.4 + LETTER * max(map(width, beside)))
    under = max(1.3, 0.3 + 0.7 * LETTER * max(map(width, below)))
    size = (left + 0.62 * max(len(columns), 4), min(under + 0.36 * len(rows), 12.0))
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
            text = f"{value:.2f}".removeprefix("0")
            # Not the page's own colours, which change with its ground: the field's does not.
            axis.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8.5,
                color="#000000" if light else "#fffffe",
            )  # fmt: skip
    for y, x in ring:
        axis.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, fill=False, edgecolor=INK, linewidth=1.8))
    axis.set_xlim(0, len(columns))
    axis.set_ylim(len(rows), 0)
    # Turned about their ends, which stay at the columns in the page's narrower font.
    axis.set_xticks(
        [x + 0.5 for x in range(len(columns))], below, fontsize=8, rotation=40, rotation_mode="anchor", ha="right"
    )
    axis.set_yticks([y + 0.5 for y in range(len(rows))], beside, fontsize=8)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if not written:
        axis.set_title(f"darkest: {roof:.2f}", loc="left", fontsize=8, color=MUTED)
    return figure


def overlap(run: Run) -> Any:
    """Jaccard indices of the units that carry half of each domain's curvature energy."""
    found = run.overlaps()
    if not found:
        return None
    names = [name for name in run.domains if any(name in pair for pair in found)]
    table = [[1.0 if a == b else found.get((a, b), found.get((b, a))) for b in names] for a in names]
    return matrix(table, names, names, top=1.0)


def places(tables: dict[str, dict[str, Places]], narrow: bool) -> Any:
    """Where each domain's curvature sits, and what projections took for it: layers by modules."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = {title: table for title, name in PLACES if (table := tables.get(name))}
    if not drawn:
        return None
    domains = list(dict.fromkeys(name for table in drawn.values() for name in table))[:MAPS]
    keys = list(dict.fromkeys(key for table in drawn.values() for name in domains for key in table.get(name, {})))
    modules = list(dict.fromkeys(module for layer, module in keys if layer is not None))
    layers = sorted({layer for layer, _ in keys if layer is not None})
    outside = [module for layer, module in keys if layer is None]
    names = [*modules, *outside]
    # One field for all domains, block under block: many axes would take seconds to lay out.
    block = max(len(layers), 1)
    tall = 0.3 + len(domains) * (0.28 + min(block * 0.06, 2.0))
    columns = 1 if narrow else len(drawn)
    size = ((NARROW if narrow else WIDE)[0], min(1.6 + tall * (len(drawn) // columns), 40.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(drawn) // columns, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, (title, table) in zip(axes, drawn.items(), strict=True):
        cells: list[list[float]] = []
        for domain in domains:
            cells += _block(table.get(domain, {}), layers, modules, outside)
        mesh = axis.pcolormesh(cells, cmap=colormaps["cividis"].reversed(), vmin=0)
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(visible=False)
        axis.tick_params(length=0)
        bar = figure.colorbar(mesh, ax=axis, aspect=30)
        bar.set_label("% of the domain's sum", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    axes[0].set_ylim(len(domains) * (block + 1) - 1, 0)
    middles = [index * (block + 1) + block / 2 for index in range(len(domains))]
    axes[0].set_yticks(middles, [shortened(name) for name in domains], fontsize=8)
    axes[0].set_xticks([index + 0.5 for index in range(len(names))], [plain(name) for name in names])
    for axis in axes:
        axis.tick_params(axis="x", rotation=90, labelsize=7 if narrow else 8)
        axis.tick_params(axis="y", labelsize=8)
    return figure


def _block(
    table: Places, layers: Sequence[int | None], modules: list[str], outside: list[str]
) -> list[list[float]]:
    """A domain's rows of the field in percent of its sum, and an empty row below; blank without a sum."""
    total = sum(table.values())
    part = {key: 100 * value / total for key, value in table.items()} if total > 0 else {}
    missing = 0.0 if part else math.nan
    beside = [part.get((None, module), math.nan) for module in outside]
    rows = [
        [*(part.get((layer, module), missing) for module in modules), *beside] for layer in layers or NO_LAYER
    ]
    return [*rows, [math.nan for _ in rows[0]]]


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
