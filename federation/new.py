"""`python -m federation.new` and `federate new`: see tools/new.py."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from federation.launch.command_line import misuse, options, run_script

Option = options()


def new(
    task: Annotated[Path, Argument(metavar="TASK.py", show_default=False)],
    script: Annotated[
        Path | None, Option("--from", metavar="SCRIPT.py", help="adapt this script, in that folder")
    ] = None,
) -> int:
    """Write a script to start from.

    \b
    federate new my_task.py                    one that runs at once, with comments
    federate new my_task.py --from train.py    one that adapts a script whose model, data and loops have other names

    train.py is read, and neither run nor changed. The new file calls what is in it, and has a marked gap wherever that
    could not be told: federate check lists them. No file is overwritten.
    """
    from federation.tools.new import gaps, write_new

    with misuse():
        write_new(task, script)
    left = [f"{task}, {gap}" for gap in gaps(task)]
    print(*left, f"wrote {task}{'; fill in what is listed above' if left else ''}", sep="\n")
    print(f"next: federate check {task.stem}")
    return 0


if __name__ == "__main__":
    run_script(new)
