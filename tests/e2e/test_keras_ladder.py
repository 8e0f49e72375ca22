"""Keras climbs the equivalence ladder. It takes minutes, so this file is apart: files are what workers share."""

import pytest

from tests.e2e.test_examples import needs
from tests.e2e.test_examples_ladder import climb


@pytest.mark.slow
@needs("keras")
def test_keras_climbs_the_ladder() -> None:
    said = climb("examples.cifar_keras", "embedded")
    assert "17 passed, 8 skipped" in said, said
