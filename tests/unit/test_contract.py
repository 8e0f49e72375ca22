"""What the parts promise one another, read off the source: a plain script, thin wrappers, no engine of our own."""

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

import cifar
from federation.app.sources import sources
from federation.app.task import build_net, client_seed, load_task
from federation.launch import host
from tests.conftest import ROOT

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
OURS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("federation/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
FRAMEWORKS = {"torch", "torchvision", "jax", "flax", "optax", "keras", "tensorflow"}
PRIVATE = re.compile(r"flwr\.(common|client|server|simulation|compat|super\w+|proto|cli)\b|flwr\.(\w+\.)*_")
DEPRECATED = {"start_server", "start_client", "start_numpy_client", "start_simulation", "run_simulation"}


def tree(name: str | Path) -> ast.Module:
    return ast.parse((ROOT / name).read_text("utf-8"))


def imports(source: ast.AST) -> Iterator[str]:
    """Yield the full name of everything that is imported, at whatever depth."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def names(source: ast.AST) -> set[str]:
    """Return all names and attributes that occur."""
    found = {node.id for node in ast.walk(source) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}


def calls(source: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(source) if isinstance(node, ast.Call)}


# --------------------------------------------------------------------------------------------------- the sources


@pytest.mark.parametrize(
    ("script", "frameworks"),
    [
        ("cifar.py", {"torch"}),
        ("cifar_data.py", {"torch", "torchvision"}),
        ("examples/mnist_jax.py", {"jax", "flax", "optax"}),
        ("examples/cifar_keras.py", {"keras"}),
    ],
)
def test_a_script_knows_nothing_of_flower_or_of_this_project(script: str, frameworks: set[str]) -> None:
    ours = {"cifar", "client", "server", "federation", "benchmarks", "tests", "examples"}
    roots = {name.split(".")[0] for name in imports(tree(script))}
    assert roots & (ours | {"flwr", "flwr_datasets", ""}) == set()
    assert roots & FRAMEWORKS == frameworks
    assert "flwr" not in (ROOT / script).read_text("utf-8").lower()
    assert not {"__import__", "import_module"} & names(tree(script))


@pytest.mark.parametrize("name", ["client.py", "server.py"])
def test_the_wrappers_have_no_training_loop(name: str) -> None:
    assert not {"backward", "step", "zero_grad", "cross_entropy", "optim"} & names(tree(name))
    assert {root.split(".")[0] for root in imports(tree(name))} & (FRAMEWORKS | {"cifar"}) == set()


@pytest.mark.parametrize("name", ["client.py", "server.py"])
def test_what_runs_in_flowers_processes_imports_no_launcher(name: str) -> None:
    top = [node for node in tree(name).body if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = {root for root in imports(ast.Module(top, [])) if root.startswith("federation")}
    assert ours and all(root.startswith("federation.app") for root in ours), ours


def test_the_client_calls_the_task() -> None:
    functions = {node.name: calls(node) for node in tree("client.py").body if isinstance(node, ast.FunctionDef)}
    assert {"job.task.train", "job.global_model"} <= functions["train"] and "job.task.test" not in functions["train"]
    assert {"job.task.test", "job.global_model"} <= functions["evaluate"] and "job.task.train" not in functions[
        "evaluate"
    ]


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_deprecated_or_private_of_flower_is_used(path: Path) -> None:
    source = tree(path)
    assert [name for name in imports(source) if PRIVATE.match(name)] == []
    assert not DEPRECATED & (names(source) | {name.split(".")[-1] for name in imports(source)})


@pytest.mark.parametrize(
    "line",
    ["from flwr.common import Message", "import flwr.server", "from flwr import client", "from flwr.app._x import y"],
)
def test_the_scan_finds_what_it_looks_for(line: str) -> None:
    assert [name for name in imports(ast.parse(f"def f():\n    {line}")) if PRIVATE.match(name)] != []


@pytest.mark.parametrize("line", ["from flwr.clientapp import ClientApp", "from flwr.serverapp.strategy import FedAvg"])
def test_the_scan_lets_the_public_names_pass(line: str) -> None:
    assert [name for name in imports(ast.parse(line)) if PRIVATE.match(name)] == []


def test_clients_get_the_app_and_the_task_with_what_it_imports_and_nothing_else(tmp_path: Path) -> None:
    ours = {path.stem for path in ROOT.glob("*.py")} | {"federation", "benchmarks", "tests", "examples"}
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]  # as in a process that has not yet imported anything of the project
        files = sources(load_task("benchmarks.niid_task"))
        host.bundle(tmp_path, {name: str(path) for name, path in files.items()})
    bundled = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    app = {"pyproject.toml", "client.py", "server.py"}
    app |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("federation/app/**/*.py")} | {
        "federation/__init__.py"
    }
    assert bundled == app | {"benchmarks/niid_task.py", "cifar.py", "cifar_data.py"}
    assert PYPROJECT["tool"]["flwr"]["app"]["fab-include"] == ["**/*.py"], "as flwr run has it: whatever is not ignored"
    components = PYPROJECT["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "server:app", "clientapp": "client:app"}


def test_the_lock_file_has_a_version_for_each_requirement_and_names_no_registry() -> None:
    lock = tomllib.loads((ROOT / "poetry.lock").read_text("utf-8"))
    locked = {package["name"]: package["version"] for package in lock["package"]}
    extras = PYPROJECT["project"]["optional-dependencies"]
    for line in [*PYPROJECT["project"]["dependencies"], *itertools.chain(*extras.values())]:
        required = Requirement(line)
        assert locked[required.name] in required.specifier
    assert set(lock["extras"]) == set(extras)
    assert not any("source" in package for package in lock["package"])


def test_requirements_agree_with_pyproject() -> None:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert sorted(required) == sorted(PYPROJECT["project"]["dependencies"])


def test_a_server_without_the_framework_requires_the_same_but_for_what_reads_data() -> None:
    lines = (ROOT / "requirements-server.txt").read_text("utf-8").splitlines()
    required = {line for line in lines if not line.startswith("#")}
    everything = {line.replace("[simulation]", "") for line in PYPROJECT["project"]["dependencies"]}
    assert required <= everything
    assert {Requirement(line).name for line in everything - required} == {
        "torch", "torchvision", "flwr-datasets", "pillow",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- tasks

COMPLETE = {
    "Net": "class Net: pass",
    "load_data": "def load_data(root): pass",
    "train": "def train(net, data, *, epochs, lr, batch_size, seed, momentum=0.9): pass",
    "test": "def test(net, data): pass",
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes a module, and returns its name; it can be imported for this test."""
    monkeypatch.syspath_prepend(tmp_path)
    module = f"task_{tmp_path.name}".replace("-", "_")

    def write(source: str) -> str:
        (tmp_path / f"{module}.py").write_text(source)
        return module

    return write


def test_cifar_is_a_task() -> None:
    assert load_task("cifar") is cifar


def test_a_complete_module_is_a_task(write: Any) -> None:
    assert load_task(write("\n".join(COMPLETE.values()))).train.__name__ == "train"


def test_a_train_that_takes_anything_will_do(write: Any) -> None:
    load_task(write("\n".join((COMPLETE | {"train": "def train(net, data, **anything): pass"}).values())))


@pytest.mark.parametrize("missing", COMPLETE)
@pytest.mark.parametrize("instead", ["", "{} = 3"])
def test_a_missing_name_is_named_with_its_file(write: Any, missing: str, instead: str) -> None:
    name = write("\n".join((COMPLETE | {missing: instead.format(missing)}).values()))
    with pytest.raises(ValueError, match=rf"{name}\.py has no {missing}\(\)"):
        load_task(name)


@pytest.mark.parametrize(
    ("function", "arguments", "lacking"),
    [
        ("train", "net, data, *, epochs, lr, batch_size", "seed"),
        ("train", "net, data, *, epochs, rate, seed", "lr, batch_size"),
        ("train", "data, *, epochs, lr, batch_size, seed", "net"),
        ("test", "net", "data"),
        ("load_data", "", "root"),
    ],
)
def test_a_missing_argument_is_named_with_its_file(write: Any, function: str, arguments: str, lacking: str) -> None:
    name = write("\n".join((COMPLETE | {function: f"def {function}({arguments}): pass"}).values()))
    with pytest.raises(ValueError, match=rf"{name}\.py has a {function}\(\) in line \d that takes no {lacking};"):
        load_task(name)


@pytest.mark.parametrize("name", ["no_such_task", "no.such.task", "cifar.py", "./cifar.py", ".cifar", "", "a b"])
def test_a_task_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be imported") as error:
        load_task(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "source",
    ["import no_such_package", "from json import no_such_name", "def f(:", "1 / 0", "raise OSError('no disk')"],
)
def test_a_task_that_breaks_on_import_is_named(write: Any, source: str) -> None:
    name = write(source)
    with pytest.raises(ValueError, match=f"{name}.* cannot be imported") as error:
        load_task(name)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- seeds


def test_a_lone_client_shuffles_as_the_centralized_script_does() -> None:
    assert [client_seed(seed, 0, 0) for seed in (0, 7, 2**31 - 1)] == [0, 7, 2**31 - 1]
    assert [client_seed(7, 0, epochs) for epochs in range(4)] == [7, 8, 9, 10]


@given(st.integers(0, 2**30), st.integers(0, 1000), st.integers(0, 10_000))
def test_the_seed_counts_on_from_epoch_to_epoch(seed: int, partition: int, epochs: int) -> None:
    first, second = client_seed(seed, partition, epochs), client_seed(seed, partition, epochs + 1)
    assert second == (first + 1) % 2**31
    assert 0 <= first < 2**31


@given(st.integers(0, 2**31 - 1), st.integers(0, 999), st.integers(0, 999), st.integers(0, 1000), st.integers(0, 1000))
def test_no_two_clients_shuffle_alike(seed: int, one: int, other: int, epoch: int, its_epoch: int) -> None:
    if one != other:
        assert client_seed(seed, one, epoch) != client_seed(seed, other, its_epoch)


def test_the_initial_model_is_the_centralized_one_of_the_seed() -> None:
    net = build_net(cifar, 5)
    torch.manual_seed(5)
    expected = cifar.Net().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())
    other = build_net(cifar, 6).state_dict()
    assert not any(torch.equal(tensor, other[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("line", "uses_it"), [("keras = sys.modules['keras']", True), ("keras = None", False)])
def test_arrays_of_a_task_are_not_taken_for_keras(
    write: Any, line: str, uses_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare an array with a module gives an array, which is neither true nor false."""
    cleared: list[bool] = []
    utils = SimpleNamespace(clear_session=lambda free_memory: cleared.append(free_memory), set_random_seed=id)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(utils=utils))
    lines = ["import sys", "import numpy", "SCALES = numpy.ones(3)", line, *COMPLETE.values()]
    build_net(load_task(write("\n".join(lines))), 5)
    assert cleared == [uses_it]


def test_a_net_that_takes_the_seed_is_given_it(write: Any) -> None:
    task = load_task(write("\n".join((COMPLETE | {"Net": "def Net(seed): return ('net', seed)"}).values())))
    assert build_net(task, 5) == ("net", 5)
