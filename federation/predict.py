"""`python -m federation.predict` and `federate predict`: see inference/predict.py."""

from pathlib import Path
from typing import Annotated

from federation.launch.command_line import options, run_script

Option = options()


def predict(
    model: Annotated[Path, Option(metavar="FILE", help="or a run folder (default: runs/federated)")] = Path(
        "runs/federated"
    ),
    data: Annotated[
        str, Option(metavar="DIR", help="images, or what the script reads (default: that of the run)")
    ] = "",
    task: Annotated[str, Option(metavar="MODULE", help="(default: that of the run, or cifar)")] = "",
    classes: Annotated[str, Option(metavar="NAME,…", help="of all classes (default: the folders of the data)")] = "",
    out: Annotated[
        Path, Option(metavar="DIR", help="for predictions.csv and confusion.png (default: runs/predict)")
    ] = Path("runs/predict"),
) -> int:
    """Predict the classes of images or other samples with a saved model.

    Images may lie in DIR/test/<class>/, in DIR/<class>/ or, without labels, in DIR. They are read and prepared by the
    script's own load_data() and test(). Of a run, metrics.json beside the model says which script that is.

    \b
    federate predict --data DIR
    federate predict --model final_model.pt --task my_script --data photo.jpg
    """
    from federation.inference.predict import predict as run  # here, so that --help need not wait for Flower
    from federation.inference.saved_model import find_model

    return run(find_model(model), data, task, [name.strip() for name in classes.split(",") if name.strip()], out)


if __name__ == "__main__":
    run_script(predict)
