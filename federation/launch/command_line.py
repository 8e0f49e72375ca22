"""Command lines: each is a function whose parameters say what its options are, behind two doors.

`python server.py` and `federate server` read the same one, with Typer. What goes wrong is one line, and status 2.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
import typer
from typer.core import TyperCommand

from federation.launch.command import run_command

FORMATS = click.Choice(["text", "json"])  # of the log, and of what is printed
WIDTH = {"max_content_width": 100}  # columns of --help, where the terminal has them


class Job(NamedTuple):
    """A command line that has been read: the name of the command, and what is to be run."""

    name: str
    work: Callable[[], int]


class Command(TyperCommand):
    """A command that is run once its line has been read: while click reads, it deals with Ctrl-C in its own way."""

    def invoke(self, ctx: click.Context) -> Job:
        return Job(ctx.command_path, partial(super().invoke, ctx))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read a line, in which an option that can be repeated may have several values, too: --client berlin paris."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, list(_repeated(args, several)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the options mean, in their groups. Typer leaves groups to its boxes."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _repeated(args: Sequence[str], options: set[str]) -> Iterator[str]:
    """Yield the words of a line, with an option before each of its values: --client a b is --client a --client b."""
    option, values = "", 0
    for word in args:
        if word.startswith("-"):
            option, values = word, 0
        elif option in options:
            if values:
                yield option
            values += 1
        yield word


def options(group: str = "Options") -> Callable[..., Any]:
    """Return what declares the options of a group in --help. Their help says what is their default."""
    return partial(typer.Option, rich_help_panel=group, show_default=False)


@contextmanager
def misuse(option: str = "", of: type[ValueError] = ValueError) -> Iterator[None]:
    """Take an error for a mistake on the command line: in the value of an option, or in all of it."""
    try:
        yield
    except of as error:
        whole = click.UsageError(str(error))
        raise click.BadParameter(str(error), param_hint=f"'{option}'") if option else whole from None


def add_command(app: typer.Typer, function: Callable[..., int], name: str) -> None:
    """Add a function to a command line. Its docstring is the help, in which its examples are given that name."""
    about = (function.__doc__ or "").replace(f"federate {function.__name__}", name)
    app.command(cls=Command, help=about, context_settings=WIDTH)(function)


def run_script(function: Callable[..., int]) -> NoReturn:
    """Run a function with what the command line of this script says."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    name, module = Path(sys.argv[0]).name, sys.modules["__main__"].__spec__
    add_command(app, function, f"python -m {module.name}" if module else f"python {name}")
    run(typer.main.get_command(app), name)


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command line to its end."""
    try:
        job = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        sys.exit(refuse(error, name))
    if isinstance(job, Job):
        run_command(partial(_run_job, job), job.name)
    sys.exit(job)  # after --help, for example


def _run_job(job: Job) -> int:
    try:
        return job.work()
    except click.UsageError as error:
        return refuse(error, job.name)


def refuse(error: click.UsageError, name: str) -> int:
    """Say in one line what is wrong with a command line; return the exit status."""
    name = error.ctx.command_path if error.ctx else name
    print(f"{name}: error: {' '.join(error.format_message().split())}", file=sys.stderr)
    return 2
