"""Bring files that lie outside of docs/ into the site: the README is its first page, and scripts can be read.

A link to such a file works where the project's files are shown as they are. On the site, the same link leads to a page
that is made of the file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"^```.*?^```$|(?<=\]\()(?!\w+:|#)[^)#\s]+", re.MULTILINE | re.DOTALL)  # or code, which has none
HREF = re.compile(r'(?<=href=")(?!\w+:|#)[^"#]+')
HIDDEN_FROM_SEARCH = "---\nsearch:\n  exclude: true\n---\n"
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files, and of those to which pages link."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text("utf-8")))
    targets = {target for page in files.documentation_pages() for target in _targets(page)}
    for target in sorted(targets):
        if _uri(target).startswith("source/") and (ROOT / target).exists():
            files.append(File.generated(config, _uri(target), content=_shown(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to where the files are on the site."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        is_code = link[0].startswith("```")
        return link[0] if is_code else posixpath.relpath(_uri(_target(here, link[0])), posixpath.dirname(here) or ".")

    return markdown if here.startswith("source/") else LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a notebook do so, too, which becomes a page without being Markdown before."""

    def moved(link: re.Match[str]) -> str:
        target = files.get_file_from_path(_uri(_target(page.file.src_uri, link[0])))
        return target.url_relative_to(page.file) if target else link[0]

    return HREF.sub(moved, html) if page.file.src_uri.endswith(".ipynb") else html


def _targets(page: File) -> list[str]:
    return [_target(page.src_uri, link) for link in LINK.findall(page.content_string) if not link.startswith("```")]


def _target(uri: str, link: str) -> str:
    """Return the path, from the root of the project, to which a link in a page leads."""
    origin = {uri: source for source, uri in PAGES.items()}.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _uri(path: str) -> str:
    """Return where on the site a file of the project is."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"source/{path}.md")


def _shown(path: Path) -> str:
    """Return a page with a file, or with all files of a folder."""
    parts = [HIDDEN_FROM_SEARCH, f"# {path.relative_to(ROOT).as_posix()}\n"]
    for file in sorted(path.glob("*.*")) if path.is_dir() else [path]:
        title = f"## {file.name}\n\n" if path.is_dir() else ""
        parts.append(f"{title}~~~~~ {LANGUAGES.get(file.suffix, 'text')}\n{file.read_text('utf-8')}\n~~~~~\n")
    return "\n".join(parts)
