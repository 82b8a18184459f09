"""Puts a run's figures and numbers into one HTML file that asks for nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interference_guard.errors import ReportError
from interference_guard.files import REPORT, replacing

from . import figures, tables
from .run import Run, read_places, read_run
from .style import DOMAINS, drawing, freeze, in_tags, png, standalone, svg
from .text import plain
from .transfer import Transfer, losses, transfer

if TYPE_CHECKING:
    from interference_guard.places import Places


# Every figure that a report may have: those that this one lacks are not to be left from an earlier one.
KEYS = ("rewards", "accuracy", "interference", "agreement", "radius", "overlap", "places", "overhead")


@dataclass
class Figure:
    """One figure of the page: key, heading, note, and its drawings as SVG; a table has a wide one alone."""

    key: str
    title: str
    note: str
    wide: str
    narrow: str


@dataclass
class Made:
    """What `build_report` wrote."""

    page: Path
    figures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build_report(run: Path, out: Path | None = None, *, state: Path | None = None, force: bool = False) -> Made:
    """Write a run's report: one HTML file, and each figure as PNG and SVG beside it.

    Args:
        run: The run's folder, or its history file.
        out: The HTML file; `report.html` in the run's folder by default. The figures go into a folder of
            the same name without `.html`.
        state: A folder with the guard's state, for the maps by layer and module; by default the history's own
            from the end of the run, else the latest state under the run that the history reaches.
        force: Replace an existing report, its figures included.

    Raises:
        StateError: If there is no readable history, or `state` cannot be read; nothing is written then.
        ReportError: If the run is empty, a package is missing, or the report exists and `force` is not set.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReportError(
            f"A report needs {error.name}, which is not installed. Run: pip install 'interference-guard[report]'"
        ) from error
    found = read_run(run)
    page = out if out is not None else found.path.parent / REPORT
    if page.is_dir():
        raise ReportError(
            f"{page} is a folder, and a report is a page. Name the page, for instance {page / REPORT}."
        )
    # Without its ending a name of dots alone would be a folder above.
    if page.suffix != ".html" or not page.stem.strip("."):
        raise ReportError(
            f"{page} is not a name for a page: it needs a name, and must end in .html, for instance report.html."
        )
    folder = page.with_suffix("")
    for path in (page, folder):
        if path.exists() and not force:
            raise ReportError(f"{path} exists already. Choose another name with --out, or pass --force.")
    maps, trouble = read_places(found, state)
    made = Made(page, notes=[*found.recorded.notes, *trouble])
    moved = transfer(found)
    try:
        with _made(folder):
            drawn = [
                figure for item in _plan(found, moved, maps) if (figure := _draw(folder, made, *item)) is not None
            ]
            _clear(folder, made.figures)
            template = files("interference_guard.report").joinpath("page.html").read_text(encoding="utf-8")
            environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
            text = environment.from_string(template).render(
                title=plain(found.path.parent.resolve().name or "run"),
                tiles=_tiles(found, moved),
                figures=drawn,
                losses=[(plain(name), value) for name, value in losses(found).items()],
                settings=found.settings,
                notes=made.notes,
                colours=[(index, *pair) for index, pair in enumerate(DOMAINS)],
            )
            # A setting may hold half of a character.
            _write(page, text.encode(errors="replace"))
    except OSError as error:
        raise ReportError(f"{page} cannot be written: {error}. Choose another place with --out.") from error
    return made


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, which goes again where what is to fill it fails: half of one would refuse the next report."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


Plan = tuple[str, str, str, Callable[[bool], Any]]


