"""Export a saved model to ONNX, and check it: onnxruntime has to compute what the framework computes."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from federation.app import samples, weights
from federation.app.console import one_line
from federation.app.run_folder import write_atomically
from federation.app.task import find_data, read_data
from federation.inference.images import class_names
from federation.inference.outputs import call, run_watched
from federation.inference.saved_model import SavedModel, about, load_model, read_record

CHECKED = 64  # samples
TOLERANCE = 1e-4  # of outputs, relative to the largest; float32 in another order of operations causes up to 1e-5
PACKAGES = {weights.Torch.model: ("onnx", "onnxscript"), weights.Keras.model: ("onnx", "tf2onnx")}
Values = NDArray[Any]


class Reference(NamedTuple):
    """What a model was called with, a batch of each input, and what it returned."""

    inputs: list[Values]
    output: Values


def export(path: Path, data: str, task: str, to: Path) -> int:
    """Write the ONNX file `to`, unless it computes something else than the model; return the exit status."""
    record = read_record(path, task)
    root = data or record.data
    model = load_model(path, record, len(class_names(root)))
    exporter = exporter_of(model)
    print(about(model))
    test = read_data(model.task, find_data(model.task, root))[1]
    few = samples.take(test, np.arange(min(CHECKED, samples.count(test))))
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, lambda unfinished: check(unfinished, exporter(model, few, unfinished)))
    print(f"saved {to}, {to.stat().st_size:,} bytes")
    return 0


def exporter_of(model: SavedModel) -> Callable[[SavedModel, Any, Path], Reference]:
    """Return what exports a model. Raises ValueError where nothing does, or where a package is missing."""
    kind, name = weights.framework(model.net).model, model.record.task
    if kind == weights.Flax.model:
        raise ValueError(f"{name} is a Flax model, and neither JAX nor Flax can export ONNX")
    if kind == weights.Arrays.model:
        raise ValueError(f"{name} is a dictionary of arrays, and has no computation of its own that could be exported")
    for package in ("onnxruntime", *PACKAGES[kind]):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ValueError(f"{package} is not installed; install it by: pip install '.[onnx]'") from None
    return export_torch if kind == weights.Torch.model else export_keras


def export_torch(model: SavedModel, few: Any, to: Path) -> Reference:
    """Export a torch.nn.Module with what test() calls it with, as a batch of any size."""
    torch = sys.modules["torch"]
    calls: list[tuple[Any, ...]] = []
    run_watched(model.task, model.net.cpu(), few, lambda _, *call: calls.append(call))
    args, kwargs, output = calls[0] if calls else ((), {}, None)
    if not args or kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        raise ValueError(
            f"{model.record.task}.test() should call the net with tensors by position; ONNX takes no other"
        )
    inputs = tuple(arg.detach().cpu() for arg in args)
    batches = tuple(torch.cat([arg, arg]) for arg in inputs)  # a batch of one would be exported as just that
    try:
        program = torch.onnx.export(
            model.net.cpu().eval(), batches, dynamo=True, verbose=False,
            dynamic_shapes=[{0: torch.export.Dim("batch")} for _ in batches],
        )  # fmt: skip
        program.save(to, external_data=False)
    except Exception as error:  # of many kinds: not every operation can be exported
        raise ValueError(f"PyTorch cannot export {model.record.task}: {one_line(error)[:300]}") from None
    scores = getattr(output, "logits", output)
    return Reference([arg.numpy() for arg in inputs], scores.detach().cpu().numpy())


def export_keras(model: SavedModel, few: Any, to: Path) -> Reference:
    """Export a Keras model by its own export()."""
    if not samples.is_arrays(few):
        raise ValueError(f"{model.record.task}: a Keras model is exported with arrays from load_data(), not a data set")
    output = call(model.net, few[0])  # Keras exports no model that has never been called
    try:
        model.net.export(to, format="onnx", verbose=False)
    except Exception as error:  # likewise
        raise ValueError(f"Keras cannot export {model.record.task}: {one_line(error)[:300]}") from None
    return Reference([np.asarray(few[0])], output)


def check(file: Path, reference: Reference) -> None:
    """Raise ValueError unless onnxruntime computes the same outputs, for one sample and for a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    count = len(reference.output)
    try:
        apart = max(_difference(session, reference, size) for size in (1, count))
    except Exception as error:  # of onnxruntime's own kinds
        raise ValueError(f"onnxruntime cannot run the exported model: {one_line(error)[:300]}") from None
    limit = TOLERANCE * max(1.0, float(np.abs(reference.output).max()))
    if not apart <= limit:
        raise ValueError(f"the exported model computes something else: outputs differ by up to {apart:.2g}, which is "
                         f"more than {limit:.2g}; nothing is kept")  # fmt: skip
    inputs, outputs = ([_described(one) for one in side] for side in (session.get_inputs(), session.get_outputs()))
    print(f"input {', '.join(inputs)}; output {', '.join(outputs)}")
    print(f"onnxruntime on {count} samples: outputs differ by up to {apart:.2g} (accepted: {limit:.2g})")


def _difference(session: Any, reference: Reference, size: int) -> float:
    """Return the largest difference between an output of both for the first `size` samples."""
    names = (one.name for one in session.get_inputs())
    kinds = (np.dtype(_numpy_type(one.type)) for one in session.get_inputs())
    fed = {
        name: value[:size].astype(kind, copy=False)
        for name, kind, value in zip(names, kinds, reference.inputs, strict=True)
    }
    found = session.run(None, fed)[0]
    return float(np.abs(found - reference.output[:size]).max())


def _numpy_type(kind: str) -> str:
    """Return NumPy's name for a type such as "tensor(float)"."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _described(one: Any) -> str:
    return f"{one.name}: {_numpy_type(one.type)}, " + "×".join(str(size or "batch") for size in one.shape)
