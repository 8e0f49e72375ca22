"""`federate`, the command that installing brings, and `python -m federation`: every command of the project."""

import sys

import typer

from federation.certificates import certificates
from federation.check import check
from federation.compare import compare
from federation.launch.client_command import client
from federation.launch.command_line import WIDTH, add_command, run
from federation.launch.server_command import server
from federation.new import new
from federation.show import show

NAME = "federate"
ABOUT = """Federate a centralized training script, without changing a line of it.

\b
federate check my_script             can my script be federated?
federate server --task my_script     host it; start federate client in other terminals
"""


def main() -> None:
    """Run the command line of this process."""
    app = typer.Typer(help=ABOUT, rich_markup_mode=None, suggest_commands=False, context_settings=WIDTH)
    for function in (server, client, new, check, compare, show, certificates):
        add_command(app, function, f"{NAME} {function.__name__}")
    sys.argv[1:] = sys.argv[1:] or ["--help"]
    run(typer.main.get_command(app), NAME)


if __name__ == "__main__":
    main()
