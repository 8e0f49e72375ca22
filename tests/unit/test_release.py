"""One version, in one place; a changelog in the format of Keep a Changelog, whose newest release is that version."""

import re
from datetime import date
from itertools import pairwise

import pytest
from click.testing import CliRunner

from federation.__main__ import NAME, command_line
from federation.app.config import version
from tests.conftest import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
SECTIONS = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
RELEASE = re.compile(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})( \[YANKED\])?")


def releases() -> list[tuple[tuple[int, ...], date]]:
    """Return the version and the day of each release, as they stand in the changelog: the newest first."""
    matches = [RELEASE.fullmatch(section.splitlines()[0]) for section in SECTIONS[1:]]
    assert all(matches), [section.splitlines()[0] for section in SECTIONS]
    return [(tuple(map(int, found.groups()[:3])), date.fromisoformat(found[4])) for found in matches if found]


def test_the_command_prints_the_version() -> None:
    result = CliRunner().invoke(command_line(), ["--version"])
    assert (result.exit_code, result.output) == (0, f"{NAME} {version()}\n")


def test_the_version_stands_in_no_other_file() -> None:
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Dockerfile", "compose.yaml", "mkdocs.yml")]
    files += [*ROOT.glob("*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("federation/**/*.py")]
    repeated = re.compile(rf"(?<![\d.]){re.escape(version())}(?![\d.])")
    assert [path.name for path in files if repeated.search(path.read_text("utf-8"))] == []


def test_the_changelog_begins_with_what_is_unreleased_and_then_this_version() -> None:
    assert CHANGELOG.startswith("# Changelog\n\nThe format is that of [Keep a Changelog](https://keepachangelog.com/")
    assert SECTIONS[0].startswith("[Unreleased]\n")
    assert ".".join(map(str, releases()[0][0])) == version()


def test_releases_follow_each_other() -> None:
    for (newer, day), (older, day_before) in pairwise(releases()):
        assert newer > older and day >= day_before


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split()[0])
def test_changes_are_grouped_by_their_kind(section: str) -> None:
    heading, *groups = re.split(r"^### ", section, flags=re.MULTILINE)
    kinds = [group.splitlines()[0] for group in groups]
    assert "\n" not in heading.strip(), "every change belongs to a kind"
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert all(re.match(r"\w+\n\n- ", group) for group in groups)
