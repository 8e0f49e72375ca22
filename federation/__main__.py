"""`federate`, the command that installing brings, and `python -m federation`: every command of the project."""

import sys

import click
import typer

from federation.certificates import certificates
from federation.check import check
from federation.compare import compare
from federation.export import export
from federation.launch.client_command import client
from federation.launch.command_line import WIDTH, add_command, run
from federation.launch.server_command import server
from federation.new import new
from federation.predict import predict
from federation.show import show
from federation.track import track

NAME = "federate"
ABOUT = """Federate a centralized training script, without changing a line of it.

\b
federate check my_script             can my script be federated?
federate server --task my_script     host it; start federate client in other terminals
"""


def command_line() -> click.Group:
    """Return the command line, with all commands."""
    app = typer.Typer(help=ABOUT, rich_markup_mode=None, suggest_commands=False, context_settings=WIDTH)
    for function in (server, client, new, check, compare, predict, export, show, track, certificates):
        add_command(app, function, f"{NAME} {function.__name__}")
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group), "it has several commands"
    group.params.append(click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False,
                                     callback=_show_version, help="Show the version and exit."))  # fmt: skip
    return group


def _show_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from federation.app.config import version  # here, so that other commands need not wait for it

        print(f"{NAME} {version()}")
        context.exit()


def main() -> None:
    """Run the command line of this process."""
    sys.argv[1:] = sys.argv[1:] or ["--help"]
    run(command_line(), NAME)


if __name__ == "__main__":
    main()
