"""A model is exported to ONNX only if onnxruntime computes the same with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from federation.app.run_folder import write_atomically
from federation.inference import export
from federation.inference.export import Reference, check, exporter_of
from federation.inference.saved_model import Record, SavedModel
from tests.tasks import TINY

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def write_product(path: Path, batch: int | str) -> None:
    """Write a model that multiplies a batch of that size by WEIGHTS."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = helper.make_tensor_value_info("x", kind, [batch, 3]), helper.make_tensor_value_info("y", kind, [batch, 2])
    weights = onnx.numpy_helper.from_array(WEIGHTS, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_the_same_outputs_are_accepted_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_product(tmp_path / "model.onnx", "batch")
    check(tmp_path / "model.onnx", Reference([X], X @ WEIGHTS))
    assert "input x: float32, batch×3; output y: float32, batch×2\nonnxruntime on 5 samples" in capsys.readouterr().out


def test_other_outputs_are_refused_and_the_file_is_not_kept(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        write_product(path, "batch")
        check(path, Reference([X], X @ WEIGHTS + np.float32(0.01)))

    with pytest.raises(ValueError, match=r"computes something else: outputs differ by up to 0\.01"):
        write_atomically(tmp_path / "model.onnx", write)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_one_size_is_refused(tmp_path: Path) -> None:
    write_product(tmp_path / "model.onnx", 5)
    with pytest.raises(ValueError, match=r"onnxruntime cannot run the exported model: .*Got: 1 Expected: 5"):
        check(tmp_path / "model.onnx", Reference([X], X @ WEIGHTS))


def model_of(net: Any) -> SavedModel:
    return SavedModel(Path("m"), Record("my_task"), SimpleNamespace(), net)  # type: ignore[arg-type]


def test_what_cannot_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="my_task is a dictionary of arrays"):
        exporter_of(model_of({"weights": np.ones(3)}))
    monkeypatch.setitem(export.PACKAGES, "torch.nn.Module", ("package_that_nobody_has",))
    with pytest.raises(ValueError, match=r"package_that_nobody_has is not installed; install it by: .*\[onnx\]"):
        exporter_of(model_of(torch.nn.Linear(1, 1)))


@pytest.mark.slow
def test_a_flax_model_is_refused() -> None:
    pytest.importorskip("flax")
    from examples.mnist_jax import Net

    with pytest.raises(ValueError, match="my_task is a Flax model, and neither JAX nor Flax can export ONNX"):
        exporter_of(model_of(Net()))


@pytest.mark.slow
def test_a_torch_model_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "exported_task.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    net = torch.nn.Linear(256, 10)
    torch.save(net.state_dict(), "model.pt")
    assert export.export(Path("model.pt"), "", "exported_task", Path("out/model.onnx")) == 0
    assert [path.name for path in Path("out").iterdir()] == ["model.onnx"]
    assert "batch×256; output" in capsys.readouterr().out
    import onnxruntime

    session, x = onnxruntime.InferenceSession("out/model.onnx"), torch.randn(3, 256)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.allclose(found, net(x).detach().numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_keras_model_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    (tmp_path / "keras_task.py").write_text(
        "import keras\nimport numpy as np\n"
        "def Net():\n    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])\n"
        "def load_data(root=None):\n    return (np.eye(4, dtype='float32'), np.arange(4) % 3), "
        "(np.ones((2, 4), 'float32'), np.arange(2))\n"
        "def train(net, data, *, epochs, lr, batch_size, seed):\n    return 0.0\n"
        "def test(net, data):\n    return 0.0, 0.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    net.save("model.keras")
    assert export.export(Path("model.keras"), "", "keras_task", Path("model.onnx")) == 0
    import onnxruntime

    session, x = onnxruntime.InferenceSession("model.onnx"), np.random.default_rng(0).normal(size=(3, 4))
    found = session.run(None, {session.get_inputs()[0].name: x.astype("float32")})[0]
    assert np.allclose(found, net.predict(x, verbose=0), atol=1e-5)
