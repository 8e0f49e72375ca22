"""Scripts in other frameworks climb the equivalence ladder; Keras does in test_keras_ladder.py."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.e2e.test_examples import needs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        pytest.param("examples.mnist_jax", "embedded", "25 passed", marks=needs("jax")),
        pytest.param("examples.diabetes_torch", "", "22 passed, 3 skipped", marks=needs("sklearn")),
        pytest.param("examples.digits_sklearn", "", "17 passed, 8 skipped", marks=needs("sklearn")),
        pytest.param("examples.digits_lightning", "", "25 passed", marks=needs("pytorch_lightning")),
        pytest.param("examples.text_lora", "", "14 passed, 11 skipped", marks=needs("peft")),
    ],
)
def test_the_examples_climb_the_ladder(task: str, data: str, expected: str) -> None:
    said = climb(task, data)
    assert expected in said, said


def climb(task: str, data: str) -> str:
    """Let a task climb the ladder, and return what pytest says."""
    ladder = ["tests/evidence/test_ladder.py", "--task", task, "--data", data, "-q"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *ladder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        start_new_session=True,  # Linux shares the cores among sessions: this one gets as much as others do
    ).stdout
