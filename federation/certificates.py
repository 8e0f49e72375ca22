"""`python -m federation.certificates` and `federate certificates`: see security/certificates.py."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from federation.launch.command_line import misuse, options, run_script

Option = options()


def certificates(
    folder: Annotated[Path, Argument(show_default=False)],
    server: Annotated[list[str] | None, Option(metavar="HOST …", help="by which clients reach the server")] = None,
    client: Annotated[list[str] | None, Option(metavar="NAME …", help="who may join")] = None,
    days: Annotated[int, Option(metavar="N", help="how long certificates last (default: 365)")] = 365,
) -> int:
    """Make certificates for TLS, and keys for clients.

    \b
    federate certificates keys --server server.example 10.0.0.1 --client berlin paris

    This makes a certificate authority for development (keys/ca.crt, ca.key), a certificate for the server that is
    reached by these names (server.crt, server.key), and for each client a folder to be copied there (keys/berlin:
    ca.crt, client.key). Clients with a public key in keys/clients may join, now and while the server runs. Nothing but
    the server's certificate is ever made anew.
    """
    from federation.security.certificates import make_missing

    with misuse():
        for made in make_missing(folder, server or [], client or [], days):
            print(made)
    return 0


if __name__ == "__main__":
    run_script(certificates)
