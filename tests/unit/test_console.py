"""Errors in one line, whatever Flower and Ray have put around them."""

import pytest

from federation.app.console import one_line

ERROR = "no such data: a 'folder'"
RAY = f"""<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run() (pid=7)
  File "x.py", line 1
flwr.clientapp.ClientAppException:
Exception ClientAppException occurred. Message: {ERROR}'>"""


@pytest.mark.parametrize(
    "error",
    [ERROR, ERROR.replace(": ", ":\n  "), f"<class 'ValueError'>:<'{ERROR}'>", RAY, ValueError(ERROR)],
    ids=["plain", "lines", "Flower", "Ray", "exception"],
)
def test_what_is_around_an_error_is_taken_off(error: object) -> None:
    assert one_line(error) == ERROR


def test_an_error_without_a_text_is_named_by_its_type() -> None:
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt()"
