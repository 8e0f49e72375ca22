"""`federate show` and `python -m federation.show`: the page of runs that have finished, or go on."""

from pathlib import Path
from typing import Annotated

import click
from typer import Argument

from federation.launch.command_line import misuse, options, run_script

Option = options()


def show(
    folders: Annotated[list[Path], Argument(metavar="FOLDER …", show_default=False)],
    page: Annotated[str | None, Option(metavar="HOST:PORT", help="where (default: 127.0.0.1:8081)")] = None,
    tls: Annotated[str | None, Option(metavar="DIR", help="the folder of server.crt, server.key, …")] = None,
) -> int:
    """Show runs in a browser, from their run folders, until Ctrl-C.

    \b
    federate show runs/federated
    federate show runs/*              several, side by side
    """
    from federation.launch.page import DEFAULT, PageServer, read_address
    from federation.page.folder import is_run
    from federation.security.certificates import server_folder

    with misuse("--tls"):
        keys = None if tls is None else server_folder(tls)
    with misuse("--page"):
        where = read_address(page or DEFAULT, keys is not None)
        if where is None:
            raise ValueError("off leaves nothing to do; leave it out, or give HOST:PORT")
    runs = [folder for folder in folders if is_run(folder)]
    for folder in folders:
        if folder not in runs:
            print(f"skipped {folder}: it has no metrics.json", flush=True)
    if not runs:
        raise click.UsageError(f"{', '.join(map(str, folders))}: no run folder, which has a metrics.json")
    return PageServer(where, runs, keys).wait()


if __name__ == "__main__":
    run_script(show)