def _plan(run: Run, moved: Transfer | None, maps: dict[str, dict[str, Places]]) -> list[Plan]:
    """Key, title, note and drawing of each figure."""
    plans: list[Plan] = [
        (
            "rewards",
            "Reward by domain",
            "A band is the phase of the domain in whose colour it is. Hatched: recovery.",
            lambda narrow: figures.rewards(run, narrow),
        )
    ]
    if moved is not None:
        plans.append(
            (
                "accuracy",
                "Reward after each phase",
                "A row is a phase, a column a domain. Framed: a domain right after its own phase.",
                lambda narrow: _once(narrow, lambda: tables.accuracy(moved, run)),
            )
        )
    plans += [
        (
            "interference",
            "Interference over time",
            "Above as the local model predicts it at every step, below as probes measured it; " + _units(run),
            lambda narrow: figures.interference(run, narrow),
        ),
        (
            "agreement",
            "Predicted against measured",
            "A point is a probe. On the line, the prediction was right; left of it, too low.",
            lambda narrow: figures.agreement(run, narrow),
        ),
        (
            "radius",
            "Radius",
            "The bound of the projection in the raw prediction's unit, which differs from domain to domain.",
            lambda narrow: figures.radius(run, narrow),
        ),
        (
            "overlap",
            "Overlap of protected sets",
            "Jaccard index of the units that carry half of each domain's curvature energy.",
            lambda narrow: _once(narrow, lambda: tables.overlap(run)),
        ),
    ]
    plans.append(
        (
            "places",
            "Where curvature and projections sit",
            "By layer (the first on top) and module: each domain's gradient energy, and the squared length of "
            "what projections took back from the weights for its sake, over the whole run. Columns right of the "
            "layers' modules lie outside the layers and fill a domain's whole block.",
            lambda narrow: tables.places(maps, narrow),
        )
    )
    plans.append(
        (
            "overhead",
            "Overhead",
            "The guard's part of the wall-clock time of a step; evaluations count as part of the step.",
            lambda narrow: figures.overhead(run, narrow),
        )
    )
    return plans


def _units(run: Run) -> str:
    """The end of a note: what interference is measured in."""
    nats = [run.in_nats(name) for name in run.domains if run.metric(name, "measured")]
    if not any(nats):
        return "in parts of a domain's reward range. The dashed line is the budget."
    if all(nats):
        return "in nats per token. The dashed line is the budget in nats."
    return (
        "in parts of a domain's reward range, of those marked so in nats per token. The dashed lines are the "
        "budgets of the two units."
    )


def _once(narrow: bool, draw: Callable[[], Any]) -> Any:
    """A table is drawn once: on a phone it scrolls."""
    return None if narrow else draw()


def _draw(
    folder: Path, made: Made, key: str, title: str, note: str, draw: Callable[[bool], Any]
) -> Figure | None:
    drawings = []
    for narrow in (False, True):
        with drawing(f"{key}-{narrow}"):
            figure = draw(narrow)
            if figure is None:
                continue
            text = svg(freeze(figure))
            # Ids of two inline drawings must differ.
            drawings.append(_renamed(text, f"{key}-{'n' if narrow else 'w'}-"))
            if not narrow:
                for name, data in ((f"{key}.png", png(figure)), (f"{key}.svg", standalone(text).encode())):
                    _write(folder / name, data)
                    made.figures.append(folder / name)
    return Figure(key, title, note, drawings[0], drawings[1] if drawings[1:] else "") if drawings else None


def _renamed(text: str, prefix: str) -> str:
    def rename(tag: str) -> str:
        tag = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', tag)
        tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", tag)
        return re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}\1"', tag)

    return in_tags(text, rename)


def _tiles(run: Run, moved: Transfer | None) -> list[tuple[str, str, str]]:
    """Value, name and meaning of the numbers at the top."""
    tiles = [(f"{run.last:g}", "steps", f"{len(run.domains)} domains, {len(run.phases) or 'interleaved'} phases")]
    if moved is not None:
        tiles += [
            (f"{moved.acc:.3f}", "ACC", "mean reward after the last phase"),
            (f"{moved.bwt:+.3f}", "BWT", "mean change since a domain's own phase"),
        ]
        if moved.fwt is not None:
            tiles.append((f"{moved.fwt:+.3f}", "FWT", "mean change before a domain's own phase"))
        tiles.append((f"{moved.forgetting:.3f}", "forgetting", "best after any phase minus last, mean"))
    else:
        lost = losses(run)
        if lost:
            worst = max(lost, key=lambda name: lost[name])
            tiles.append((f"{lost[worst]:.3f}", "worst forgetting", plain(worst)))
    times = run.overhead()
    if times:
        # Medians: an evaluation or a save between two reports is not the price of a step.
        share = sorted(guard / every for _, guard, every in times)[len(times) // 2]
        tiles.append((f"{share:.1%}", "overhead", "median part of a step's time"))
    return tiles


def _clear(folder: Path, written: list[Path]) -> None:
    """Remove figures of an earlier report that this one does not have; other files are not the report's."""
    for key in KEYS:
        for path in (folder / f"{key}.png", folder / f"{key}.svg"):
            if path not in written:
                path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as new:
        new.write_bytes(data)
