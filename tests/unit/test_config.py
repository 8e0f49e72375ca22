"""The run config: its syntax, its types and limits, and pyproject.toml as the one source of its defaults."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.app.config import defaults, limits, parse, validate
from tests.conftest import ROOT

KEYS = st.from_regex(r"[a-z][a-z-]{0,15}", fullmatch=True)
TEXTS = st.text(st.sampled_from("abcXYZ019 =/.-_é#,[]"), max_size=20).filter(lambda text: "\\" not in text)
NUMBERS = st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
VALUES = st.one_of(NUMBERS, TEXTS)


def written(value: Any) -> str:
    """Write a value as one types it on the command line."""
    return f'"{value}"' if isinstance(value, str) else json.dumps(value)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_pairs_are_read_back_with_value_and_type(config: dict[str, Any]) -> None:
    read = parse(" ".join(f"{key}={written(value)}" for key, value in config.items()))
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("seed=5", {"seed": 5}),
        ("  seed=5   batch-size=16 ", {"seed": 5, "batch-size": 16}),
        ("seed=5\nbatch-size=16", {"seed": 5, "batch-size": 16}),
        ("learning-rate=1e-3", {"learning-rate": 0.001}),
        ("learning-rate=.5", None),  # no number of TOML
        ("verbose=true", {"verbose": True}),
        ('data="a folder = mine"', {"data": "a folder = mine"}),
        ("data='C:\\images'", {"data": "C:\\images"}),
        ("out='a b' task=\"c\"", {"out": "a b", "task": "c"}),
        ('data=""', {"data": ""}),
    ],
)
def test_examples(text: str, expected: dict[str, Any] | None) -> None:
    if expected is not None:
        assert parse(text) == expected
        return
    with pytest.raises(ValueError, match="not of the form key=value"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "seed", "seed 5", "seed = 5", "seed=", "=5", "seed=five", "seed=5,batch-size=6", "seed=5 rounds", "--rounds 5",
        "seed==5", 'data="a', 'data="a" b"', 'data="a"b', "data=a b", "data=it's", "seed=5 seed=6", "seed=0x", "a=b=c",
    ],
)  # fmt: skip
def test_garbage_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="not of the form key=value") as error:
        parse(text)
    assert repr(text) in str(error.value)


@given(st.text(max_size=30).filter(lambda text: not text.endswith(".toml")))
def test_any_text_is_read_or_refused_with_a_value_error(text: str) -> None:
    try:
        read = parse(text)
    except ValueError as error:
        assert str(error).startswith("run config ")
    else:
        assert isinstance(read, dict)


def test_a_toml_file(tmp_path: Path) -> None:
    (tmp_path / "my run.toml").write_text('seed = 5\nlearning-rate = 0.05\ndata = "a = b"  # mine\n', "utf-8")
    assert parse(str(tmp_path / "my run.toml")) == {"seed": 5, "learning-rate": 0.05, "data": "a = b"}


def test_a_toml_file_that_is_missing_or_garbage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: No such file"):
        parse(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("seed 5")
    with pytest.raises(ValueError, match=r"bad\.toml"):
        parse(str(tmp_path / "bad.toml"))


def test_defaults_are_the_table_in_pyproject() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    assert defaults() == table
    assert validate({}).values() == table
    assert table["task"] == "cifar" and table["num-server-rounds"] == 3 and table["num-clients"] == 2


def test_settings_do_not_change() -> None:
    config = validate({"seed": 5})
    with pytest.raises(ValueError, match="frozen"):
        config.task = "changed"
    assert (config.changed(task="another").task, config.task, defaults()["seed"]) == ("another", "cifar", 0)


def test_defaults_are_allowed_themselves() -> None:
    assert validate(defaults()).values() == defaults()


NUMBERS = [key for key, value in defaults().items() if type(value) in (int, float)]
CHOICES = {"topology": ["star", "ring", "random", "full"], "learning-rate-schedule": ["constant", "step", "cosine"],
           "partitioner": ["iid", "dirichlet", "inner-dirichlet", "pathological", "shards", "size-skewed", "linear",
                           "square", "exponential", "by-column", "grouped-natural-id"]}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_limits(key: str) -> None:
    low, high = limits(key)
    kind = type(defaults()[key])
    for value in (kind(low), kind(high)):
        enough = {"num-clients": value or 1} if key in ("min-clients", "clients-per-round") else {}
        enough |= {"dp": "server-fixed"} if key == "dp-target-epsilon" else {}
        assert validate({key: value} | enough).values()[key] == value
    for value in (kind(low) - 1, kind(high) + 1):
        with pytest.raises(ValueError, match=f"{key}=.* is out of range: .* is allowed") as error:
            validate({key: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("key", "lowest", "highest"),
    [
        ("alpha", 1e-3, 1e6), ("min-partition-size", 1, 10**9), ("labels-per-client", 1, 10**9),
        ("shards-per-client", 1, 10**9),
    ],
)  # fmt: skip
def test_limits_of_the_partitioners(key: str, lowest: float, highest: float) -> None:
    assert limits(key) == (lowest, highest)
    for value in (0 * lowest, -lowest, lowest - 1e-4 if key == "alpha" else 0):
        with pytest.raises(ValueError, match=f"{key}=.* is out of range: {lowest:g} to"):
            validate({key: value})


@pytest.mark.parametrize("key", ["learning-rate", "alpha", "fraction-train", "dp-clipping-norm", "top-k"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_is_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key}=.* is out of range"):
        validate({key: value})


@pytest.mark.parametrize(("least", "clients"), [(3, 2), (2, 1), (100_000, 99_999)])
def test_no_more_clients_can_be_needed_than_are_waited_for(least: int, clients: int) -> None:
    assert validate({"min-clients": clients, "num-clients": clients}).min_clients == clients
    with pytest.raises(ValueError, match=f"^run config min-clients={least} is more than num-clients={clients}$"):
        validate({"min-clients": least, "num-clients": clients})


def test_choices_are_allowed_and_the_default_is_one() -> None:
    for key, choices in CHOICES.items():
        assert defaults()[key] in choices
        assert [
            validate({"learning-rate": 0.1, "num-clients": 4, key: choice}).values()[key] for choice in choices
        ] == choices


@pytest.mark.parametrize("value", ["foo", "", "IID", "iid ", "dirichlet,shards"])
def test_what_is_no_choice_is_refused_with_all_that_there_are(value: str) -> None:
    with pytest.raises(ValueError, match="none of") as error:
        validate({"partitioner": value})
    allowed = ", ".join(CHOICES["partitioner"])
    assert str(error.value) == f"run config partitioner={value!r} is none of: {allowed}"


def test_an_unknown_key_is_named_with_the_keys_that_there_are() -> None:
    with pytest.raises(ValueError, match="no key 'rounds'") as error:
        validate({"rounds": 5})
    assert "num-server-rounds" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("num-server-rounds", True, "int"),
        ("num-server-rounds", 3.0, "int"),
        ("num-server-rounds", "3", "int"),
        ("learning-rate", "0.1", "float"),
        ("learning-rate", True, "float"),
        ("task", 3, "str"),
        ("data", False, "str"),
        ("seed", [1], "int"),
        ("seed", {"a": 1}, "int"),
        ("seed", None, "int"),
        ("resume", 1, "bool"),
        ("resume", 0.0, "bool"),
        ("resume", "true", "bool"),
        ("partitioner", 1, "str"),
        ("alpha", "0.5", "float"),
        ("alpha", True, "float"),
        ("labels-per-client", 2.0, "int"),
    ],
)
def test_a_wrong_type_is_refused(key: str, value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=.* should be of type {kind}") as error:
        validate({key: value})
    assert repr(value) in str(error.value)


def test_a_switch_is_true_or_false() -> None:
    assert defaults()["resume"] is False
    assert validate(parse("resume=true")).resume is True and validate(parse("resume=false")).resume is False


@given(st.integers(0, 10**6))
def test_an_int_will_do_for_a_float(value: int) -> None:
    rate = validate({"learning-rate": value}).learning_rate
    assert type(rate) is float and rate == value
