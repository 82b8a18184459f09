"""The guard's latest metrics in the terminal: a panel under the trainer's progress bar, or a line a log."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tqdm.std import tqdm

from interference_guard.guard import Guard
from interference_guard.report.live import LiveView
from interference_guard.telling import warn


class LiveDisplay:
    """Shows a `LiveView` where the trainer shows its progress bar.

    The panel's lines are bars of the same library, so the trainer's bar, its logs and whatever else is written
    with `tqdm.write` stay whole, and the panel goes with its last line. Without a terminal, without rich, or with
    the trainer's bars switched off, every log is one line on the standard output.

    Attributes:
        bars (`bool`): Whether the trainer shows bars (`disable_tqdm`); True until it is set.
    """

    def __init__(self) -> None:
        self.bars = True
        self._view = LiveView()
        self._lines: list[Any] = []
        self._failed = False

    def show(self, guard: Guard, logs: Mapping[str, Any]) -> None:
        """Draw what a log says; a fault ends the display with a warning, never the run."""
        if self._failed:
            return
        try:
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            self._view.update(guard, numbers)
            if self.bars and is_terminal(sys.stderr) and find_spec("rich") is not None:
                self._draw()
            else:
                tqdm.write(self._view.line(), file=sys.stdout)
        except Exception as error:
            # Whatever a terminal, its bars or their library raise: a picture must not end hours of training.
            self._failed = True
            self.close()
            warn(f"The guard's display ends, training goes on: {error!r}.")

    def close(self) -> None:
        """Take the panel off the screen; the next `show` draws it again."""
        while self._lines:
            self._lines.pop().close()

    def _draw(self) -> None:
        size = _size(sys.stderr)
        unicode = (sys.stderr.encoding or "").lower().startswith("utf")
        # The trainer has a bar for training and one for evaluation, and the last column must stay free.
        lines = self._view.panel(size.columns - 1, max(size.lines - 3, 4), unicode=unicode)
        while len(self._lines) > len(lines):
            self._lines.pop().close()
        for index, text in enumerate(lines):
            if index < len(self._lines):
                self._lines[index].set_description_str(text)
            else:
                bar = tqdm(desc=text, bar_format="{desc}", position=index + 1, leave=False, file=sys.stderr)
                self._lines.append(bar)


def _size(stream: Any) -> os.terminal_size:
    try:
        return os.get_terminal_size(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return shutil.get_terminal_size()


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False
