"""The files of a task: whatever it imports from beside it is found, wherever it does so, and nothing else."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from federation.app.layout import SCRIPTS
from federation.app.sources import compared, digests, sources, unresolved
from tests.conftest import ROOT

Make = Callable[..., ModuleType]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that writes files, and imports the first of them."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(**files: str) -> ModuleType:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        return import_module(next(iter(files)).replace("__", "."))

    yield make
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_imports_are_found_wherever_they_stand(make: Make) -> None:
    task = make(
        a_task="import json, at_top\ndef train():\n    import in_function\n    from parts.deep import thing, other\n",
        at_top="try:\n    import optional\nexcept ImportError:\n    pass\n",
        in_function="class A:\n    def f(self):\n        import importlib; importlib.import_module('by_name')\n",
        by_name="", optional="", unused="",
        parts__deep__thing="from .. import sibling", parts__sibling="", parts__unused="", parts__deep__init="",
    )  # fmt: skip
    assert list(sources(task)) == [
        "a_task.py", "at_top.py", "by_name.py", "in_function.py", "optional.py", "parts/deep/thing.py",
        "parts/sibling.py",
    ]  # fmt: skip


def test_packages_are_found_with_what_runs_when_they_are_imported(make: Make, tmp_path: Path) -> None:
    for folder in ("mine", "mine/nets"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    task = make(mine__a_task="from .nets import small\nfrom . import tools as t", mine__nets__small="", mine__tools="")
    assert list(sources(task)) == [
        "mine/__init__.py", "mine/a_task.py", "mine/nets/__init__.py", "mine/nets/small.py", "mine/tools.py",
    ]  # fmt: skip


def test_modules_that_only_running_has_shown_are_added(make: Make) -> None:
    task = make(a_task="import importlib\nimportlib.import_module('by' + '_name')", by_name="import other", other="")
    assert list(sources(task)) == ["a_task.py"]
    assert list(sources(task, ["by_name", "json", "numpy"])) == ["a_task.py", "by_name.py", "other.py"]


def test_a_copy_of_a_script_of_the_project_brings_the_module_that_stays_beside_the_original(make: Make) -> None:
    task = make(my_cifar=(ROOT / "cifar.py").read_text("utf-8"))
    assert sources(task) == {"cifar_data.py": ROOT / "cifar_data.py", "my_cifar.py": Path(str(task.__file__))}
    assert list(unresolved(task)) == []


def test_a_module_beside_the_task_comes_before_one_of_the_project(make: Make, tmp_path: Path) -> None:
    task = make(a_task="def f(): import cifar_data")
    (tmp_path / "cifar_data.py").touch()
    assert sources(task)["cifar_data.py"] == tmp_path / "cifar_data.py"


def test_an_installed_task_has_no_files_to_send_but_one_to_compare() -> None:
    import flwr

    assert sources(flwr) == {} and list(compared(flwr)) == ["flwr/__init__.py"]


def test_files_are_compared_as_python_would_import_them(make: Make, tmp_path: Path) -> None:
    task = make(a_task="import helper", helper="WIDTH = 16")
    names = list(compared(task))
    ours = digests([*names, "gone.py"])
    assert len(set(ours)) == 3 and ours[2] == ""
    (tmp_path / "helper.py").write_text("WIDTH = 17")
    assert [one == other for one, other in zip(digests(names), ours, strict=False)] == [True, False]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "def f(name):\n    __import__(name)",
            ["a_task.py, line 2: which module this imports is only known at"],
        ),
        ("def f():\n    import not_there.deep", ["a_task.py, line 2: not_there.deep is not installed here"]),
        ("try:\n    import not_there\nexcept ImportError: pass", []),
        ("import json, numpy as np, zipimport, sys\nfrom torch.nn import Linear\nimport a_namespace.inner", []),
    ],
)
def test_imports_that_clients_cannot_follow_are_named(make: Make, source: str, said: list[str], tmp_path: Path) -> None:
    found = list(unresolved(make(a_task=source, a_namespace__inner="")))
    assert len(found) == len(said) and all(map(str.startswith, found, said))


def test_a_module_from_another_folder_is_named(
    make: Make, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "library_of_mine.py").write_text("")
    monkeypatch.syspath_prepend(other)
    (found,) = unresolved(make(a_task="import library_of_mine"))
    assert f"is at {other / 'library_of_mine.py'} and is not sent to clients; move it next to the task" in found


def test_a_helper_that_is_no_python_is_named_with_its_line(make: Make) -> None:
    task = make(a_task="def f():\n    import broken", broken="x = 1\ndef (")
    with pytest.raises(ValueError, match=r"broken\.py, line 2, is not valid Python"):
        sources(task)


def test_a_module_of_the_project_is_sent_unless_one_beside_the_task_has_its_name(make: Make, tmp_path: Path) -> None:
    task = make(a_task="from cifar import Net\nimport client, federation.app.config")
    found = sources(task)
    assert set(found) - {path.name for path in SCRIPTS.glob("cifar*.py")} == {"a_task.py"}
    assert found["cifar.py"] == SCRIPTS / "cifar.py" and set(compared(task)) == set(found)
    assert list(unresolved(task)) == []
    (tmp_path / "cifar.py").write_text("def Net(): ...")
    assert sources(task) == {"a_task.py": tmp_path / "a_task.py", "cifar.py": tmp_path / "cifar.py"}
