"""`python -m federation.track` and `federate track`: see tracking/follow.py."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from federation.launch.command_line import misuse, options, run_script

Option = options()


def track(
    folder: Annotated[Path, Argument(show_default=False)],
    tracking: Annotated[str, Option(metavar="NAMES", help="tensorboard, mlflow, wandb, or several of them")],
) -> int:
    """Send a run to trackers.

    \b
    federate track runs/federated --tracking tensorboard

    This is for a run that was not tracked, and for one that a tracker has only in part. Nothing is sent twice.
    """
    from federation.app.run_folder import METRICS, lock_run_folder
    from federation.app.tracking import check_installed, split_names
    from federation.tracking.follow import send

    with misuse("--tracking"):
        names = split_names(tracking)
        check_installed(names)
    if not (folder / METRICS).is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no metrics.json")
    with lock_run_folder(folder):
        return 0 if send(folder.absolute(), names, print) else 1


if __name__ == "__main__":
    run_script(track)
