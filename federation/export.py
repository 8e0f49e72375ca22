"""`python -m federation.export` and `federate export`: see inference/export.py."""

from pathlib import Path
from typing import Annotated

from federation.launch.command_line import options, run_script

Option = options()


def export(
    model: Annotated[Path, Option(metavar="FILE", help="or a run folder (default: runs/federated)")] = Path(
        "runs/federated"
    ),
    to: Annotated[Path, Option(metavar="FILE", help="(default: model.onnx)")] = Path("model.onnx"),
    data: Annotated[str, Option(metavar="DIR", help="samples to check it with (default: the data of the run)")] = "",
    task: Annotated[str, Option(metavar="MODULE", help="(default: that of the run, or cifar)")] = "",
) -> int:
    """Export a saved model to ONNX, and check it with onnxruntime.

    The file takes what the script's own test() calls the network with, in batches of any size. It is only kept if
    onnxruntime computes the same outputs for samples of the test set.

    \b
    federate export --to model.onnx
    """
    from federation.inference.export import export as run  # here, so that --help need not wait for Flower
    from federation.inference.saved_model import find_model

    return run(find_model(model), data, task, to)


if __name__ == "__main__":
    run_script(export)
