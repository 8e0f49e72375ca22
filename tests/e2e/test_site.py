"""`make docs` builds a site that needs no network, and in which every link leads somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
pytestmark = pytest.mark.slow
BUILD = "mkdocs build --strict"  # which fails where a page is in no navigation, or a link leads nowhere
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
OUTSIDE = "https:", "http:", "//"


class Elements(HTMLParser):
    """The ids in a page, where its links lead, and what a browser fetches with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.fetched += [found[FETCHED[tag]]] if FETCHED.get(tag) in found else []


@cache
def elements(page: Path) -> Elements:
    return Elements(page.read_text("utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert BUILD in (ROOT / "Makefile").read_text()
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", *BUILD.split(), "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> Iterator[Path]:
    return (page for page in site.rglob("*.html") if page.name != "404.html")  # that one is served at any address


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        assert [address for address in elements(page).fetched if address.startswith(OUTSIDE)] == [], page
        assert [text for text in re.findall(r"@import|url\(https?:", page.read_text("utf-8"))] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_every_link_leads_to_a_file_and_a_place_in_it(site: Path) -> None:
    checked = 0
    for page in pages(site):
        for link in elements(page).links + elements(page).fetched:
            address = urlsplit(link)
            if address.scheme or address.netloc or not link:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if address.fragment and target.suffix == ".html":
                assert unquote(address.fragment) in elements(target).ids, f"{page.relative_to(site)}: {link}"
            checked += 1
    assert checked > 1000


def test_the_readme_is_the_first_page_and_its_scripts_can_be_read(site: Path) -> None:
    assert {"two-commands", "run-it-in-three-terminals"} <= elements(site / "index.html").ids
    assert {"source/cifar.py.html", "results.html", "changelog.html"} <= set(elements(site / "index.html").links)
    code = re.sub("<[^>]+>", "", (site / "source" / "cifar.py.html").read_text("utf-8"))
    assert "def load_data" not in code and "class Net(nn.Module):" in code


def test_the_reference_has_the_docstrings_and_the_commands(site: Path) -> None:
    assert "federation.app.weights.read_model" in elements(site / "reference" / "models.html").ids
    commands = (site / "reference" / "commands.html").read_text("utf-8")
    assert "--simulate N" in commands and "--version" in commands


def test_what_is_written_on_a_page_can_be_found(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text("utf-8")  # a script, which a page on a disk may load
    assert "Return the mixing matrix W" in index and "class Net(nn.Module)" not in index
