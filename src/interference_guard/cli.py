"""Entry point of the command line: errors become one sentence and an exit code, never a traceback.

Exit codes: 0 done, 1 a limit of `check` was passed or `doctor` found a fault, 2 wrong usage or input that
cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .errors import GuardError

EXTRA = "interference-guard needs {0}, which is not installed. Run: pip install 'interference-guard[report]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of the process by default.

    Returns:
        The exit code, for `sys.exit`.
    """
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "packaging"):
            raise
        sys.stderr.write(EXTRA.format(error.name) + "\n")
        return 2
    try:
        app(args=None if arguments is None else list(arguments), prog_name="interference-guard")
    except GuardError as error:
        _say(str(error))
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"Error: {sentence}\n")


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
