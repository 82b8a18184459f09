"""A guard's latest metrics for a terminal: a panel of a few lines drawn by rich, or one plain line."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .text import plain

if TYPE_CHECKING:
    from interference_guard.guard import Guard

# Cells of the bar that shows measured interference against the budget.
CELLS = 8
# Lines of a panel around those of its domains: border, names of the columns, border.
FRAME = 3
COLUMNS = ("domain", "", "reward", "predicted", "measured", "of budget", "radius", "lost")


@dataclass
class DomainRow:
    """What is shown of one domain; NaN is unknown.

    Args:
        name: The domain, without characters that would move a terminal's cursor.
        role: ``"training"``, ``"recovering"``, ``"held"`` (protected) or empty.
        budget: Allowed interference, in the unit of `values["measured"]`.
        values: Latest metrics by the last part of their names.
    """

    name: str
    role: str
    budget: float
    values: Mapping[str, float] = field(default_factory=dict)

    def number(self, key: str, form: str = ".3f") -> str:
        """A metric as text, or a dash."""
        value = self.values.get(key, math.nan)
        return format(value, form) if math.isfinite(value) else "-"

    @property
    def share(self) -> float:
        """Measured interference over the budget."""
        return self.values.get("measured", math.nan) / self.budget


class LiveView:
    """Keeps the latest value of each metric and turns them into text; computes none itself.

    Some metrics are only reported where something happened since the last report, so the latest are kept.
    """

    def __init__(self) -> None:
        self.step = 0
        self.rows: list[DomainRow] = []
        self.recovery = ""
        self._values: dict[str, dict[str, float]] = {}
        self._kept = self._seconds = math.nan

    def update(self, guard: Guard, metrics: Mapping[str, float]) -> None:
        """Take in a report.

        Args:
            guard: The guard; only what costs nothing to read is read.
            metrics: What `Guard.metrics` returned; other names are passed over.
        """
        self.step = guard.steps
        self._kept = metrics.get("guard/update_kept", math.nan)
        self._seconds = metrics.get("guard/seconds", self._seconds)
        self.recovery = _recovery(guard) if guard.config.recovery else ""
        self.rows = []
        for name, state in guard.domains.items():
            prefix = f"guard/{name}/"
            values = self._values.setdefault(name, {})
            values |= {
                key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)
            }
            role = "training" if name in guard.active else "held" if state.anchored else ""
            role = "recovering" if name == guard.recovery else role
            self.rows.append(DomainRow(plain(name), role, state.region.allowed, dict(values)))

    def line(self) -> str:
        """Everything in one line without control characters."""
        parts = [f"guard: step {self.step}"]
        for row in self.rows:
            words = [
                row.role,
                *(f"{key} {row.number(key)}" for key in ("reward", "predicted") if key in row.values),
            ]
            if "measured" in row.values:
                words.append(f"measured {row.number('measured')} of {row.budget:g}")
            if "radius" in row.values:
                words.append(f"radius {row.number('radius', '.1e')}")
            if "forgetting" in row.values:
                words.append(f"lost {row.number('forgetting')}")
            parts.append(f"{row.name}: " + ", ".join(word for word in words if word))
        return "; ".join([*parts, *self._footer()])

    def panel(self, width: int, height: int = 24, *, colour: bool = True, unicode: bool = True) -> list[str]:
        """The panel's lines, with colours as escape sequences; needs rich.

        Args:
            width: Cells of a line, at most.
            height: Most lines; domains that find no room are counted.
            colour: Whether to colour; what colours say, words say too.
            unicode: Whether the terminal shows more than ASCII.
        """
        from rich import box
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, padding=(0, 1), show_edge=False)
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True, header_style="dim")
        room = max(height - FRAME, 1)
        shown = self.rows if len(self.rows) <= room else self.rows[: room - 1]
        for row in shown:
            over = row.share > 1
            table.add_row(
                # Text, not markup: a domain may be called [math].
                Text(row.name, "bold" if row.role in ("training", "recovering") else ""),
                row.role,
                row.number("reward"),
                row.number("predicted"),
                Text(row.number("measured"), "bold red" if over else ""),
                Text(meter(row.share, unicode), "bold red" if over else ""),
                row.number("radius", ".1e"),
                row.number("forgetting", "+.3f"),
            )
        if len(shown) < len(self.rows):
            table.add_row(f"and {len(self.rows) - len(shown)} more")
        framed = Panel(
            table,
            box=box.ROUNDED if unicode else box.ASCII,
            title=Text(f"guard, step {self.step}"),
            subtitle=Text(", ".join(self._footer())),
            padding=0,
            border_style="dim",
        )
        stream = io.StringIO()
        system: Any = "standard" if colour else None
        console = Console(file=stream, width=width, height=height, force_terminal=True, color_system=system)
        console.print(framed)
        return stream.getvalue().splitlines()

    def _footer(self) -> Iterable[str]:
        if math.isfinite(self._kept):
            yield f"{self._kept:.0%} of the protected displacement kept"
        if self.recovery:
            yield self.recovery
        if math.isfinite(self._seconds):
            yield f"{self._seconds:.3f} s a step"


def meter(share: float, unicode: bool = True) -> str:
    """A bar and a percentage.

    >>> meter(0.5, unicode=False), meter(2.0, unicode=False)
    ('####....   50%', 'over ###  200%')
    """
    if not math.isfinite(share):
        return "-"
    full, empty = ("█", "░") if unicode else ("#", ".")
    # A gain uses none of the budget.
    share = min(max(share, 0.0), 9.99)
    number = f"{share:>5.0%}"
    if share > 1:
        return "over " + full * (CELLS - 5) + " " + number
    filled = round(share * CELLS)
    return full * filled + empty * (CELLS - filled) + " " + number


def _recovery(guard: Guard) -> str:
    schedule = guard.schedule
    failed = f", {schedule.failures} of {schedule.phases} phases failed" if schedule.phases else ""
    if schedule.domain is None:
        return f"recovery {schedule.phase}{failed}"
    return f"recovering {plain(schedule.domain)}, {schedule.taken} steps{failed}"
