"""Colours and drawing settings; figures take the page's colours, so that one drawing serves light and dark.

The hues are those of Okabe and Ito's palette for all kinds of colour vision, without its black and yellow,
which vanish on one of the two grounds. Dashes repeat the distinction without colour.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Light ground, dark ground.
DOMAINS = (
    ("#0072b2", "#4aa8e0"),
    ("#d55e00", "#f0803c"),
    ("#009e73", "#2bc79b"),
    ("#cc79a7", "#e39ac4"),
    ("#b07a00", "#e6a817"),
    ("#56b4e9", "#86cdf5"),
    ("#7a6fac", "#a79cdc"),
    ("#5f6770", "#aab2bd"),
)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2, 3, 2)),
    (0, (2, 3)),
)
NUMBER = re.compile(r"-?\d+\.\d{3,}")
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6570", "#d3d9de", "#ffffff"
# Colour in a drawing to the page's variable.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    light: f"--d{index}" for index, (light, _) in enumerate(DOMAINS)
}


def colour(index: int) -> str:
    """Colour of a domain by its place in the list."""
    return DOMAINS[index % len(DOMAINS)][0]


def dash(index: int) -> Any:
    """Line style of a domain: no two of one round through the colours share it, nor one colour in two rounds."""
    return DASHES[(index // len(DOMAINS) + index % len(DOMAINS)) % len(DASHES)]


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """The report's settings of matplotlib inside of the block, without a screen; `salt` keeps SVG ids apart."""
    import matplotlib

    settings: Any = {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's own fonts have the letters: in an SVG text is text.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def freeze(figure: Any) -> Any:
    """Lay a figure out once: each further output of it would do so twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def svg(figure: Any) -> str:
    """A figure as SVG text with the page's colours in place of the drawing's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Inline SVG needs neither a document type nor metadata with addresses of standards.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return in_tags(text, _tag)


def in_tags(text: str, change: Callable[[str], str]) -> str:
    """Change the tags alone: a label that says 0.005 must not become 0.01, and one may look like code.

    >>> in_tags('<text id="y">id="y"</text>', str.upper)
    '<TEXT ID="Y">id="y"</TEXT>'
    """
    return re.sub(r"<[^>]+>", lambda tag: change(tag[0]), text)


def _tag(tag: str) -> str:
    tag = NUMBER.sub(_shorter, tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    for plain, variable in VARIABLES.items():
        tag = tag.replace(plain, f"var({variable})")
    return tag


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def standalone(text: str) -> str:
    """A figure's SVG for the page as a file of its own: colours of the light page in place of its variables."""
    text = in_tags(text, _light)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text


def _light(tag: str) -> str:
    for plain, variable in VARIABLES.items():
        tag = tag.replace(f"var({variable})", plain)
    return tag


def png(figure: Any) -> bytes:
    """A figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()
