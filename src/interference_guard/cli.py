"""Entry point of the command line: errors become one sentence and an exit code, never a traceback.

Exit codes: 0 done, 1 a limit of `check` was passed or `doctor` found a fault, 2 wrong usage, input that cannot
be read, output that cannot be written or a gate that saw nothing of a domain, 3 a fault of the program.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from .errors import GuardError
from .report.text import plain

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

        app(args=None if arguments is None else list(arguments), prog_name="interference-guard")
    except GuardError as error:
        _say(str(error))
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    except Exception as error:
        # The outermost frame, and the only place where anything is caught: left alone, Python ends with 1, and a
        # script that calls `check` would take a fault for a limit that was passed.
        if isinstance(error, ModuleNotFoundError) and error.name in ("typer", "rich", "packaging"):
            sys.stderr.write(EXTRA.format(error.name) + "\n")
            return 2
        if isinstance(error, OSError) and error.filename is not None:
            # Refused by the system: a name too long, a folder above that may not be searched.
            _say(f"{error.filename} cannot be used: {error.strerror}. Check the path and its permissions.")
            return 2
        return _fault(error)
    return 0


def _fault(error: Exception) -> int:
    place = traceback.extract_tb(error.__traceback__)[-1]
    _say(
        f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno}). This is a fault of the "
        "program, or a damaged input that it does not know. Please report it with the command and its input."
    )
    return 3


def _say(sentence: str) -> None:
    sys.stderr.write(f"Error: {plain(sentence)}\n")


class _Pipe(io.FileIO):
    """A stream whose reader may have gone: what is written then is lost, and nobody is told.

    typer and rich end a program with 1 there, which for `check` says that a limit was passed. What is lost on a
    full disk is told at the end.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failure = error
        return memoryview(data).nbytes


def _open(stream: TextIO | None) -> tuple[TextIO, _Pipe | None]:
    """A stream on the same file that bears a closed pipe, and names that the encoding lacks."""
    if stream is None:
        # Closed by the caller.
        return io.StringIO(), None
    try:
        number, lines = stream.fileno(), stream.isatty() or stream is sys.stderr
    except (AttributeError, OSError):
        # None of the system's.
        return stream, None
    pipe = _Pipe(number, "w", closefd=False)
    raw = io.BufferedWriter(pipe)
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines), pipe


def run() -> None:
    """The console script."""
    (sys.stdout, pipe), (sys.stderr, _) = _open(sys.stdout), _open(sys.stderr)
    code = main()
    sys.stdout.flush()
    if pipe is not None and pipe.failure is not None:
        _say(f"The output cannot be written: {pipe.failure.strerror}. Free space or send it elsewhere.")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    run()
