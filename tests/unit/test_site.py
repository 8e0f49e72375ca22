"""The site has every page of docs/, and its reference names what there is, and what says what it does."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
MADE = {"index.md", "contributing.md", "changelog.md", "reference/commands.md"}  # by the hooks of the site
REFERENCE = sorted(DOCS.glob("reference/*.md"))
NAMES = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)]


def in_navigation() -> list[str]:
    _, navigation = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")
    return re.findall(r"[\w/]+\.(?:md|ipynb)", navigation)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")]
    assert sorted(in_navigation()) == sorted([*pages, *MADE])


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_the_reference_shows_no_command_that_is_not_run(page: Path) -> None:
    assert "```sh" not in page.read_text("utf-8")  # these are for the pages that test_readme.py reads


def test_the_reference_names_everything_once() -> None:
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_names_what_has_a_docstring(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found: Any = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found) or inspect.isroutine(found):
        assert found.__doc__
