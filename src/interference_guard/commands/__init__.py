"""The commands, each in a file of its own; needs the extra `report` (typer, rich)."""

import typer

from .check import check
from .compare import compare
from .doctor import doctor
from .inspect import inspect
from .report import report
from .rollback import rollback

app = typer.Typer(
    name="interference-guard",
    help="See what a guarded run did, compare checkpoints, undo what harmed a domain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (inspect, report, compare, rollback, check, doctor):
    app.command()(command)

__all__ = ["app"]
