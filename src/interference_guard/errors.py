"""What the guard raises: each class is a `GuardError` and the builtin a caller would expect.

Every message says what was found, what is allowed and what to do next.
"""


class GuardError(Exception):
    """Base class of everything the guard raises on purpose."""


class ConfigError(GuardError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ShapeError(GuardError, ValueError):
    """A tensor whose shape is not the one its unit view was made for."""


class MissingDomainError(GuardError, ValueError):
    """A row, or a step, that carries no domain."""


class UnknownDomainError(GuardError, KeyError):
    """A domain that the guard does not know, or that has no anchor yet."""

    def __str__(self) -> str:
        # KeyError shows repr() of its argument, which turns a sentence into a quoted string.
        return str(self.args[0]) if self.args else ""


class UnsupportedError(GuardError, RuntimeError):
    """A model, an optimizer or an engine the guard cannot protect; raised before anything is changed."""


class HostError(GuardError, RuntimeError):
    """A trainer that lacks a seam the guard needs, for instance because its version moved it."""


class StateError(GuardError, RuntimeError):
    """A state file that is missing, damaged, or of another model."""


class StateVersionError(StateError):
    """A state file written by a version of the guard whose format this one cannot read."""


class CheckpointError(GuardError, ValueError):
    """A saved checkpoint that is incomplete, damaged, or of another architecture."""


class ReportError(GuardError, RuntimeError):
    """A report or a command that lacks something: an optional package, a readable run, a free output path."""
