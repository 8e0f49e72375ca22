"""`python -m federation.check` and `federate check`: see tools/check.py."""

from typing import Annotated

from typer import Argument

from federation.launch.command_line import options, run_script

Option = options()


def check(
    task: Annotated[str, Argument(metavar="SCRIPT", show_default=False)],
    data: Annotated[str, Option(metavar="DIR", help="its data (default: the script's own choice)")] = "",
) -> int:
    """Check whether a script can be federated.

    SCRIPT is my_script, package.my_script or my_script.py. It is imported, tried on a few of its samples, and what
    would go wrong is listed. Exit status: 0 if it can be federated, with or without warnings, 1 if it cannot.

    \b
    federate check my_script --data DIR
    """
    from federation.tools.check import check_script  # here, so that --help need not wait for Flower

    return check_script(task, data)


if __name__ == "__main__":
    run_script(check)
